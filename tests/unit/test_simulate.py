"""The simulation of plans, by hand, and as a schedule that breaks no rule of the links."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsecoll as sc
from sparsecoll import Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan import LEAD, TRANSFER
from sparsecoll.plan.costs import Costs, costs_of
from sparsecoll.plan.simulate import Timeline, pieces_of, simulate
from tests.plans import ALGORITHMS, Case, Row, cases, rows_of


def links(
    node_of: tuple[int, ...],
    *,
    up: int | tuple[int, ...] = 1,
    out: int | tuple[int, ...] = 1,
    node: int = 0,
    latency: tuple[int, int] = (0, 0),
) -> Costs:
    """Ticks of a byte, for all ranks or for each."""
    world_size = len(node_of)
    up, out = (each if isinstance(each, tuple) else (each,) * world_size for each in (up, out))
    return Costs(up, out, (node,) * (max(node_of) + 1), *latency, tick_s=1.0)


def transfer(src: int, dst: int, num_bytes: int, chunk: int = 0, **more: Any) -> dict[str, Any]:
    return {"src": src, "dst": dst, "end": num_bytes, "chunk": chunk, "span": 1, "pieces": 1, **more}


def played(costs: Costs, node_of: tuple[int, ...], *rows: dict[str, Any], gathers: bool = True) -> Timeline:
    table = np.zeros(len(rows), TRANSFER)
    for number, row in enumerate(rows):
        for name, value in row.items():
            table[number][name] = value
    return simulate(table, (table["end"] - table["begin"]).tolist(), node_of, costs, gathers=gathers)


def arrivals(timeline: Timeline) -> dict[tuple[int, int], int]:
    """``(row, piece)`` → when it is there."""
    pairs = zip(timeline.row.tolist(), timeline.piece.tolist(), strict=True)
    return dict(zip(pairs, timeline.arrived.tolist(), strict=True))


FLAT = (0, 0, 0, 0)
NODES = (0, 0, 1, 1)


def test_one_message_takes_its_bytes_and_a_latency() -> None:
    assert played(links(FLAT, up=3, latency=(7, 0)), FLAT, transfer(0, 1, 100)).finish == 307
    assert played(links(FLAT, up=(1, 5, 1, 1)), FLAT, transfer(0, 1, 100)).finish == 500, "the slower end counts"
    assert played(links(NODES, up=1, out=4, latency=(1, 9)), NODES, transfer(0, 2, 100)).finish == 409
    assert played(links(NODES, out=4, node=6), NODES, transfer(0, 2, 100)).finish == 600, "or what the node shares"


def test_a_message_passes_its_links_while_it_comes_in() -> None:
    """Sender, both nodes and receiver all take as long; together they take no longer than one of them."""
    assert played(links(NODES, out=5, node=5), NODES, transfer(0, 2, 100)).finish == 500


def test_nothing_takes_no_time() -> None:
    timeline = played(links(FLAT), FLAT)
    assert timeline.finish == 0 and len(timeline.sent) == 0


def test_messages_queue_on_the_link_that_they_share() -> None:
    costs = links(FLAT, up=2, latency=(5, 0))
    one_sender = played(costs, FLAT, transfer(0, 1, 100), transfer(0, 2, 50, chunk=1))
    assert arrivals(one_sender) == {(0, 0): 205, (1, 0): 305}
    assert one_sender.sent.tolist() == [0, 200]
    one_receiver = played(costs, FLAT, transfer(0, 2, 100), transfer(1, 2, 50, chunk=1))
    assert one_receiver.finish == 305 and one_receiver.sent.tolist() == [0, 0]
    apart = played(costs, FLAT, transfer(0, 1, 100), transfer(2, 3, 100, chunk=1))
    assert apart.finish == 205
    both_ways = played(costs, FLAT, transfer(0, 1, 100), transfer(1, 0, 100, chunk=1))
    assert both_ways.finish == 205, "links carry both directions at once"


def test_a_rank_uses_both_of_its_links_at_once() -> None:
    costs = links(NODES, up=2, out=3)
    assert played(costs, NODES, transfer(0, 1, 100), transfer(0, 2, 100, chunk=1)).finish == 300


def test_ranks_of_a_node_share_its_link() -> None:
    rows = transfer(0, 2, 100), transfer(1, 3, 100, chunk=1)
    assert played(links(NODES, out=1, node=1), NODES, *rows).finish == 200
    assert played(links(NODES, out=1, node=0), NODES, *rows).finish == 100
    inside = transfer(0, 1, 100), transfer(2, 3, 100, chunk=1)
    assert played(links(NODES, up=1, node=9), NODES, *inside).finish == 100, "only messages between nodes pass it"
    # Two nodes send to a third: what lets in is what all wait for.
    three = (0, 1, 2, 2)
    into_one = transfer(0, 2, 100), transfer(1, 3, 100, chunk=1)
    assert played(links(three, out=1, node=1), three, *into_one).finish == 200


def test_pieces_are_forwarded_while_others_come_in() -> None:
    """Four pieces over two hops take the time of five."""
    costs = links(FLAT, up=1, latency=(10, 0))
    hops = transfer(0, 1, 4000, stage=0, span=4, pieces=4), transfer(1, 2, 4000, stage=1, span=4, pieces=4)
    timeline = played(costs, FLAT, *hops)
    assert timeline.finish == 5 * 1000 + 2 * 10
    there = arrivals(timeline)
    assert [there[1, piece] - there[0, piece] for piece in range(4)] == [1010] * 4
    whole = transfer(0, 1, 4000, stage=0), transfer(1, 2, 4000, stage=1)
    assert played(costs, FLAT, *whole).finish == 2 * 4000 + 2 * 10


def test_a_sum_waits_for_all_that_it_is_made_of() -> None:
    costs = links(FLAT, up=(1, 1, 3, 1))
    rows = transfer(1, 3, 100), transfer(2, 3, 100), transfer(3, 0, 100, stage=1, partial=True)
    timeline = played(costs, FLAT, *rows, gathers=False)
    assert timeline.sent.tolist()[2] == timeline.arrived[:2].max() == 300 and timeline.finish == 400
    own = (*rows[:2], transfer(3, 0, 100, stage=1))
    timeline = played(costs, FLAT, *own, gathers=False)
    assert timeline.sent.tolist() == [0, 0, 0], "an own contribution waits for nobody"


def test_what_is_earlier_and_at_hand_goes_first() -> None:
    costs = links(FLAT)
    rows = transfer(0, 1, 100, stage=5), transfer(0, 2, 100, chunk=1, stage=3), transfer(0, 3, 100, chunk=2, stage=4)
    assert arrivals(played(costs, FLAT, *rows)) == {(1, 0): 100, (2, 0): 200, (0, 0): 300}
    # Stage 1 is not at hand before 50, and what has begun is not broken off.
    rows = transfer(2, 0, 50), transfer(0, 1, 50, stage=1), transfer(0, 3, 100, chunk=1, stage=2)
    assert arrivals(played(costs, FLAT, *rows)) == {(0, 0): 50, (2, 0): 100, (1, 0): 150}


def test_within_a_stage_a_rank_begins_with_the_next_one() -> None:
    rows = [transfer(1, dst, 10, chunk=dst) for dst in (0, 2, 3)]
    assert arrivals(played(links(FLAT), FLAT, *rows)) == {(1, 0): 10, (2, 0): 20, (0, 0): 30}


def test_messages_of_a_pair_keep_their_order() -> None:
    """What is next for a rank but not at hand holds up what comes after it for that rank, and for no other."""
    rows = (
        transfer(3, 0, 500),
        transfer(0, 1, 500, stage=1),
        transfer(0, 1, 10, chunk=1, stage=2),
        transfer(0, 2, 10, chunk=2, stage=3),
    )
    there = arrivals(played(links(FLAT), FLAT, *rows))
    assert there[3, 0] == 10 and there[1, 0] == 1000 and there[2, 0] == 1010


@pytest.mark.parametrize(("stage", "expected"), [(LEAD, 10), (LEAD + 1, 110)])
def test_a_rank_lets_in_only_what_is_nearly_due(stage: int, expected: int) -> None:
    """Rank 1 waits for a message of stage 0 that takes 100 ticks, on the same link."""
    costs = links(FLAT, up=(100, 1, 1, 1))
    rows = transfer(0, 1, 1), transfer(2, 1, 10, chunk=1, stage=stage)
    there = arrivals(played(costs, FLAT, *rows))
    assert there[0, 0] == 100
    # Service at the receiver is in the order in which messages come, and the slow one has its place already.
    assert there[1, 0] == 110 and played(costs, FLAT, *rows).sent.max() == (0 if expected == 10 else 100)
    two_links = (0, 0, 1, 1)
    rows = transfer(0, 1, 1), transfer(2, 1, 10, chunk=1, stage=stage)
    assert arrivals(played(links(two_links, up=(100, 1, 1, 1)), two_links, *rows))[1, 0] == 10, "links are apart"


def test_pieces_are_in_the_order_in_which_ranks_prefer_them() -> None:
    table = np.zeros(2, TRANSFER)
    table[0] = (0, 10, 0, 1, 0, 4, 0, 4096, False)
    table[1] = (3, 4, 0, 2, 0, 2, 0, 4096, False)
    row, piece, stage = pieces_of(table)
    assert list(zip(row.tolist(), piece.tolist(), stage.tolist(), strict=True)) == [
        (0, 0, 0),
        (0, 1, 2),
        (1, 0, 3),
        (0, 2, 5),
        (1, 1, 5),
        (0, 3, 7),
    ]


class Links:
    """What a plan's topology says, for checks of a timeline in integers."""

    def __init__(self, plan: Plan) -> None:
        self.node_of = plan.topology.node_of
        self.costs = costs_of(plan.topology)

    def crosses(self, row: Row) -> bool:
        return self.node_of[row.src] != self.node_of[row.dst]

    def latency(self, row: Row) -> int:
        return self.costs.out_latency if self.crosses(row) else self.costs.up_latency

    def passed(self, row: Row) -> dict[tuple[str, int, bool], int]:
        """``(what, who, receives)`` → ticks of a byte."""
        if not self.crosses(row):
            return {("up", row.src, False): self.costs.up[row.src], ("up", row.dst, True): self.costs.up[row.dst]}
        home, away = self.node_of[row.src], self.node_of[row.dst]
        return {
            ("out", row.src, False): self.costs.out[row.src],
            ("node", home, False): self.costs.node[home],
            ("node", away, True): self.costs.node[away],
            ("out", row.dst, True): self.costs.out[row.dst],
        }


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_the_timeline_breaks_no_rule_of_the_links(case: Case, algorithm: str) -> None:
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        timeline, rows, world = plan.timeline, rows_of(plan, played=True), Links(plan)
        keys = list(zip(timeline.row.tolist(), timeline.piece.tolist(), strict=True))
        assert sorted(keys) == [(row.number, piece) for row in rows for piece in range(row.pieces)]
        sent = dict(zip(keys, timeline.sent.tolist(), strict=True))
        there = dict(zip(keys, timeline.arrived.tolist(), strict=True))
        assert timeline.finish == max(there.values(), default=0)
        on_wire = plan.transfer_bytes.tolist()
        brought = defaultdict(list)
        for row in rows:
            brought[row.dst, row.chunk, row.begin].append(row.number)
        leaving, entering = defaultdict(list), defaultdict(list)
        carried: Counter[tuple[str, int, bool]] = Counter()
        for number, piece in keys:
            row = rows[number]
            num_bytes = on_wire[number] * (piece + 1) // row.pieces - on_wire[number] * piece // row.pieces
            passed = world.passed(row)
            begin, end = sent[number, piece], there[number, piece] - world.latency(row)
            assert end >= begin + num_bytes * max(passed.values())
            if plan.op == "all_gather" or row.partial:
                for need in brought[row.src, row.chunk, row.begin]:
                    assert begin >= there[need, piece], "forwarded when it has arrived"
            if not num_bytes:
                continue
            source, *_, target = passed.items()
            leaving[source[0]].append((begin, begin + num_bytes * source[1]))
            entering[target[0]].append((end, num_bytes * target[1]))
            carried.update({link: num_bytes * cost for link, cost in passed.items()})
        for intervals in leaving.values():
            assert all(before[1] <= after[0] for before, after in pairwise(sorted(intervals))), "one at a time"
        for ends in entering.values():
            assert all(after[0] >= before[0] + after[1] for before, after in pairwise(sorted(ends)))
        least = min((world.latency(row) for row in rows), default=0)
        assert timeline.finish >= max(carried.values(), default=0) + least
        in_all = sum(on_wire[row.number] * sum(world.passed(row).values()) for row in rows)
        assert timeline.finish <= in_all + sum(row.pieces * world.latency(row) for row in rows), "somebody always moves"


@settings(deadline=None, max_examples=50)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_messages_of_a_pair_arrive_in_order(case: Case, algorithm: str) -> None:
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        rows, timeline = rows_of(plan, played=True), plan.timeline
        last: dict[tuple[int, int], int] = {}
        for number, arrived in zip(timeline.row.tolist(), timeline.arrived.tolist(), strict=True):
            pair = rows[number].src, rows[number].dst
            assert arrived >= last.get(pair, 0)
            last[pair] = arrived


@settings(deadline=None, max_examples=30)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_equal_inputs_give_equal_timelines(case: Case, algorithm: str) -> None:
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        again = simulate(
            plan.played.copy(),
            plan.transfer_bytes.tolist(),
            plan.topology.node_of,
            costs_of(plan.topology),
            gathers=plan.op == "all_gather",
        )
        assert again.finish == plan.timeline.finish
        np.testing.assert_array_equal(again.sent, plan.timeline.sent)
        np.testing.assert_array_equal(again.arrived, plan.timeline.arrived)


def test_messages_that_are_posted_together_share_their_links() -> None:
    """Rank 1 gets from 0 and 2, and 0 also sends to 3: none of the three stands in a queue behind another."""
    place = Placement.of_owners([0, 0, 2], 4).replicate({0: [1], 1: [3], 2: [1]})
    plan = plan_all_gather(place, 1_600_000, Topology.flat(4, Link(1e6, 0.0)), "direct")
    assert plan.predicted_s == pytest.approx(3.2, rel=0.05)
    rows = rows_of(plan, played=True)
    assert Counter((row.src, row.dst, row.chunk, row.range) for row in rows) == Counter(
        (row.src, row.dst, row.chunk, row.range) for row in rows_of(plan)
    )
    relayed = plan_all_gather(place.replicate({0: range(4)}), 1_600_000, plan.topology, "relay")
    assert relayed.played is relayed.transfers, "what has an order is played in that order"


def test_predictions_are_in_seconds() -> None:
    place = Placement.of_owners([0], 3).replicate({0: [2]})
    for plan_one in (plan_all_gather, plan_reduce_scatter):
        flat = plan_one(place, 3_000_000, Topology.flat(3, Link(1.5e6, 0.25)))
        assert flat.predicted_s == pytest.approx(2.25)
        nodes = Topology((0, 0, 1), Link(1e9, 0.0), Link(1e9, 1e-3), Link(1e6, 0.5))
        assert plan_one(place, 3_000_000, nodes).predicted_s == pytest.approx(3.5)


def test_a_plan_whose_pieces_wait_for_ever_predicts_nothing() -> None:
    place = sc.Placement.of_owners([0], 3).replicate({0: range(3)})
    plan = sc.plan_all_gather(place, 1 << 20, sc.Topology.flat(3), "relay")
    assert plan.predicted_s >= plan.bound_s
    rows = plan.transfers.copy()[:2]
    rows["chunk"], rows["begin"], rows["end"], rows["pieces"] = 0, 0, 1 << 20, 1
    rows["src"], rows["dst"], rows["stage"] = (1, 2), (2, 1), (1, 1)
    circle = dataclasses.replace(plan, transfers=rows)
    with pytest.raises(sc.InvalidArgument, match="waits for ever"):
        _ = circle.predicted_s
