"""Runs one rank's part of a Plan over messages in host memory. It decides nothing: what goes where, and in which order,
stands in the Plan.

A run is a generator with one stop: it posts what it can, yields, and does the rest when it is resumed. Its driver
resumes it at once, or lets messages travel meanwhile.

A chunk is a tuple of *segments*, one uint8 view for each tensor that its rows come from; each segment of a piece
travels as a message of its own, straight from the caller's memory into the caller's memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import Protocol

import numpy as np

from sparsecoll.arena import Arena
from sparsecoll.executor.segments import Segments, cut, cut_sizes
from sparsecoll.executor.windowed import is_crowded, reduce_in_turn
from sparsecoll.native import accumulation_itemsize, itemsize, sum_views
from sparsecoll.plan import LEAD, Move, Plan, Program, program
from sparsecoll.transport.base import HostTransport, Message, Operation, View

__all__ = ["Steps", "all_gather_steps", "reduce_scatter_steps"]

Steps = Iterator[bool]
"""Yields once: whether all that is left can wait until the caller has time, as no other rank waits for this one."""

_SENDS_IN_FLIGHT = 2
"""Enough to keep a link busy, few enough that what is more urgent does not wait behind them."""


def all_gather_steps(
    plan: Plan,
    transport: HostTransport,
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
    payload = _Gathered({**destination, **source}, segment_bytes, mine, arena)
    steps = _flow(mine, transport, operation, payload)
    can_wait = next(steps)
    for chunk in mine.owned:
        if chunk in destination and destination[chunk] is not source[chunk]:
            for to, view in zip(destination[chunk], source[chunk], strict=True):
                np.copyto(to, view)
    yield can_wait
    yield from steps


def reduce_scatter_steps(
    plan: Plan,
    transport: HostTransport,
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
    divisors = plan.place.holders.sum(axis=1).tolist() if mean else [1] * plan.place.num_chunks
    if is_crowded(mine):
        arguments = (mine, transport, source, destination, segment_bytes, dtypes, divisors, operation, arena)
        yield from reduce_in_turn(*arguments)
        return
    arena.reset(int(plan.staging_bytes[transport.rank]))
    payload = _Reduced(source, destination, segment_bytes, dtypes, divisors, mine, arena)
    yield from _flow(mine, transport, operation, payload)
    payload.finish()


class _Payload(Protocol):
    """The bytes behind the moves of a program."""

    def outgoing(self, move: Move) -> Iterable[View]:
        """What to send; all that it needs has arrived."""

    def landing(self, number: int, move: Move) -> Iterable[View]:
        """Where a receive goes."""

    def arrived(self, number: int) -> None:
        """A receive has ended."""


def _flow(mine: Program, transport: HostTransport, operation: Operation, payload: _Payload) -> Steps:
    if mine.is_immediate:
        receives = [
            Message(move.peer, view)
            for number, move in enumerate(mine.receives)
            for view in payload.landing(number, move)
        ]
        sends = [Message(move.peer, view) for move in mine.sends for view in payload.outgoing(move)]
        requests = transport.post(sends, receives, operation)
        yield True
        transport.wait(requests, operation)
        for number in range(len(mine.receives)):
            payload.arrived(number)
        return
    pipeline = _Pipeline(mine, transport, operation, payload)
    pipeline.post()
    yield False
    while pipeline.is_running:
        pipeline.advance()


class _Pipeline:
    """A program in which pieces wait for each other."""

    def __init__(self, mine: Program, transport: HostTransport, operation: Operation, payload: _Payload) -> None:
        self._mine, self._transport, self._operation, self._payload = mine, transport, operation, payload
        self._missing = [len(move.needs) for move in mine.sends]
        self._feeds: list[list[int]] = [[] for _ in mine.receives]
        # Sends to a rank go in order; a queue is turned round, so that its end is next.
        self._queues: dict[int, list[int]] = {}
        for number in range(len(mine.sends) - 1, -1, -1):
            move = mine.sends[number]
            self._queues.setdefault(move.peer, []).append(number)
            for need in move.needs:
                self._feeds[need].append(number)
        self._heads: list[int] = []  # next to some rank and at hand
        for queue in self._queues.values():
            self._offer(queue)
        self._sending: set[int] = set()
        self._ports = [_Port([n for n, move in enumerate(mine.receives) if move.port == port]) for port in (0, 1)]
        self._parts: dict[tuple[bool, int], int] = {}  # (is_send, number) → messages in flight

    @property
    def is_running(self) -> bool:
        return bool(self._parts)

    def post(self) -> None:
        """Posts every receive that may come and every send that may go."""
        for port in self._ports:
            while (number := port.next(self._mine.receives)) is not None:
                move = self._mine.receives[number]
                self._start(False, number, move, self._payload.landing(number, move))
        while self._heads and self._may_send(self._heads[0]):
            number = heappop(self._heads)
            move = self._mine.sends[number]
            queue = self._queues[move.peer]
            queue.pop()
            self._offer(queue)
            self._sending.add(number)
            self._start(True, number, move, self._payload.outgoing(move))

    def advance(self) -> None:
        """Waits until something has ended, and posts what that makes possible."""
        arrived = []
        for key in self._transport.ended(self._operation):
            self._parts[key] -= 1
            if self._parts[key]:
                continue
            del self._parts[key]
            is_send, number = key
            if is_send:
                self._sending.remove(number)
                continue
            arrived.append(number)
            move = self._mine.receives[number]
            self._ports[move.port].arrive(number)
            for send in self._feeds[number]:
                self._missing[send] -= 1
                queue = self._queues[self._mine.sends[send].peer]
                if not self._missing[send] and queue[-1] == send:
                    heappush(self._heads, send)
        self.post()
        for number in arrived:
            self._payload.arrived(number)

    def _may_send(self, number: int) -> bool:
        """Whether there is room for one more in flight; there always is for one that comes before all of those.

        What is in flight may be ahead of its time, so that its receivers let it in only when what they lack has come.
        If that had to wait for room here, ranks would wait for each other in a circle.
        """
        return len(self._sending) < _SENDS_IN_FLIGHT or number < min(self._sending)

    def _offer(self, queue: list[int]) -> None:
        if queue and not self._missing[queue[-1]]:
            heappush(self._heads, queue[-1])

    def _start(self, is_send: bool, number: int, move: Move, views: Iterable[View]) -> None:
        messages = [Message(move.peer, view) for view in views]
        requests = self._transport.post(messages if is_send else [], [] if is_send else messages, self._operation)
        key = (is_send, number)
        self._parts[key] = len(requests)
        for request in requests:
            self._transport.track(request, key, self._operation)


class _Port:
    """Receives on one of a rank's links, let in when they are due (see `sparsecoll.plan.LEAD`)."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers
        self._next = 0
        self._earliest = 0
        self._has_arrived: set[int] = set()

    def next(self, receives: Sequence[Move]) -> int | None:
        """The next receive to post, if it is its time."""
        if self._next == len(self._numbers):
            return None
        number = self._numbers[self._next]
        if receives[number].stage > receives[self._numbers[self._earliest]].stage + LEAD:
            return None
        self._next += 1
        return number

    def arrive(self, number: int) -> None:
        self._has_arrived.add(number)
        while self._earliest < self._next and self._numbers[self._earliest] in self._has_arrived:
            self._has_arrived.remove(self._numbers[self._earliest])
            self._earliest += 1


class _Gathered:
    """Chunks on their way to their holders."""

    def __init__(
        self, at: dict[int, Segments], segment_bytes: Mapping[int, Sequence[int]], mine: Program, arena: Arena
    ) -> None:
        for chunk in mine.passing:
            at[chunk] = tuple(arena.take(size) for size in segment_bytes[chunk])
        self._at = at

    def outgoing(self, move: Move) -> Iterable[View]:
        return cut(self._at[move.chunk], move.begin, move.end)

    def landing(self, number: int, move: Move) -> Iterable[View]:
        return cut(self._at[move.chunk], move.begin, move.end)

    def arrived(self, number: int) -> None:
        pass


class _Reduced:
    """What one rank has of every chunk in a reduce-scatter: its own contribution and what has arrived."""

    def __init__(
        self,
        source: Mapping[int, Segments],
        destination: Mapping[int, Segments],
        segment_bytes: Mapping[int, Sequence[int]],
        dtypes: Sequence[str],
        divisors: Sequence[int],
        mine: Program,
        arena: Arena,
    ) -> None:
        self._source, self._destination = source, destination
        self._segment_bytes, self._dtypes, self._divisors = segment_bytes, dtypes, divisors
        self._widths = [accumulation_itemsize(dtype) // itemsize(dtype) for dtype in dtypes]
        self._mine, self._arena = mine, arena
        self._landed: list[Segments] = [()] * len(mine.receives)
        self._zeros = arena.take(0)
        # A sum is made as soon as its last contribution has arrived, while others are on their way.
        self._sum_of = {number: index for index, (*_, numbers) in enumerate(mine.sums) for number in numbers}
        self._missing = [len(numbers) for *_, numbers in mine.sums]

    def landing(self, number: int, move: Move) -> Segments:
        self._landed[number] = self._take(move)
        return self._landed[number]

    def outgoing(self, move: Move) -> Iterable[View]:
        """A sum, this rank's own contribution, or zeros where it has none."""
        if move.partial:
            total = self._take(move)
            self._add(total, move.chunk, move.begin, move.end, move.needs, is_partial=True)
            return total
        if move.chunk in self._source:
            return cut(self._source[move.chunk], move.begin, move.end)
        sizes = cut_sizes(self._segment_bytes[move.chunk], move.begin, move.end)
        if self._zeros.nbytes < max(sizes):
            self._zeros = self._arena.take(max(sizes))
            self._zeros[:] = 0
        return [self._zeros[:size] for size in sizes]

    def arrived(self, number: int) -> None:
        index = self._sum_of.get(number)
        if index is not None:
            self._missing[index] -= 1
            if not self._missing[index]:
                self._finish(index)

    def finish(self) -> None:
        """Sums to which nobody else contributes."""
        for index, (*_, numbers) in enumerate(self._mine.sums):
            if not numbers:
                self._finish(index)

    def _finish(self, index: int) -> None:
        chunk, begin, end, numbers = self._mine.sums[index]
        self._add(cut(self._destination[chunk], begin, end), chunk, begin, end, numbers, divisor=self._divisors[chunk])

    def _add(
        self,
        destination: Segments,
        chunk: int,
        begin: int,
        end: int,
        numbers: Sequence[int],
        *,
        is_partial: bool = False,
        divisor: int = 1,
    ) -> None:
        """Own contribution first, then arrivals in the Plan's order."""
        parts = [cut(self._source[chunk], begin, end)] if chunk in self._source else []
        are_partial = [False] * len(parts) + [self._mine.receives[number].partial for number in numbers]
        parts += [self._landed[number] for number in numbers]
        for position, dtype in enumerate(self._dtypes):
            if destination[position].nbytes:
                sum_views(
                    destination[position],
                    [part[position] for part in parts],
                    dtype,
                    destination_is_partial=is_partial,
                    sources_are_partial=are_partial,
                    divisor=divisor,
                )

    def _take(self, move: Move) -> Segments:
        widths = self._widths if move.partial else [1] * len(self._widths)
        sizes = cut_sizes(self._segment_bytes[move.chunk], move.begin, move.end)
        return tuple(self._arena.take(size * width) for size, width in zip(sizes, widths, strict=True))
