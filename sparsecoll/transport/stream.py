"""Messages in device memory, in the order of streams: issuing returns at once, and nobody waits on the host.

What is issued travels after all that is in the caller's stream, and is ready to a stream that joins it. Messages go in
*rounds*, groups that both ends number alike (`sparsecoll.plan.rounds`). Records travel over the host, by another
transport: so do the notice of an abort and the start.

[Note: what nobody waits for] An operation that never ends keeps its stream waiting, and the host would notice at some
unrelated synchronisation, if ever. A watcher looks at what is in flight, ends the communicators when a deadline has
passed or the back end reports an error, and so releases the streams; the error is raised by the next call of the group
and by whoever waits for the operation.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sparsecoll.cuda.device import Device, Lane
from sparsecoll.errors import CollectiveTimeout, PeerFailure, SparsecollError, TransportError
from sparsecoll.transport.base import HostTransport, Operation, Transport

__all__ = ["Buffer", "Issue", "Round", "Slot", "StreamTransport"]

_WATCH_S = 0.02
_SPIN_S = 2e-4
_PAUSE_S = 5e-5


class Buffer(NamedTuple):
    """Device memory of an operation.

    Attributes:
        address: of its first byte.
        nbytes: its size, under NumPy's name.
    """

    address: int
    nbytes: int


class Slot(NamedTuple):
    """One message of a round: bytes from ``offset`` of the buffer with the number ``buffer``."""

    peer: int
    buffer: int
    offset: int
    num_bytes: int


class Round(NamedTuple):
    """Messages that travel as one group; those of a pair of ranks stand in one order at both ends, none is empty."""

    receives: tuple[Slot, ...]
    sends: tuple[Slot, ...]


class Issue:
    """Something that has been put on a lane and ends when the device gets there.

    Attributes:
        operation: what it belongs to.
        framework: of the caller's tensors, whose current stream joins it.
        keep: stays alive until the end.
    """

    def __init__(self, transport: StreamTransport, operation: Operation, framework: str) -> None:
        self.operation, self.framework = operation, framework
        self.keep: Any = None
        self._transport = transport
        self._event = transport.gpu.new_event()
        self._ended_well = False

    def close(self, lane: Lane) -> None:
        """Marks the end, when all has been put on ``lane``."""
        self._event.record(lane.stream)

    def join(self) -> None:
        """Lets the caller's current stream go on only when this has ended; raises what has gone wrong by now."""
        if not self._ended_well:
            self._transport.check(self.operation)
        self._event.hold(self._transport.gpu.caller_stream(self.framework))

    def has_ended_well(self) -> bool:
        """Whether the device has got there, and not because everything was broken off.

        Raises:
            TransportError: the device has failed for good.
        """
        try:
            if not self._ended_well and self._transport.failure is None and self._event.is_done():
                # Asked once more, for a failure comes before what it breaks off.
                self._ended_well = self._transport.failure is None
        except RuntimeError as error:  # CUDA tells here what went wrong in any kernel before
            text = f"expected {self._transport.device} to go on, got {error}"
            raise self._transport._error(TransportError, self.operation, text) from error
        return self._ended_well

    def is_done(self) -> bool:
        """Whether it has ended, well or badly."""
        return self._transport.failure is not None or self.has_ended_well()

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks the host until the end.

        Raises:
            CollectiveTimeout: ``timeout_s`` passed; the operation itself goes on.
            CollectiveTimeout, PeerFailure, TransportError: the operation has failed.
        """
        limit_s = self.operation.remaining_s + 2 * _WATCH_S if timeout_s is None else timeout_s
        started_s = time.monotonic()
        while not self.is_done():
            waited_s = time.monotonic() - started_s
            if waited_s >= limit_s:
                text = f"expected an end within {limit_s:.3g} s, it is still in flight"
                raise self._transport._error(CollectiveTimeout, self.operation, text)
            if waited_s > _SPIN_S:  # what takes longer can wait for the host's clock
                time.sleep(_PAUSE_S)
        if not self.has_ended_well():
            self._transport.check(self.operation)


class StreamTransport(Transport):
    """A transport of device memory; a subclass puts single groups on a stream.

    Attributes:
        gpu: this rank's device.
        control: carries records; closed with this transport.
        failure: what has ended it, if anything has.
    """

    def __init__(self, control: HostTransport, gpu: Device) -> None:
        super().__init__(control.rank, control.world_size)
        self.gpu = gpu
        self.device = gpu.name
        self.control = control
        self.counters = control.counters
        self.failure: SparsecollError | None = None
        self._closed = False
        self._in_flight: deque[Issue] = deque()
        self._news = threading.Condition()
        self._watcher: threading.Thread | None = None

    def run_round(self, group: Round, buffers: Sequence[Buffer], lane: Lane) -> None:
        """Puts the messages of one round on ``lane``, and counts them."""
        if group.receives or group.sends:
            self.issue(group, buffers, lane)
            self.counters.received_bytes += sum(slot.num_bytes for slot in group.receives)
            self.counters.received_messages += len(group.receives)
            self.counters.sent_bytes += sum(slot.num_bytes for slot in group.sends)
            self.counters.sent_messages += len(group.sends)

    @abstractmethod
    def issue(self, group: Round, buffers: Sequence[Buffer], lane: Lane) -> None:
        """Puts the messages of one round, of which there are some, on ``lane``."""

    @abstractmethod
    def gather(self, source: Buffer, destination: Buffer, lane: Lane) -> None:
        """Puts on ``lane``: ``source`` of every rank, of equal sizes, to ``destination`` in rank order."""

    @abstractmethod
    def _problem(self) -> SparsecollError | None:
        """What the back end reports of its own accord."""

    @abstractmethod
    def _break_off(self) -> None:
        """Makes everything in flight end, so that streams go on; from any thread."""

    @abstractmethod
    def _release(self) -> None:
        """Gives back communicators after a good end."""

    @contextmanager
    def issuing(self, operation: Operation, framework: str, priority: int = 0) -> Iterator[tuple[Lane, Issue]]:
        """Opens a lane for one operation, after all that is in the current stream of ``framework``.

        Raises:
            CollectiveTimeout, PeerFailure, TransportError: an earlier operation has failed.
        """
        self.check(operation)
        caller = self.gpu.caller_stream(framework)
        with self.gpu.lane(caller, priority) as lane:
            issue = Issue(self, operation, framework)
            yield lane, issue
            issue.close(lane)
        if not lane.is_captured:
            self._watch(issue)

    def check(self, operation: Operation) -> None:
        """Raises what has ended this transport, if anything has."""
        if self.failure is not None:
            text = str(self.failure)
            raise type(self.failure)(text if text.startswith(str(operation)) else f"{operation}: {text}")

    def exchange(self, record: bytes, operation: Operation) -> list[bytes]:
        self.check(operation)
        return self.control.exchange(record, operation)

    def abort(self, reason: str) -> None:
        self._fail(TransportError(f"expected an open transport, this rank aborted: {reason}"), reason)

    def close(self) -> None:
        """Waits for what is in flight (each operation has its timeout)."""
        if self._closed:
            return
        with self._news:
            self._news.wait_for(lambda: not self._in_flight or self.failure is not None)
            self._closed = True
            self._news.notify_all()
        if self._watcher is not None:
            self._watcher.join()
        if self.failure is None:
            self._release()
        self.control.close()

    def _watch(self, issue: Issue) -> None:
        with self._news:
            self._in_flight.append(issue)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._look, name=f"sparsecoll-watch-{self.rank}", daemon=True)
                self._watcher.start()
            elif len(self._in_flight) == 1:
                self._news.notify_all()

    def _look(self) -> None:
        self.gpu.use_beside_captures()
        while True:
            with self._news:
                self._news.wait_for(lambda: self._in_flight or self._closed)
                if self._closed:
                    return
            try:
                failure = self._look_once()
            except SparsecollError as error:
                failure = error
            if failure is not None:
                self._fail(failure, str(failure))
                return
            time.sleep(_WATCH_S)

    def _look_once(self) -> SparsecollError | None:
        """Forgets what has ended, and says what is wrong with the rest."""
        while self._in_flight and self._in_flight[0].has_ended_well():
            with self._news:
                self._in_flight.popleft()
                self._news.notify_all()
        if (problem := self._problem()) is not None:
            return problem
        if self._in_flight and (ending := self.control.heard_abort()) is not None:
            return self._error(PeerFailure, self._in_flight[0].operation, f"expected all ranks to go on, {ending}")
        for issue in list(self._in_flight):
            if issue.operation.remaining_s == 0.0 and not issue.has_ended_well():
                text = f"expected all ranks to take part within {issue.operation.timeout_s} s, it is still in flight"
                return self._error(CollectiveTimeout, issue.operation, text)
        return None

    def _fail(self, failure: SparsecollError, reason: str) -> None:
        with self._news:
            if self.failure is not None or self._closed:
                return
            self.failure = failure
            self._news.notify_all()
        try:
            self._break_off()
        finally:  # the others are told in any case; the buffers stay, as the device may still write to them
            self.control.abort(reason)
