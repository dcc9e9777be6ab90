"""Who gets a slot under a fixed capacity: the first of each expert, worked out without reading a tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsecoll as sc
from sparsecoll.moe import Capacity, assign_slots, sort_by_expert


@given(st.integers(0, 30), st.integers(1, 4), st.integers(4, 7), st.integers(1, 9), st.integers(0, 2**31))
def test_slots_equal_a_loop(num_tokens: int, top_k: int, num_experts: int, rows: int, seed: int) -> None:
    ids = torch.randint(num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed)) // 2
    assignments, slots, taken = [-1] * (num_experts * rows), [], [0] * num_experts
    for assignment, expert in enumerate(ids.flatten().tolist()):
        fits = taken[expert] < rows
        slots.append(expert * rows + taken[expert] if fits else -1)
        if fits:
            assignments[slots[-1]] = assignment
        taken[expert] += 1
    got = assign_slots(ids, *sort_by_expert(ids, num_experts), rows)
    assert got.assignment.tolist() == assignments
    assert got.slot.shape == ids.shape and got.slot.flatten().tolist() == slots


def test_nothing_is_read() -> None:
    """The meta device has shapes and no values."""
    ids = torch.zeros(8, 2, dtype=torch.int64, device="meta")
    slots = assign_slots(ids, *sort_by_expert(ids, 3), 4)
    assert (slots.assignment.shape, slots.slot.shape) == ((12,), (8, 2))


@pytest.mark.parametrize("rows", [0, -1, 2.0, True, None])
def test_rows_must_be_a_positive_integer(rows: int) -> None:
    with pytest.raises(sc.InvalidArgument, match="rows_per_expert >= 1, got"):
        Capacity(rows)


def test_placements() -> None:
    bases = {"a": sc.Placement.even(4, 2), "b": sc.Placement.even(3, 2)}
    places = Capacity(5, {"b": {0: [1], 2: (0, 1)}}).placements(bases)
    assert places == {"a": bases["a"], "b": bases["b"].replicate({0: [1], 2: [0]})}
    for replicate, text in (({"c": {}}, "a, b, got 'c'"), ({"a": {4: [0]}}, "got 4"), ({"a": {0: [2]}}, "got 2")):
        with pytest.raises(sc.InvalidArgument, match=text):
            Capacity(5, replicate).placements(bases)
