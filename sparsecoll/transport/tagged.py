"""What the back ends share whose ranks are processes and whose messages match by peer and tag.

The exchange of records and the notice of an abort are ordinary messages under tags of their own. An exchange sends
each record straight to every rank. Between 2 ranks on a quiet host that takes as long as Gloo's all-gather (0.3 ms; on
a busy one it was slower), and it can tell by name the rank that does not answer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsecoll.errors import PeerFailure, SparsecollError
from sparsecoll.transport.base import HostTransport, Message, Operation, View

__all__ = ["NOTICE_TAG", "NUM_PAYLOAD_TAGS", "Request", "TaggedTransport", "new_notice", "read_notice"]

NUM_PAYLOAD_TAGS = 32768
# All exchanges share one tag and so match in the order of calls: ranks that disagree about the operation meet here
# all the same, and can say so.
_EXCHANGE_TAG = NUM_PAYLOAD_TAGS
NOTICE_TAG = NUM_PAYLOAD_TAGS + 1
_NOTICE_BYTES = 1024
_NOTICE_TIMEOUT_S = 0.25


class Request(NamedTuple):
    """One message in flight.

    Attributes:
        handle: the back end's own request.
        view: what is read or filled, kept alive.
    """

    handle: Any
    peer: int
    view: View
    is_send: bool

    def __str__(self) -> str:
        side = f"send to rank {self.peer}" if self.is_send else f"receive from rank {self.peer}"
        return f"{side} of {self.view.nbytes} bytes"


class TaggedTransport(HostTransport):
    """A transport between processes; a subclass starts single messages and waits for them."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._ending: str | None = None

    @abstractmethod
    def _start(self, peer: int, view: View, tag: int, operation: Operation, *, is_send: bool) -> Request:
        """Starts one message under any tag; raises as `wait` does."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message], operation: Operation) -> list[Any]:
        self._check_usable(operation)
        return super().post(sends, receives, operation)

    def _send(self, peer: int, view: View, operation: Operation) -> Request:
        return self._start(peer, view, operation.tag, operation, is_send=True)

    def _receive(self, peer: int, view: View, operation: Operation) -> Request:
        return self._start(peer, view, operation.tag, operation, is_send=False)

    def exchange(self, record: bytes, operation: Operation) -> list[bytes]:
        self._check_usable(operation)
        records = np.empty((self.world_size, len(record)), np.uint8)
        records[self.rank] = np.frombuffer(record, np.uint8)
        requests = [
            self._start(peer, records[self.rank if is_send else peer], _EXCHANGE_TAG, operation, is_send=is_send)
            for is_send in (False, True)
            for peer in self._peers
        ]
        self.wait(requests, operation)
        self.counters.control_bytes += len(record) * len(self._peers)
        self.counters.control_messages += len(self._peers)
        return [each.tobytes() for each in records]

    def abort(self, reason: str) -> None:
        if self._ending is not None:
            return
        self._ending = f"rank {self.rank} aborted: {reason}"
        notice = new_notice()
        text = reason.encode()[: _NOTICE_BYTES - 1] or b"?"
        notice[: len(text)] = np.frombuffer(text, np.uint8)
        operation = Operation("abort", 0, _NOTICE_TIMEOUT_S)
        requests = []
        for peer in self._peers:
            try:
                requests.append(self._start(peer, notice, NOTICE_TAG, operation, is_send=True))
            except SparsecollError:
                continue  # this one is gone; the others may listen
        try:
            self.wait(requests, operation)
        except SparsecollError:
            return  # best effort

    def _check_usable(self, operation: Operation) -> None:
        if self._ending is not None:
            raise self._error(PeerFailure, operation, f"expected an open transport, {self._ending}")


def new_notice() -> View:
    """Room for a notice of abort, empty."""
    return np.zeros(_NOTICE_BYTES, np.uint8)


def read_notice(notice: View) -> str | None:
    """The reason in a notice, or None when none has arrived."""
    return notice.tobytes().rstrip(b"\0").decode(errors="replace") if notice[0] else None
