"""How a meter's bytes travel: as messages in host memory, or in rounds on a stream that the host waits for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np

from sparsecoll.cuda.device import Memory
from sparsecoll.transport.base import HostTransport, Message, Operation
from sparsecoll.transport.stream import Buffer, Round, Slot, StreamTransport

__all__ = ["HostWire", "StreamWire", "Wire"]

_IN_FLIGHT = 4
_LEAST_MESSAGE_BYTES = 1 << 12


class Wire(Protocol):
    """A way to a peer.

    Attributes:
        most_bytes: that are worth sending at once, to outlast a start.
    """

    most_bytes: int

    def reserve(self, num_bytes: int) -> None:
        """Makes room for so many bytes in each direction, so that no measurement is the first to touch it."""
        ...

    def swap(self, peer: int, sent_bytes: int, received_bytes: int) -> None:
        """Returns when so many bytes have passed in each direction."""
        ...


class HostWire:
    """Over a transport of host memory."""

    most_bytes = 1 << 25

    def __init__(self, transport: HostTransport, operation: Operation) -> None:
        self._transport, self._operation = transport, operation
        self._source = self._destination = np.ones(0, np.uint8)

    def reserve(self, num_bytes: int) -> None:
        if len(self._source) < num_bytes:
            self._source, self._destination = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)

    def swap(self, peer: int, sent_bytes: int, received_bytes: int) -> None:
        sends = [Message(peer, self._source[begin:end]) for begin, end in _parts(sent_bytes)]
        receives = [Message(peer, self._destination[begin:end]) for begin, end in _parts(received_bytes)]
        self._transport.wait(self._transport.post(sends, receives, self._operation), self._operation)


class StreamWire:
    """Over a transport of device memory; what the host takes to issue and to notice counts."""

    most_bytes = 1 << 28

    def __init__(self, transport: StreamTransport, operation: Operation) -> None:
        self._transport, self._operation = transport, operation
        self._source = self._destination = Memory(0, 0, None)

    def reserve(self, num_bytes: int) -> None:
        if self._source.num_bytes < num_bytes:
            with self._transport.issuing(self._operation, "cupy") as (lane, _):
                self._source, self._destination = (
                    self._transport.gpu.allocate(num_bytes, lane) for _ in range(2)
                )  # fmt: skip

    def swap(self, peer: int, sent_bytes: int, received_bytes: int) -> None:
        group = Round(
            tuple(Slot(peer, 1, begin, end - begin) for begin, end in _parts(received_bytes)),
            tuple(Slot(peer, 0, begin, end - begin) for begin, end in _parts(sent_bytes)),
        )
        buffers = [Buffer(each.address, each.num_bytes) for each in (self._source, self._destination)]
        with self._transport.issuing(self._operation, "cupy") as (lane, issue):
            self._transport.run_round(group, buffers, lane)
        issue.wait()


def _parts(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Where the messages of a batch begin and end."""
    count = min(_IN_FLIGHT, max(1, num_bytes // _LEAST_MESSAGE_BYTES))
    return pairwise(num_bytes * part // count for part in range(count + 1)) if num_bytes else iter(())
