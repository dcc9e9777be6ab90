"""When things happened in a step of one rank: spans of its own time, and flights of sparse collectives beside it.

[Note: what the host sees] On a CPU the host does the work, so its clock tells what a step waited for. What it cannot
tell is when a back end that moves bytes by itself had moved the last of them: a flight lasts from the issue to the end
of the wait, also where everything had arrived long before. On a GPU the host only issues, and waits happen on streams;
`Timeline.on_streams` measures those, with CUDA events on the current stream around each span. Such a span is the time
that the stream spent between the two, and reading it waits for the device. A captured graph replays its events without
Python, so nothing is recorded while a stream captures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch.profiler import record_function

__all__ = ["Event", "Flight", "Kind", "RecordedStep", "Span", "StepEvents", "Timeline"]

Kind = Literal["wait", "issue", "dispatch", "counts", "compute"]


class Event(NamedTuple):
    """Something that took time.

    Attributes:
        name: what it was, such as ``wait_for_sparse_all_gather``.
        fqn: of the layer.
        kind: ``wait`` (compute waits for a sparse collective), ``issue`` (of one), ``dispatch`` (an all-to-all of
            tokens), ``counts`` (the exchange of loads), ``compute``; or ``flight``, a sparse collective from its issue
            to the end of the wait for it.
        begin_ns: after the begin of the step; negative for a flight that began before it.
        end_ns: likewise.
    """

    name: str
    fqn: str
    kind: str
    begin_ns: int
    end_ns: int


@dataclass(frozen=True)
class StepEvents:
    """What was recorded of one step on one rank.

    Attributes:
        number: of the step, from 0.
        unix_ns: when it began, by the clock on the wall, which ranks share as far as their hosts agree.
        length_ns: from the begin of the forward to the end of the last backward, or without one to where it was read
            or the next forward began.
        events: in the order in which they ended.
    """

    number: int
    unix_ns: int
    length_ns: int
    events: tuple[Event, ...]

    def of(self, *kinds: str) -> list[Event]:
        """Those of the given kinds."""
        return [event for event in self.events if event.kind in kinds]


class _Stamped(NamedTuple):
    """An `Event` before its stamps are read."""

    name: str
    fqn: str
    kind: str
    begin: Any
    end: Any


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """A step whose stamps lie as the clock gave them, so that ending a step waits for nothing."""

    number: int
    unix_ns: int
    begin: Any
    end: Any
    stamped: tuple[_Stamped, ...]
    elapsed_ns: Callable[[Any, Any], int]

    def read(self) -> StepEvents:
        """The events in nanoseconds; on a GPU, waits until the device has come to the end of the step."""
        since, begin = self.elapsed_ns, self.begin
        return StepEvents(
            self.number,
            self.unix_ns,
            since(begin, self.end),
            tuple(
                Event(name, fqn, kind, since(begin, first), since(begin, last))
                for name, fqn, kind, first, last in self.stamped
            ),
        )


class Timeline:
    """Records the current step of one rank. Used by the thread that runs the step, or by one after the other.

    An event belongs to the step in which it ends. A step is open from the begin of its forward to the begin of the next
    one; what ends before the first is not kept.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], Any] = time.perf_counter_ns,
        elapsed_ns: Callable[[Any, Any], int] | None = None,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        """Starts without a step.

        Args:
            clock: gives a stamp of now, or None for a moment that cannot be measured.
            elapsed_ns: nanoseconds from one stamp to another; None for stamps that are nanoseconds.
            wall: nanoseconds since 1970.
        """
        self._clock = clock
        self._elapsed_ns = _difference if elapsed_ns is None else elapsed_ns
        self._wall = wall
        self._number = -1
        self._unix_ns = 0
        self._begin: Any = None
        self._end: Any = None
        self._stamped: list[_Stamped] = []

    @classmethod
    def on_streams(cls) -> Timeline:
        """One that measures on the current CUDA stream instead of on the host: [Note: what the host sees]."""
        return cls(clock=_stamp_on_stream, elapsed_ns=_elapsed_on_stream)

    def span(self, name: str, fqn: str, kind: Kind) -> Span:
        """A context in which this rank does one thing; a range of torch's profiler as well."""
        return Span(self, name, fqn, kind)

    def flight(self, name: str, fqn: str) -> Flight:
        """A sparse collective that is issued now."""
        return Flight(self, name, fqn, self._clock())

    def begin_step(self) -> RecordedStep | None:
        """Begins a forward; gives what was recorded of the step before, or None if there was none."""
        now = self._clock()
        last = self._recorded(now if self._end is None else self._end)
        self._number += 1
        self._unix_ns = self._wall()
        self._begin, self._end, self._stamped = now, None, []
        return last

    def end_step(self) -> RecordedStep | None:
        """Ends a backward; gives the step so far, or None before the first.

        A further backward of the same forward goes on with it and ends it again.
        """
        self._end = self._clock()
        return self._recorded(self._end)

    def _recorded(self, end: Any) -> RecordedStep | None:
        if self._begin is None or end is None:
            return None
        return RecordedStep(self._number, self._unix_ns, self._begin, end, tuple(self._stamped), self._elapsed_ns)

    def _add(self, name: str, fqn: str, kind: str, begin: Any) -> None:
        end = self._clock()
        if self._begin is not None and begin is not None and end is not None:
            self._stamped.append(_Stamped(name, fqn, kind, begin, end))


class Span:
    """See `Timeline.span`."""

    __slots__ = ("_begin", "_fqn", "_kind", "_name", "_range", "_timeline")

    def __init__(self, timeline: Timeline, name: str, fqn: str, kind: Kind) -> None:
        self._timeline, self._name, self._fqn, self._kind = timeline, name, fqn, kind
        self._range = record_function(f"FSSDP::{name} ({fqn})")

    def __enter__(self) -> None:
        self._range.__enter__()
        self._begin = self._timeline._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timeline._add(self._name, self._fqn, self._kind, self._begin)
        self._range.__exit__(kind, error, trace)


class Flight:
    """See `Timeline.flight`. One that never ends leaves nothing behind."""

    __slots__ = ("_begin", "_fqn", "_has_ended", "_name", "_timeline")

    def __init__(self, timeline: Timeline, name: str, fqn: str, begin: Any) -> None:
        self._timeline, self._name, self._fqn, self._begin = timeline, name, fqn, begin
        self._has_ended = False

    def end(self) -> None:
        """The wait for it has ended; only the first call counts."""
        if not self._has_ended:
            self._has_ended = True
            self._timeline._add(self._name, self._fqn, "flight", self._begin)


def _difference(begin: int, end: int) -> int:
    return end - begin


def _stamp_on_stream() -> torch.cuda.Event | None:
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_on_stream(begin: torch.cuda.Event, end: torch.cuda.Event) -> int:
    begin.synchronize()
    end.synchronize()
    return round(begin.elapsed_time(end) * 1e6)
