"""The traffic of a Balance is that of the dispatcher, and what it costs."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import Placement, Topology
from sparsecoll.balance.base import Balance
from sparsecoll.balance.traffic import Spread, Traffic, copying_s, exposed_s, predicted_s, traffic_of
from sparsecoll.moe.routes import plan_routes
from tests.unit.balancing import Problem, make_costs, problems


def assert_equal(traffic: Traffic, other: Traffic) -> None:
    for name, values in traffic._asdict().items():
        assert values.dtype == np.int64
        np.testing.assert_array_equal(values, getattr(other, name), err_msg=name)


def walked(problem: Problem, place: Placement) -> Traffic:
    """From where the dispatcher sends every assignment."""
    quotas = plan_routes(problem.loads, place.holders, place.owners, problem.costs.topology.node_of).quotas
    between = quotas.sum(axis=1)
    stays = between.diagonal()
    return Traffic(between.sum(axis=0), between.sum(axis=1) - stays, between.sum(axis=0) - stays)


@given(problems())
def test_traffic_is_the_dispatchers(problem: Problem) -> None:
    node_of = problem.costs.topology.node_of
    assert_equal(traffic_of(problem.loads, problem.base, node_of), walked(problem, problem.base))
    assert_equal(traffic_of(problem.loads.astype(np.int32), problem.base, node_of), walked(problem, problem.base))


@given(problems(), st.randoms(use_true_random=False))
def test_traffic_of_quotas(problem: Problem, random: Random) -> None:
    """Each rank first takes its own assignments, up to its quota; all others cross."""
    loads, base, costs = problem
    quotas = np.zeros(base.holders.shape, np.int64)
    for expert, load in enumerate(loads.sum(axis=0)):
        for rank in np.flatnonzero(base.holders[expert]):
            quotas[expert, rank] = random.randint(0, int(load - quotas[expert].sum()))
        quotas[expert, base.owners[expert]] += load - quotas[expert].sum()
    traffic = traffic_of(loads, base, costs.topology.node_of, quotas)
    np.testing.assert_array_equal(traffic.computed, quotas.sum(axis=0))
    for rank in range(base.world_size):
        stays = sum(min(loads[rank, expert], quotas[expert, rank]) for expert in range(base.num_chunks))
        assert traffic.sent[rank] == loads[rank].sum() - stays
        assert traffic.received[rank] == quotas[:, rank].sum() - stays


@given(problems(), st.data())
def test_spreading_experts_is_traffic_of_their_placement(problem: Problem, data: st.DataObject) -> None:
    loads, base, costs = problem
    spread = Spread(loads, base, costs)
    order = data.draw(st.permutations(range(base.num_chunks)))
    for expert in order[: data.draw(st.integers(0, len(order)))]:
        expected = spread.preview(expert)
        spread.copy(expert)
        assert_equal(spread.traffic, expected)
    assert spread.order == list(order[: len(spread.order)])
    for most in (0, len(spread.order) // 2, len(spread.order)):
        place = base.replicate({expert: range(base.world_size) for expert in order[:most]})
        assert spread.place(most) == place
    assert_equal(spread.traffic, traffic_of(loads, place, costs.topology.node_of))
    np.testing.assert_array_equal(spread.copies, (place.holders & ~base.holders).sum(axis=0))


def test_times_by_hand() -> None:
    """Two nodes of two ranks; expert 0 on ranks 0 and 1, expert 1 on rank 2 only."""
    place = Placement.of_owners([0, 2], 4).replicate({0: [1]})
    loads = np.array([[10, 4], [20, 0], [7, 1], [5, 0]])
    costs = make_costs(Topology((0, 0, 1, 1)), token_assignments=2.0, copy_assignments=6.0, hidden_copies=1.5)
    traffic = traffic_of(loads, place, costs.topology.node_of)
    assert_equal(traffic, Traffic(np.array([22, 20, 5, 0]), np.array([4, 0, 7, 5]), np.array([12, 0, 4, 0])))
    assert predicted_s(loads, Balance(place), costs) == pytest.approx(22 + 2 * 12)
    quotas = np.array([[16, 26, 0, 0], [0, 0, 5, 0]])
    assert predicted_s(loads, Balance(place, quotas), costs) == pytest.approx(26 + 2 * 7)

    base = Placement.of_owners([0, 2], 4)
    assert copying_s(base, place, costs) == 0
    assert copying_s(base, place, costs, exact=True) == pytest.approx(3), "the gather; gradients come home unseen"
    assert exposed_s(1, costs) == 0 and exposed_s(2, costs) == pytest.approx(2 * (2 * 3 - 1.5 * 3))
    assert exposed_s(2, costs, exact=True) == pytest.approx(2 * 3 + (2 * 3 - 1.5 * 3))
