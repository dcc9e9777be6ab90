"""Runs one rank's part of a Plan over a transport. It decides nothing: what goes where stands in the Plan.

A chunk is a tuple of *segments*, one uint8 view for each tensor that its rows come from; each segment travels as a
message of its own, straight from the caller's memory into the caller's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sparsecoll.arena import Arena
from sparsecoll.native import accumulation_itemsize, itemsize, sum_views
from sparsecoll.plan import Move, Plan, program
from sparsecoll.transport.base import Message, Operation, Transport, View

__all__ = ["Segments", "run_all_gather", "run_reduce_scatter"]

Segments = tuple[View, ...]

def run_all_gather(
    plan: Plan,
    transport: Transport,
    source: Mapping[int, Segments],
    destination: Mapping[int, Segments],
    segment_bytes: Mapping[int, Sequence[int]],
    operation: Operation,
    arena: Arena,
) -> None:
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
        transport.wait(requests, operation)


def run_reduce_scatter(
    plan: Plan,
    transport: Transport,
    source: Mapping[int, Segments],
    destination: Mapping[int, Segments],
    segment_bytes: Mapping[int, Sequence[int]],
    dtypes: Sequence[str],
    mean: bool,
    operation: Operation,
    arena: Arena,
) -> None:
    """Fills ``destination`` with sums (or means) over all holders of the chunks that this rank owns.

    The order of summation is fixed by the Plan: a rank's own contribution, then arrivals in the Plan's order.

    Args:
        source: the held chunks; ``destination`` may alias it.
        dtypes: name of the element type of each segment.
    """
    mine = program(plan, transport.rank)
    arena.reset(int(plan.staging_bytes[transport.rank]))
    arrived: dict[int, list[tuple[Segments, bool]]] = {chunk: [] for chunk in mine.arrivals}

    def contributions(chunk: int) -> list[tuple[Segments, bool]]:
        own = [(source[chunk], False)] if chunk in source else []
        return own + arrived.get(chunk, [])

    def outgoing(move: Move) -> Segments:
        if move.partial:
            total = tuple(arena.take(size) for size in _partial_bytes(segment_bytes[move.chunk], dtypes))
            _sum(total, True, contributions(move.chunk), dtypes, 1)
            return total
        if move.chunk in source:
            return source[move.chunk]
        nonlocal zeros
        needed = max(segment_bytes[move.chunk])
        if zeros.nbytes < needed:
            zeros = arena.take(needed)
            zeros[:] = 0
        return tuple(zeros[:size] for size in segment_bytes[move.chunk])

    zeros = arena.take(0)
    for stage in mine.stages:
        sends = [message for move in stage.sends for message in _messages(move, outgoing(move))]
        receives = []
        for move in stage.receives:
            sizes = segment_bytes[move.chunk]
            sizes = _partial_bytes(sizes, dtypes) if move.partial else sizes
            landing = tuple(arena.take(size) for size in sizes)
            arrived[move.chunk].append((landing, move.partial))
            receives += _messages(move, landing)
        transport.wait(transport.post(sends, receives, operation), operation)
    num_holders = plan.place.holders.sum(axis=1)
    for chunk in mine.owned:
        divisor = int(num_holders[chunk]) if mean else 1
        _sum(destination[chunk], False, contributions(chunk), dtypes, divisor)


def _messages(move: Move, segments: Segments) -> Iterator[Message]:
    return (Message(move.peer, segment) for segment in segments)


def _copy(chunks: Sequence[int], source: Mapping[int, Segments], destination: Mapping[int, Segments]) -> None:
    for chunk in chunks:
        for to, view in zip(destination[chunk], source[chunk], strict=True):
            np.copyto(to, view)


def _sum(
    destination: Segments,
    is_partial: bool,
    contributions: Sequence[tuple[Segments, bool]],
    dtypes: Sequence[str],
    divisor: int,
) -> None:
    flags = [partial for _, partial in contributions]
    for number, dtype in enumerate(dtypes):
        sum_views(
            destination[number],
            [segments[number] for segments, _ in contributions],
            dtype,
            destination_is_partial=is_partial,
            sources_are_partial=flags,
            divisor=divisor,
        )


def _partial_bytes(sizes: Sequence[int], dtypes: Sequence[str]) -> list[int]:
    return [
        size // itemsize(dtype) * accumulation_itemsize(dtype) for size, dtype in zip(sizes, dtypes, strict=True)
    ]
