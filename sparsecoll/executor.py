"""Runs one rank's part of a Plan over a transport. It decides nothing: what goes where stands in the Plan.

A run is a generator that posts messages and yields the requests that must end before it can go on. Its driver either
waits at once, or leaves them in flight and comes back.

A chunk is a tuple of *segments*, one uint8 view for each tensor that its rows come from; each segment travels as a
message of its own, straight from the caller's memory into the caller's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparsecoll.arena import Arena
from sparsecoll.native import accumulation_itemsize, itemsize, sum_views
from sparsecoll.plan import Move, Plan, program
from sparsecoll.transport.base import Message, Operation, Transport, View

__all__ = ["Segments", "Steps", "all_gather_steps", "reduce_scatter_steps"]

Segments = tuple[View, ...]

Steps = Iterator[list[Any]]
"""Yields requests of a transport."""


def all_gather_steps(
    plan: Plan,
    transport: Transport,
    source: Mapping[int, Segments],
    destination: Mapping[int, Segments],
    segment_bytes: Mapping[int, Sequence[int]],
    operation: Operation,
    arena: Arena,
) -> Steps:
    """Fills ``destination`` with the chunks that this rank holds.

    Args:
        source: the owned chunks.
        destination: the held chunks; an owned one may be left out or be the very segments of ``source``, and is then
            not copied.
        segment_bytes: sizes of a chunk's segments, for chunks that this rank only passes on.
    """
    mine = program(plan, transport.rank)
    arena.reset(int(plan.staging_bytes[transport.rank]))
    at = {**destination, **source}
    for chunk in mine.arrivals:
        if chunk not in at:
            at[chunk] = tuple(arena.take(size) for size in segment_bytes[chunk])
    own = [chunk for chunk in mine.owned if chunk in destination and destination[chunk] is not source[chunk]]
    if not mine.stages:
        _copy(own, source, destination)
    for number, stage in enumerate(mine.stages):
        sends = [message for move in stage.sends for message in _messages(move, at[move.chunk])]
        receives = [message for move in stage.receives for message in _messages(move, at[move.chunk])]
        requests = transport.post(sends, receives, operation)
        if number == 0:
            _copy(own, source, destination)
        yield requests


def reduce_scatter_steps(
    plan: Plan,
    transport: Transport,
    source: Mapping[int, Segments],
    destination: Mapping[int, Segments],
    segment_bytes: Mapping[int, Sequence[int]],
    dtypes: Sequence[str],
    mean: bool,
    operation: Operation,
    arena: Arena,
) -> Steps:
    """Fills ``destination`` with sums (or means) over all holders of the chunks that this rank owns.

    The order of summation is fixed by the Plan: a rank's own contribution, then arrivals in the Plan's order.

    Args:
        source: the held chunks; ``destination`` may alias it.
        dtypes: name of the element type of each segment.
    """
    mine = program(plan, transport.rank)
    arena.reset(int(plan.staging_bytes[transport.rank]))
    sums = _Sums(source, segment_bytes, dtypes, arena)
    for stage in mine.stages:
        sends = [message for move in stage.sends for message in _messages(move, sums.outgoing(move))]
        receives = [message for move in stage.receives for message in _messages(move, sums.landing(move))]
        yield transport.post(sends, receives, operation)
    num_holders = plan.place.holders.sum(axis=1)
    for chunk in mine.owned:
        sums.total(chunk, destination[chunk], divisor=int(num_holders[chunk]) if mean else 1)


class _Sums:
    """What one rank has of every chunk in a reduce-scatter: its own contribution and what has arrived."""

    def __init__(
        self,
        source: Mapping[int, Segments],
        segment_bytes: Mapping[int, Sequence[int]],
        dtypes: Sequence[str],
        arena: Arena,
    ) -> None:
        self._source = source
        self._segment_bytes = segment_bytes
        self._dtypes = dtypes
        self._widths = [accumulation_itemsize(dtype) // itemsize(dtype) for dtype in dtypes]
        self._arena = arena
        self._arrived: dict[int, list[tuple[Segments, bool]]] = {}
        self._zeros = arena.take(0)

    def landing(self, move: Move) -> Segments:
        """Room for something that arrives; it counts as arrived for later stages."""
        segments = self._take(move)
        self._arrived.setdefault(move.chunk, []).append((segments, move.partial))
        return segments

    def outgoing(self, move: Move) -> Segments:
        """What is sent on: a sum, this rank's own contribution, or zeros where it has none."""
        if move.partial:
            total = self._take(move)
            self.total(move.chunk, total, is_partial=True)
            return total
        if move.chunk in self._source:
            return self._source[move.chunk]
        sizes = self._segment_bytes[move.chunk]
        if self._zeros.nbytes < max(sizes):
            self._zeros = self._arena.take(max(sizes))
            self._zeros[:] = 0
        return tuple(self._zeros[:size] for size in sizes)

    def total(self, chunk: int, destination: Segments, *, is_partial: bool = False, divisor: int = 1) -> None:
        """Sums a chunk into ``destination``: own contribution first, then arrivals in the Plan's order."""
        own = [(self._source[chunk], False)] if chunk in self._source else []
        contributions = own + self._arrived.get(chunk, [])
        for number, dtype in enumerate(self._dtypes):
            sum_views(
                destination[number],
                [segments[number] for segments, _ in contributions],
                dtype,
                destination_is_partial=is_partial,
                sources_are_partial=[partial for _, partial in contributions],
                divisor=divisor,
            )

    def _take(self, move: Move) -> Segments:
        widths = self._widths if move.partial else [1] * len(self._widths)
        sizes = self._segment_bytes[move.chunk]
        return tuple(self._arena.take(size * width) for size, width in zip(sizes, widths, strict=True))


def _messages(move: Move, segments: Segments) -> Iterator[Message]:
    return (Message(move.peer, segment) for segment in segments)


def _copy(chunks: Sequence[int], source: Mapping[int, Segments], destination: Mapping[int, Segments]) -> None:
    for chunk in chunks:
        for to, view in zip(destination[chunk], source[chunk], strict=True):
            np.copyto(to, view)
