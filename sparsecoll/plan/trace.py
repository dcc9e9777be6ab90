"""A Plan as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format", JSON object with ``traceEvents``. Ranks are processes and their links threads; nodes that
share links are processes too. Each piece is a slice on every lane that it passes, with an arrow from the lane that it
leaves by to the one that it arrives by, and from there to each lane by which it is forwarded. Bounds and the predicted
end are global instants.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.plan.costs import costs_of
from sparsecoll.plan.lanes import Integers, Lane, Pieces, lanes_of
from sparsecoll.plan.simulate import needs_of

if TYPE_CHECKING:
    from sparsecoll.plan.plan import Plan

__all__ = ["save_trace", "trace"]

_SLICE, _START, _FINISH = range(3)  # what comes first of events at the same time: arrows belong to slices


def save_trace(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes the trace of `trace`.

    Raises:
        InvalidArgument: the file cannot be written; names the path.
    """
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(trace(plan))
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InvalidArgument(f"Plan.trace: expected a writable path, got {path}: {error}") from error


def trace(plan: Plan) -> Iterator[str]:
    """The text of the file, an event in each line; times in microseconds, to the nanosecond."""
    figures = {
        "op": plan.op,
        "algorithm": plan.algorithm,
        "digest": plan.digest,
        "predicted_us": plan.predicted_s * 1e6,
        "bound_us": plan.bound_s * 1e6,
        "universal_bound_us": plan.universal_bound_s * 1e6,
    }
    yield f'{{"displayTimeUnit":"ns","otherData":{json.dumps(figures)},"traceEvents":[\n'
    pieces, lanes = lanes_of(plan)
    separator = ""
    for event in chain(_names(plan, lanes), _timed(plan, pieces, lanes)):
        yield separator + event
        separator = ",\n"
    yield "\n]}\n"


def _names(plan: Plan, lanes: list[Lane]) -> Iterator[str]:
    """What processes and threads are called, and their order."""
    last = None
    for number, lane in enumerate(lanes):
        process, thread = _process(plan, lane), _thread(plan, lanes, number)
        if process != last:
            name = f"{'node' if lane.level == 'node' else 'rank'} {lane.number}"
            yield _named("process", f'"pid":{process}', name, process)
        side = "egress" if lane.outgoing else "ingress"
        yield _named("thread", f'"pid":{process},"tid":{thread}', f"{lane.level} {side}", number)
        last = process


def _named(what: str, where: str, name: str, order: int) -> str:
    return (
        f'{{"ph":"M","name":"{what}_name",{where},"args":{{"name":"{name}"}}}},\n'
        f'{{"ph":"M","name":"{what}_sort_index",{where},"args":{{"sort_index":{order}}}}}'
    )


def _process(plan: Plan, lane: Lane) -> int:
    """Numbers from 1, as trace viewers take 0 for the system's idle process."""
    return 1 + lane.number + (plan.place.world_size if lane.level == "node" else 0)


def _thread(plan: Plan, lanes: list[Lane], number: int) -> int:
    """One of its own for each lane of all, as Perfetto names threads by ``tid`` alone; and none that is a process."""
    return 1 + plan.place.world_size + plan.topology.num_nodes + number


class _Events(NamedTuple):
    """Columns.

    Attributes:
        ns: when.
        kind: slice, start or finish of an arrow.
        lane: by position.
        piece: by position.
        ns_long: of a slice.
        arrow: its number.
    """

    ns: Integers
    kind: Integers
    lane: Integers
    piece: Integers
    ns_long: Integers
    arrow: Integers


def _timed(plan: Plan, pieces: Pieces, lanes: list[Lane]) -> Iterator[str]:
    """Slices, arrows and instants, in order of time."""
    places = [f'"pid":{_process(plan, lane)},"tid":{_thread(plan, lanes, n)}' for n, lane in enumerate(lanes)]
    marks = [(plan.bound_s, "bound"), (plan.universal_bound_s, "universal bound"), (plan.predicted_s, "predicted")]
    instants = sorted((round(seconds * 1e9), name) for seconds, name in marks)
    texts = _slice_texts(pieces, plan.played["pieces"])
    events = _events(plan, pieces, lanes)
    for ns, kind, lane, piece, ns_long, arrow in zip(*(column.tolist() for column in events), strict=True):
        while instants and instants[0][0] < ns:
            yield _instant(*instants.pop(0))
        at = f'{places[lane]},"ts":{_us(ns)}'
        if kind == _SLICE:
            yield f'{{"ph":"X",{at},"dur":{ns_long // 1000}.{ns_long % 1000:03d},{texts[piece]}}}'
        elif kind == _START:
            yield f'{{"ph":"s",{at},"id":{arrow},"cat":"way","name":"way"}}'
        else:
            yield f'{{"ph":"f","bp":"e",{at},"id":{arrow},"cat":"way","name":"way"}}'
    for instant in instants:
        yield _instant(*instant)


def _us(ns: int) -> str:
    """Half a nanosecond late, as viewers cut off what is less than one: 10.333 us may be 10332.99 ns to them."""
    return f"{ns // 1000}.{ns % 1000:03d}5"


def _instant(ns: int, name: str) -> str:
    return f'{{"ph":"i","s":"g","pid":1,"tid":1,"ts":{_us(ns)},"cat":"bound","name":"{name}"}}'


def _slice_texts(pieces: Pieces, counts: NDArray[np.int32]) -> list[str]:
    columns = (pieces.chunk, pieces.forwarded, pieces.bytes, pieces.src, pieces.dst, pieces.number, counts[pieces.row])
    return [
        f'"cat":"{"forward" if forwarded else "first"}","name":"chunk {chunk}","args":{{"chunk":{chunk},'
        f'"bytes":{size},"src":{src},"dst":{dst},"piece":{number},"pieces":{count}}}'
        for chunk, forwarded, size, src, dst, number, count in zip(*(each.tolist() for each in columns), strict=True)
    ]


def _events(plan: Plan, pieces: Pieces, lanes: list[Lane]) -> _Events:
    tick_ns, num_pieces = costs_of(plan.topology).tick_s * 1e9, len(pieces.row)
    begins = [np.rint(lane.begin * tick_ns).astype(np.int64) for lane in lanes]
    ends = [np.rint(lane.end * tick_ns).astype(np.int64) for lane in lanes]
    # Where and when each piece leaves its sender and reaches its receiver.
    lane_of, begin_of = np.zeros((2, num_pieces), np.int64), np.zeros((2, num_pieces), np.int64)
    parts = []
    for number, (lane, begin, end) in enumerate(zip(lanes, begins, ends, strict=True)):
        zeros = np.zeros(len(begin), np.int64)
        parts.append(_Events(begin, zeros + _SLICE, zeros + number, lane.piece, end - begin, zeros))
        if lane.level != "node":
            lane_of[int(not lane.outgoing), lane.piece] = number
            begin_of[int(not lane.outgoing), lane.piece] = begin
    every = np.arange(num_pieces)
    received, forwarded = _forwards(plan, pieces)
    tail = np.concatenate([every, received]), np.repeat([0, 1], [num_pieces, len(received)])
    head = np.concatenate([every, forwarded]), np.repeat([1, 0], [num_pieces, len(received)])
    arrow = np.arange(len(tail[0]))
    for kind, (piece, side) in ((_START, tail), (_FINISH, head)):
        zeros = np.zeros(len(piece), np.int64)
        parts.append(_Events(begin_of[side, piece], zeros + kind, lane_of[side, piece], piece, zeros, arrow))
    events = _Events(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.lexsort((events.arrow, events.lane, events.kind, events.ns))
    return _Events(*(column[order] for column in events))


def _forwards(plan: Plan, pieces: Pieces) -> tuple[Integers, Integers]:
    """Pairs of pieces: one that arrives, and one that it is forwarded as or added to."""
    table = plan.played
    needs = needs_of(table, gathers=plan.op == "all_gather")
    counts = table["pieces"].astype(np.int64)
    starts = np.cumsum(counts) - counts
    position = np.zeros(len(pieces.row), np.int64)  # by row and number
    position[starts[pieces.row] + pieces.number] = np.arange(len(pieces.row))
    received, forwarded = [], []
    for row, those in enumerate(needs):
        numbers = np.arange(counts[row])
        for need in those:  # cut alike
            received.append(position[starts[need] + numbers])
            forwarded.append(position[starts[row] + numbers])
    none = np.zeros(0, np.int64)
    return np.concatenate([none, *received]), np.concatenate([none, *forwarded])
