"""Owners in all layers together: equal numbers, level loads, and no move without a cause."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import InvalidArgument, Placement, Topology
from sparsecoll.balance.base import Balance, Balancer
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.balance.faster_moe import FasterMoE
from sparsecoll.balance.hecate import Hecate
from sparsecoll.balance.none import NoReplicas
from sparsecoll.balance.sharding import best_sharding, migration_bytes, shard_experts, sharding_gain_s
from sparsecoll.balance.traffic import predicted_s
from tests.unit.balancing import make_costs, zipf_loads


class Model(NamedTuple):
    """Arguments of `shard_experts`."""

    loads: list[Loads]
    current: list[Placement]
    costs: list[Costs]

    @property
    def world_size(self) -> int:
        return self.current[0].world_size

    def cold(self, layer: int) -> list[int]:
        """Experts that dense compute leaves no time to copy."""
        by_expert = self.loads[layer].sum(axis=0)
        order = sorted(range(len(by_expert)), key=lambda each: (-by_expert[each], each))
        return order[self.costs[layer].overlap_degree :]


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Up to four layers, with different numbers of experts and copies; owners and nodes in any order."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    world_size = draw(st.integers(1, 6))
    nodes = random.integers(0, draw(st.integers(1, 3)), world_size).tolist()
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    topology = Topology(tuple(numbers[node] for node in nodes))
    model = Model([], [], [])
    for num_experts in draw(st.lists(st.integers(0, 12), min_size=1, max_size=4)):
        base = Placement.of_owners(random.integers(0, world_size, num_experts), world_size)
        model.current.append(Placement(base.owners, base.holders | (random.random(base.holders.shape) < 0.2)))
        model.costs.append(make_costs(topology, hidden_copies=draw(st.sampled_from([0.0, 1.0, 3.0, 20.0]))))
        model.loads.append(random.integers(0, draw(st.sampled_from([1, 3, 1000])), (world_size, num_experts)))
    return model


def owned(placements: list[Placement]) -> list[int]:
    """How many experts each rank owns."""
    return np.sum([np.bincount(place.owners, minlength=place.world_size) for place in placements], axis=0).tolist()


def num_moves(model: Model, new: list[Placement]) -> int:
    return sum(int((old.owners != place.owners).sum()) for old, place in zip(model.current, new, strict=True))


@given(models())
def test_ranks_own_equally_many(model: Model) -> None:
    new = shard_experts(*model)
    for old, place in zip(model.current, new, strict=True):
        assert place.num_chunks == old.num_chunks and place.world_size == old.world_size
        assert not len(place.replicated())
    assert max(owned(new)) - min(owned(new)) <= 1


@given(models())
def test_pure(model: Model) -> None:
    shown = copy.deepcopy(model)
    new = shard_experts(*shown)
    np.testing.assert_equal([each.tolist() for each in shown.loads], [each.tolist() for each in model.loads])
    others = [np.asfortranarray(loads).astype(np.int32) for loads in model.loads]
    without = [Placement.of_owners(place.owners, place.world_size) for place in model.current]
    assert shard_experts(others, without, model.costs) == new, "replicas and memory layout do not matter"


@given(models())
def test_ranks_stay_below_what_greedy_packing_promises(model: Model) -> None:
    """With slots to spare: an expert stays below 11/10 of the mean or goes to the least loaded."""
    roomy = Model(model.loads[:1], model.current[:1], model.costs[:1])
    # A layer of idle experts that are copied anyway makes room for all.
    num_idle = 12 * roomy.world_size**2
    roomy.loads.append(np.zeros((roomy.world_size, num_idle), np.int64))
    roomy.current.append(Placement.even(num_idle, roomy.world_size))
    roomy.costs.append(replace(roomy.costs[0], hidden_s=1e9))
    new = shard_experts(*roomy)
    cold = roomy.cold(0)
    if not cold:
        return
    by_expert = roomy.loads[0].sum(axis=0)
    of_rank = np.bincount(new[0].owners[cold], by_expert[cold], roomy.world_size)
    node_of = np.array(roomy.costs[0].topology.node_of)
    if node_of.max() == 0:
        assert of_rank.max() <= 1.1 * of_rank.mean() + by_expert[cold].max()


@given(models(), st.sampled_from([0.0, 1e9]))
def test_what_is_level_stays(model: Model, hidden_s: float) -> None:
    """If ranks own equally many and every expert has the same load, and none is copied or all are, nothing moves."""
    world_size = model.world_size
    level = model._replace(
        current=[Placement.even(3 * world_size, world_size) for _ in model.current],
        loads=[np.full((world_size, 3 * world_size), 7) for _ in model.loads],
        costs=[replace(costs, hidden_s=hidden_s) for costs in model.costs],
    )
    assert num_moves(level, shard_experts(*level)) == 0


def test_noise_moves_little() -> None:
    loads = [zipf_loads(8, 64, exponent=0.0, tokens=4096, seed=layer) for layer in range(4)]
    current = [Placement.even(64, 8)] * 4
    model = Model(loads, current, [make_costs(Topology((0, 0, 0, 0, 1, 1, 1, 1)))] * 4)
    assert num_moves(model, shard_experts(*model)) == 0


def test_by_hand_one_layer() -> None:
    """Loads 10, 9, 2, 1 of which one rank has the first two: expert 1 goes, and 3 makes room for it."""
    loads = [np.array([[5, 4, 1, 0], [5, 5, 1, 1]])]
    new = shard_experts(loads, [Placement.even(4, 2)], [make_costs(2)])
    assert new[0].owners.tolist() == [0, 1, 1, 0]


def test_by_hand_hot_experts_fill_what_is_left() -> None:
    """Expert 0 will be copied, so that of the others only 1 and 2 count, and 0 makes room."""
    loads = [np.array([[50, 5, 4, 0], [50, 5, 5, 1]])]
    current = [Placement.of_owners([1, 0, 0, 1], 2)]
    new = shard_experts(loads, current, [make_costs(2, hidden_copies=1.0)])
    assert new[0].owners.tolist() == [0, 0, 1, 1]


def test_by_hand_a_rank_owns_more_of_one_layer_and_less_of_another() -> None:
    """Layer 0 has one heavy expert, which gets a rank of its own; layer 1 fills that rank's slots."""
    loads = [np.array([[15, 5, 5, 5], [15, 5, 5, 5]]), np.array([[1, 1, 1, 1], [1, 1, 1, 1]])]
    new = shard_experts(loads, [Placement.even(4, 2)] * 2, [make_costs(2)] * 2)
    assert new[0].owners.tolist() == [0, 1, 1, 1]
    assert np.bincount(new[1].owners).tolist() == [3, 1]


def test_by_hand_nodes_come_first() -> None:
    """Rank 1 is idle, but its node has expert 0 already: expert 1 goes to the other node."""
    loads = [np.tile([30, 20, 1, 1], (4, 1))]
    topology = Topology((0, 0, 1, 1))
    current = [Placement.of_owners([0, 0, 2, 3], 4)]
    new = shard_experts(loads, current, [make_costs(topology)])
    assert topology.node_of[new[0].owners[1]] == 1
    flat = shard_experts(loads, current, [make_costs(4)])
    assert flat[0].owners[1] == 1


def test_by_hand_the_busiest_layer_chooses_first() -> None:
    """Both layers would leave rank 1 its two experts, but one has to go: of the layer without much load."""
    loads = [np.array([[5, 3, 2]] * 2), np.array([[90, 10, 10]] * 2)]
    new = shard_experts(loads, [Placement.of_owners([0, 1, 1], 2)] * 2, [make_costs(2)] * 2)
    assert [place.owners.tolist() for place in new] == [[0, 1, 0], [0, 1, 1]]


def test_by_hand_what_is_no_fuller_than_dealt_out_anew_stays() -> None:
    """Dealing out 3, 3, 2, 2, 2 would give a rank 7 as well, if the mean is 6."""
    current = [Placement.of_owners([0, 1, 0, 0, 1], 2)]
    assert shard_experts([np.array([[3, 3, 2, 2, 2], [0] * 5])], current, [make_costs(2)]) == current


def test_by_hand_experts_to_be_copied_go_where_fewest_of_them_are() -> None:
    """Rank 0 has to give up two of four, and nobody else has to."""
    current = [Placement.of_owners([0, 0, 1, 2, 0, 0], 3)]
    new = shard_experts([np.array([[9, 8, 7, 6, 0, 0]] * 3)], current, [make_costs(3)], num_copied=[4])
    assert new[0].owners.tolist() == [1, 2, 1, 2, 0, 0]


def test_what_does_not_divide_evenly() -> None:
    """Ten experts on four ranks: those that have most now keep three."""
    current = [Placement.of_owners([3, 3, 3, 1, 1, 1, 0, 0, 0, 0], 4)]
    new = shard_experts([np.zeros((4, 10), np.int64)], current, [make_costs(4)])
    assert owned(new) == [3, 3, 2, 2]
    assert num_moves(Model([], current, []), new) == 2


def test_skewed_layers_gain() -> None:
    """Contiguous owners with popular experts side by side: level owners are faster, also with copies."""
    popularity = np.arange(1, 33) ** -0.9
    random = np.random.default_rng(0)
    loads = [random.multinomial(4096, popularity / popularity.sum(), size=4) for _ in range(3)]
    current = [Placement.even(32, 4)] * 3
    costs = [make_costs(Topology((0, 0, 1, 1)), hidden_copies=2.0, token_assignments=1.0)] * 3
    new = shard_experts(loads, current, costs)
    for balancer in (Hecate(exposed=False), FasterMoE()):
        gain_s = sharding_gain_s(loads, current, new, balancer, costs)
        assert gain_s > 0
        assert sharding_gain_s(loads, new, current, balancer, costs) == -gain_s
        assert sharding_gain_s(loads, current, current, balancer, costs) == 0
    plain = [predicted_s(loads[0], Balance(place), costs[0]) for place in (current[0], new[0])]
    assert plain[1] < plain[0]


@given(models(), st.sampled_from([Hecate(), Hecate(exposed=False), FasterMoE(), NoReplicas()]))
def test_the_best_sharding_never_loses(model: Model, balancer: Balancer) -> None:
    best = best_sharding(*model, balancer)
    assert best.gain_s == sharding_gain_s(model.loads, *without_replicas(model, best.owners), balancer, model.costs)
    assert best.gain_s > 0 or num_moves(model, best.owners) == 0
    for num_copied in (None, [0] * len(model.loads)):
        other = shard_experts(*model, num_copied)
        gain_s = sharding_gain_s(model.loads, *without_replicas(model, other), balancer, model.costs)
        assert gain_s <= max(0.0, best.gain_s)


def without_replicas(model: Model, new: list[Placement]) -> tuple[list[Placement], list[Placement]]:
    """Present owners, and new ones."""
    return [Placement.of_owners(place.owners, place.world_size) for place in model.current], new


def test_the_best_sharding_knows_what_the_balancer_copies() -> None:
    """Dense compute would hide copies, but the balancer makes none: then the hottest experts count as well."""
    loads = [np.tile([50, 40, 0, 0], (2, 1))]
    current, costs = [Placement.even(4, 2)], [make_costs(2, hidden_copies=2.0)]
    assert shard_experts(loads, current, costs)[0] == current[0]
    best = best_sharding(loads, current, costs, NoReplicas())
    assert best.owners[0].owners[0] != best.owners[0].owners[1]
    assert best.gain_s == pytest.approx(180 - 100)


def test_the_best_sharding_expects_copies_that_pay() -> None:
    """Nothing is hidden, yet the hottest experts are copied: owners are level without them."""
    loads, current = [zipf_loads(8, 32, tokens=4096, seed=seed) for seed in range(4)], [Placement.even(32, 8)] * 4
    costs = [make_costs(8, copy_assignments=300.0)] * 4
    wrong = shard_experts(loads, current, costs)
    assert sharding_gain_s(loads, current, wrong, Hecate(), costs) < 0
    assert best_sharding(loads, current, costs, Hecate()).gain_s > 0


def test_gain_counts_copies_that_are_seen() -> None:
    """One hot expert either way; at the rank without other work it needs no copies."""
    loads = [np.array([[0, 100, 60, 0], [0, 100, 60, 0]])]
    old, new = [Placement.of_owners([0, 1, 1, 0], 2)], [Placement.of_owners([1, 0, 1, 0], 2)]
    costs = [make_costs(2, copy_assignments=40.0)]
    # Old: 320 on rank 1; a copy of expert 1 makes that 220 and costs 40, one more of 2 makes it 160. New: 200 and 120.
    assert sharding_gain_s(loads, old, new, FasterMoE(), costs) == pytest.approx((160 + 80) - 200)


def test_migration_bytes() -> None:
    old = [Placement.of_owners([0, 0, 1, 2], 3), Placement.of_owners([0, 1], 3)]
    new = [Placement.of_owners([1, 1, 2, 2], 3), Placement.of_owners([0, 2], 3)]
    # Rank 0 sends two of layer 0, rank 1 receives them; rank 2 receives one of each.
    assert migration_bytes(old, new, [8, 100]) == 8 + 100
    assert migration_bytes(old, new, [8, 1]) == 2 * 8
    assert migration_bytes(old, old, [8, 100]) == 0
    assert migration_bytes([], [], []) == 0
    assert isinstance(migration_bytes(old, new, [8, 1]), int)


def test_no_layers() -> None:
    assert shard_experts([], [], []) == []


def test_refuses() -> None:
    place, loads = Placement.even(2, 2), np.ones((2, 2), np.int64)
    with pytest.raises(InvalidArgument, match="of all layers, got 1, 2 and 1"):
        shard_experts([loads], [place, place], [make_costs(2)])
    with pytest.raises(InvalidArgument, match="same 2 ranks, got layer 1"):
        shard_experts([loads] * 2, [place] * 2, [make_costs(2), make_costs(Topology((0, 1)))])
