"""Ranks that are threads of one process, and the mailboxes between them.

A message is a rendezvous: whoever posts second copies once, straight from the sender's view to the receiver's.
Every request has a lock of its own that its end releases, so an event wakes exactly the thread that waits for it;
with 128 ranks a shared condition would wake them all.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sparsecoll.errors import CollectiveTimeout, InvalidArgument, PeerFailure, SparsecollError, TransportError
from sparsecoll.transport.base import HostTransport, Operation, View

__all__ = ["LocalTransport", "LocalWorld", "run_local"]

Result = TypeVar("Result")


class _Failure(NamedTuple):
    """Why something ended badly; the rank that waited makes an exception of it."""

    kind: type[SparsecollError]
    text: str


class _Signal:
    """Something that ends once, well or badly, and that one rank waits for.

    A bare lock, as `threading.Event` costs several times as much to make and every message makes two.
    """

    __slots__ = ("_running", "failure")

    def __init__(self) -> None:
        self.failure: _Failure | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def finish(self, failure: _Failure | None = None) -> None:
        self.failure = failure
        self._running.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        if not self._running.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            return False
        self._running.release()
        return True


class _Request(_Signal):
    """One side of a message."""

    __slots__ = ("dst", "is_send", "listener", "src", "tag", "view")

    def __init__(self, src: int, dst: int, tag: int, view: View, *, is_send: bool) -> None:
        super().__init__()
        self.src, self.dst, self.tag, self.view, self.is_send = src, dst, tag, view, is_send
        self.listener: SimpleQueue[_Request] | None = None

    def finish(self, failure: _Failure | None = None) -> None:
        super().finish(failure)
        # Whoever sets the listener looks for the end afterwards, so one of both sees the other.
        if self.listener is not None:
            self.listener.put(self)

    def __str__(self) -> str:
        side = f"send to rank {self.dst}" if self.is_send else f"receive from rank {self.src}"
        return f"{side} of {self.view.nbytes} bytes"


class _Mailbox:
    """The messages to one rank of which only one side has been posted.

    A queue holds sends or receives, never both: the second side takes the first one out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[tuple[int, int], deque[_Request]] = {}

    def match(self, request: _Request, obstacle: Callable[[], _Failure | None]) -> _Request | None:
        """Takes out the other side of ``request``, or leaves ``request`` here; with an obstacle ends it instead."""
        with self._lock:
            # Asked under the lock: an obstacle arises before `remove` sweeps, so no request slips in between.
            if (failure := obstacle()) is not None:
                request.finish(failure)
                return None
            queue = self._queues.setdefault((request.src, request.tag), deque())
            if not queue or queue[0].is_send == request.is_send:
                queue.append(request)
                return None
            other = queue.popleft()
            if not queue:
                del self._queues[request.src, request.tag]
            return other

    def withdraw(self, request: _Request) -> bool:
        """Takes ``request`` back; False when the other side has it already, and ends it."""
        with self._lock:
            queue = self._queues.get((request.src, request.tag))
            if queue is None or request not in queue:
                return False
            queue.remove(request)
            if not queue:
                del self._queues[request.src, request.tag]
            return True

    def remove(self, src: int | None = None) -> list[_Request]:
        """Takes out everything, or everything from ``src``."""
        with self._lock:
            keys = [key for key in self._queues if src is None or key[0] == src]
            return [request for key in keys for request in self._queues.pop(key)]


class _Round:
    """One exchange: the record of each rank that has arrived, and what it waits for."""

    def __init__(self) -> None:
        self.records: dict[int, bytes] = {}
        self.signals: dict[int, _Signal] = {}
        self.leaver: int | None = None

    def finish(self, failure: _Failure | None) -> None:
        for signal in self.signals.values():
            signal.finish(failure)


class LocalWorld:
    """What the threads of one world share: a mailbox for each rank, the round of exchange, who has left."""

    def __init__(self, world_size: int) -> None:
        if world_size < 1:
            raise InvalidArgument(f"LocalWorld: expected a positive world_size, got {world_size}")
        self.world_size = world_size
        self._mailboxes = [_Mailbox() for _ in range(world_size)]
        self._round_lock = threading.Lock()
        self._round = _Round()
        self._closed: set[int] = set()
        self._abortion: _Failure | None = None
        self.ending: str | None = None
        self._twins: list[LocalWorld] = []

    def twin(self, number: int) -> LocalWorld:
        """The world in which the ranks meet that ask for their twin of this number, from 0."""
        with self._round_lock:
            while len(self._twins) <= number:
                self._twins.append(LocalWorld(self.world_size))
            return self._twins[number]

    def post(self, request: _Request) -> None:
        """Ends ``request`` together with its other side, or leaves it for that one."""
        other = self._mailboxes[request.dst].match(request, lambda: self._obstacle((request.src, request.dst)))
        if other is None:
            return
        send, receive = (request, other) if request.is_send else (other, request)
        failure = None
        if send.view.nbytes != receive.view.nbytes:
            text = f"expected a message of {receive.view.nbytes} bytes from rank {send.src} to rank {send.dst}"
            failure = _Failure(TransportError, f"{text}, got {send.view.nbytes}")
        else:
            try:
                np.copyto(receive.view, send.view)
            except (TypeError, ValueError) as exc:  # a read-only view, say; both sides have to know
                failure = _Failure(TransportError, f"expected to fill the {receive}, got {exc}")
        send.finish(failure)
        receive.finish(failure)

    def withdraw(self, request: _Request) -> bool:
        """Takes ``request`` back, so that nobody touches its view any more; False when it ends by itself."""
        return self._mailboxes[request.dst].withdraw(request)

    def join_round(self, rank: int, record: bytes) -> tuple[_Round, _Signal]:
        """Adds a record to the round of exchange; the last rank ends it."""
        signal = _Signal()
        with self._round_lock:
            current = self._round
            failure = self._obstacle(range(self.world_size))
            if failure is None and current.leaver is not None:
                failure = _Failure(
                    PeerFailure, f"expected rank {current.leaver} to wait, it has given up this exchange"
                )
            if failure is not None:
                signal.finish(failure)
                return current, signal
            current.records[rank] = record
            current.signals[rank] = signal
            if len(current.records) == self.world_size:
                lengths = sorted(set(map(len, current.records.values())))
                text = f"expected records of equal length, got {lengths} bytes"
                self._end_round(_Failure(TransportError, text) if len(lengths) > 1 else None)
        return current, signal

    def leave_round(self, rank: int, current: _Round) -> list[int]:
        """Gives up and says which ranks are missing; none when the round has ended meanwhile.

        The record stays, so that those who give up next do not take this rank for missing.
        """
        with self._round_lock:
            if self._round is not current:
                return []
            current.leaver = rank if current.leaver is None else current.leaver
            del current.signals[rank]
            return [other for other in range(self.world_size) if other not in current.records]

    def abort(self, rank: int, reason: str) -> None:
        """Ends everything in flight and all that comes later; the first abort counts."""
        with self._round_lock:
            if self._abortion is None:
                self.ending = f"rank {rank} aborted: {reason}"
                self._abortion = _Failure(PeerFailure, f"expected all ranks to go on, {self.ending}")
            self._end_round(self._abortion)
        for mailbox in self._mailboxes:
            for request in mailbox.remove():
                request.finish(self._abortion)

    def close(self, rank: int) -> None:
        """Ends what others have in flight with ``rank``."""
        failure = _closure(rank)
        with self._round_lock:
            if rank in self._closed:
                return
            self._closed.add(rank)
            self._end_round(failure)
        for dst, mailbox in enumerate(self._mailboxes):
            for request in mailbox.remove(None if dst == rank else rank):
                request.finish(failure)

    def _end_round(self, failure: _Failure | None) -> None:
        ended, self._round = self._round, _Round()
        ended.finish(failure)

    def _obstacle(self, peers: Iterable[int]) -> _Failure | None:
        if self._abortion is not None:
            return self._abortion
        if self._closed:
            return next((_closure(peer) for peer in peers if peer in self._closed), None)
        return None


def _closure(rank: int) -> _Failure:
    return _Failure(PeerFailure, f"expected rank {rank} to take part, it has closed its transport")


class LocalTransport(HostTransport):
    """One rank of a `LocalWorld`."""

    backend = "local"

    def __init__(self, world: LocalWorld, rank: int) -> None:
        if not 0 <= rank < world.world_size:
            raise InvalidArgument(f"LocalTransport: expected a rank below {world.world_size}, got {rank}")
        super().__init__(rank, world.world_size)
        self._world = world
        self._num_twins = 0
        self._tracked: dict[_Request, Hashable] = {}
        self._heard: SimpleQueue[_Request] = SimpleQueue()

    def twin(self) -> LocalTransport:
        self._num_twins += 1
        return LocalTransport(self._world.twin(self._num_twins - 1), self.rank)

    def _send(self, peer: int, view: View, operation: Operation) -> _Request:
        request = _Request(self.rank, peer, operation.tag, view, is_send=True)
        self._world.post(request)
        return request

    def _receive(self, peer: int, view: View, operation: Operation) -> _Request:
        request = _Request(peer, self.rank, operation.tag, view, is_send=False)
        self._world.post(request)
        return request

    def wait(self, requests: Sequence[_Request], operation: Operation) -> None:
        for index, request in enumerate(requests):
            if request.wait(operation.remaining_s) and request.failure is None:
                continue
            overdue = [each for each in requests[index:] if self._take_back(each)]
            failure = next((each.failure for each in requests[index:] if each.failure is not None), None)
            if failure is not None:
                raise self._error(failure.kind, operation, failure.text)
            if overdue:
                text = f"expected the {overdue[0]} to end within {operation.timeout_s} s"
                text += f", {len(overdue)} of {len(requests)} messages are in flight"
                raise self._error(CollectiveTimeout, operation, text)

    def track(self, request: _Request, key: Hashable, operation: Operation) -> None:
        self._tracked[request] = key
        request.listener = self._heard
        if request.wait(0.0):
            self._heard.put(request)

    def ended(self, operation: Operation) -> list[Any]:
        keys: list[Any] = []
        while not keys or not self._heard.empty():
            try:
                request = self._heard.get(timeout=min(operation.remaining_s, threading.TIMEOUT_MAX))
            except Empty:
                return keys + self._end_all([], operation)
            if request not in self._tracked:
                continue  # told twice, or of an operation that has failed
            if request.failure is not None:
                self._end_all([request], operation)
            keys.append(self._tracked.pop(request))
        return keys

    def _end_all(self, first: list[_Request], operation: Operation) -> list[Any]:
        """Takes back what has not ended and raises; or gives the keys, where all have ended after all."""
        tracked, self._tracked = self._tracked, {}
        self.wait(first + list(tracked), operation)
        return list(tracked.values())

    def _take_back(self, request: _Request) -> bool:
        """Whether ``request`` was still in flight. Afterwards nobody touches its view."""
        if request.wait(0.0):
            return False
        if self._world.withdraw(request):
            return True
        request.wait(threading.TIMEOUT_MAX)  # the other side is copying right now
        return False

    def exchange(self, record: bytes, operation: Operation) -> list[bytes]:
        current, signal = self._world.join_round(self.rank, record)
        if not signal.wait(operation.remaining_s):
            if missing := self._world.leave_round(self.rank, current):
                text = f"expected a record of {len(record)} bytes from every rank within {operation.timeout_s} s"
                raise self._error(CollectiveTimeout, operation, f"{text}, got none from ranks {missing}")
            signal.wait(threading.TIMEOUT_MAX)  # the round has ended between the deadline and now
        if signal.failure is not None:
            raise self._error(signal.failure.kind, operation, signal.failure.text)
        self.counters.control_bytes += len(record) * (self.world_size - 1)
        self.counters.control_messages += self.world_size - 1
        return [current.records[rank] for rank in range(self.world_size)]

    def heard_abort(self) -> str | None:
        return self._world.ending

    def abort(self, reason: str) -> None:
        self._world.abort(self.rank, reason)

    def close(self) -> None:
        self._world.close(self.rank)


def run_local(fn: Callable[[LocalTransport], Result], world_size: int, *, timeout_s: float = 60.0) -> list[Result]:
    """Runs ``fn`` in ``world_size`` threads, each with the transport of one rank, and returns what they return.

    The first exception of a rank aborts the world and is raised here, with a note that names the rank.

    Raises:
        CollectiveTimeout: a rank has not ended within ``timeout_s``; the message has the stacks of all threads.
            Such a thread cannot be stopped: its next message raises, and it does not keep the process alive.
    """
    world = LocalWorld(world_size)
    results: dict[int, Result] = {}
    failures: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        transport = LocalTransport(world, rank)
        try:
            results[rank] = fn(transport)
        except BaseException as exc:  # whatever ends a rank has to end the others
            failures.append((rank, exc))
            transport.abort(f"{type(exc).__name__}: {exc}")
        finally:
            transport.close()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    deadline_s = time.monotonic() + timeout_s
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        stacks = _stacks() if late else ""
    except BaseException as exc:  # Ctrl-C while waiting
        world.abort(0, f"{type(exc).__name__} in the thread that started the ranks")
        raise
    if failures:
        rank, exception = failures[0]
        exception.add_note(f"raised by rank {rank}/{world_size}" + (f"; ranks {late} run on" if late else ""))
        raise exception
    if late:
        world.abort(late[0], f"did not end within {timeout_s} s")
        raise CollectiveTimeout(
            f"run_local: expected all ranks to end within {timeout_s} s, ranks {late} run on\n{stacks}"
        )
    return [results[rank] for rank in range(world_size)]


def _stacks() -> str:
    frames = sys._current_frames()
    parts = []
    for thread in threading.enumerate():
        if thread.ident in frames:
            parts.append(f"{thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident])))
    return "\n".join(parts)
