"""The Chrome trace of a Plan: sound by the format, read as Perfetto reads it, and saying what the plan does."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecoll import InvalidArgument, Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan.trace import trace

Event = dict[str, Any]
HOT = Placement.of_owners([0] * 4, 6).replicate(dict.fromkeys(range(4), range(6)))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    per_node, num_nodes, num_chunks = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 6))
    world_size = per_node * num_nodes
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = random.integers(0, world_size, num_chunks)
    mask = random.random((num_chunks, world_size)) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    mask[np.arange(num_chunks), owners] = True
    shared = draw(st.sampled_from([None, Link(1e8, 1e-5), Link(3e9, 0.0)]))
    up = Link(draw(st.sampled_from([7e8, 3.3e10])), draw(st.sampled_from([0.0, 3.3e-6])))
    topology = Topology(tuple(rank // per_node for rank in range(world_size)), up, Link(3e8, 5e-6), shared)
    sizes = random.choice([0, 640, 100_000, 1_000_000], num_chunks).tolist()
    algorithm = draw(st.sampled_from(["auto", "direct", "relay", "hierarchical", "dense"]))
    if draw(st.booleans()):
        return plan_all_gather(Placement(owners, mask), sizes, topology, algorithm)
    double = [2 * size for size in sizes]
    return plan_reduce_scatter(Placement(owners, mask), sizes, topology, algorithm, partial_bytes=double)


class Trace:
    """A trace read back.

    Attributes:
        events: those in time, in order.
        slices: (pid, tid) → its slices in order.
        names: (pid, tid) → names of process and thread.
    """

    def __init__(self, plan: Plan) -> None:
        self.record = json.loads("".join(trace(plan)))
        events = self.record["traceEvents"]
        self.events: list[Event] = [event for event in events if event["ph"] != "M"]
        self.metadata: list[Event] = [event for event in events if event["ph"] == "M"]
        self.slices: dict[tuple[int, int], list[Event]] = defaultdict(list)
        for event in self.of("X"):
            self.slices[event["pid"], event["tid"]].append(event)
        processes = {event["pid"]: event["args"]["name"] for event in self.named("process_name")}
        self.names: dict[tuple[int, int], tuple[str, str]] = {
            (event["pid"], event["tid"]): (processes[event["pid"]], event["args"]["name"])
            for event in self.named("thread_name")
        }

    def of(self, phase: str) -> list[Event]:
        return [event for event in self.events if event["ph"] == phase]

    def named(self, name: str) -> list[Event]:
        return [event for event in self.metadata if event["name"] == name]

    def side(self, process: str, end: str) -> list[Event]:
        """Slices of all lanes of a process that are called ``scale-up egress`` or the like, by the last word."""
        lanes = [key for key, (name, lane) in self.names.items() if name == process and lane.endswith(end)]
        return [event for key in lanes for event in self.slices[key]]

    def slice_at(self, event: Event) -> Event:
        """The slice that an arrow's end belongs to: the last one that has begun on its lane, if it has not ended."""
        begun = [each for each in self.slices[event["pid"], event["tid"]] if ns(each["ts"]) <= ns(event["ts"])]
        assert begun and ns(event["ts"]) <= ns(begun[-1]["ts"]) + ns(begun[-1]["dur"])
        return begun[-1]

    def arrows(self) -> list[tuple[Event, Event]]:
        """The slices at both ends of every arrow."""
        starts, finishes = ({event["id"]: event for event in self.of(phase)} for phase in "sf")
        assert starts.keys() == finishes.keys()
        assert len(self.of("s")) == len(starts) and len(self.of("f")) == len(finishes)
        return [(self.slice_at(starts[arrow]), self.slice_at(finishes[arrow])) for arrow in starts]


def ns(us: float) -> int:
    """Perfetto's way from microseconds to nanoseconds: it cuts off."""
    return int(us * 1000)


def key_of(event: Event) -> tuple[int, ...]:
    return tuple(event["args"][name] for name in ("src", "dst", "chunk", "piece"))


@settings(deadline=None)
@given(plan=plans())
def test_the_format_is_kept(plan: Plan) -> None:
    found = Trace(plan)
    assert found.record["displayTimeUnit"] == "ns" and isinstance(found.record["otherData"], dict)
    for event in found.events:
        assert event.keys() >= {"ph", "pid", "tid", "ts", "name", "cat"} and event["ph"] in "Xsfi"
        assert event["ts"] >= 0 and isinstance(event["name"], str)
        assert {"X": "dur" in event, "f": event.get("bp") == "e", "i": event.get("s") == "g", "s": True}[event["ph"]]
        assert event["ph"] not in "sf" or isinstance(event["id"], int)
        assert event["ph"] == "i" or (event["pid"], event["tid"]) in found.names
    assert all(one["ts"] <= other["ts"] for one, other in pairwise(found.events)), "in order of time"
    for those in found.slices.values():
        assert all(event["dur"] >= 0 for event in those)
        for one, other in pairwise(those):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-9, "a lane carries one piece at a time"
            assert ns(one["ts"]) + ns(one["dur"]) <= ns(other["ts"]), "also for viewers that cut off"


@settings(deadline=None)
@given(plan=plans())
def test_every_piece_is_there_with_all_its_bytes(plan: Plan) -> None:
    found = Trace(plan)
    for rank in range(plan.place.world_size):
        sent, received = (found.side(f"rank {rank}", end) for end in ("egress", "ingress"))
        assert sum(event["args"]["bytes"] for event in sent) == plan.sent_bytes[rank]
        assert sum(event["args"]["bytes"] for event in received) == plan.received_bytes[rank]
        assert {event["args"]["src"] for event in sent} <= {rank}
        assert {event["args"]["dst"] for event in received} <= {rank}
    expected = Counter(
        (src, dst, chunk, piece)
        for _, _, src, dst, chunk, pieces, *_ in plan.played.tolist()
        for piece in range(pieces)
    )
    for end in ("egress", "ingress"):
        ranks = range(plan.place.world_size)
        assert expected == Counter(key_of(event) for rank in ranks for event in found.side(f"rank {rank}", end))
        nodes = [event for node in range(plan.topology.num_nodes) for event in found.side(f"node {node}", end)]
        if plan.topology.node_link is not None:
            node_of = plan.topology.node_of
            far = Counter({key: count for key, count in expected.items() if node_of[key[0]] != node_of[key[1]]})
            assert Counter(map(key_of, nodes)) == far
    last = max((event["ts"] + event["dur"] for event in found.of("X")), default=0)
    assert last == pytest.approx(plan.predicted_s * 1e6, abs=2e-3)


@settings(deadline=None)
@given(plan=plans())
def test_arrows_lead_from_sender_to_receiver_and_on_to_what_is_forwarded(plan: Plan) -> None:
    found = Trace(plan)
    ways, forwards = Counter[tuple[int, ...]](), defaultdict(list)
    for tail, head in found.arrows():
        if head["args"] == tail["args"]:
            assert found.names[tail["pid"], tail["tid"]][1].endswith("egress")
            assert found.names[head["pid"], head["tid"]][1].endswith("ingress")
            assert tail["ts"] <= head["ts"]
            ways[key_of(tail)] += 1
        else:
            assert tail["pid"] == head["pid"] and tail["args"]["dst"] == head["args"]["src"], "at the relay"
            assert tail["args"]["piece"] == head["args"]["piece"] and tail["name"] == head["name"]
            assert ns(tail["ts"]) + ns(tail["dur"]) <= ns(head["ts"]) + 1, "nothing is forwarded before it is there"
            forwards[key_of(head)].append(tail["args"]["src"])
    assert ways.total() == plan.played["pieces"].sum()
    sends: dict[tuple[int, int, int], list[int]] = defaultdict(list)  # who sends a range of a chunk to whom
    for _, _, src, dst, chunk, _, begin, _, _ in plan.played.tolist():
        sends[dst, chunk, begin].append(src)
    expected = defaultdict(list)
    for _, _, src, dst, chunk, pieces, begin, _, partial in plan.played.tolist():
        if plan.op == "all_gather" or partial:
            for piece in range(pieces):
                expected[src, dst, chunk, piece] += sends.get((src, chunk, begin), [])
    assert {key: sorted(those) for key, those in forwards.items()} == {
        key: sorted(those) for key, those in expected.items() if those
    }


def test_processes_and_threads_have_numbers_of_their_own_and_stand_in_order() -> None:
    """Perfetto names threads by ``tid`` alone, and takes process 0 and a thread with its process's number apart."""
    topology = Topology((0, 0, 0, 1, 1, 1), node_link=Link(1e9, 1e-5))
    found = Trace(plan_all_gather(HOT, 1 << 20, topology))
    processes = found.named("process_name")
    names = [event["args"]["name"] for event in processes]
    assert names == [*(f"rank {rank}" for rank in range(6)), "node 0", "node 1"]
    numbers = [event["pid"] for event in processes]
    threads = [event["tid"] for event in found.named("thread_name")]
    assert min(numbers) > 0 and len(set(numbers + threads)) == len(numbers) + len(threads)
    lanes = ["scale-up egress", "scale-up ingress", "scale-out egress", "scale-out ingress"]
    assert [name for process, name in found.names.values() if process == "rank 4"] == lanes
    assert [name for process, name in found.names.values() if process == "node 1"] == ["node egress", "node ingress"]
    for kind in ("process", "thread"):
        order = [event["args"]["sort_index"] for event in found.named(f"{kind}_sort_index")]
        assert order == sorted(set(order)) and len(order) == len(found.named(f"{kind}_name"))


def test_bounds_are_instants() -> None:
    plan = plan_all_gather(HOT, 1 << 20, Topology.flat(6), "direct")
    instants = {event["name"]: event["ts"] for event in Trace(plan).of("i")}
    expected = {"bound": plan.bound_s, "universal bound": plan.universal_bound_s, "predicted": plan.predicted_s}
    assert instants == {name: pytest.approx(seconds * 1e6, abs=2e-3) for name, seconds in expected.items()}
    figures = Trace(plan).record["otherData"]
    assert figures["digest"] == plan.digest and figures["predicted_us"] == plan.predicted_s * 1e6


def test_a_plan_in_which_nothing_travels() -> None:
    found = Trace(plan_all_gather(Placement.even(3, 2), 8, Topology.flat(2), "direct"))
    assert [event["ph"] for event in found.events] == ["i"] * 3


def test_trace_writes_the_file(tmp_path: Path) -> None:
    plan = plan_reduce_scatter(HOT, 1 << 16, Topology.flat(6))
    plan.trace(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == Trace(plan).record
    for path in (tmp_path / "none" / "plan.json", tmp_path, "a\0b"):
        with pytest.raises(InvalidArgument, match=r"Plan\.trace: expected a writable path, got"):
            plan.trace(path)
