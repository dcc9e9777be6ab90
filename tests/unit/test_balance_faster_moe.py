"""FasterMoE: the busiest experts are shadowed, one after the other, while that is faster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given

from sparsecoll import Placement
from sparsecoll.balance.base import Balance
from sparsecoll.balance.faster_moe import FasterMoE
from sparsecoll.balance.traffic import copying_s, predicted_s
from tests.unit.balancing import Problem, ask, check_answer, check_corners, check_purity, make_costs, problems


def total_s(problem: Problem, place: Placement) -> float:
    """Predicted time of a placement with its copies, none of which is hidden."""
    loads, base, costs = problem
    return predicted_s(loads, Balance(place), costs) + copying_s(base, place, costs, exact=True)


def shadowed(problem: Problem) -> list[int]:
    """Experts that got copies."""
    return np.flatnonzero((ask(FasterMoE(), problem).place.holders & ~problem.base.holders).any(axis=1)).tolist()


@given(problems())
def test_answers_are_sound_and_no_slower(problem: Problem) -> None:
    answer = check_answer(FasterMoE(), problem)
    assert FasterMoE().exact
    assert total_s(problem, answer.place) <= total_s(problem, problem.base)


@given(problems())
def test_experts_are_shadowed_by_load_until_it_is_slower(problem: Problem) -> None:
    loads, base, costs = problem
    place = base
    for expert in sorted(range(base.num_chunks), key=lambda each: (-loads[:, each].sum(), each)):
        more = place.replicate({expert: range(base.world_size)})
        fits = (more.holders & ~base.holders).sum(axis=0).max() <= costs.spare_experts
        if not fits or total_s(problem, more) >= total_s(problem, place):
            break
        place = more
    assert ask(FasterMoE(), problem).place == place


@given(problems())
def test_pure(problem: Problem) -> None:
    check_purity(FasterMoE(), problem)
    hidden = problem._replace(costs=replace(problem.costs, hidden_s=1e9))
    assert ask(FasterMoE(), hidden).place == ask(FasterMoE(), problem).place, "nothing is hidden after the router"


def test_corners() -> None:
    check_corners(FasterMoE())


def test_by_hand() -> None:
    """Ranks with one expert each: 240, 160, 60 and 4 assignments, a quarter from each rank; times after each copy.

    Without copies 240; with expert 0 everywhere 60 + 160; with 1 as well 100 + 60; with 2 as well 115 + 4. The last
    is free: the others receive three experts already.
    """
    loads = np.tile([60, 40, 15, 1], (4, 1))
    for copy_assignments, expected in ((19.0, [0, 1, 2, 3]), (21.0, [])):
        problem = Problem(loads, Placement.even(4, 4), make_costs(4, copy_assignments=copy_assignments))
        assert shadowed(problem) == expected, copy_assignments


def test_by_hand_the_first_failure_ends_it() -> None:
    """Times 560, 300 with expert 1 everywhere, 240 with 0 as well, 199 with 2 as well."""
    loads = np.tile([40, 140, 15, 1], (4, 1))
    for copy_assignments, expected in ((119.0, [1]), (61.0, [1]), (50.0, [0, 1])):
        problem = Problem(loads, Placement.even(4, 4), make_costs(4, copy_assignments=copy_assignments))
        assert shadowed(problem) == expected, copy_assignments
    assert shadowed(problem._replace(costs=replace(problem.costs, spare_experts=1))) == [1]
