"""Moving experts to other owners: what belongs to them, and checks for any back end.

Checks are ``check_<what>(group)``, called on all ranks, as in `tests.fssdp_checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparsecoll as sc
from sparsecoll.balance import NoReplicas
from sparsecoll.fssdp.layer import ShardedLayer
from sparsecoll.fssdp.reshard import move_experts
from tests.fssdp_checks import Case, Sharded

__all__ = [
    "STILL",
    "Owners",
    "Snapshot",
    "assert_same",
    "check_moves",
    "even",
    "layers_of",
    "move",
    "owners_of",
    "snapshot",
]

Owners = Sequence[int]
Snapshot = dict[str, dict[str, Any]]

# Rows of 64 bytes, so that a matrix product takes the same path wherever an expert's rows lie.
STILL = Case(num_experts=6, dim=8, hidden_dim=8, balancer=NoReplicas(), tokens=(7, 4, 9, 5))


def layers_of(run: Sharded) -> list[ShardedLayer]:
    return list(run.model._fssdp.layers.values())


def move(run: Sharded, owners: Sequence[Owners], *optimizers: torch.optim.Optimizer) -> None:
    """Moves each layer to its ``owners``; ``run.optimizer`` is the one that there is by default."""
    bases = [sc.Placement.of_owners(each, run.group.world_size) for each in owners]
    move_experts(layers_of(run), bases, optimizers or [run.optimizer], run.group)


def owners_of(case: Case, world_size: int, seed: int) -> list[Owners]:
    """Random owners of both layers; of the second, some rank owns none and, for every other seed, one owns all."""
    draw = np.random.default_rng(seed)
    first = draw.integers(world_size, size=case.num_experts)
    second = draw.choice(draw.permutation(world_size)[: max(1, world_size - 1)], size=case.num_experts)
    return [first.tolist(), [second[0].item()] * case.num_experts if seed % 2 else second.tolist()]


def even(case: Case, world_size: int) -> list[Owners]:
    return [sc.Placement.even(case.num_experts, world_size).owners.tolist()] * 2


def snapshot(run: Sharded) -> Snapshot:
    """All that belongs to the experts of this rank, by layer, expert and weight."""
    found = {}
    for layer in layers_of(run):
        experts = layer.layer.experts
        for name, weight in zip(experts.weight_names, experts.weights, strict=True):
            for row, expert in enumerate(experts.owned):
                mine = {"data": weight[row]} | ({} if weight.grad is None else {"grad": weight.grad[row]})
                for key, value in run.optimizer.state.get(weight, {}).items():
                    mine[key] = value[row] if isinstance(value, Tensor) and value.shape == weight.shape else value
                copies = {key: v.detach().clone() if isinstance(v, Tensor) else v for key, v in mine.items()}
                found[f"{layer.fqn} {expert} {name}"] = copies
    return found


def assert_same(got: Snapshot, expected: Snapshot, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert got.keys() == expected.keys()
    for place, belongings in expected.items():
        assert got[place].keys() == belongings.keys(), place
        for key, value in belongings.items():
            if not isinstance(value, Tensor):
                assert got[place][key] == value, f"{place} {key}"
                continue
            close = {"rtol": rtol, "atol": atol, "msg": lambda text, at=f"{place} {key}": f"{at}: {text}"}
            torch.testing.assert_close(got[place][key], value, **close)


def check_moves(group: sc.Group) -> None:
    """A model whose experts move after every backward trains as its twin does; steps are counted on the device."""
    still, moving = Sharded(STILL, group), Sharded(STILL, group)
    for run in (still, moving):
        run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.01, fused=True)
    for step in range(3):
        for run in (still, moving):
            run.optimizer.zero_grad()
            run.loss(step).backward()
        move(moving, owners_of(STILL, group.world_size, step))
        for run in (still, moving):
            run.optimizer.step()
    move(moving, even(STILL, group.world_size))
    assert_same(snapshot(moving), snapshot(still), rtol=1e-9, atol=1e-11)
