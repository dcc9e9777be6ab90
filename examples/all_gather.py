"""Copies one busy chunk to every rank and moves nothing else: ``mpirun -n 2 python examples/all_gather.py``"""

import torch

import sparsecoll as sc

with sc.init_group() as group:
    everyone = range(group.world_size)
    place = sc.Placement.even(num_chunks=4, world_size=group.world_size).replicate({3: everyone})
    owned = torch.tensor(place.owned_by(group.rank))
    shard = 10 * owned[:, None] + torch.arange(3)  # a row for each chunk; its first digit tells which
    held = sc.sparse_all_gather(shard, place)
    moved_bytes = group.stats().sent_bytes
    print(f"rank {group.rank} owns chunks {owned.tolist()}, sent {moved_bytes} bytes, holds rows {held.tolist()}")
