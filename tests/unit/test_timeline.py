"""The timeline of a step, by a clock that the test turns; and its Chrome trace, read back."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import profile, record_function

from sparsecoll import InvalidArgument
from sparsecoll.fssdp.step_trace import step_trace, write_chrome_trace
from sparsecoll.fssdp.timeline import Event, RecordedStep, StepEvents, Timeline

WALL = 1_700_000_000_000_000_000


class Clock:
    """Nanoseconds that pass when a test says so."""

    def __init__(self, ns: int = 1000) -> None:
        self.ns = ns

    def __call__(self) -> int:
        return self.ns

    def wall(self) -> int:
        return WALL + self.ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timeline(clock: Clock) -> Timeline:
    return Timeline(clock=clock, wall=clock.wall)


def read(step: RecordedStep | None) -> StepEvents:
    assert step is not None
    return step.read()


def test_spans_nest_and_times_count_from_the_begin_of_the_step(clock: Clock, timeline: Timeline) -> None:
    timeline.begin_step()
    clock.ns += 10
    with timeline.span("outer", "a", "compute"):
        clock.ns += 5
        with timeline.span("inner", "b", "wait"):
            clock.ns += 7
        clock.ns += 1
    clock.ns += 2
    step = read(timeline.end_step())
    assert step == StepEvents(
        0, WALL + 1000, 25, (Event("inner", "b", "wait", 15, 22), Event("outer", "a", "compute", 10, 23))
    )
    assert step.of("wait") == [step.events[0]] and step.of("wait", "compute") == list(step.events)


def test_before_the_first_step_there_is_nothing_and_nothing_is_kept(clock: Clock, timeline: Timeline) -> None:
    assert timeline.end_step() is None
    with timeline.span("early", "a", "wait"):
        clock.ns += 5
    assert timeline.begin_step() is None
    assert read(timeline.end_step()).events == ()


def test_a_step_ends_with_its_last_backward_and_takes_all_that_came_before_the_next(
    clock: Clock, timeline: Timeline
) -> None:
    timeline.begin_step()
    clock.ns += 10
    assert read(timeline.end_step()).length_ns == 10
    clock.ns += 10
    with timeline.span("again", "a", "wait"):
        clock.ns += 1
    timeline.end_step()
    clock.ns += 100  # an optimizer
    last = read(timeline.begin_step())
    assert (last.number, last.length_ns, last.events) == (0, 21, (Event("again", "a", "wait", 20, 21),))


def test_a_step_without_backward_ends_where_the_next_begins(clock: Clock, timeline: Timeline) -> None:
    timeline.begin_step()
    for number in range(3):
        clock.ns += 10 + number
        last = read(timeline.begin_step())
        assert (last.number, last.length_ns) == (number, 10 + number)


def test_a_flight_belongs_to_the_step_that_it_ends_in(clock: Clock, timeline: Timeline) -> None:
    timeline.begin_step()
    clock.ns += 10
    flight = timeline.flight("sparse_all_gather", "a")
    timeline.flight("sparse_all_gather", "never ends")
    clock.ns += 10
    assert read(timeline.begin_step()).events == ()
    clock.ns += 3
    flight.end()
    clock.ns += 3
    flight.end()
    assert read(timeline.end_step()).events == (Event("sparse_all_gather", "a", "flight", -10, 3),)


def test_what_is_read_of_a_step_stays_as_it_was(clock: Clock, timeline: Timeline) -> None:
    timeline.begin_step()
    early = timeline.end_step()
    with timeline.span("later", "a", "wait"):
        clock.ns += 1
    assert read(early).events == () and len(read(timeline.end_step()).events) == 1


def test_a_span_that_raises_is_recorded_and_lets_the_error_pass(clock: Clock, timeline: Timeline) -> None:
    timeline.begin_step()
    with pytest.raises(ZeroDivisionError), timeline.span("bad", "a", "dispatch"):
        clock.ns += 4
        raise ZeroDivisionError
    assert read(timeline.end_step()).events == (Event("bad", "a", "dispatch", 0, 4),)


def test_moments_that_cannot_be_measured_are_left_out(clock: Clock) -> None:
    """As on a stream that a graph captures."""
    captures = False
    timeline = Timeline(clock=lambda: None if captures else clock())
    timeline.begin_step()
    with timeline.span("captured", "a", "wait"):
        captures = True
    flight = timeline.flight("captured", "a")
    captures = False
    flight.end()
    with timeline.span("measured", "a", "wait"):
        pass
    assert [event.name for event in read(timeline.end_step()).events] == ["measured"]
    captures = True
    timeline.begin_step()
    assert timeline.end_step() is None
    with timeline.span("measured", "a", "wait"):
        captures = False
    assert timeline.begin_step() is None


def test_stamps_are_compared_only_when_the_step_is_read() -> None:
    """On a GPU comparing waits for the device."""
    asked = []

    def elapsed(begin: str, end: str) -> int:
        asked.append((begin, end))
        return 10 * (int(end) - int(begin))

    stamps = iter("0123456789")
    timeline = Timeline(clock=lambda: next(stamps), elapsed_ns=elapsed)
    timeline.begin_step()
    with timeline.span("x", "a", "wait"):
        pass
    step = timeline.end_step()
    assert not asked
    assert read(step).events == (Event("x", "a", "wait", 10, 20),) and read(step).length_ns == 30


def test_on_streams_events_are_the_stamps(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    class CudaEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.has_ended = False

        def record(self) -> None:
            self.ms = clock() / 1e6

        def synchronize(self) -> None:
            self.has_ended = True

        def elapsed_time(self, end: CudaEvent) -> float:
            assert self.has_ended and end.has_ended
            return end.ms - self.ms

    captures = False
    monkeypatch.setattr("torch.cuda.Event", CudaEvent)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: captures)
    timeline = Timeline.on_streams()
    flight = timeline.flight("sparse_all_gather", "a")
    clock.ns += 10
    timeline.begin_step()
    with timeline.span("measured", "a", "wait"):
        clock.ns += 7
    flight.end()
    captures = True
    with timeline.span("captured", "a", "wait"):
        clock.ns += 7
    captures = False
    assert read(timeline.end_step()).events == (
        Event("measured", "a", "wait", 0, 7),
        Event("sparse_all_gather", "a", "flight", -10, 7),
    )


def test_spans_are_ranges_of_the_profiler(timeline: Timeline) -> None:
    with profile() as profiled, timeline.span("dispatch", "blocks.0.moe", "dispatch"):
        pass
    assert "FSSDP::dispatch (blocks.0.moe)" in {event.key for event in profiled.key_averages()}


def test_spans_cost_little_and_a_step_lets_go_of_the_one_before() -> None:
    timeline = Timeline()
    timeline.begin_step()

    def seconds(body: Any) -> float:
        start = time.perf_counter()
        for _ in range(500):
            with body():
                pass
        return (time.perf_counter() - start) / 500

    pairs = [
        (seconds(lambda: timeline.span("x", "a", "wait")), seconds(lambda: record_function("FSSDP::x (a)")))
        for _ in range(9)
    ]
    # About 1.5 us; the bound leaves room for a machine that does other things.
    assert statistics.median(ours - bare for ours, bare in pairs) < 20e-6
    assert len(read(timeline.begin_step()).events) == 9 * 500
    assert read(timeline.end_step()).events == ()


class Trace:
    """A trace read back.

    Attributes:
        slices: (rank, thread), by their names → slices by begin.
    """

    def __init__(self, text: str) -> None:
        self.record = json.loads(text)
        events = self.record["traceEvents"]
        names = {
            (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
            for event in events
            if event["ph"] == "M" and event["name"].endswith("_name")
        }
        self.slices: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        processes, threads = set(), set()
        for event in events:
            assert event["ph"] in "MX" and event["pid"] > 0
            if event["ph"] == "X":
                processes.add(event["pid"])
                threads.add((event["pid"], event["tid"]))
                process = names["process_name", event["pid"], None]
                self.slices[process, names["thread_name", event["pid"], event["tid"]]].append(event)
        tids = [tid for _, tid in threads]
        assert len(tids) == len(set(tids)) and not set(tids) & processes, "threads are told apart by tid alone"
        assert len(self.slices) == len(threads), "threads of a rank have names of their own"


def ns(event: dict[str, Any]) -> tuple[int, int]:
    """Begin and end, as viewers read them."""
    begin, length = int(event["ts"] * 1e3), round(event["dur"] * 1e3)
    return begin, begin + length


@st.composite
def steps(draw: st.DrawFn) -> StepEvents:
    events = [
        Event(
            f"event {number}",
            "a",
            draw(st.sampled_from(["wait", "dispatch", "flight", "flight"])),
            begin,
            begin + length,
        )
        for number, (begin, length) in enumerate(
            draw(st.lists(st.tuples(st.integers(-30, 50), st.integers(0, 40)), max_size=12))
        )
    ]
    return StepEvents(draw(st.integers(0, 9)), WALL + draw(st.integers(0, 10**6)), 60, tuple(events))


@given(st.dictionaries(st.integers(0, 40), steps(), max_size=3))
def test_the_trace_shows_every_event_once_on_threads_without_crossings(ranks: dict[int, StepEvents]) -> None:
    trace = Trace("".join(step_trace(ranks)))
    origin = trace.record["otherData"]["begin_unix_ns"]
    shown = defaultdict(list)
    for (rank, thread), slices in trace.slices.items():
        for event in slices:
            begin, end = ns(event)
            shown[rank].append((event["name"], origin + begin, origin + end))
            assert begin >= 0
            assert (event["cat"] == "flight") == thread.startswith("in flight")
        for i, first in enumerate(map(ns, slices)):
            for second in map(ns, slices[i + 1 :]):
                assert first[0] <= second[0]
                is_apart = first[1] <= second[0]
                assert is_apart or (second[1] <= first[1] and not thread.startswith("in flight"))
    expected = {
        f"rank {rank}": sorted(
            [
                (f"step {step.number}", step.unix_ns, step.unix_ns + step.length_ns),
                *((f"{e.name} (a)", step.unix_ns + e.begin_ns, step.unix_ns + e.end_ns) for e in step.events),
            ]
        )
        for rank, step in ranks.items()
    }
    assert {rank: sorted(events) for rank, events in shown.items()} == expected


def test_flights_take_no_more_threads_than_there_are_at_once() -> None:
    flights = [Event("gather", "a", "flight", begin, begin + 15) for begin in range(0, 100, 10)]
    trace = Trace("".join(step_trace({0: StepEvents(0, WALL, 120, tuple(flights))})))
    assert {thread for _, thread in trace.slices} == {"step", "in flight", "in flight 1"}
    for slices in (trace.slices["rank 0", "in flight"], trace.slices["rank 0", "in flight 1"]):
        assert all(ns(first)[1] <= ns(second)[0] for first, second in pairwise(slices))


def test_ranks_are_put_beside_each_other_by_the_wall(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    late = StepEvents(7, WALL + 5000, 10, (Event("gather", "a", "flight", -7000, 1),))
    write_chrome_trace({1: late, 0: StepEvents(7, WALL, 10, ())}, path)
    trace = Trace(path.read_text(encoding="utf-8"))
    assert ns(trace.slices["rank 1", "in flight"][0]) == (0, 7001)
    assert ns(trace.slices["rank 0", "step"][0]) == (2000, 2010)
    assert ns(trace.slices["rank 1", "step"][0]) == (7000, 7010)


def test_names_that_json_must_quote_come_back(tmp_path: Path) -> None:
    step = StepEvents(0, WALL, 10, (Event('a"b\n', "Schicht\u00fc", "wait", 0, 1),))
    write_chrome_trace({0: step}, tmp_path / "t.json")
    (slice_,) = Trace((tmp_path / "t.json").read_text(encoding="utf-8")).slices["rank 0", "rank"]
    assert slice_["name"] == 'a"b\n (Schicht\u00fc)' and slice_["args"] == {"layer": "Schicht\u00fc"}


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nowhere"):
        write_chrome_trace({}, tmp_path / "nowhere" / "t.json")
