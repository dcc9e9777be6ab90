"""A direct reduce-scatter in which many ranks contribute to what one owns: few contributions are in memory at a time.

Posting all receives at once takes staging for every contribution, and an owner of a popular expert gets one from every
rank. Here receives are let in a few at a time, and each is added to what has come before, in the Plan's order, so that
the sum has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sparsecoll.arena import Arena
from sparsecoll.executor.segments import Segments, cut, cut_sizes
from sparsecoll.native import accumulation_itemsize, itemsize, sum_views
from sparsecoll.plan import Program
from sparsecoll.transport.base import HostTransport, Message, Operation

__all__ = ["is_crowded", "reduce_in_turn"]

_WINDOW = 2
"""Receives in flight: one that is added, and one on its way."""

_MOST_FOR_EACH = 4
"""Contributions to an owned range up to which they are all let in at once."""


def is_crowded(mine: Program) -> bool:
    """Whether contributions to this rank should be let in a few at a time."""
    if not mine.is_immediate or len(mine.receives) <= _MOST_FOR_EACH * len(mine.sums):
        return False
    # Messages of a pair of ranks match in their order, so that order has to be the one in which they are added.
    last: dict[int, int] = {}
    for *_, numbers in mine.sums:
        for number in numbers:
            peer = mine.receives[number].peer
            if last.get(peer, -1) > number or mine.receives[number].partial:
                return False
            last[peer] = number
    return True


def reduce_in_turn(
    mine: Program,
    transport: HostTransport,
    source: Mapping[int, Segments],
    destination: Mapping[int, Segments],
    segment_bytes: Mapping[int, Sequence[int]],
    dtypes: Sequence[str],
    divisors: Sequence[int],
    operation: Operation,
    arena: Arena,
) -> Iterator[bool]:
    """What `sparsecoll.executor.host.reduce_scatter_steps` does, for a program that `is_crowded`."""
    widths = [accumulation_itemsize(dtype) // itemsize(dtype) for dtype in dtypes]
    order = [(index, number) for index, (*_, numbers) in enumerate(mine.sums) for number in numbers]
    sizes = [cut_sizes(segment_bytes[chunk], begin, end) for chunk, begin, end, _ in mine.sums]
    largest = [max(each[position] for each in sizes) for position in range(len(dtypes))]
    arena.reset(
        sum(size * (_WINDOW + (width if width > 1 else 0)) + 512 for size, width in zip(largest, widths, strict=True))
    )
    slots = [tuple(arena.take(size) for size in largest) for _ in range(_WINDOW)]
    totals = tuple(arena.take(size * width if width > 1 else 0) for size, width in zip(largest, widths, strict=True))

    def receive(turn: int) -> list[object]:
        index, number = order[turn]
        landing = [view[:size] for view, size in zip(slots[turn % _WINDOW], sizes[index], strict=True)]
        return transport.post([], [Message(mine.receives[number].peer, view) for view in landing], operation)

    incoming = [receive(turn) for turn in range(min(_WINDOW, len(order)))]
    sends = transport.post(
        [Message(move.peer, view) for move in mine.sends for view in cut(source[move.chunk], move.begin, move.end)],
        [],
        operation,
    )
    yield len(order) <= _WINDOW

    for turn, (index, number) in enumerate(order):
        transport.wait(incoming[turn], operation)
        chunk, begin, end, numbers = mine.sums[index]
        is_first, is_last = number == numbers[0], number == numbers[-1]
        own = cut(source[chunk], begin, end) if is_first and chunk in source else None
        to = cut(destination[chunk], begin, end)
        for position, dtype in enumerate(dtypes):
            size = sizes[index][position]
            if not size:
                continue
            converts = widths[position] > 1
            so_far = totals[position][: size * widths[position]] if converts else to[position]
            arrived = slots[turn % _WINDOW][position][:size]
            parts, are_partial = [arrived], [False]
            if own is not None or not is_first:
                parts.insert(0, own[position] if own is not None else so_far)
                are_partial.insert(0, own is None and converts)
            sum_views(
                to[position] if is_last or not converts else so_far,
                parts,
                dtype,
                destination_is_partial=converts and not is_last,
                sources_are_partial=are_partial,
                divisor=divisors[chunk] if is_last else 1,
            )
        if turn + _WINDOW < len(order):
            incoming.append(receive(turn + _WINDOW))
    for chunk, begin, end, numbers in mine.sums:
        if not numbers:
            pairs = zip(cut(destination[chunk], begin, end), cut(source[chunk], begin, end), dtypes, strict=True)
            for view, alone, dtype in pairs:
                sum_views(view, [alone], dtype, divisor=divisors[chunk])
    transport.wait(sends, operation)
