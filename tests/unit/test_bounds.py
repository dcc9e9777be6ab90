"""Bounds against a linear programme of fluid schedules, and against arithmetic done by hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.bound.programme import optimum_s
from sparsecoll import Link, Placement, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan.bounds import holders_bound_s, universal_bound_s

MEGA = 10**6


class Case(NamedTuple):
    place: Placement
    chunk_bytes: list[int]
    topology: Topology

    @property
    def holders_s(self) -> float:
        return holders_bound_s(self.place, range(self.place.num_chunks), self.chunk_bytes, self.topology)

    @property
    def universal_s(self) -> float:
        return universal_bound_s(self.place, range(self.place.num_chunks), self.chunk_bytes, self.topology)

    def optimum_s(self, *, outsiders: bool = False) -> float:
        found = optimum_s(self.place, self.chunk_bytes, self.topology, outsiders=outsiders)
        assert found is not None
        return found


def draw_place(random: np.random.Generator, world_size: int, num_chunks: int) -> Placement:
    owners = random.integers(0, world_size, num_chunks)
    if random.random() < 0.5:
        owners[:] = owners[0]
    mask = random.random((num_chunks, world_size)) < random.choice([0.3, 0.6, 1.0])
    mask[np.arange(num_chunks), owners] = True
    return Placement(owners, mask)


def draw_links(random: np.random.Generator, count: int, *, alike: bool) -> tuple[Link, ...]:
    rates = random.integers(1, 9, count) * 1e6
    return (Link(rates[0], 0.0),) * count if alike else tuple(Link(rate, 0.0) for rate in rates.tolist())


def draw_topology(random: np.random.Generator, node_of: list[int], *, alike: bool) -> Topology:
    """Links between nodes are the slower ones where they are ``alike``, as they are in clusters."""
    world_size, num_nodes = len(node_of), max(node_of) + 1
    out = draw_links(random, world_size, alike=alike)
    up = draw_links(random, world_size, alike=alike)
    if alike:
        up = (Link(out[0].bandwidth_bytes_per_s * random.choice([2, 8]), 0.0),) * world_size
    shared = None
    if random.random() < 0.5:
        shared = out[:num_nodes] if alike else draw_links(random, num_nodes, alike=False)
    return Topology(tuple(node_of), up, out, shared)


def draw_case(seed: int, node_of: list[int], num_chunks: int, *, alike: bool) -> Case:
    random = np.random.default_rng(seed)
    place = draw_place(random, len(node_of), num_chunks)
    sizes = random.choice([0, 1, 3, 700, MEGA, 3 * MEGA], num_chunks)
    return Case(place, sizes.tolist(), draw_topology(random, node_of, alike=alike))


seeds = st.integers(0, 2**32 - 1)
flat_nodes = st.one_of(
    st.builds(lambda n: [0] * n, st.integers(2, 6)), st.builds(lambda n: [*range(n)], st.integers(2, 6))
)
mixed_nodes = st.lists(st.integers(1, 3), min_size=2, max_size=4).map(
    lambda counts: [node for node, count in enumerate(counts) for _ in range(count)][:7]
)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, node_of=flat_nodes, num_chunks=st.integers(1, 6), alike=st.booleans())
def test_on_one_level_the_bound_is_the_optimum_among_holders(
    seed: int, node_of: list[int], num_chunks: int, alike: bool
) -> None:
    case = draw_case(seed, node_of, num_chunks, alike=alike)
    assert case.holders_s == pytest.approx(case.optimum_s(), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, node_of=mixed_nodes, num_chunks=st.integers(1, 6), alike=st.booleans())
def test_on_two_levels_no_schedule_among_holders_is_below_the_bound(
    seed: int, node_of: list[int], num_chunks: int, alike: bool
) -> None:
    case = draw_case(seed, node_of, num_chunks, alike=alike)
    assert case.universal_s * (1 - 1e-9) <= case.holders_s <= case.optimum_s() * (1 + 1e-6)


def test_on_two_levels_the_bound_is_mostly_the_optimum() -> None:
    """Where links of a kind are alike; how often is what the two-level bound is worth."""
    ratios = []
    for seed in range(80):
        node_of = sorted(np.random.default_rng(seed).integers(0, 3, 6).tolist())
        node_of = [sorted(set(node_of)).index(node) for node in node_of]
        case = draw_case(seed, node_of, 4, alike=True)
        if optimum := case.optimum_s():
            ratios.append(case.holders_s / optimum)
    assert len(ratios) > 60
    assert np.mean(np.array(ratios) > 1 - 1e-6) >= 0.95
    assert min(ratios) > 0.8


@settings(deadline=None, max_examples=40)
@given(seed=seeds, node_of=st.one_of(flat_nodes, mixed_nodes), num_chunks=st.integers(1, 3), alike=st.booleans())
def test_no_schedule_at_all_is_below_the_universal_bound(
    seed: int, node_of: list[int], num_chunks: int, alike: bool
) -> None:
    case = draw_case(seed, node_of[:5], num_chunks, alike=alike)
    with_outsiders = case.optimum_s(outsiders=True)
    assert case.universal_s <= with_outsiders * (1 + 1e-6)
    assert with_outsiders <= case.optimum_s() * (1 + 1e-6)


def test_two_hops_by_hand() -> None:
    """Owner 0 sends to 1 and 2, which owe a chunk each to 3 and 4. The owner's chunk takes two sends, of which it must
    do one: 4 sends of three ranks, so 4/3. Ranks 3 and 4 could relay as well: 6/5, and no cheap bound sees why."""
    place = Placement.of_owners([0, 1, 2], 5).replicate({0: [1, 2], 1: [3], 2: [4]})
    case = Case(place, [MEGA] * 3, Topology.flat(5, Link(1e6, 0.0)))
    assert case.holders_s == pytest.approx(4 / 3)
    assert case.optimum_s() == pytest.approx(4 / 3)
    assert case.optimum_s(outsiders=True) == pytest.approx(6 / 5)
    assert case.universal_s == pytest.approx(1.0)


def test_one_hot_owner_needs_the_time_of_one_copy() -> None:
    place = Placement.of_owners([0] * 8, 4).replicate({chunk: range(4) for chunk in range(8)})
    case = Case(place, [MEGA] * 8, Topology.flat(4, Link(50e6, 1e-4)))
    assert case.holders_s == pytest.approx(8 * MEGA / 50e6 + 1e-4)
    assert case.universal_s == case.holders_s


def test_an_owner_without_helpers_sends_every_copy() -> None:
    """Each chunk has one receiver, so there is nothing to share: the owner's sends are the bound."""
    place = Placement.of_owners([0, 0, 0], 4).replicate({0: [1], 1: [2], 2: [3]})
    case = Case(place, [MEGA, 2 * MEGA, 3 * MEGA], Topology.flat(4, Link(1e6, 0.0)))
    assert case.holders_s == case.universal_s == pytest.approx(6.0)


def test_a_slow_rank_forwards_little() -> None:
    """Two receivers, one of them slow: it takes its copy in one second; the owner and the fast one share the rest."""
    place = Placement.of_owners([0], 3).replicate({0: [1, 2]})
    links = (Link(1e6, 0.0), Link(1e6, 0.0), Link(0.5e6, 0.0))
    assert Case(place, [MEGA], Topology((0, 0, 0), links)).holders_s == pytest.approx(2.0)
    links = (Link(1e6, 0.0), Link(0.25e6, 0.0), Link(9e6, 0.0))
    assert Case(place, [MEGA], Topology((0, 0, 0), links)).holders_s == pytest.approx(4.0)


def test_a_shared_link_carries_each_chunk_once() -> None:
    place = Placement.of_owners([0], 4).replicate({0: [1, 2, 3]})
    up, out = Link(10e6, 0.0), Link(2e6, 0.0)
    case = Case(place, [MEGA], Topology((0, 0, 1, 1), up, out, Link(1e6, 0.0)))
    assert case.holders_s == case.universal_s == pytest.approx(1.0)
    # Without the shared link both ranks of a node let the chunk in, and each has half of it and spreads that.
    case = Case(place, [MEGA], Topology((0, 0, 1, 1), up, out))
    assert case.holders_s == pytest.approx(case.optimum_s()) == pytest.approx(0.25)


def test_a_sole_holder_of_a_node_has_only_its_own_rail() -> None:
    place = Placement.of_owners([0], 4).replicate({0: [2]})
    case = Case(place, [MEGA], Topology((0, 0, 1, 1), Link(10e6, 0.0), Link(1e6, 0.0)))
    assert case.holders_s == pytest.approx(1.0)
    # Anybody in the two nodes may help if outsiders may: two rails each way, and the owner's link inside as well.
    assert case.universal_s == pytest.approx(0.5)
    assert case.optimum_s(outsiders=True) == pytest.approx(0.5)


def test_two_hops_between_nodes_and_within_one() -> None:
    """The example with 4/3 again: with nodes in the place of ranks, and on one node while another has nothing to do."""
    place = Placement.of_owners([0, 2, 4], 10).replicate({0: range(6), 1: [2, 3, 6, 7], 2: [4, 5, 8, 9]})
    fast, slow = Link(100e6, 0.0), Link(1e6, 0.0)
    between = Case(place, [MEGA] * 3, Topology((0, 0, 1, 1, 2, 2, 3, 3, 4, 4), fast, slow, slow))
    assert between.holders_s == pytest.approx(4 / 3)
    place = Placement.of_owners([0, 1, 2], 6).replicate({0: [1, 2], 1: [3], 2: [4]})
    within = Case(place, [MEGA] * 3, Topology((0, 0, 0, 0, 0, 1), slow, slow))
    assert within.holders_s == pytest.approx(4 / 3)


def test_what_comes_from_the_own_node_alone_comes_by_scale_up() -> None:
    place = Placement.of_owners([1, 2, 3], 5).replicate({0: [0], 1: [0], 2: [0]})
    case = Case(place, [MEGA] * 3, Topology((0, 0, 0, 0, 1), Link(1e6, 0.0), Link(1e6, 0.0)))
    assert case.holders_s == pytest.approx(case.optimum_s()) == pytest.approx(3.0)
    assert case.universal_s == pytest.approx(1.5), "half could come by scale-out, through the rank outside"


def test_a_node_takes_in_what_its_ranks_lack() -> None:
    place = Placement.of_owners([2, 4], 6).replicate({0: [0], 1: [1]})
    links = Link(10e6, 0.0), Link(10e6, 0.0), Link(1e6, 0.0)
    case = Case(place, [MEGA, 2 * MEGA], Topology((0, 0, 1, 1, 2, 2), *links))
    assert case.holders_s == case.universal_s == pytest.approx(3.0)


def test_links_of_very_different_speed() -> None:
    place = Placement.of_owners([0, 1], 4).replicate({0: [1, 2, 3], 1: [0, 2]})
    links = (Link(200e9, 0.0), Link(50e6, 0.0), Link(25e9, 0.0), Link(50e6, 0.0))
    case = Case(place, [40 * MEGA, 7 * MEGA], Topology((0,) * 4, links))
    assert case.holders_s == pytest.approx(case.optimum_s(), rel=1e-6)
    endless = Topology((0, 0, 1, 1), Link(float("inf"), 0.0), Link(1e6, 0.0))
    assert Case(place, [4 * MEGA, MEGA], endless).holders_s == pytest.approx(2.5)


def test_the_least_latency_is_added() -> None:
    place = Placement.of_owners([0], 4).replicate({0: [1, 2, 3]})
    links = Link(1e9, 3e-6), Link(1e6, 2e-5), Link(1e6, 5e-5)
    with_latency = Case(place, [MEGA], Topology((0, 0, 1, 1), *links))
    without = with_latency._replace(topology=Topology((0, 0, 1, 1), *(Link(x.bandwidth_bytes_per_s, 0) for x in links)))
    assert with_latency.holders_s == pytest.approx(without.holders_s + 3e-6)
    alone = with_latency._replace(topology=Topology((0, 1, 2, 3), *links))
    assert alone.holders_s == pytest.approx(1.0 + 5e-5), "a message between nodes passes the shared link as well"


@pytest.mark.parametrize("node_of", [(0,), (0, 0, 0), (0, 1, 2), (0, 0, 1)])
def test_nothing_to_move_takes_no_time(node_of: tuple[int, ...]) -> None:
    world_size = len(node_of)
    nothing_held = Case(Placement.even(5, world_size), [MEGA] * 5, Topology(node_of))
    empty_chunks = Case(Placement.even(2, world_size).replicate({0: range(world_size)}), [0, MEGA], Topology(node_of))
    no_chunks = Case(Placement.even(0, world_size), [], Topology(node_of))
    for case in (nothing_held, empty_chunks, no_chunks):
        assert case.holders_s == case.universal_s == case.optimum_s() == 0.0


def test_only_the_chunks_that_take_part_count() -> None:
    place = Placement.of_owners([0, 0, 1], 3).replicate({0: [1], 1: [2], 2: [0]})
    topology = Topology.flat(3, Link(1e6, 0.0))
    sizes = [MEGA, 2 * MEGA, 4 * MEGA]
    for chunks, expected in (([0, 1, 2], 4.0), ([0, 1], 3.0), ([1], 2.0), ([], 0.0)):
        assert holders_bound_s(place, chunks, sizes, topology) == pytest.approx(expected)
        assert universal_bound_s(place, chunks, sizes, topology) == pytest.approx(expected)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, node_of=st.one_of(flat_nodes, mixed_nodes))
def test_only_how_much_of_a_kind_counts(seed: int, node_of: list[int]) -> None:
    """Chunks of one owner and the same holders may be cut and joined; sizes and times are proportional."""
    case = draw_case(seed, node_of, 4, alike=False)
    place, sizes = case.place, case.chunk_bytes
    twice = Placement(np.tile(place.owners, 2), np.tile(place.holders, (2, 1)))
    halves = Case(twice, [size // 2 for size in sizes] + [size - size // 2 for size in sizes], case.topology)
    larger = case._replace(chunk_bytes=[1000 * size for size in sizes])
    assert halves.holders_s == pytest.approx(case.holders_s, rel=1e-6)
    assert halves.universal_s == pytest.approx(case.universal_s, rel=1e-9)
    assert larger.holders_s == pytest.approx(1000 * case.holders_s, rel=1e-6)
    assert larger.universal_s == pytest.approx(1000 * case.universal_s, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, node_of=st.one_of(flat_nodes, mixed_nodes))
def test_plans_of_both_collectives_carry_the_bounds(seed: int, node_of: list[int]) -> None:
    case = draw_case(seed, node_of, 4, alike=True)
    for plan_one in (plan_all_gather, plan_reduce_scatter):
        plan = plan_one(case.place, case.chunk_bytes, case.topology)
        assert (plan.bound_s, plan.universal_bound_s) == (case.holders_s, case.universal_s)


def test_many_chunks_on_many_ranks() -> None:
    """Every hot chunk of one owner on 64 ranks of 1,024: its own port is what everybody waits for."""
    random = np.random.default_rng(0)
    place = Placement.of_owners([0] * 32 + random.integers(1, 1024, 480).tolist(), 1024)
    place = place.replicate({chunk: random.choice(1024, 64, replace=False).tolist() for chunk in range(32)})
    sizes = random.integers(MEGA, 40 * MEGA, 512).tolist()
    flat = Case(place, sizes, Topology.flat(1024, Link(200e9, 0.0)))
    assert flat.holders_s == flat.universal_s == pytest.approx(sum(sizes[:32]) / 200e9)
    nodes = Topology(tuple(rank // 8 for rank in range(1024)), Link(200e9, 0.0), Link(25e9, 0.0), Link(25e9, 0.0))
    hosts = Case(place, sizes, nodes)
    assert hosts.holders_s >= hosts.universal_s >= sum(sizes[:32]) / 25e9
