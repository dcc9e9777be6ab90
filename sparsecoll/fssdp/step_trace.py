"""Steps as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

Format as in `sparsecoll.plan.trace`. Ranks are processes. A rank's own time is one thread, in which spans lie inside
each other or apart; sparse collectives in flight are as many threads as there are at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sparsecoll.errors import InvalidArgument
from sparsecoll.fssdp.timeline import Event, StepEvents

__all__ = ["step_trace", "write_chrome_trace"]


def write_chrome_trace(steps: Mapping[int, StepEvents], path: str | os.PathLike[str]) -> None:
    """Writes the trace of `step_trace`.

    Raises:
        InvalidArgument: the file cannot be written; names the path.
    """
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(step_trace(steps))
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InvalidArgument(f"write_chrome_trace: expected a writable path, got {path}: {error}") from error


def step_trace(steps: Mapping[int, StepEvents]) -> Iterator[str]:
    """The text of the file, an event in each line; times in microseconds, to the nanosecond.

    Args:
        steps: rank → one of its steps. Several ranks are put beside each other by the clocks on their hosts' walls,
            which on different hosts may differ by more than a step is long.
    """
    begins = (step.unix_ns + min((0, *(event.begin_ns for event in step.events))) for step in steps.values())
    origin = min(begins, default=0)
    yield f'{{"displayTimeUnit":"ns","otherData":{{"begin_unix_ns":{origin}}},"traceEvents":[\n'
    separator = ""
    for event in _all(steps, origin):
        yield separator + json.dumps(event, separators=(",", ":"))
        separator = ",\n"
    yield "\n]}\n"


def _all(steps: Mapping[int, StepEvents], origin: int) -> Iterator[dict[str, object]]:
    # Perfetto names threads by ``tid`` alone: each has one of its own over all ranks, and none that is a process.
    thread = 1 + max(steps, default=0)
    for rank, step in sorted(steps.items()):
        process = 1 + rank  # viewers take 0 for the system's idle process
        yield from _named("process", {"pid": process}, f"rank {rank}", rank)
        for order, (name, events) in enumerate(_threads(step)):
            thread += 1
            place = {"pid": process, "tid": thread}
            yield from _named("thread", place, name, order)
            for event in events:
                yield _slice(event, step.unix_ns - origin, place)


def _threads(step: StepEvents) -> Iterator[tuple[str, list[Event]]]:
    """Names and events of a rank's threads; every one has at least one event."""
    yield "step", [Event(f"step {step.number}", "", "step", 0, step.length_ns)]
    spans = [event for event in step.events if event.kind != "flight"]
    for name, events, nests in (("rank", spans, True), ("in flight", step.of("flight"), False)):
        for number, lane in enumerate(_lanes(events, nests=nests)):
            yield f"{name} {number}" if number else name, lane


def _lanes(events: Iterable[Event], *, nests: bool) -> list[list[Event]]:
    """Each event on the first lane where it overlaps with no other or, if it ``nests``, lies inside of all those."""
    lanes: list[list[Event]] = []
    open_ends: list[list[int]] = []  # by lane, of what has not ended, the outermost first
    for event in sorted(events, key=lambda event: (event.begin_ns, -event.end_ns)):
        for ends in open_ends:
            while ends and ends[-1] <= event.begin_ns:
                ends.pop()
        fits = (not ends or (nests and event.end_ns <= ends[-1]) for ends in open_ends)
        number = next((number for number, fit in enumerate(fits) if fit), len(lanes))
        if number == len(lanes):
            lanes.append([])
            open_ends.append([])
        lanes[number].append(event)
        open_ends[number].append(event.end_ns)
    return lanes


def _named(what: str, place: dict[str, int], name: str, order: int) -> Iterator[dict[str, object]]:
    yield {"ph": "M", "name": f"{what}_name", **place, "args": {"name": name}}
    yield {"ph": "M", "name": f"{what}_sort_index", **place, "args": {"sort_index": order}}


def _slice(event: Event, shift_ns: int, place: dict[str, int]) -> dict[str, object]:
    # Half a nanosecond late, as viewers cut off what is less than one.
    begin_us = (shift_ns + event.begin_ns + 0.5) / 1e3
    length_us = (event.end_ns - event.begin_ns) / 1e3
    name = f"{event.name} ({event.fqn})" if event.fqn else event.name
    return {
        "ph": "X",
        **place,
        "ts": begin_us,
        "dur": length_us,
        "cat": event.kind,
        "name": name,
        "args": {"layer": event.fqn},
    }
