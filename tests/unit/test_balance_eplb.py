"""EPLB: the published algorithm, and the balancer made of its steps."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import InvalidArgument, Placement, Topology
from sparsecoll.balance.base import Balance
from sparsecoll.balance.eplb import Eplb, pack, rebalance, replicate
from sparsecoll.balance.traffic import predicted_s
from tests.unit.balancing import (
    Problem,
    ask,
    check_answer,
    check_corners,
    check_purity,
    make_costs,
    problems,
    zipf_loads,
)

eplbs = st.builds(Eplb, replicas=st.integers(0, 4))
weight_lists = st.lists(st.integers(0, 9) | st.integers(0, 1000), min_size=1, max_size=12)


def test_published_example() -> None:
    """Two layers of 12 experts, 16 slots on 8 ranks of 2 nodes, 4 groups: as in the README of EPLB."""
    weights = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    slots = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for layer, expected in zip(weights, slots, strict=True):
        assert rebalance(layer, num_slots=16, num_groups=4, num_nodes=2, num_ranks=8).ravel().tolist() == expected


def test_published_example_without_nodes() -> None:
    """Groups that do not fit the nodes: all ranks are one node, and all slots hold something."""
    weights = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    flat = rebalance(weights, 16, num_groups=3, num_nodes=2, num_ranks=8)
    np.testing.assert_array_equal(flat, rebalance(weights, 16, num_groups=1, num_nodes=1, num_ranks=8))
    # The mean is 1033 / 16; the greedy steps give to 10, 5, 1, 4.
    assert sorted(flat.ravel().tolist()) == sorted([*range(12), 10, 5, 1, 4])


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_rebalance_fills_all_slots_and_forgets_nobody(
    num_groups: int,
    group_size: int,
    num_nodes: int,
    ranks_per_node: int,
    slots_per_rank: int,
    random: Random,
) -> None:
    num_experts, num_ranks = num_groups * group_size, num_nodes * ranks_per_node
    weights = [random.randint(1, 99) for _ in range(num_experts)]
    if slots_per_rank * num_ranks < num_experts:
        return
    slots = rebalance(weights, slots_per_rank * num_ranks, num_groups, num_nodes, num_ranks)
    assert slots.shape == (num_ranks, slots_per_rank)
    assert set(slots.ravel()) == set(range(num_experts))
    if num_groups % num_nodes == 0:
        of_nodes = slots.reshape(num_nodes, -1) // group_size
        groups = [set(groups) for groups in of_nodes.tolist()]
        assert sum(map(len, groups)) == num_groups, "a group is inside one node"


@given(weight_lists, st.integers(0, 20), st.none() | st.integers(1, 6), st.data())
def test_replicas_go_to_the_most_loaded_holders(
    weights: list[int], num_replicas: int, most: int | None, data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(1, 3), min_size=len(weights), max_size=len(weights)))
    holders = list(counts)
    chosen = replicate(weights, num_replicas, counts, most)
    for expert in chosen:
        eligible = [each for each in range(len(weights)) if most is None or holders[each] < most]
        assert expert == max(eligible, key=lambda each: (weights[each] / holders[each], -each))
        holders[expert] += 1
    room = num_replicas if most is None else sum(max(0, most - count) for count in counts)
    assert len(chosen) == min(num_replicas, room)


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_packs_are_full_and_the_heaviest_item_is_in_the_lightest_pack(
    num_packs: int, size: int, data: st.DataObject
) -> None:
    total = num_packs * size
    weights = data.draw(st.lists(st.integers(0, 50), min_size=total, max_size=total))
    packs = pack(weights, num_packs)
    assert packs.shape == (num_packs, size) and sorted(packs.ravel()) == list(range(total))
    if size > 1:
        sums = np.array(weights)[packs].sum(axis=1)
        assert sums.max() - sums.min() <= size * max(weights)
        first = sorted(np.array(weights)[packs[:, 0]], reverse=True)
        assert first == sorted(weights, reverse=True)[:num_packs]


@given(problems(), eplbs)
def test_answers_are_sound(problem: Problem, balancer: Eplb) -> None:
    answer = check_answer(balancer, problem)
    assert answer.quotas is None and not balancer.exact
    added = answer.place.holders & ~problem.base.holders
    assert added.sum(axis=0).max() <= balancer.replicas
    assert not added[problem.loads.sum(axis=0) == 0].any()


@given(problems(), eplbs)
def test_pure(problem: Problem, balancer: Eplb) -> None:
    check_purity(balancer, problem)


def test_corners() -> None:
    for replicas in (0, 1, 3):
        check_corners(Eplb(replicas))


def test_by_hand() -> None:
    """Loads 120, 40, 32, 20: expert 0 gets replicas at 120, 60 and 40 (before expert 1, its equal), then 1 its own."""
    loads = np.tile([30, 10, 8, 5], (4, 1))
    base = Placement.even(4, 4)
    place = check_answer(Eplb(), Problem(loads, base, make_costs(4))).place
    added = place.holders & ~base.holders
    # The rank of expert 0 holds it already, and so takes the one of expert 1.
    assert added.tolist() == [[False, True, True, True], [True, False, False, False], [False] * 4, [False] * 4]


def test_replicas_go_to_nodes_without_their_expert() -> None:
    """Rank 1 is idle, but beside the owner of expert 0; of the other node rank 3 has least load."""
    loads = np.tile([100, 0, 99, 98, 97], (4, 1))
    base = Placement.of_owners([0, 1, 2, 3, 0], 4)
    for topology, expected in ((Topology((0, 0, 1, 1)), 3), (Topology.flat(4), 1)):
        added = check_answer(Eplb(), Problem(loads, base, make_costs(topology))).place.holders & ~base.holders
        assert np.flatnonzero(added[0]).tolist() == [expected]


def test_replicas_go_to_the_least_loaded_rank_by_then() -> None:
    """Experts of rank 0 have shares of 33, 30, 40 and 35 in the end: the one of 40 goes to rank 1, 35 to rank 2."""
    loads = np.array([[100, 90, 80, 70, 0, 5], [0] * 6, [0] * 6])
    base = Placement.of_owners([0, 0, 0, 0, 1, 2], 3)
    place = check_answer(Eplb(2), Problem(loads, base, make_costs(3))).place
    assert place.holders[2].tolist() == [True, True, False]
    assert place.holders[3].tolist() == [True, False, True]


def test_memory_below_the_number_of_replicas() -> None:
    loads, base = zipf_loads(4, 16), Placement.even(16, 4)
    problem = Problem(loads, base, make_costs(4))
    few = problem._replace(costs=replace(problem.costs, spare_experts=2))
    assert ask(Eplb(5), few).place == ask(Eplb(2), problem).place
    added = ask(Eplb(2), problem).place.holders & ~base.holders
    assert added.sum(axis=0).max() == 2


def test_skewed_loads_of_many_ranks() -> None:
    loads, base = zipf_loads(32, 256, exponent=0.6, tokens=4096), Placement.even(256, 32)
    problem = Problem(loads, base, make_costs(Topology(tuple(np.arange(32) // 8))))
    answer = check_answer(Eplb(2), problem)
    assert predicted_s(loads, answer, problem.costs) < 0.75 * predicted_s(loads, Balance(base), problem.costs)


def test_refuses() -> None:
    with pytest.raises(InvalidArgument, match="expected replicas >= 0, got -1"):
        Eplb(replicas=-1)
    with pytest.raises(InvalidArgument, match="packs of equal size, got 3 items in 2"):
        pack([1, 2, 3], 2)
    with pytest.raises(InvalidArgument, match="groups of equal size, got 5 in 2"):
        rebalance([1, 2, 3, 4, 5], 6, 2, 1, 3)
    for slots, nodes, ranks in ((3, 1, 2), (7, 1, 2), (8, 2, 3)):
        with pytest.raises(InvalidArgument, match="at least 4 slots"):
            rebalance([1, 2, 3, 4], slots, 1, nodes, ranks)
