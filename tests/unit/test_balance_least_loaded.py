"""What overflows goes to the least loaded ranks, in pieces that are worth a replica."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import Placement
from sparsecoll.balance.least_loaded import LeastLoaded
from sparsecoll.errors import InvalidArgument
from tests.unit.balancing import Problem, ask, check_answer, check_purity, make_costs, problems, zipf_loads

balancers = st.builds(
    LeastLoaded,
    threshold=st.sampled_from([1.0, 1.3, 2.5]),
    capacity=st.sampled_from([1.0, 1.1, 1.5]),
    min_tokens=st.sampled_from([None, 1, 2, 30, 1000]),
)


def problem_of(loads: Any, owners: list[int], **costs: Any) -> Problem:
    """All assignments come from rank 0; only sums count."""
    world_size = max(owners) + 1
    sources = np.zeros((world_size, len(owners)), np.int64)
    sources[0] = loads
    return Problem(sources, Placement.of_owners(owners, world_size), make_costs(world_size, **costs))


def quotas_of(balancer: LeastLoaded, problem: Problem) -> Any:
    answer = check_answer(balancer, problem)
    assert answer.quotas is not None
    return answer.quotas.tolist()


class TestByHand:
    def test_one_expert_has_nearly_everything(self) -> None:
        """The paper's worst case, 95 of 100 assignments: every rank ends with the mean."""
        problem = problem_of([95, 2, 2, 1], [0, 1, 2, 3])
        assert quotas_of(LeastLoaded(min_tokens=1), problem) == [
            [25, 23, 23, 24],
            [0, 2, 0, 0],
            [0, 0, 2, 0],
            [0, 0, 0, 1],
        ]

    def test_the_largest_expert_makes_room_for_those_to_come(self) -> None:
        """Capacity 40: of expert 0 rank 0 keeps what leaves room for expert 1, and rank 2 is filled before rank 1."""
        problem = problem_of([60, 20, 25, 15], [0, 0, 1, 2])
        assert quotas_of(LeastLoaded(min_tokens=1), problem) == [[20, 15, 25], [20, 0, 0], [0, 25, 0], [0, 0, 15]]

    def test_the_least_loaded_rank_is_filled_first(self) -> None:
        problem = problem_of([50, 20, 10], [0, 1, 2])
        assert quotas_of(LeastLoaded(min_tokens=1), problem) == [[27, 6, 17], [0, 20, 0], [0, 0, 10]]

    def test_an_owner_hands_over_no_more_than_it_has_too_much(self) -> None:
        """Capacity 45, and rank 1 has room for 45: 15 of expert 0 are enough."""
        problem = problem_of([40, 20, 0], [0, 0, 1])
        assert quotas_of(LeastLoaded(capacity=1.5, min_tokens=1), problem) == [[25, 15], [20, 0], [0, 0]]

    def test_an_expert_goes_as_a_whole_if_its_owner_has_no_room(self) -> None:
        problem = problem_of([30, 20, 10, 0], [0, 0, 0, 1])
        assert quotas_of(LeastLoaded(min_tokens=1), problem) == [[0, 30], [20, 0], [10, 0], [0, 0]]

    def test_little_is_not_worth_a_replica(self) -> None:
        # Capacity 40: rank 0 has 20 too much, rank 1 room for 15 and rank 2 for 5.
        problem = problem_of([60, 25, 35], [0, 1, 2])
        assert quotas_of(LeastLoaded(min_tokens=5), problem) == [[40, 15, 5], [0, 25, 0], [0, 0, 35]]
        assert quotas_of(LeastLoaded(min_tokens=6), problem) == [[45, 15, 0], [0, 25, 0], [0, 0, 35]]
        assert ask(LeastLoaded(min_tokens=16), problem).place == problem.base
        assert quotas_of(LeastLoaded(capacity=1.25, min_tokens=1), problem) == [[50, 10, 0], [0, 25, 0], [0, 0, 35]]

    @pytest.mark.parametrize(("copy_assignments", "is_worth_it"), [(15.0, True), (15.5, False)])
    def test_by_default_as_many_as_take_as_long_as_a_copy(self, copy_assignments: float, is_worth_it: bool) -> None:
        problem = problem_of([60, 25, 35], [0, 1, 2], copy_assignments=copy_assignments)
        assert (ask(LeastLoaded(), problem).place != problem.base) == is_worth_it

    def test_nothing_happens_below_the_threshold(self) -> None:
        problem = problem_of([60, 25, 35], [0, 1, 2])
        assert ask(LeastLoaded(threshold=1.5, min_tokens=1), problem).place != problem.base
        answer = ask(LeastLoaded(threshold=1.51, min_tokens=1), problem)
        assert answer.place == problem.base and answer.quotas is None

    def test_ranks_without_memory_take_nothing(self) -> None:
        """With one slot each, rank 1 takes of expert 0, and expert 1 finds room on nobody but rank 2."""
        problem = problem_of([40, 35, 0, 0], [0, 0, 1, 2], spare_experts=1)
        assert quotas_of(LeastLoaded(min_tokens=1), problem) == [[0, 25, 15], [35, 0, 0], [0, 0, 0], [0, 0, 0]]
        none = problem_of([40, 35, 0, 0], [0, 0, 1, 2], spare_experts=0)
        assert ask(LeastLoaded(min_tokens=1), none).place == none.base

    def test_replicas_that_are_there_need_no_memory_and_no_least_number(self) -> None:
        base = Placement.of_owners([0, 1], 2).replicate({0: [1]})
        problem = Problem(np.array([[60, 0], [0, 40]]), base, make_costs(2, spare_experts=0))
        assert quotas_of(LeastLoaded(threshold=1.0, min_tokens=1000), problem) == [[50, 10], [0, 40]]


def test_nothing_to_balance() -> None:
    for problem in (
        Problem(np.zeros((4, 8), np.int64), Placement.even(8, 4), make_costs(4)),
        Problem(np.full((1, 8), 50), Placement.even(8, 1), make_costs(1)),
        Problem(np.full((4, 8), 500), Placement.even(8, 4), make_costs(4)),
        Problem(np.zeros((3, 0), np.int64), Placement.even(0, 3), make_costs(3)),
        Problem(zipf_loads(4, 8), Placement.even(8, 4), make_costs(4, spare_experts=0)),
    ):
        answer = check_answer(LeastLoaded(), problem)
        assert answer.place == problem.base and answer.quotas is None


@given(problem=problems(), balancer=balancers)
def test_answers_are_sound_and_no_rank_is_filled_beyond_capacity(problem: Problem, balancer: LeastLoaded) -> None:
    answer = check_answer(balancer, problem)
    at_owner = np.bincount(problem.base.owners, problem.loads.sum(axis=0), problem.base.world_size)
    if answer.quotas is None:
        assert answer.place == problem.base
        return
    computed = answer.quotas.sum(axis=0)
    assert computed.max() <= at_owner.max()
    capacity = np.ceil(balancer.capacity * problem.loads.sum() / problem.base.world_size)
    if not len(problem.base.replicated()):
        assert (computed <= np.maximum(capacity, at_owner)).all()
        if balancer.min_tokens is not None:
            assert (answer.quotas[answer.place.holders & ~problem.base.holders] >= balancer.min_tokens).all()
        if balancer.min_tokens == 1 and problem.costs.spare_experts >= problem.base.num_chunks:
            assert computed.max() <= capacity


@given(problem=problems(), balancer=balancers)
def test_pure(problem: Problem, balancer: LeastLoaded) -> None:
    check_purity(balancer, problem)


@pytest.mark.parametrize("arguments", [{"threshold": 0.9}, {"capacity": 0.5}, {"min_tokens": 0}, {"capacity": np.nan}])
def test_senseless_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="LeastLoaded: expected"):
        LeastLoaded(**arguments)
