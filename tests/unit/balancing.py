"""Random problems for balancers, and what every answer must keep to."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from sparsecoll import Placement, Topology
from sparsecoll.balance.base import Balance, Balancer
from sparsecoll.balance.costs import Costs, Loads

__all__ = ["Problem", "ask", "check_answer", "check_corners", "check_purity", "make_costs", "problems", "zipf_loads"]

_BYTES_PER_S = 2.0**40
_MIXTURES = [(0.0, 0.0, 1.0), (0.5, 0.3, 0.2), (0.2, 0.8, 0.0), (1.0, 0.0, 0.0)]
"""How many loads are zero, tie, are large."""


class Problem(NamedTuple):
    """Arguments of `Balancer.balance`."""

    loads: Loads
    base: Placement
    costs: Costs


def make_costs(
    topology: Topology | int,
    *,
    copy_assignments: float = 8.0,
    token_assignments: float = 0.0,
    hidden_copies: float = 0.0,
    spare_experts: int = 1 << 30,
) -> Costs:
    """Costs in seconds that each hold one assignment, computed forward and backward.

    Args:
        topology: or a number of ranks on one node.
        copy_assignments: assignments computed while an expert is copied to all ranks and its gradients come back.
        token_assignments: assignments computed while one travels there and back, twice; 0 is next to nothing.
        hidden_copies: experts that can be copied to all ranks under the dense compute.
        spare_experts: see `Costs`.
    """
    expert_bytes = max(1, round(copy_assignments / 2 * _BYTES_PER_S))
    return Costs(
        topology=Topology.flat(topology) if isinstance(topology, int) else topology,
        expert_bytes=expert_bytes,
        token_bytes=max(1, round(token_assignments / 4 * _BYTES_PER_S)),
        bytes_per_s=_BYTES_PER_S,
        token_s=1 / 3,
        hidden_s=hidden_copies * expert_bytes / _BYTES_PER_S,
        spare_experts=spare_experts,
    )


@st.composite
def problems(draw: st.DrawFn, max_ranks: int = 6, max_experts: int = 9, replicas: bool = True) -> Problem:
    """Owners and nodes in any order, loads of which many are zero or tie; with ``replicas`` the base may have some."""
    world_size, num_experts = draw(st.integers(1, max_ranks)), draw(st.integers(1, max_experts))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = Placement.of_owners(random.integers(0, world_size, num_experts), world_size)
    if replicas and draw(st.booleans()):
        base = Placement(base.owners, base.holders | (random.random(base.holders.shape) < 0.2))
    most = random.choice([1, 4, 10_001], (world_size, num_experts), p=draw(st.sampled_from(_MIXTURES)))

    nodes = random.integers(0, draw(st.integers(1, 3)), world_size).tolist()
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    costs = make_costs(
        Topology(tuple(numbers[node] for node in nodes)),
        copy_assignments=draw(st.sampled_from([1e-3, 1.0, 30.0, 1000.0])),
        token_assignments=draw(st.sampled_from([0.0, 0.5, 4.0])),
        hidden_copies=draw(st.sampled_from([0.0, 0.5, 1.0, 2.5, 20.0])),
        spare_experts=draw(st.sampled_from([0, 1, 2, 3, 1 << 30])),
    )
    return Problem(random.integers(0, most), base, costs)


def ask(balancer: Balancer, problem: Problem) -> Balance:
    return balancer.balance(problem.loads, problem.base, problem.costs)


def check_answer(balancer: Balancer, problem: Problem) -> Balance:
    """The answer keeps what the base has, respects memory, and its quotas compute every assignment once."""
    answer = ask(balancer, problem)
    base, place = problem.base, answer.place
    np.testing.assert_array_equal(place.owners, base.owners)
    assert place.holders.shape == base.holders.shape
    assert (place.holders >= base.holders).all(), "replicas that are there already stay"
    added = (place.holders & ~base.holders).sum(axis=0)
    assert added.max() <= problem.costs.spare_experts
    if answer.quotas is not None:
        assert answer.quotas.dtype == np.int64 and answer.quotas.shape == place.holders.shape
        assert (answer.quotas >= 0).all() and not answer.quotas[~place.holders].any()
        np.testing.assert_array_equal(answer.quotas.sum(axis=1), problem.loads.sum(axis=0))
    return answer


def check_purity(balancer: Balancer, problem: Problem) -> None:
    """One answer, whoever asks, how often, and however the loads lie in memory; arguments stay as they are."""
    loads, shown = problem.loads, problem.loads.copy()
    first = balancer.balance(shown, problem.base, problem.costs)
    np.testing.assert_array_equal(shown, loads)
    frozen = loads.copy()
    frozen.flags.writeable = False
    spread = np.zeros((2 * loads.shape[0], 3 * loads.shape[1]), np.int64)
    spread[::2, ::3] = loads
    for same in (shown, frozen, np.asfortranarray(loads), loads.astype(np.int32), spread[::2, ::3]):
        for asked in (balancer, copy.deepcopy(balancer)):
            again = asked.balance(same, problem.base, problem.costs)
            assert again.place == first.place
            assert (again.quotas is None) == (first.quotas is None)
            if first.quotas is not None:
                np.testing.assert_array_equal(again.quotas, first.quotas)


def check_corners(balancer: Balancer) -> None:
    """Nothing to balance, or nowhere to: no loads, one rank, no experts, no memory."""
    free = {"copy_assignments": 1e-3, "hidden_copies": 100.0}
    idle = Problem(np.zeros((4, 8), np.int64), Placement.even(8, 4), make_costs(4, **free))
    alone = Problem(np.full((1, 8), 50), Placement.even(8, 1), make_costs(1, **free))
    nothing = Problem(np.zeros((3, 0), np.int64), Placement.even(0, 3), make_costs(3, **free))
    crowded = Problem(zipf_loads(4, 8), Placement.even(8, 4), make_costs(4, **free, spare_experts=0))
    for problem in (idle, alone, nothing, crowded):
        assert check_answer(balancer, problem).place == problem.base
        assert (
            check_answer(balancer, problem._replace(costs=replace(problem.costs, hidden_s=0.0))).place == problem.base
        )


def zipf_loads(num_ranks: int, num_experts: int, exponent: float = 1.2, tokens: int = 1000, seed: int = 0) -> Loads:
    """``tokens`` assignments of each rank to experts of Zipf popularity, in random order."""
    random = np.random.default_rng(seed)
    popularity = random.permutation(np.arange(1, num_experts + 1) ** -exponent)
    return random.multinomial(tokens, popularity / popularity.sum(), size=num_ranks).astype(np.int64)
