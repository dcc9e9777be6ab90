"""Messages over an MPI communicator, through mpi4py.

[Note: waiting] MPI moves bytes only while somebody calls it. A wait therefore polls: for some milliseconds with no
more than a yield of the processor between polls, so that an operation that moves megabytes never sleeps over its own
progress, and ranks that share a core take turns; then with sleeps of a tenth of the time waited so far. Capped at
0.2 ms they leave 93 % of the core to others. On another thread than the one that made the transport, where a wait
runs beside the caller's compute, the sleeps begin almost at once. What a caller leaves in flight while it computes is
polled by a thread of the transport, see [Note: progress].
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sparsecoll.errors import (
    BackendUnavailable,
    CollectiveTimeout,
    InvalidArgument,
    PeerFailure,
    SparsecollError,
    TransportError,
)
from sparsecoll.transport.base import Message, Operation, View
from sparsecoll.transport.progress import Progress
from sparsecoll.transport.tagged import (
    NOTICE_TAG,
    NUM_PAYLOAD_TAGS,
    Request,
    TaggedTransport,
    new_notice,
    read_notice,
)

__all__ = ["MpiTransport", "attached"]

T = TypeVar("T")

_NOTICE_TAG = NOTICE_TAG - NUM_PAYLOAD_TAGS
_EAGER_POLLS = 50
_SPIN_S = 5e-3
_SPIN_BESIDE_COMPUTE_S = 1e-4
_LONGEST_SLEEP_S = 2e-4


class MpiTransport(TaggedTransport):
    """One rank of a communicator. All ranks of ``comm`` make theirs together.

    Attributes:
        supports_threads: whether a thread other than the one that started MPI may use this transport.

    Args:
        comm: an intracommunicator of mpi4py; None takes all ranks.
        timeout_s: allowed time until all ranks have come.
        beside: what polls for a twin of this transport.

    Raises:
        BackendUnavailable: mpi4py or an MPI library is missing.
        CollectiveTimeout: not all ranks came in time; names those that do not answer.
        InvalidArgument: ``comm`` is no intracommunicator.
    """

    backend = "mpi"

    def __init__(self, comm: Any | None = None, *, timeout_s: float = 300.0, beside: Progress | None = None) -> None:
        self._mpi = _import_mpi()
        comm = self._mpi.COMM_WORLD if comm is None else comm
        if not isinstance(comm, self._mpi.Intracomm) or comm == self._mpi.COMM_NULL:
            raise InvalidArgument(f"MpiTransport: expected an intracommunicator, got {comm!r}")
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._thread = threading.get_ident()
        self.supports_threads = self._mpi.Query_thread() == self._mpi.THREAD_MULTIPLE
        start = Operation("MpiTransport", 0, timeout_s)
        # Payload may use every tag that MPI guarantees, so records and notices have a communicator of their own.
        # Both stay until MPI ends: to free them is collective, and a rank that closes must not wait for others.
        self._payload, self._control = self._duplicate(comm, start), self._duplicate(comm, start)
        # MPI may write into the buffers of what was given up. An attribute of a communicator outlives this object.
        self._abandoned: list[Request] = []
        self._control.Set_attr(self._mpi.Comm.Create_keyval(), self._abandoned)
        self._tracked: list[tuple[Request, Hashable]] = []
        self._progress = Progress(f"sparsecoll-{self.rank}-progress", beside)
        # MPI must not end under a poll, so the thread of a transport that nobody closes ends before Python does.
        weakref.finalize(self, self._progress.close)

    def twin(self) -> MpiTransport:
        return MpiTransport(self._payload, beside=self._progress)

    def _duplicate(self, comm: Any, operation: Operation) -> Any:
        duplicate, request = comm.Idup()
        if not any(request.Test() for _ in _patience(operation.deadline_s)):
            text = f"expected all ranks within {operation.timeout_s} s, ranks {self._silent(comm)} do not answer"
            raise self._error(CollectiveTimeout, operation, text)
        duplicate.Set_errhandler(self._mpi.ERRORS_RETURN)
        return duplicate

    def _silent(self, comm: Any) -> list[int]:
        """Asks around on the caller's own communicator, which is fair only because all is lost anyway."""
        tag, nothing = comm.Get_attr(self._mpi.TAG_UB), np.empty(0, np.uint8)
        answers = [comm.Irecv([nothing, self._mpi.BYTE], peer, tag) for peer in self._peers]
        questions = [comm.Isend([nothing, self._mpi.BYTE], peer, tag) for peer in self._peers]
        any(self._mpi.Request.Testall(answers + questions) for _ in _patience(time.monotonic() + 0.5))
        silent = [peer for peer, answer in zip(self._peers, answers, strict=True) if not answer.Test()]
        for answer in answers:
            if answer:
                answer.Cancel()
        return silent

    def _start(self, peer: int, view: View, tag: int, operation: Operation, *, is_send: bool) -> Request:
        comm, tag = (self._payload, tag) if tag < NUM_PAYLOAD_TAGS else (self._control, tag - NUM_PAYLOAD_TAGS)
        try:
            handle = (comm.Isend if is_send else comm.Irecv)([view, self._mpi.BYTE], peer, tag)
        except self._mpi.Exception as exc:
            raise self._describe(exc.Get_error_code(), Request(None, peer, view, is_send), operation) from exc
        return Request(handle, peer, view, is_send)

    def post(self, sends: Sequence[Message], receives: Sequence[Message], operation: Operation) -> list[Any]:
        requests = super().post(sends, receives, operation)
        if self.supports_threads:
            self._progress.posted(request.handle for request in requests)
        return requests

    def keep_going(self) -> None:
        """Has what is in flight go on while the caller computes, until its end; see [Note: progress]."""
        if self.supports_threads:
            self._progress.leave()

    def track(self, request: Request, key: Hashable, operation: Operation) -> None:
        self._tracked.append((request, key))

    def ended(self, operation: Operation) -> list[Any]:
        tracked, self._tracked = self._tracked, []
        requests = [request for request, _ in tracked]
        handles = [request.handle for request in requests]
        statuses = [self._mpi.Status() for _ in requests]
        found: list[int] = []

        def test() -> bool:
            found.extend(self._mpi.Request.Testsome(handles, statuses) or ())
            return bool(found)

        with self._waiting(requests, statuses, operation):
            self._poll(test, requests, operation)
            for status, position in zip(statuses, found, strict=False):
                self._check_length(requests[position], status, operation)
        gone = set(found)
        self._tracked = [each for position, each in enumerate(tracked) if position not in gone]
        return [tracked[position][1] for position in found]

    def wait(self, requests: Sequence[Request], operation: Operation) -> None:
        handles = [request.handle for request in requests]
        statuses = [self._mpi.Status() for _ in requests]
        with self._waiting(requests, statuses, operation):
            self._poll(lambda: self._mpi.Request.Testall(handles, statuses), requests, operation)
            for request, status in zip(requests, statuses, strict=True):
                self._check_length(request, status, operation)

    def _poll(self, test: Callable[[], bool], requests: Sequence[Request], operation: Operation) -> None:
        """Calls ``test`` until it is true."""
        # Most waits end within a few polls; clocks and yields would double what those cost.
        if any(test() for _ in range(_EAGER_POLLS)):
            return
        spin_s = _SPIN_S if threading.get_ident() == self._thread else _SPIN_BESIDE_COMPUTE_S
        for waited_s in _patience(operation.deadline_s, spin_s):
            if test():
                return
            if waited_s > spin_s and (ending := self._listen()) is not None:
                raise self._error(PeerFailure, operation, f"expected all ranks to go on, {ending}")
        if test():
            return
        # Those that end only now, while they are looked at one by one, are late all the same.
        overdue = [request for request in requests if not request.handle.Test()] or requests
        text = f"expected the {overdue[0]} to end within {operation.timeout_s} s"
        text += f", {len(overdue)} of {len(requests)} messages are in flight"
        raise self._error(CollectiveTimeout, operation, text)

    def _check_length(self, request: Request, status: Any, operation: Operation) -> None:
        if not request.is_send and status.Get_count(self._mpi.BYTE) != request.view.nbytes:
            text = f"expected the {request} to be filled, got {status.Get_count(self._mpi.BYTE)} bytes"
            raise self._error(TransportError, operation, text)

    @contextlib.contextmanager
    def _waiting(self, requests: Sequence[Request], statuses: Sequence[Any], operation: Operation) -> Iterator[None]:
        """Has requests to itself, translates what MPI raises, and keeps alive what it may still write to."""
        self._progress.pause()
        try:
            yield
        except self._mpi.Exception as exc:
            self._give_up(requests)
            raise self._diagnose(exc, requests, statuses, operation) from exc
        except SparsecollError:
            self._give_up(requests)
            raise
        finally:
            self._progress.go_on()

    def heard_abort(self) -> str | None:
        return self._listen() if self.supports_threads else None

    def _listen(self) -> str | None:
        """What another rank's notice of an abort says."""
        if self._ending is not None:
            return self._ending
        # A matched probe, for two threads may ask, and only one of them can receive the notice.
        status = self._mpi.Status()
        message = self._control.Improbe(self._mpi.ANY_SOURCE, _NOTICE_TAG, status)
        if message is not None:
            notice = new_notice()
            message.Recv([notice, self._mpi.BYTE], status)
            self._ending = f"rank {status.Get_source()} aborted: {read_notice(notice)}"
        return self._ending

    def _give_up(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.handle and not request.is_send:  # MPI has no way to take back a send
                request.handle.Cancel()
        self._abandoned.extend(requests)

    def _diagnose(
        self, exc: Any, requests: Sequence[Request], statuses: Sequence[Any], operation: Operation
    ) -> SparsecollError:
        if exc.Get_error_class() != self._mpi.ERR_IN_STATUS:
            return self._describe(exc.Get_error_code(), requests[0], operation)
        fine = {self._mpi.SUCCESS, self._mpi.ERR_PENDING}
        for request, status in zip(requests, statuses, strict=True):
            code = status.Get_error()
            if self._mpi.Get_error_class(code) not in fine:
                # Testsome fills statuses from the first one on, whichever request they belong to.
                if request.is_send or request.peer != status.Get_source():
                    received = [each for each in requests if not each.is_send and each.peer == status.Get_source()]
                    request = next(iter(received), request)
                return self._describe(code, request, operation)
        return self._describe(exc.Get_error_code(), requests[0], operation)

    def _describe(self, code: int, request: Request, operation: Operation) -> SparsecollError:
        mpi = self._mpi
        gone = {mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_PROC_ABORTED, mpi.ERR_REVOKED}
        reason = mpi.Get_error_string(code)
        if mpi.Get_error_class(code) in gone:
            text = f"expected the {request} to end, rank {request.peer} has failed: {reason}"
            return self._error(PeerFailure, operation, text)
        return self._error(TransportError, operation, f"expected the {request} to end, got {reason}")

    def abort(self, reason: str) -> None:
        self._progress.close()
        super().abort(reason)

    def close(self) -> None:
        self._ending = self._ending or f"rank {self.rank} has closed it"
        self._progress.close()


def attached(comm: Any, make: Callable[[MpiTransport], T]) -> T:
    """What ``make`` made of a transport over ``comm``, kept as an attribute of ``comm`` and so made only once.

    Collective over ``comm`` at first use. MPI forgets the attribute when the communicator is freed, so a new
    communicator that gets the old one's handle starts afresh.
    """
    key = _attachment_key()
    found = comm.Get_attr(key)
    if found is None:
        found = make(MpiTransport(comm))
        comm.Set_attr(key, found)
    return found


@lru_cache(maxsize=1)
def _attachment_key() -> int:
    return _import_mpi().Comm.Create_keyval()


def _patience(deadline_s: float, spin_s: float = _SPIN_S) -> Iterator[float]:
    """Yields the seconds waited so far before each poll, at least once; see [Note: waiting]."""
    started_s = now_s = time.monotonic()
    while True:
        waited_s = now_s - started_s
        yield waited_s
        if waited_s < spin_s:
            os.sched_yield()
        else:
            time.sleep(min(_LONGEST_SLEEP_S, waited_s / 10))
        now_s = time.monotonic()
        if now_s > deadline_s:
            return


def _import_mpi() -> Any:
    """Imports mpi4py.MPI, which starts MPI."""
    if "mpi4py.MPI" not in sys.modules and _can_read_own_kind():
        # MPICH copies a long message twice, into shared memory and out of it, unless it may read the sender's
        # memory. It asks the kernel for that only when told to, as containers often forbid it; we have asked.
        # Measured for a gather of 8 MB, half of it from the other rank: 0.8 to 1.5 times a plain copy of all of it with
        # that, 1.0 to 1.8 times without.
        os.environ.setdefault("MPIR_CVAR_CH4_CMA_ENABLE", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as exc:  # RuntimeError: mpi4py is there and finds no MPI library
        raise BackendUnavailable('mpi: expected mpi4py and MPI, try pip install "sparsecoll[mpi]"') from exc
    return MPI


def _can_read_own_kind() -> bool:
    """Whether a process may read the memory of another one of the same user."""
    try:
        # Without Yama a process may read its siblings; with any scope but 0 only its children.
        if Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip() != "0":
            return False
    except OSError:
        pass
    source, target = ctypes.c_uint64(0x5C), ctypes.c_uint64(0)
    local, remote = (_IoVector(ctypes.addressof(each), 8) for each in (target, source))
    try:
        read = ctypes.CDLL(None).process_vm_readv
    except AttributeError:  # not Linux
        return False
    num_bytes = read(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return num_bytes == 8 and target.value == source.value


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))
