"""Quotas from exact loads: the busiest rank as little busy as it can be, for no more replicas than pay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import Placement
from sparsecoll.balance.base import Balancer
from sparsecoll.balance.quota import Quota
from sparsecoll.balance.relief import relieve_ranks
from sparsecoll.balance.traffic import exposed_s, predicted_s, traffic_of
from sparsecoll.errors import InvalidArgument
from tests.unit.balancing import Problem, ask, check_answer, check_purity, make_costs, problems, zipf_loads

FREE = 1e-9
"""Copies that take next to no time."""

balancers = st.builds(
    Quota,
    most=st.sampled_from([None, 0, 1, 2, 5]),
    min_tokens=st.sampled_from([1, 2, 32, 1000]),
    min_gain=st.sampled_from([0.0, 0.02, 0.5]),
)


def computed(balancer: Balancer, problem: Problem) -> Any:
    """``[W]``; the answer is checked."""
    answer = check_answer(balancer, problem)
    return traffic_of(problem.loads, answer.place, problem.costs.topology.node_of, answer.quotas).computed


def new_replicas(problem: Problem, balancer: Balancer) -> Any:
    return ask(balancer, problem).place.holders & ~problem.base.holders


class TestByHand:
    def test_one_busy_rank_hands_over_its_busiest_expert(self) -> None:
        # Mean 50: rank 0 has 20 too much, of expert 0; rank 2 has the tightest room for them.
        loads = np.array([[30, 10, 30, 5], [10, 0, 9, 20], [20, 0, 6, 10]])
        problem = Problem(loads, Placement.of_owners([0, 0, 1, 2], 3), make_costs(3, copy_assignments=FREE))
        answer = check_answer(Quota(min_tokens=1), problem)
        assert answer.quotas is not None
        assert answer.quotas.tolist() == [[40, 5, 15], [10, 0, 0], [0, 45, 0], [0, 0, 35]]
        assert answer.place == problem.base.replicate({0: [1, 2]})

    def test_too_few_are_topped_up_or_stay(self) -> None:
        # Rank 0 has 10 too much. A rank gets a replica for 12 assignments, but not for 31: rank 1 has room for 30.
        loads = np.array([[30, 20], [10, 0]])
        problem = Problem(loads, Placement.even(2, 2), make_costs(2, copy_assignments=FREE))
        for min_tokens, expected in ((5, [30, 30]), (12, [28, 32]), (31, [40, 20])):
            assert computed(Quota(min_tokens=min_tokens), problem).tolist() == expected

    @pytest.mark.parametrize(("copy_assignments", "is_worth_it"), [(9.0, True), (11.0, False)])
    def test_a_copy_takes_less_time_than_it_saves(self, copy_assignments: float, is_worth_it: bool) -> None:
        loads = np.array([[30, 20], [10, 0]])
        problem = Problem(loads, Placement.even(2, 2), make_costs(2, copy_assignments=copy_assignments))
        assert (check_answer(Quota(min_tokens=1, min_gain=0.0), problem).place != problem.base) == is_worth_it

    @pytest.mark.parametrize(("token_assignments", "is_worth_it"), [(0.0, False), (0.5, True)])
    def test_traffic_counts_beside_computing(self, token_assignments: float, is_worth_it: bool) -> None:
        """A replica for 10 saves rank 1 a journey of 20 and rank 0 the computing of 10; the copy costs 12."""
        loads = np.array([[20, 0], [20, 20]])
        costs = make_costs(2, copy_assignments=12.0, token_assignments=token_assignments)
        problem = Problem(loads, Placement.even(2, 2), costs)
        assert (check_answer(Quota(min_tokens=1, min_gain=0.0), problem).place != problem.base) == is_worth_it

    def test_a_gain_of_some_percent_may_not_be_worth_it(self) -> None:
        loads = np.array([[52, 20], [0, 48]])
        problem = Problem(loads, Placement.even(2, 2), make_costs(2, copy_assignments=FREE))
        assert check_answer(Quota(min_tokens=1, min_gain=0.03), problem).place != problem.base
        assert check_answer(Quota(min_tokens=1, min_gain=0.3), problem).place == problem.base

    @pytest.mark.parametrize(("copy_assignments", "expected"), [(2.0, [40, 40]), (10.0, [45, 35]), (40.0, [80, 0])])
    def test_a_second_replica_has_to_pay_too(self, copy_assignments: float, expected: list[int]) -> None:
        """One replica takes 35 off rank 0, and a second one 5 more."""
        base = Placement.of_owners([0, 0, 0, 0], 2)
        problem = Problem(
            np.array([[35, 15, 15, 15], [0, 0, 0, 0]]), base, make_costs(2, copy_assignments=copy_assignments)
        )
        assert computed(Quota(min_tokens=1), problem).tolist() == expected

    def test_replicas_that_are_there_take_part_for_nothing(self) -> None:
        loads = np.array([[40, 20], [20, 0]])
        base = Placement.even(2, 2).replicate({0: [1]})
        problem = Problem(loads, base, make_costs(2, copy_assignments=1e9))
        answer = check_answer(Quota(), problem)
        assert answer.place == base
        assert answer.quotas is not None and answer.quotas.tolist() == [[40, 20], [0, 20]]

    def test_tokens_that_a_replica_keeps_do_not_travel_to_the_owner_and_others_back(self) -> None:
        """All ranks hold both experts and ask for as much: nothing has to leave its rank."""
        loads = np.array([[50, 30], [20, 60]])
        base = Placement.even(2, 2).replicate({0: [1], 1: [0]})
        problem = Problem(loads, base, make_costs(2))
        answer = check_answer(Quota(), problem)
        assert traffic_of(loads, answer.place, (0, 0), answer.quotas).sent.tolist() == [0, 0]


def test_nothing_to_balance() -> None:
    free = {"copy_assignments": FREE}
    for problem in (
        Problem(np.zeros((4, 8), np.int64), Placement.even(8, 4), make_costs(4, **free)),
        Problem(np.full((1, 8), 50), Placement.even(8, 1), make_costs(1, **free)),
        Problem(np.full((4, 8), 500), Placement.even(8, 4), make_costs(4, **free)),
        Problem(np.zeros((3, 0), np.int64), Placement.even(0, 3), make_costs(3, **free)),
        Problem(zipf_loads(4, 8), Placement.even(8, 4), make_costs(4, **free, spare_experts=0)),
    ):
        answer = check_answer(Quota(min_gain=0.0), problem)
        assert answer.place == problem.base and answer.quotas is None


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_balanced_routing_gets_no_replicas_and_zipf_a_level_near_the_mean(world_size: int) -> None:
    tokens, num_experts = 8192, 4 * world_size
    base = Placement.even(num_experts, world_size)
    # A copy, there and back, takes as long as computing a sixteenth of what a rank has to.
    costs = make_costs(world_size, copy_assignments=tokens / 16)
    for seed in range(3):
        even = Problem(zipf_loads(world_size, num_experts, 0.0, tokens, seed), base, costs)
        assert not new_replicas(even, Quota()).any()
        for exponent in (0.8, 1.2):
            skewed = Problem(zipf_loads(world_size, num_experts, exponent, tokens, seed), base, costs)
            assert computed(Quota(), skewed).max() <= 1.1 * tokens
            assert new_replicas(skewed, Quota()).sum(axis=0).max() <= 2


@given(problem=problems(), balancer=balancers)
def test_answers_are_sound_and_never_slower_than_plain_expert_parallelism(problem: Problem, balancer: Quota) -> None:
    answer = check_answer(balancer, problem)
    copies = (answer.place.holders & ~problem.base.holders).sum(axis=0)
    most = -(-problem.base.num_chunks // problem.base.world_size) if balancer.most is None else balancer.most
    assert copies.max() <= most
    at_owner = np.bincount(problem.base.owners, problem.loads.sum(axis=0), problem.base.world_size)
    assert computed(balancer, problem).max() <= at_owner.max()
    if not len(problem.base.replicated()):
        plain = ask(Quota(most=0), problem)
        seen_s = exposed_s(int(copies.max()), problem.costs, exact=True)
        assert predicted_s(problem.loads, answer, problem.costs) + seen_s <= predicted_s(
            problem.loads, plain, problem.costs
        )
        if answer.quotas is not None:
            replicas = answer.place.holders & ~problem.base.holders
            assert (answer.quotas[replicas] >= balancer.min_tokens).all(), "no tiny quota moves an expert"


@given(problem=problems(), balancer=balancers)
def test_pure(problem: Problem, balancer: Quota) -> None:
    check_purity(balancer, problem)


@given(problem=problems(max_ranks=8, max_experts=12, replicas=False))
def test_enough_slots_bring_every_rank_near_the_mean(problem: Problem) -> None:
    loads, base = problem.loads, problem.base
    everywhere = relieve_ranks(loads, base.owners, base.holders, base.num_chunks, 1)[-1]
    mean = -(-loads.sum() // base.world_size)
    assert everywhere.level <= mean + mean // 128


@given(problem=problems(max_ranks=8, max_experts=12), most=st.integers(0, 6), min_tokens=st.sampled_from([1, 3, 50]))
def test_reliefs_are_what_they_say(problem: Problem, most: int, min_tokens: int) -> None:
    loads, base = problem.loads, problem.base
    reliefs = relieve_ranks(loads, base.owners, base.holders, most, min_tokens)
    for position, relief in enumerate(reliefs):
        quotas = np.zeros(base.holders.shape, np.int64)
        experts, ranks, amounts = relief.moves.T
        assert len({*zip(experts.tolist(), ranks.tolist(), strict=True)}) == len(relief.moves), "a pair comes once"
        assert (amounts > 0).all() and (ranks != base.owners[experts]).all()
        quotas[experts, ranks] = amounts
        quotas[np.arange(base.num_chunks), base.owners] = loads.sum(axis=0) - quotas.sum(axis=1)
        assert (quotas >= 0).all()
        new = (quotas > 0) & ~base.holders
        assert (quotas[new] >= min_tokens).all()
        slots = 0 if position == 0 else most
        assert new.sum(axis=0).max() <= slots
        traffic = traffic_of(loads, base, (0,) * base.world_size, quotas)
        assert relief.level == traffic.computed.max()
        assert relief.traffic == max(traffic.sent.max(), traffic.received.max())
        sent = np.bincount(base.owners, new.any(axis=1), base.world_size)
        assert relief.copies == max(new.sum(axis=0).max(), sent.max())
    levels = [relief.level for relief in reliefs]
    assert levels == sorted(levels, reverse=True)


def test_levels_of_one_slot_beside_the_best_there_are() -> None:
    """Ranks that hand over do not take from others, which with few ranks and slots is not always best."""
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        loads = random.integers(0, 100, (3, 3))
        base = Placement.of_owners(random.integers(0, 3, 3), 3)
        found = relieve_ranks(loads, base.owners, base.holders, 1, 1)[-1].level
        ratios.append(found / _best_level(loads.sum(axis=0), base))
    assert min(ratios) >= 1 and np.median(ratios) <= 1.1 and max(ratios) <= 1.5


def _best_level(by_expert: Any, base: Placement) -> int:
    """Of all ways to give each rank one expert more, the least maximum over sets of ranks of what only they may do."""
    best = int(by_expert.sum())
    for choice in np.ndindex(*(base.num_chunks,) * base.world_size):
        holders = base.holders.copy()
        holders[choice, np.arange(base.world_size)] = True
        level = 0
        for chosen in range(1, 1 << base.world_size):
            members = np.array([chosen >> rank & 1 for rank in range(base.world_size)], bool)
            inside = by_expert[~holders[:, ~members].any(axis=1)].sum()
            level = max(level, -(-int(inside) // int(members.sum())))
        best = min(best, level)
    return best


@pytest.mark.parametrize("arguments", [{"most": -1}, {"min_tokens": 0}, {"min_gain": -0.1}, {"min_gain": float("nan")}])
def test_senseless_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="Quota: expected"):
        Quota(**arguments)


def test_loads_of_other_ranks_or_experts_are_refused() -> None:
    for shape in ((3, 4), (2, 5)):
        with pytest.raises(InvalidArgument, match="loads"):
            Quota().balance(np.ones(shape, np.int64), Placement.even(4, 2), make_costs(2))
