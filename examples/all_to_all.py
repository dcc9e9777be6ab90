"""Sends each rank as many tokens as it is to get: ``mpirun -n 2 python examples/all_to_all.py``"""

import torch

import sparsecoll as sc

with sc.init_group() as group:
    counts = [dst + 1 for dst in range(group.world_size)]  # one token to rank 0, two to rank 1, and so on
    tokens = torch.full((sum(counts), 2), float(group.rank))  # a token is its sender's rank, twice
    received = sc.all_to_all(tokens, counts)
    print(f"rank {group.rank} sent {counts} tokens, received from ranks {received[:, 0].int().tolist()}")
