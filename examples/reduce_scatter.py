"""Adds up the copies of a busy chunk at its one owner: ``mpirun -n 2 python examples/reduce_scatter.py``"""

import torch

import sparsecoll as sc

with sc.init_group() as group:
    everyone = range(group.world_size)
    place = sc.Placement.even(num_chunks=4, world_size=group.world_size).replicate({3: everyone})
    held = torch.ones(len(place.held_by(group.rank)), 3)  # a gradient for each chunk that this rank has computed with
    sums = sc.sparse_reduce_scatter(held, place)
    owned, moved_bytes = place.owned_by(group.rank).tolist(), group.stats().sent_bytes
    print(f"rank {group.rank} sent {moved_bytes} bytes, owns chunks {owned} with sums {sums.tolist()}")
