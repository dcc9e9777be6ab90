"""Messages over an MPI communicator, through mpi4py.

[Note: waiting] MPI moves bytes only while somebody calls it. A wait therefore polls: at first with nothing but a
yield of the processor between polls, which keeps small messages fast also when ranks share a core, then with short
sleeps, so that a rank which waits for long leaves the core to compute.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsecoll.errors import (
    BackendUnavailable,
    CollectiveTimeout,
    InvalidArgument,
    PeerFailure,
    SparsecollError,
    TransportError,
)
from sparsecoll.transport.base import Operation, View
from sparsecoll.transport.tagged import (
    NOTICE_TAG,
    NUM_PAYLOAD_TAGS,
    Request,
    TaggedTransport,
    new_notices,
    read_notice,
)

__all__ = ["MpiTransport"]

_SPIN_S = 5e-4
_LONGEST_SLEEP_S = 1e-4


class MpiTransport(TaggedTransport):
    """One rank of a communicator. All ranks of ``comm`` make theirs together.

    Attributes:
        supports_threads: whether a thread other than the one that started MPI may use this transport.

    Args:
        comm: an intracommunicator of mpi4py; None takes all ranks.
        timeout_s: allowed time until all ranks have come.

    Raises:
        BackendUnavailable: mpi4py or an MPI library is missing.
        CollectiveTimeout: not all ranks came in time; names those that do not answer.
        InvalidArgument: ``comm`` is no intracommunicator.
    """

    backend = "mpi"

    def __init__(self, comm: Any | None = None, *, timeout_s: float = 300.0) -> None:
        self._mpi = _import_mpi()
        comm = self._mpi.COMM_WORLD if comm is None else comm
        if not isinstance(comm, self._mpi.Intracomm) or comm == self._mpi.COMM_NULL:
            raise InvalidArgument(f"MpiTransport: expected an intracommunicator, got {comm!r}")
        super().__init__(comm.Get_rank(), comm.Get_size())
        self.supports_threads = self._mpi.Query_thread() == self._mpi.THREAD_MULTIPLE
        start = Operation("MpiTransport", 0, timeout_s)
        # Payload may use every tag that MPI guarantees, so records and notices have a communicator of their own.
        # Both stay until MPI ends: to free them is collective, and a rank that closes must not wait for others.
        self._payload, self._control = self._duplicate(comm, start), self._duplicate(comm, start)
        # MPI may write into the buffers of what was given up. An attribute of a communicator outlives this object.
        self._abandoned: list[Request] = []
        self._control.Set_attr(self._mpi.Comm.Create_keyval(), self._abandoned)

    def _duplicate(self, comm: Any, operation: Operation) -> Any:
        duplicate, request = comm.Idup()
        if not _poll(request.Test, operation.deadline_s):
            text = f"expected all ranks within {operation.timeout_s} s, ranks {self._silent(comm)} do not answer"
            raise self._error(CollectiveTimeout, operation, text)
        duplicate.Set_errhandler(self._mpi.ERRORS_RETURN)
        return duplicate

    def _silent(self, comm: Any) -> list[int]:
        """Asks around on the caller's own communicator, which is fair only because all is lost anyway."""
        tag, nothing = comm.Get_attr(self._mpi.TAG_UB), np.empty(0, np.uint8)
        answers = [comm.Irecv([nothing, self._mpi.BYTE], peer, tag) for peer in self._peers]
        questions = [comm.Isend([nothing, self._mpi.BYTE], peer, tag) for peer in self._peers]
        _poll(lambda: self._mpi.Request.Testall(answers + questions), time.monotonic() + 0.5)
        silent = [peer for peer, answer in zip(self._peers, answers, strict=True) if not answer.Test()]
        for request in answers + questions:
            if request:
                request.Cancel()
        return silent

    def _start(self, peer: int, view: View, tag: int, operation: Operation, *, is_send: bool) -> Request:
        comm, tag = (self._payload, tag) if tag < NUM_PAYLOAD_TAGS else (self._control, tag - NUM_PAYLOAD_TAGS)
        request = Request(None, peer, view, is_send)
        try:
            handle = (comm.Isend if is_send else comm.Irecv)([view, self._mpi.BYTE], peer, tag)
        except self._mpi.Exception as exc:
            raise self._describe(exc.Get_error_code(), request, operation) from exc
        return request._replace(handle=handle)

    def wait(self, requests: Sequence[Request], operation: Operation) -> None:
        handles = [request.handle for request in requests]
        statuses = [self._mpi.Status() for _ in requests]
        try:
            if not _poll(lambda: self._mpi.Request.Testall(handles, statuses), operation.deadline_s, self._listen):
                overdue = [request for request in requests if not request.handle.Test()]
                if overdue:
                    text = f"expected the {overdue[0]} to end within {operation.timeout_s} s"
                    text += f", {len(overdue)} of {len(requests)} messages are in flight"
                    raise self._error(CollectiveTimeout, operation, text)
        ...


def _poll(test: Callable[[], bool], deadline_s: float, listen: Callable[[], None] | None = None) -> bool:
    """Calls ``test`` until it is true or the deadline has passed; see [Note: waiting]."""
