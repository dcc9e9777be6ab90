"""Hecate: copies that pay, no slower than without them, within memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import InvalidArgument, Placement, Topology
from sparsecoll.balance.base import Balance, Balancer
from sparsecoll.balance.hecate import Hecate
from sparsecoll.balance.traffic import copying_s, predicted_s
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

hecates = st.builds(Hecate, most=st.none() | st.integers(0, 12), exposed=st.booleans())


def total_s(problem: Problem, place: Placement) -> float:
    """Predicted time of a placement with what is seen of its copies."""
    loads, base, costs = problem
    return predicted_s(loads, Balance(place), costs) + copying_s(base, place, costs)


def copied(problem: Problem, balancer: Balancer) -> list[int]:
    """Experts that got copies."""
    return np.flatnonzero((ask(balancer, problem).place.holders & ~problem.base.holders).any(axis=1)).tolist()


@given(problems(), hecates)
def test_answers_are_sound_and_no_slower(problem: Problem, balancer: Hecate) -> None:
    answer = check_answer(balancer, problem)
    assert answer.quotas is None and not balancer.exact
    assert total_s(problem, answer.place) <= total_s(problem, problem.base)
    assert balancer.most is None or len(copied(problem, balancer)) <= balancer.most
    if not balancer.exposed:
        assert copying_s(problem.base, answer.place, problem.costs) == 0


@given(problems(), hecates)
def test_pure(problem: Problem, balancer: Hecate) -> None:
    check_purity(balancer, problem)


def test_corners() -> None:
    for most, exposed in itertools.product([None, 0, 3], [False, True]):
        check_corners(Hecate(most, exposed))


@given(problems(replicas=False))
def test_experts_are_everywhere_or_at_home_unless_memory_is_short(problem: Problem) -> None:
    problem = problem._replace(costs=replace(problem.costs, spare_experts=1 << 30))
    holders = ask(Hecate(), problem).place.holders.sum(axis=1)
    assert set(holders) <= {1, problem.base.world_size}


@given(problems())
def test_copies_that_nobody_needs_are_not_made(problem: Problem) -> None:
    answer = ask(Hecate(), problem).place
    assert answer == problem.base or total_s(problem, answer) < total_s(problem, problem.base)


def hot_rank(hidden_copies: float, copy_assignments: float = 30.0, spare_experts: int = 1 << 30) -> Problem:
    """Four ranks on two nodes with two experts each; rank 2 has the two hottest, rank 3 the third."""
    base = Placement.even(8, 4)
    loads = np.tile([1, 1, 1, 1, 60, 40, 15, 1], (4, 1))
    costs = make_costs(
        Topology((0, 0, 1, 1)),
        hidden_copies=hidden_copies,
        copy_assignments=copy_assignments,
        spare_experts=spare_experts,
    )
    return Problem(loads, base, costs)


def test_overlap_degree_is_what_dense_compute_hides() -> None:
    """Time without copies is 400; with expert 4 everywhere 60 + 160, with 4 and 5 100 + 4, the mean of 120 with 6."""
    assert copied(hot_rank(1.0), Hecate(exposed=False)) == [4]
    assert copied(hot_rank(1.99), Hecate(exposed=False)) == [4]
    assert copied(hot_rank(2.0), Hecate(exposed=False)) == [4, 5]
    assert copied(hot_rank(0.5), Hecate(exposed=False)) == []


def test_copies_beyond_the_overlap_degree_pay_or_are_not_made() -> None:
    """Copy 4 saves 180 and 5 another 56: 220 to 164 (then rank 3 is slowest, with 64 and the 100 that all have)."""
    for copy_assignments, expected in ((179, [4]), (181, []), (55, [4, 5]), (57, [4])):
        assert copied(hot_rank(0.0, copy_assignments), Hecate()) == expected, copy_assignments
    assert copied(hot_rank(1.0, 57), Hecate()) == [4], "the first is hidden, the second not worth it"
    assert copied(hot_rank(0.0, 3.0), Hecate()) == [4, 5, 6], "the rest takes less off than it costs"
    assert copied(hot_rank(0.0, 3.0), Hecate(most=1)) == [4]


def test_hot_experts_of_an_idle_rank_are_passed_over() -> None:
    """Expert 0 is the hottest, but rank 1 with its many is the slowest."""
    base = Placement.of_owners([0, 1, 1, 1], 2)
    loads = np.array([[50, 30, 30, 30], [50, 30, 30, 30]])
    problem = Problem(loads, base, make_costs(2, hidden_copies=1.0))
    assert copied(problem, Hecate(exposed=False)) == [1]


def test_two_ranks_equally_slow() -> None:
    """A copy from either alone saves nothing, from both it does."""
    base = Placement.even(8, 4)
    loads = np.tile([40, 1, 40, 1, 1, 1, 1, 1], (4, 1))
    assert copied(Problem(loads, base, make_costs(4, copy_assignments=20.0)), Hecate()) == [0, 2]
    assert copied(Problem(loads, base, make_costs(4, copy_assignments=60.0)), Hecate()) == []


def test_slots_are_divided_by_load_and_over_nodes_first() -> None:
    """Memory for one replica on each rank; experts of ranks 0 and 7, on different nodes, are equally hot."""
    base = Placement.even(8, 8)
    topology = Topology((0, 0, 0, 0, 1, 1, 1, 1))
    loads = np.tile([40, 1, 1, 1, 1, 1, 1, 40], (8, 1))
    problem = Problem(loads, base, make_costs(topology, hidden_copies=2.0, spare_experts=1))
    answer = check_answer(Hecate(), problem)
    added = answer.place.holders & ~base.holders
    # Either gets four slots; but what is left for expert 7 in the end is the slot of its owner, which needs none.
    assert added.sum(axis=1).tolist() == [4, 0, 0, 0, 0, 0, 0, 3]
    assert added[0].tolist() == [False, True, True, False, True, True, False, False]
    assert added[7].tolist() == [True, False, False, True, False, False, True, False]
    assert predicted_s(loads, answer, problem.costs) < 0.5 * predicted_s(loads, Balance(base), problem.costs)


def test_slots_beyond_the_number_of_ranks_go_to_others() -> None:
    """Two slots on each of four ranks, 300 : 20 : 20 of load: the first needs three only, and leaves five."""
    base = Placement.even(4, 4)
    loads = np.tile([300, 20, 20, 0], (4, 1))
    problem = Problem(loads, base, make_costs(4, hidden_copies=3.0, spare_experts=2))
    added = check_answer(Hecate(), problem).place.holders & ~base.holders
    assert added.sum(axis=1).tolist() == [3, 3, 2, 0]


def test_memory_for_some_is_used_at_least_as_well_as_everywhere() -> None:
    loads, base = zipf_loads(8, 32, exponent=1.0), Placement.even(32, 8)
    for spare in range(6):
        problem = Problem(
            loads, base, make_costs(Topology((0, 0, 0, 0, 1, 1, 1, 1)), hidden_copies=10.0, spare_experts=spare)
        )
        everywhere = problem._replace(costs=replace(problem.costs, hidden_s=spare * problem.costs.copy_s))
        assert total_s(problem, check_answer(Hecate(), problem).place) <= total_s(
            everywhere, ask(Hecate(exposed=False), everywhere).place
        )


def test_replicas_of_the_base_take_no_new_copies() -> None:
    problem = hot_rank(2.0)
    first = ask(Hecate(exposed=False), problem).place
    after = problem._replace(base=first, costs=replace(problem.costs, hidden_s=0.0))
    assert ask(Hecate(exposed=False), after).place == first
    more = copied(after._replace(costs=replace(after.costs, expert_bytes=1)), Hecate())
    assert 6 in more and not {4, 5} & set(more)


def test_skewed_loads_of_many_ranks_come_near_the_mean() -> None:
    loads, base = zipf_loads(64, 256, tokens=4096), Placement.even(256, 64)
    problem = Problem(loads, base, make_costs(Topology(tuple(np.arange(64) // 8)), hidden_copies=12.0))
    answer = check_answer(Hecate(exposed=False), problem)
    assert predicted_s(loads, answer, problem.costs) < 1.7 * 4096
    assert predicted_s(loads, Balance(base), problem.costs) > 16 * 4096


def test_refuses() -> None:
    with pytest.raises(InvalidArgument, match="expected most >= 0, got -1"):
        Hecate(most=-1)
