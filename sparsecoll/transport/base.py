"""What a back end must do: move messages, exchange small records. It decides nothing.

There are two kinds. A `HostTransport` moves host memory and tells when a message has ended; a
`sparsecoll.transport.stream.StreamTransport` moves device memory in the order of streams, where nobody waits on the
host.

A payload of host memory is a *view*: a one-dimensional, contiguous uint8 NumPy array over the caller's memory. Messages
between a pair of ranks under one tag match in the order in which both sides post them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import SparsecollError

__all__ = ["Counters", "HostTransport", "Message", "Operation", "Transport", "split_message"]

View = NDArray[np.uint8]


class Message(NamedTuple):
    """One view to send to ``peer``, or to fill from ``peer``."""

    peer: int
    view: View


@dataclass(frozen=True)
class Operation:
    """What is under way, for matching and for error messages.

    Attributes:
        name: public name of the collective.
        sequence: number of the operation in its group, equal on all ranks.
        timeout_s: allowed time from ``started_s``.
        started_s: ``time.monotonic()`` at the start.
    """

    name: str
    sequence: int
    timeout_s: float
    started_s: float = field(default_factory=time.monotonic)

    @property
    def deadline_s(self) -> float:
        return self.started_s + self.timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.deadline_s - time.monotonic())

    @property
    def tag(self) -> int:
        """Small enough for every back end (MPI guarantees 32767)."""
        return self.sequence % 32768

    def __str__(self) -> str:
        return f"{self.name} #{self.sequence}"


@dataclass
class Counters:
    """What a rank has really sent and received. Payload and control records are counted apart."""

    sent_bytes: int = 0
    sent_messages: int = 0
    received_bytes: int = 0
    received_messages: int = 0
    control_bytes: int = 0
    control_messages: int = 0

    def snapshot(self) -> Counters:
        return Counters(**vars(self))

    def __add__(self, other: Counters) -> Counters:
        return Counters(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def since(self, earlier: Counters) -> Counters:
        """The difference to an earlier snapshot."""
        return Counters(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})


class Transport(ABC):
    """Connects the ranks of one group. Used by one thread at a time.

    Attributes:
        backend: ``local``, ``torch``, ``mpi`` or ``nccl``.
        device: where the tensors are that it moves, as torch writes it.
    """

    backend: str
    device: str = "cpu"

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.counters = Counters()

    @abstractmethod
    def exchange(self, record: bytes, operation: Operation) -> list[bytes]:
        """Gives every rank the records of all, in rank order. All have the same length, usually under 4 kB.

        Adds to ``control_bytes`` and ``control_messages`` what this rank's record cost to bring to the others.

        After an error the group is unusable: whoever gets one calls `abort`, so that those who wait for this rank
        need not wait for their own deadline.

        Raises:
            CollectiveTimeout: the deadline passed; names what is missing.
            PeerFailure: a peer is gone.
            TransportError: the back end failed otherwise.
        """

    def _error(self, kind: type[SparsecollError], operation: Operation, text: str) -> SparsecollError:
        """An error of the common form; ``text`` says what was expected and found."""
        return kind(f"{operation}: {text} (rank {self.rank}/{self.world_size})")

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Makes peers that wait for this rank fail soon with `PeerFailure`, where the back end can."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the transport owns. Local, idempotent, and no collective."""


class HostTransport(Transport):
    """Messages in host memory.

    Attributes:
        max_message_bytes: larger views are cut by `split_message` on both sides.
    """

    max_message_bytes: int = 1 << 30

    def post(self, sends: Sequence[Message], receives: Sequence[Message], operation: Operation) -> list[Any]:
        """Starts all messages and returns one request for each part, sends after receives.

        Views must stay alive and untouched until `wait` has returned. Empty views are skipped on both sides.
        Peers are other ranks, never this one.
        """
        incoming = self._parts(receives)
        outgoing = self._parts(sends)
        requests = [self._receive(peer, part, operation) for peer, part in incoming]
        requests += [self._send(peer, part, operation) for peer, part in outgoing]
        self.counters.received_bytes += sum(part.nbytes for _, part in incoming)
        self.counters.received_messages += len(incoming)
        self.counters.sent_bytes += sum(part.nbytes for _, part in outgoing)
        self.counters.sent_messages += len(outgoing)
        return requests

    def _parts(self, messages: Sequence[Message]) -> list[tuple[int, View]]:
        """What really goes on the wire: empty views do not, and large ones do in parts."""
        limit_bytes = self.max_message_bytes
        if all(0 < view.nbytes <= limit_bytes for _, view in messages):
            return list(messages)
        return [(peer, part) for peer, view in messages for part in split_message(view, limit_bytes)]

    @abstractmethod
    def _send(self, peer: int, view: View, operation: Operation) -> Any:
        """Starts one non-empty send and returns its request."""

    @abstractmethod
    def _receive(self, peer: int, view: View, operation: Operation) -> Any:
        """Starts one non-empty receive and returns its request."""

    def keep_going(self) -> None:
        """Has what is in flight go on while the caller computes. Nothing to do where it goes on by itself."""

    @abstractmethod
    def wait(self, requests: Sequence[Any], operation: Operation) -> None:
        """Blocks until all ``requests`` have ended.

        Raises:
            CollectiveTimeout: the deadline passed; names operation, peer, direction and bytes of one that is missing.
            PeerFailure, TransportError: as `exchange`.
        """

    @abstractmethod
    def track(self, request: Any, key: Hashable, operation: Operation) -> None:
        """Has `ended` tell when ``request`` has ended, instead of `wait`. The order of calls is that of posting."""

    @abstractmethod
    def ended(self, operation: Operation) -> list[Any]:
        """Blocks until a tracked request has ended, and gives the keys of all that have ended since the last call.

        Something must be tracked. Raises as `wait` does; nothing is tracked afterwards.
        """

    @abstractmethod
    def twin(self) -> HostTransport:
        """Another transport between the same ranks, whose messages do not meet those of this one.

        Another thread may use it. It ends at the latest when this one does. Collective: all ranks ask for as many.
        """

    @abstractmethod
    def heard_abort(self) -> str | None:
        """What another rank's `abort` has said, if it has been heard by now; may be asked from any thread."""


def split_message(view: View, limit_bytes: int) -> Iterator[View]:
    """Cuts a view into parts of at most ``limit_bytes``; an empty view has none."""
    for begin in range(0, view.nbytes, limit_bytes):
        yield view[begin : begin + limit_bytes]
