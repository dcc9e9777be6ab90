"""Relayed schedules, by property: trees of holders, what crosses between nodes, and how busy links are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecoll import Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan.transfer import GRANULE_BYTES, SLOTS
from tests.plans import Case, Row, cases, check_cover, draw_case, gathered, pieces_of, reduced, rows_of

RELAYED = ["relay", "hierarchical"]
MEGA = 10**6


def relayed_plans(case: Case, algorithm: str) -> Iterator[Plan]:
    yield case.gather(algorithm)
    yield case.reduce(algorithm)


def turned(plan: Plan) -> list[Row]:
    """Rows of an all-gather, or with arrows reversed those of the all-gather that a reduce-scatter mirrors."""
    rows = rows_of(plan)
    return rows if plan.op == "all_gather" else [row._replace(src=row.dst, dst=row.src) for row in rows]


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(RELAYED))
def test_each_holder_gets_each_byte_once_along_a_tree_of_holders(case: Case, algorithm: str) -> None:
    for plan in relayed_plans(case, algorithm):
        arriving = defaultdict(list)
        for row in turned(plan):
            arriving[row.dst, row.chunk].append(row.range)
            assert case.place.holders[row.chunk, row.src] and case.place.holders[row.chunk, row.dst]
        for (rank, chunk), ranges in arriving.items():
            assert rank != case.place.owners[chunk]
            check_cover(ranges, case.chunk_bytes[chunk])
        assert set(arriving) == reached(case)


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(RELAYED))
def test_what_is_forwarded_came_in_earlier_stages_cut_alike(case: Case, algorithm: str) -> None:
    for plan in relayed_plans(case, algorithm):
        rows = turned(plan)
        brought = {(row.dst, row.chunk, row.begin): row for row in rows}
        for row in rows:
            if row.src == case.place.owners[row.chunk]:
                continue
            source = brought[row.src, row.chunk, row.begin]
            assert (source.end, source.pieces) == (row.end, row.pieces)
        # Piece by piece, as stages of pieces depend on spans too.
        stage_of = {(each.row, each.number): each.stage for each in pieces_of(plan)}
        for row in rows:
            if row.src != case.place.owners[row.chunk]:
                source = brought[row.src, row.chunk, row.begin]
                for piece in range(row.pieces):
                    there, here = stage_of[source.number, piece], stage_of[row.number, piece]
                    assert there < here if plan.op == "all_gather" else there > here


@pytest.mark.parametrize("num_nodes", [2, 3, 5])
def test_what_is_forwarded_on_nodes_came_in_earlier_stages(num_nodes: int) -> None:
    """Ten ranks and fourteen chunks: enough for owners, senders, relays and entries to be all kinds of ranks."""
    for seed in range(120):
        random = np.random.default_rng([num_nodes, seed])
        sizes = [1 << 16, 1 << 18, 1 << 20]
        case = draw_case(
            random, world_size=10, num_chunks=14, sizes=sizes, num_nodes=num_nodes, has_node_links=seed % 2 == 0
        )
        assert len(gathered(case.gather("hierarchical"))) == len(reached(case)), f"seed {seed}"
        assert set(reduced(case.reduce("hierarchical"))) == {chunk for _, chunk in reached(case)}, f"seed {seed}"


def reached(case: Case) -> set[tuple[int, int]]:
    """``(rank, chunk)`` of all holders but owners."""
    return {(rank, chunk) for chunk in case.moving for rank in case.holders(chunk) if rank != case.place.owners[chunk]}


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(RELAYED))
def test_sums_are_what_passes_a_relay(case: Case, algorithm: str) -> None:
    """Only those, and the owner has every range's contributions in the same pieces, so that it can add them up."""
    assert not case.gather(algorithm).transfers["partial"].any()
    plan = case.reduce(algorithm)
    rows = rows_of(plan)
    receives = {(row.dst, row.chunk, row.begin) for row in rows}
    assert all(row.partial == ((row.src, row.chunk, row.begin) in receives) for row in rows)
    owned = reduced(plan)
    for chunk in case.moving:
        others = Counter(rank for rank in case.holders(chunk) if rank != case.place.owners[chunk])
        if others:
            check_cover(owned[chunk], case.chunk_bytes[chunk])
            assert all(each == others for each in owned[chunk].values())


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(RELAYED))
def test_the_reduce_scatter_mirrors_the_all_gather(case: Case, algorithm: str) -> None:
    """The same rows with arrows turned round, where sums are as wide as what they are made of."""
    gather, reduce = rows_of(case.gather(algorithm)), rows_of(case.reduce(algorithm, width=1))
    assert len(gather) == len(reduce)
    facts = [(row.src, row.dst, row.chunk, row.begin, row.end, row.pieces, row.span) for row in gather]
    assert facts == [(row.dst, row.src, row.chunk, row.begin, row.end, row.pieces, row.span) for row in reduce]


@settings(deadline=None)
@given(case=cases())
def test_a_chunk_crosses_into_each_other_node_once(case: Case) -> None:
    node_of = case.topology.node_of
    for plan in relayed_plans(case, "hierarchical"):
        entering = defaultdict(list)
        for row in turned(plan):
            if node_of[row.src] != node_of[row.dst]:
                entering[node_of[row.dst], row.chunk].append(row)
        expected = set()
        for chunk in case.moving:
            home = node_of[case.place.owners[chunk]]
            expected |= {(node_of[rank], chunk) for rank in case.holders(chunk) if node_of[rank] != home}
        assert set(entering) == expected, "into nodes with holders, and never back into the owner's"
        for (_, chunk), rows in entering.items():
            check_cover([row.range for row in rows], case.chunk_bytes[chunk])
        crossing = sum(row.num_bytes for rows in entering.values() for row in rows)
        assert crossing == sum(case.chunk_bytes[chunk] for _, chunk in expected)


@pytest.mark.parametrize("seed", range(10))
def test_relay_does_as_if_there_were_no_nodes(seed: int) -> None:
    """Each rank as fast as the slower of its links, which here is the one to other nodes."""
    random = np.random.default_rng(seed)
    case = draw_case(random, world_size=7, num_chunks=9, sizes=[7, 54_321, 1 << 20])
    node_of = (0, 1, 0, 1, 1, 1, 0) if seed % 2 else (0, 1, 1, 2, 1, 0, 2)
    slow = tuple(Link(rate, 1e-6) for rate in [1e9, *random.choice([1e6, 3e6, 1e9], 6).tolist()])
    with_nodes = case._replace(topology=Topology(node_of, Link(1e9, 1e-6), slow))
    without = case._replace(topology=Topology((0,) * 7, slow))
    for make in ("gather", "reduce"):
        np.testing.assert_array_equal(
            getattr(with_nodes, make)("relay").transfers, getattr(without, make)("relay").transfers
        )


def busiest_s(plan: Plan) -> float:
    """Seconds that the busiest direction of a rank's link needs on one level, by floats and apart from the planner."""
    rates = np.array([plan.topology.scale_up_of(rank).bandwidth_bytes_per_s for rank in range(plan.place.world_size)])
    return float(max((plan.sent_bytes / rates).max(), (plan.received_bytes / rates).max()))


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize("seed", range(60))
def test_no_link_of_a_flat_network_carries_more_than_it_must(seed: int, alike: bool) -> None:
    """The division of forward work is exact, and cuts at multiples of some bytes add next to nothing."""
    random = np.random.default_rng([seed, alike])
    case = draw_case(
        random,
        world_size=int(random.integers(2, 17)),
        num_chunks=int(random.integers(1, 25)),
        sizes=[1 << 20, 3 << 20, 7_654_321],
        alike=alike,
    )
    least_s = min(case.topology.scale_up_of(rank).latency_s for rank in range(case.place.world_size))
    for plan in (case.gather("relay"), case.reduce("relay", width=1)):
        if plan.bound_s:
            optimum_s = plan.bound_s - least_s
            assert optimum_s * (1 - 1e-6) <= busiest_s(plan) <= optimum_s * 1.001


def test_one_hot_owner_sends_each_chunk_about_once() -> None:
    """Eight holders of everything that one of them owns: seven copies of each chunk, and one of them by the owner."""
    place = Placement.of_owners([3] * 16, 8).replicate(dict.fromkeys(range(16), range(8)))
    for plan_one in (plan_all_gather, plan_reduce_scatter):
        plan = plan_one(place, 4 * MEGA, Topology.flat(8, Link(50e6, 5e-5)), "relay")
        forth = plan.sent_bytes if plan.op == "all_gather" else plan.received_bytes
        assert forth.max() <= 1.001 * 16 * 4 * MEGA
        assert plan.predicted_s <= 1.1 * plan.bound_s


def test_relays_of_an_indivisible_chunk_forward_it_whole() -> None:
    place = Placement.of_owners([0] * 3, 4).replicate(dict.fromkeys(range(3), range(4)))
    plan = plan_all_gather(place, MEGA, Topology.flat(4, Link(1e9, 1e-6)), "relay", divisible=False)
    assert {row.range for row in rows_of(plan)} == {(0, MEGA)}
    relays = {row.src for row in rows_of(plan)} - {0}
    assert len(relays) >= 2, "chunks differ in who forwards them"


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(RELAYED))
def test_ranges_and_stages_are_what_the_format_says(case: Case, algorithm: str) -> None:
    for plan in relayed_plans(case, algorithm):
        for row in rows_of(plan):
            size = case.chunk_bytes[row.chunk]
            assert 0 <= row.begin < row.end <= size and row.pieces >= 1
            assert row.begin % GRANULE_BYTES == 0 and (row.end % GRANULE_BYTES == 0 or row.end == size)
            assert row.stage >= 0 and 1 <= row.span <= SLOTS
        assert min((row.stage for row in rows_of(plan)), default=0) == 0


@pytest.mark.parametrize("algorithm", RELAYED)
def test_work_of_a_rank_is_spread_over_all_slots(algorithm: str) -> None:
    """So that all who send begin at once and end together."""
    place = Placement.of_owners([0] * 12, 4).replicate(dict.fromkeys(range(12), range(4)))
    plan = plan_all_gather(place, MEGA, Topology((0, 1, 2, 3), Link(1e9, 0.0), Link(1e9, 1e-6)), algorithm)
    sends = defaultdict(list)
    for piece in pieces_of(plan):
        sends[piece.src].append(piece.stage)
    assert len(sends) >= 3
    for stages in sends.values():
        assert min(stages) <= SLOTS // 4 and max(stages) >= SLOTS - SLOTS // 4


@pytest.mark.parametrize("algorithm", RELAYED)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_nothing_to_forward_is_direct(algorithm: str, world_size: int) -> None:
    """A chunk with one receiver has nobody else to send it."""
    place = Placement.even(world_size, world_size).replicate(
        {chunk: [(chunk + 1) % world_size] for chunk in range(world_size)}
    )
    for plan_one in (plan_all_gather, plan_reduce_scatter):
        plan = plan_one(place, MEGA, Topology.flat(world_size), algorithm)
        pairs = Counter((row.src, row.dst, row.chunk) for row in turned(plan))
        assert pairs == Counter((chunk, (chunk + 1) % world_size, chunk) for chunk in range(world_size))


def test_a_slow_rank_forwards_little() -> None:
    """Rank 1 has a tenth of the others' bandwidth: what it takes in is all that it has time for."""
    place = Placement.of_owners([0] * 8, 4).replicate(dict.fromkeys(range(8), range(4)))
    fast, slow = Link(1e9, 0.0), Link(1e8, 0.0)
    plan = plan_all_gather(place, MEGA, Topology((0,) * 4, (fast, slow, fast, fast)), "relay")
    assert plan.received_bytes.tolist() == [0, 8 * MEGA, 8 * MEGA, 8 * MEGA]
    assert plan.sent_bytes[1] <= 8 * MEGA
    assert gathered(plan)


def test_ranks_of_a_node_share_what_goes_out() -> None:
    """Two nodes of four, one hot owner and a rail for each rank: each rail carries a quarter of a chunk."""
    place = Placement.of_owners([0] * 4, 8).replicate(dict.fromkeys(range(4), range(8)))
    topology = Topology((0,) * 4 + (1,) * 4, Link(1e10, 0.0), Link(1e9, 0.0))
    plan = plan_all_gather(place, 4 * MEGA, topology, "hierarchical")
    out = Counter()
    for row in rows_of(plan):
        if topology.node_of[row.src] != topology.node_of[row.dst]:
            out[row.src] += row.num_bytes
            out[row.dst] += row.num_bytes
    assert all(out[rank] <= 1.01 * 4 * MEGA for rank in range(8))
    assert plan.predicted_s <= 1.25 * plan.bound_s
