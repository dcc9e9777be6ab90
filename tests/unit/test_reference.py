"""The oracle against examples worked out by hand: everything else is tested against the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsecoll import Placement, reference

# Rank 0 owns chunks 0 and 2, rank 1 owns chunk 1; chunk 0 is held by both, chunk 1 by all three, chunk 2 by its owner.
PLACE = Placement.of_owners([0, 1, 0], 3).replicate({0: [1], 1: [0, 2]})


def rows(*values: int) -> list[np.ndarray]:
    return [np.array([value, -value]) for value in values]


def plain(result: list[list[np.ndarray]]) -> list[list[list[float]]]:
    return [[row.tolist() for row in rank] for rank in result]


def test_all_gather() -> None:
    gathered = reference.all_gather([rows(10, 12), rows(11), rows()], PLACE)
    assert plain(gathered) == [[[10, -10], [11, -11], [12, -12]], [[10, -10], [11, -11]], [[11, -11]]]


def test_all_gather_of_a_subset() -> None:
    gathered = reference.all_gather([rows(12), rows(11), rows()], PLACE, chunks=[1, 2])
    assert plain(gathered) == [[[11, -11], [12, -12]], [[11, -11]], [[11, -11]]]


def test_all_gather_copies() -> None:
    shard = rows(10, 12)
    gathered = reference.all_gather([shard, rows(11), rows()], PLACE)
    shard[0][:] = 99
    gathered[1][0][:] = 77
    assert plain(gathered) == [[[10, -10], [11, -11], [12, -12]], [[77, 77], [11, -11]], [[11, -11]]]


def test_reduce_scatter() -> None:
    held = [rows(1, 2, 3), rows(10, 20), rows(200)]
    assert plain(reference.reduce_scatter(held, PLACE)) == [[[11, -11], [3, -3]], [[222, -222]], []]
    assert plain(reference.reduce_scatter(held, PLACE, op="mean")) == [[[5.5, -5.5], [3, -3]], [[74, -74]], []]


def test_reduce_scatter_of_a_subset() -> None:
    held = [rows(2, 3), rows(20), rows(200)]
    assert plain(reference.reduce_scatter(held, PLACE, chunks=[1, 2])) == [[[3, -3]], [[222, -222]], []]


def test_sums_are_wide() -> None:
    """One rounding at the end is the caller's affair; the oracle itself adds in 64 bits."""
    place = Placement.even(1, 2).replicate({0: [1]})
    halves = [[np.array([1.0], np.float16)], [np.array([2.0**-11], np.float16)]]
    assert reference.reduce_scatter(halves, place)[0][0].tolist() == [1.0 + 2.0**-11]
    bytes_ = [[np.array([100], np.int8)], [np.array([100], np.int8)]]
    assert reference.reduce_scatter(bytes_, place)[0][0].tolist() == [200]
    large = [[np.array([2**60], np.int64)], [np.array([1], np.int64)]]
    assert reference.reduce_scatter(large, place)[0][0].tolist() == [2**60 + 1]


def test_wrong_number_of_rows_is_noticed() -> None:
    with pytest.raises(ValueError, match="zip"):
        reference.all_gather([rows(10), rows(11), rows()], PLACE)
    with pytest.raises(ValueError, match="zip"):
        reference.reduce_scatter([rows(1, 2, 3), rows(10, 20), rows()], PLACE)


def test_all_to_all() -> None:
    xs = [np.array([[1], [2], [3]]), np.array([[4], [5]]), np.zeros((0, 1), int)]
    counts = [[1, 0, 2], [1, 1, 0], [0, 0, 0]]
    moved = reference.all_to_all(xs, counts)
    assert [each.tolist() for each in moved] == [[[1], [4]], [[5]], [[2], [3]]]


def test_moe_layer_with_one_expert_each() -> None:
    """Top-1 with normalized weights is the chosen expert alone."""
    x = np.array([[3.0, 0.0], [0.0, 2.0]])
    router = np.eye(2)
    experts = [
        (np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0], [0.0]])),  # swiglu of (x0, x0), written to the first
        (np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[0.0], [1.0]])),  # a gate of zero lets nothing through
    ]
    out = reference.moe_layer(x, router, experts, top_k=1)
    assert out[0].tolist() == pytest.approx([3.0 / (1 + math.exp(-3.0)) * 3.0, 0.0])
    assert out[1].tolist() == [0.0, 0.0]


def test_moe_layer_weighs_experts_by_probability() -> None:
    x = np.array([[1.0, 0.0]])
    router = np.array([[math.log(3.0), 0.0], [0.0, 0.0], [math.log(1.0), 5.0]])  # probabilities 3/5, 1/5, 1/5
    gelu_of_one = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    experts = [(np.array([[1.0, 0.0]]), np.array([[scale], [0.0]])) for scale in (10.0, 100.0, 1000.0)]
    both = reference.moe_layer(x, router, experts, top_k=2, activation="gelu", normalize_weights=False)
    assert both[0, 0] == pytest.approx(gelu_of_one * (10 * 3 / 5 + 100 * 1 / 5)), "of equal ones the first wins"
    normalized = reference.moe_layer(x, router, experts, top_k=2, activation="gelu")
    assert normalized[0, 0] == pytest.approx(gelu_of_one * (10 * 3 / 4 + 100 * 1 / 4))
    every = reference.moe_layer(x, router, experts, top_k=3, activation="gelu")
    assert every[0, 0] == pytest.approx(gelu_of_one * (10 * 3 + 100 + 1000) / 5)


def test_moe_layer_without_tokens() -> None:
    experts = [(np.ones((2, 3)), np.ones((3, 1)))]
    assert reference.moe_layer(np.zeros((0, 3)), np.ones((1, 3)), experts, top_k=1).shape == (0, 3)
