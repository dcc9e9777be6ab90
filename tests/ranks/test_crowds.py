"""Reduce-scatters in which many ranks contribute to what one owns: the same bits, from little staging memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sparsecoll as sc
from sparsecoll.executor import windowed
from sparsecoll.native import accumulation_itemsize

MANY = 9


def place_of(world_size: int) -> sc.Placement:
    """Rank 0 owns three chunks that all hold, and one that nobody else does; the others own one each, held by some."""
    owners = [0, 0, 0, 0, *range(1, world_size)]
    everyone = range(world_size)
    return sc.Placement.of_owners(owners, world_size).replicate(
        {0: everyone, 2: everyone, 3: everyone, 5: [0, 4, 7], 7: [1, 2, 3, 4, 5, 6, 8]}
    )


def rows_of(place: sc.Placement, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    held = len(place.held_by(rank))
    draw = [torch.randn((held, *shape), generator=generator) * 100 for shape in ((3, 67), (5,))]
    first, second = (each.to(dtype) for each in draw)
    return first, second


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_bits_as_all_at_once(dtype: torch.dtype, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(MANY)

    def main(group: sc.Group) -> tuple[list[Any], int]:
        out = sc.sparse_reduce_scatter(rows_of(place, group.rank, dtype), place, op=op, group=group)
        return [each.double().numpy() for each in out], group.staging_bytes

    few_at_a_time = sc.run_local(main, MANY)
    monkeypatch.setattr(windowed, "_MOST_FOR_EACH", 1000)
    at_once = sc.run_local(main, MANY)
    for (ours, _), (theirs, _) in zip(few_at_a_time, at_once, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)
    chunk_bytes = (3 * 67 + 5) * dtype.itemsize
    width = accumulation_itemsize(str(dtype).removeprefix("torch.")) // dtype.itemsize
    assert at_once[0][1] >= 3 * (MANY - 1) * chunk_bytes
    assert few_at_a_time[0][1] <= (3 + (width if width > 1 else 0)) * chunk_bytes + 1024


def test_sums_may_take_the_place_of_contributions_while_others_are_in_flight() -> None:
    place = sc.Placement.of_owners([0, 1], MANY).replicate({0: range(MANY), 1: range(MANY)})

    def main(group: sc.Group) -> None:
        works = []
        for turn in range(4):
            held = np.full((2, 1000), turn + group.rank, np.float32)
            out = held[group.rank : group.rank + 1] if group.rank < 2 else np.empty((0, 1000), np.float32)
            works.append((sc.sparse_reduce_scatter(held, place, group=group, out=out, async_op=True), out, turn))
        for work, out, turn in works:
            work.wait()
            assert (out == sum(turn + rank for rank in range(MANY))).all()

    sc.run_local(main, MANY, timeout_s=20.0)
