"""One rank's part of a Plan as steps on a stream: rounds of messages, and kernels that copy and sum between them.

A recipe is made of integers alone, so that it is made once and run for every call with equal sizes: it names places by
the number of a buffer and an offset in it. Buffers are the caller's tensors, sources first, and last the staging
memory. Nothing here touches a payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from sparsecoll.cuda.tables import MOST_BASES, Place, Span, Sum, Table, pack_table, sum_table
from sparsecoll.native import accumulation_itemsize, itemsize
from sparsecoll.plan import Plan, rounds_of
from sparsecoll.plan.simulate import needs_of
from sparsecoll.plan.transfer import piece_bounds
from sparsecoll.transport.stream import Round, Slot

__all__ = ["Launch", "Recipe", "Spot", "Spots", "Zeros", "gather_recipe", "reduce_recipe"]

T = TypeVar("T")

_ALIGNMENT = 256


class Spot(NamedTuple):
    """Where a segment of a chunk lies."""

    buffer: int
    offset: int
    num_bytes: int


Spots = Mapping[int, tuple[Spot, ...]]
"""Chunk → its segments."""


class Launch:
    """A kernel that copies or sums by a table.

    Attributes:
        dtype: of the sums; None for a copy of bytes.
        table: what is done.
        buffers: the number of the buffer behind each base of the table.
    """

    def __init__(self, dtype: str | None, table: Table, buffers: tuple[int, ...]) -> None:
        self.dtype, self.table, self.buffers = dtype, table, buffers


class Zeros(NamedTuple):
    """Staging memory that is to be zero from here on."""

    offset: int
    num_bytes: int


class Recipe(NamedTuple):
    """What one rank does, in order.

    Attributes:
        steps: rounds are numbered alike on all ranks; a rank skips those in which it has no message.
        staging_bytes: size of the last buffer.
        sent_bytes, sent_messages, received_bytes, received_messages: in all rounds.
    """

    steps: tuple[Round | Launch | Zeros, ...]
    staging_bytes: int
    sent_bytes: int
    sent_messages: int
    received_bytes: int
    received_messages: int


def gather_recipe(
    plan: Plan, rank: int, source: Spots, destination: Spots, segment_bytes: Mapping[int, Sequence[int]], staging: int
) -> Recipe:
    """Fills ``destination`` with the chunks that ``rank`` holds.

    Args:
        source: the owned chunks.
        destination: the held chunks; an owned one may be left out.
        segment_bytes: sizes of a chunk's segments, for chunks that the rank only passes on.
        staging: number of the staging buffer.
    """
    layout = _Staging(staging)
    at = {**destination, **source}
    rounds = []
    for parts in _rounds(plan, rank):
        for part in parts:
            if part.chunk not in at:
                at[part.chunk] = tuple(layout.take(size) for size in segment_bytes[part.chunk])
        rounds.append(_round(parts, rank, lambda part: _cut(at[part.chunk], part.begin, part.end)))
    copies = [
        Span(Place(to.buffer, to.offset), Place(spot.buffer, spot.offset), spot.num_bytes)
        for chunk, spots in source.items()
        for to, spot in zip(destination.get(chunk, ()), spots, strict=False)
        if spot.num_bytes
    ]
    return _finished([*_copies(copies), *rounds], layout)


def reduce_recipe(
    plan: Plan,
    rank: int,
    source: Spots,
    destination: Spots,
    segment_bytes: Mapping[int, Sequence[int]],
    dtypes: Sequence[str],
    mean: bool,
    staging: int,
) -> Recipe:
    """Fills ``destination`` with sums (or means) over all holders of the chunks that ``rank`` owns.

    The order of summation is that of `sparsecoll.executor.host`: a rank's own contribution, then arrivals in the
    order of the Plan's rows.

    Args:
        source: the held chunks; ``destination`` may alias it.
        dtypes: name of the element type of each segment.
    """
    return _Reduction(plan, rank, source, destination, segment_bytes, dtypes, mean, staging).recipe()


class _Part(NamedTuple):
    """A run of a row's pieces that travel in one round, and so in one message for each segment."""

    row: int
    src: int
    dst: int
    chunk: int
    begin: int
    end: int
    partial: bool


def _rounds(plan: Plan, rank: int) -> list[list[_Part]]:
    """A rank's messages, round by round; in a round by row, which is the same order at both ends."""
    table, (pieces, row, piece, number, num_rounds, _) = plan.transfers, rounds_of(plan)
    mine = (table["src"] == rank) | (table["dst"] == rank)
    chosen = mine[row]
    row, piece, number = row[chosen], piece[chosen], number[chosen]
    order = np.lexsort((piece, row, number))
    row, piece, number = row[order], piece[order], number[order]
    begins = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(number, prepend=-1))
    ends = np.append(begins, len(row))[1:] - 1
    rounds: list[list[_Part]] = [[] for _ in range(num_rounds)]
    columns = {each: table[each].tolist() for each in table.dtype.names or ()}
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        at = int(row[begin])
        cuts = piece_bounds(columns["begin"][at], columns["end"][at], int(pieces[at]))
        first, last = cuts[int(piece[begin])], cuts[int(piece[end]) + 1]
        if first < last:
            ends_of = columns["src"][at], columns["dst"][at], columns["chunk"][at]
            rounds[int(number[begin])].append(_Part(at, *ends_of, first, last, columns["partial"][at]))
    return rounds


def _round(parts: Iterable[_Part], rank: int, spots_of: Callable[[_Part], Iterable[Spot]]) -> Round:
    receives: list[Slot] = []
    sends: list[Slot] = []
    for part in parts:
        peer, slots = (part.src, receives) if part.dst == rank else (part.dst, sends)
        slots += [Slot(peer, *spot) for spot in spots_of(part) if spot.num_bytes]
    return Round(tuple(receives), tuple(sends))


class _Staging:
    """Hands out staging memory."""

    def __init__(self, buffer: int) -> None:
        self._buffer = buffer
        self.num_bytes = 0

    def take(self, num_bytes: int) -> Spot:
        begin = -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = begin + num_bytes
        return Spot(self._buffer, begin, num_bytes)


class _Reduction:
    """The making of a reduce-scatter's recipe."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        source: Spots,
        destination: Spots,
        segment_bytes: Mapping[int, Sequence[int]],
        dtypes: Sequence[str],
        mean: bool,
        staging: int,
    ) -> None:
        self._plan, self._rank, self._source, self._destination = plan, rank, source, destination
        self._segment_bytes, self._dtypes = segment_bytes, dtypes
        self._divisors = plan.place.holders.sum(axis=1).tolist() if mean else [1] * plan.place.num_chunks
        self._widths = [accumulation_itemsize(dtype) // itemsize(dtype) for dtype in dtypes]
        self._staging = _Staging(staging)
        table = plan.transfers
        self._mine = np.flatnonzero((table["src"] == rank) | (table["dst"] == rank))
        self._rows = {int(row): _whole(plan, int(row)) for row in self._mine}
        needs = needs_of(table[self._mine], gathers=False)
        self._needs = {
            int(row): [int(self._mine[n]) for n in each] for row, each in zip(self._mine, needs, strict=True)
        }
        # What a row brings, and the sums that one takes away, lie in one piece each, whatever rounds cut them into.
        self._landed = {row: self._take(part) for row, part in self._rows.items() if part.dst == rank}
        self._totals = {row: self._take(part) for row, part in self._rows.items() if part.src == rank and part.partial}

    def recipe(self) -> Recipe:
        steps: list[Round | Launch | Zeros] = list(self._zeros())
        for parts in _rounds(self._plan, self._rank):
            totals = [part for part in parts if part.src == self._rank and part.partial]
            steps += self._sums([each for part in totals for each in self._total(part)])
            steps.append(_round(parts, self._rank, self._spots))
        steps += self._sums([each for chunk in self._owned() for each in self._final(chunk)])
        return _finished(steps, self._staging)

    def _spots(self, part: _Part) -> Iterable[Spot]:
        """What a message carries: an arrival, a sum, this rank's own contribution, or zeros where it has none."""
        if part.row in self._landed or part.row in self._totals:
            return self._part_of(part)
        if part.chunk in self._source:
            return _cut(self._source[part.chunk], part.begin, part.end)
        sizes = _cut_sizes(self._segment_bytes[part.chunk], part.begin, part.end)
        return [self._zero._replace(num_bytes=size) for size in sizes]

    def _zeros(self) -> Iterator[Zeros]:
        """One block for all contributions to chunks that this rank does not hold."""
        without = [
            max(_cut_sizes(self._segment_bytes[part.chunk], part.begin, part.end))
            for part in self._rows.values()
            if part.src == self._rank and not part.partial and part.chunk not in self._source
        ]
        if without:
            self._zero = self._staging.take(max(without))
            yield Zeros(self._zero.offset, self._zero.num_bytes)

    def _owned(self) -> list[int]:
        chunks = np.asarray(self._plan.chunks, np.int64)
        return chunks[self._plan.place.owners[chunks] == self._rank].tolist()

    def _total(self, part: _Part) -> Iterator[tuple[str, Sum]]:
        """What a relay passes on: its own contribution, if it has one, and those that have arrived."""
        yield from self._sum(self._part_of(part), True, part, self._needs[part.row], 1)

    def _final(self, chunk: int) -> Iterator[tuple[str, Sum]]:
        ranges: dict[tuple[int, int], list[int]] = {}
        for row in sorted(self._landed):
            part = self._rows[row]
            if part.chunk == chunk:
                ranges.setdefault((part.begin, part.end), []).append(row)
        for begin, end in sorted(ranges) or [(0, self._plan.chunk_bytes[chunk])]:
            whole = _Part(-1, self._rank, self._rank, chunk, begin, end, False)
            destination = _cut(self._destination[chunk], begin, end)
            yield from self._sum(destination, False, whole, ranges.get((begin, end), []), self._divisors[chunk])

    def _sum(
        self, destination: Sequence[Spot], is_partial: bool, part: _Part, rows: Sequence[int], divisor: int
    ) -> Iterator[tuple[str, Sum]]:
        sources = [_cut(self._source[part.chunk], part.begin, part.end)] if part.chunk in self._source else []
        are_partial = [False] * len(sources) + [self._rows[row].partial for row in rows]
        sources += [self._part_of(part._replace(row=row)) for row in rows]
        for position, dtype in enumerate(self._dtypes[: len(destination)]):
            to = destination[position]
            num_elements = to.num_bytes // (accumulation_itemsize(dtype) if is_partial else itemsize(dtype))
            if num_elements:
                places = tuple(Place(each[position].buffer, each[position].offset) for each in sources)
                yield (
                    dtype,
                    Sum(Place(to.buffer, to.offset), is_partial, places, tuple(are_partial), num_elements, divisor),
                )

    def _sums(self, sums: list[tuple[str, Sum]]) -> Iterator[Launch]:
        for dtype in sorted({dtype for dtype, _ in sums}):
            same = [each for name, each in sums if name == dtype]
            for chosen, bases in _by_bases(same, lambda each: (each.destination, *each.sources)):
                moved = [
                    each._replace(
                        destination=_moved(each.destination, bases),
                        sources=tuple(_moved(place, bases) for place in each.sources),
                    )
                    for each in chosen
                ]
                yield Launch(dtype, sum_table(moved, dtype), bases)

    def _take(self, part: _Part) -> tuple[Spot, ...]:
        sizes = _cut_sizes(self._segment_bytes[part.chunk], part.begin, part.end)
        widths = self._widths if part.partial else [1] * len(sizes)
        return tuple(self._staging.take(size * width) for size, width in zip(sizes, widths, strict=False))

    def _part_of(self, part: _Part) -> tuple[Spot, ...]:
        """The bytes of ``part`` in what its row brings or takes away."""
        whole, spots = self._rows[part.row], self._landed.get(part.row) or self._totals[part.row]
        widths = self._widths if whole.partial else [1] * len(spots)
        sizes = self._segment_bytes[part.chunk]
        skipped = _cut_sizes(sizes, whole.begin, part.begin)
        wanted = _cut_sizes(sizes, part.begin, part.end)
        return tuple(
            Spot(spot.buffer, spot.offset + skip * width, size * width)
            for spot, skip, size, width in zip(spots, skipped, wanted, widths, strict=False)
        )


def _whole(plan: Plan, row: int) -> _Part:
    _, _, src, dst, chunk, _, begin, end, partial = plan.transfers[row].tolist()
    return _Part(row, src, dst, chunk, begin, end, partial)


def _copies(spans: Sequence[Span]) -> Iterator[Launch]:
    for chosen, bases in _by_bases(spans, lambda each: (each.destination, each.source)):
        moved = [
            each._replace(destination=_moved(each.destination, bases), source=_moved(each.source, bases))
            for each in chosen
        ]
        yield Launch(None, pack_table(moved, "uint8", "uint8"), bases)


def _by_bases(
    items: Sequence[T], places_of: Callable[[T], Sequence[Place]]
) -> Iterator[tuple[list[T], tuple[int, ...]]]:
    """Cuts items into runs that need no more buffers than a launch has bases; lists have a buffer for each row."""
    chosen: list[T] = []
    bases: dict[int, None] = {}
    for item in items:
        wanted = dict.fromkeys(place.base for place in places_of(item))
        if chosen and len(bases | wanted) > MOST_BASES:
            yield chosen, tuple(bases)
            chosen, bases = [], {}
        chosen.append(item)
        bases |= wanted
    if chosen:
        yield chosen, tuple(bases)


def _moved(place: Place, bases: tuple[int, ...]) -> Place:
    return Place(bases.index(place.base), place.offset)


def _finished(steps: Iterable[Round | Launch | Zeros], staging: _Staging) -> Recipe:
    kept = tuple(each for each in steps if not isinstance(each, Round) or each.receives or each.sends)
    sends = [slot for each in kept if isinstance(each, Round) for slot in each.sends]
    receives = [slot for each in kept if isinstance(each, Round) for slot in each.receives]
    return Recipe(
        kept,
        staging.num_bytes,
        sum(slot.num_bytes for slot in sends),
        len(sends),
        sum(slot.num_bytes for slot in receives),
        len(receives),
    )


def _cut(spots: Sequence[Spot], begin: int, end: int) -> tuple[Spot, ...]:
    """Bytes ``begin`` to ``end`` of a chunk, in each of its segments; empty where the range has nothing of it."""
    parts = []
    for spot in spots:
        first = min(max(begin, 0), spot.num_bytes)
        last = min(max(end, first), spot.num_bytes)
        parts.append(Spot(spot.buffer, spot.offset + first, last - first))
        begin, end = begin - spot.num_bytes, end - spot.num_bytes
    return tuple(parts)


def _cut_sizes(sizes: Sequence[int], begin: int, end: int) -> list[int]:
    """Sizes of what `_cut` gives."""
    parts = []
    for size in sizes:
        parts.append(max(min(end, size), 0) - max(min(begin, size), 0))
        begin, end = begin - size, end - size
    return parts
