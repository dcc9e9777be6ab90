"""Loads divided among given holders: the least maximum there is, and of those the nearest assignments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecoll import Placement
from sparsecoll.balance.divide import divide_loads, divide_readably
from sparsecoll.errors import InvalidArgument
from tests.unit.balancing import Problem, problems, zipf_loads

Integers = NDArray[np.int64]


def divided(problem: Problem) -> Integers:
    return divide_loads(problem.loads, problem.base, problem.costs.topology.node_of)


def distance(loads: Integers, quotas: Integers, nodes: Integers) -> int:
    """1 for each assignment that leaves its rank, and 1 more if it leaves its node."""
    total = np.maximum(quotas - loads.T, 0).sum()
    for node in set(nodes.tolist()):
        there = nodes == node
        total += np.maximum(quotas[:, there].sum(axis=1) - loads[there].sum(axis=0), 0).sum()
    return int(total)


def test_copies_take_over_what_the_owner_has_too_much() -> None:
    # Rank 0 owns expert 0 and 1, and has 60 + 30; rank 1 has 10 of its own, and a replica of expert 0.
    place = Placement.of_owners([0, 0, 1], 2).replicate({0: [1]})
    quotas = divide_loads(np.array([[50, 30, 0], [10, 0, 10]]), place, (0, 0))
    assert quotas.tolist() == [[20, 40], [30, 0], [0, 10]]


def test_load_passes_through_ranks_that_are_full() -> None:
    """Rank 0 can turn to rank 1 only, which has to make room for it at rank 2."""
    place = Placement.of_owners([0, 1], 3).replicate({0: [1], 1: [2]})
    quotas = divide_loads(np.array([[60, 0], [0, 30], [0, 0]]), place, (0, 0, 0))
    assert quotas.tolist() == [[30, 30, 0], [0, 0, 30]]


def test_strangers_make_room_and_not_what_is_at_home() -> None:
    """Expert 0 is asked for by rank 0, 6 times, and by rank 2, 5 times: of those 1 goes to rank 0."""
    place = Placement.of_owners([0, 1], 3).replicate({0: [1]})
    quotas = divide_loads(np.array([[6, 0], [0, 4], [5, 0]]), place, (0, 0, 0))
    assert quotas.tolist() == [[7, 4, 0], [0, 4, 0]]


def test_assignments_stay_in_their_node_where_that_is_no_slower() -> None:
    """Expert 0 on both ranks of node 0 and on rank 2 of node 1."""
    place = Placement.of_owners([0], 4).replicate({0: [1, 2]})
    assert divide_loads(np.array([[9], [3], [0], [0]]), place, (0, 0, 1, 1)).tolist() == [[4, 4, 4, 0]]
    # As rank 3 has 9 to compute, nobody else needs less.
    busy = Placement.of_owners([0, 3], 4).replicate({0: [1, 2]})
    quotas = divide_loads(np.array([[9, 0], [0, 0], [3, 0], [3, 9]]), busy, (0, 0, 1, 1))
    assert quotas.tolist() == [[9, 0, 6, 0], [0, 0, 0, 9]]
    # From a node without holders they go to the owner, unless it would be the busiest.
    lonely = Placement.of_owners([0], 3).replicate({0: [1]})
    assert divide_loads(np.array([[0], [0], [2]]), lonely, (0, 1, 2)).tolist() == [[1, 1, 0]]
    with_rest = Placement.of_owners([0, 1], 3).replicate({0: [1]})
    assert divide_loads(np.array([[0, 0], [0, 9], [2, 0]]), with_rest, (0, 1, 2)).tolist() == [[2, 0, 0], [0, 9, 0]]


@given(problem=problems(max_ranks=8, max_experts=12))
def test_quotas_are_sound_and_never_worse_than_plain_expert_parallelism(problem: Problem) -> None:
    loads, place = problem.loads, problem.base
    quotas = divided(problem)
    assert quotas.dtype == np.int64 and (quotas >= 0).all() and not quotas[~place.holders].any()
    np.testing.assert_array_equal(quotas.sum(axis=1), loads.sum(axis=0))
    at_owner = np.bincount(place.owners, loads.sum(axis=0), place.world_size)
    assert quotas.sum(axis=0).max() <= at_owner.max()
    np.testing.assert_array_equal(divided(problem), quotas)


@given(problem=problems(max_ranks=7, max_experts=12))
def test_the_maximum_is_that_of_the_busiest_set_of_ranks(problem: Problem) -> None:
    """Over all sets of ranks, the mean of what only they may compute: no division has a lower maximum."""
    by_expert, holders = problem.loads.sum(axis=0), problem.base.holders
    least = 0
    for chosen in range(1, 1 << problem.base.world_size):
        members = np.array([chosen >> rank & 1 for rank in range(problem.base.world_size)], bool)
        inside = int(by_expert[~holders[:, ~members].any(axis=1)].sum())
        least = max(least, -(-inside // int(members.sum())))
    assert divided(problem).sum(axis=0).max() == least


def splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in splits(total - first, parts - 1):
            yield (first, *rest)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_is_nearer_with_the_same_maximum(seed: int) -> None:
    """By trying all divisions of small loads."""
    random = np.random.default_rng(seed)
    world_size, num_experts = int(random.integers(1, 5)), int(random.integers(1, 4))
    loads = random.multinomial(8, np.full(world_size * num_experts, 1 / (world_size * num_experts)))
    loads = loads.reshape(world_size, num_experts).astype(np.int64)
    owners = random.integers(0, world_size, num_experts)
    holders = random.random((num_experts, world_size)) < random.choice([0.2, 0.5, 0.8])
    holders[np.arange(num_experts), owners] = True
    nodes = np.unique(random.integers(0, 3, world_size), return_inverse=True)[1]

    rows = []
    for load, held in zip(loads.sum(axis=0), holders, strict=True):
        choices = np.array(list(splits(int(load), int(held.sum()))))
        row = np.zeros((len(choices), world_size), np.int64)
        row[:, held] = choices
        rows.append(row)
    best = min(
        (int(sum(chosen).max()), distance(loads, np.array(chosen), nodes))  # type: ignore[arg-type]
        for chosen in itertools.product(*rows)
    )
    quotas = divide_loads(loads, Placement(owners, holders), nodes.tolist())
    assert (quotas.sum(axis=0).max(), distance(loads, quotas, nodes)) == best


def test_what_all_ranks_hold_stays_where_it_is() -> None:
    loads = zipf_loads(4, 8)
    place = Placement(np.zeros(8, int), np.ones((8, 4), bool))
    np.testing.assert_array_equal(divide_loads(loads, place, (0, 0, 1, 1)), loads.T)


@settings(max_examples=50)
@given(problem=problems(max_ranks=8, max_experts=12))
def test_the_readable_division_is_the_same(problem: Problem) -> None:
    base, nodes = problem.base, np.array(problem.costs.topology.node_of, np.int32)
    np.testing.assert_array_equal(divide_readably(problem.loads, base.owners, base.holders, nodes), divided(problem))


@pytest.mark.parametrize(
    "changes", [{"loads": np.ones((3, 4), int)}, {"loads": np.ones((2, 5), int)}, {"node_of": (0, 0, 0)}]
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    arguments = {"loads": np.ones((2, 4), int), "place": Placement.even(4, 2), "node_of": (0, 0), **changes}
    with pytest.raises(InvalidArgument, match=r"^divide_loads: "):
        divide_loads(**arguments)
