"""Messages over a torch.distributed process group that has a back end for the CPU (Gloo, as a rule).

[Note: failures of Gloo] A wait that runs out of time closes all connections of its group, so that the peers fail
at once; there is no other way to interrupt them, and `TorchTransport.abort` uses it. A receive tells that it has
ended only through ``wait``. The message of the error is the only sign of what went wrong.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Hashable, Sequence
from datetime import timedelta
from itertools import count
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsecoll.errors import BackendUnavailable, CollectiveTimeout, PeerFailure, SparsecollError, TransportError
from sparsecoll.transport.base import Operation, View
from sparsecoll.transport.tagged import NOTICE_TAG, Request, TaggedTransport, new_notice, read_notice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TorchTransport", "control_group", "init_process_group", "moves_device_memory", "own_group"]

# Tags of our own, so that a group of the user may carry messages of the user as well.
_FIRST_TAG = 0x5C00000
_TAGS_OF_A_TWIN = 0x10000
_CLOSED = re.compile(r"closed by peer|reset by peer|broken pipe|pair closure|socket closed", re.IGNORECASE)
_WAITER_GRACE_S = 5.0
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)


class TorchTransport(TaggedTransport):
    """One rank of a process group; peers are ranks of that group.

    Args:
        process_group: this rank must be a member.
        owned: whether `close` destroys the group, which the peers notice.
        owns_default: whether `close` destroys torch's default group as well. (Python then ends cleanly: torch 2.13
            aborts now and then at exit when a default group is left.)
        first_tag: of those that messages take.

    Raises:
        BackendUnavailable: torch is missing, or the group moves no CPU memory.
    """

    backend = "torch"

    def __init__(
        self,
        process_group: ProcessGroup,
        *,
        owned: bool = False,
        owns_default: bool = False,
        first_tag: int = _FIRST_TAG,
    ) -> None:
        self._dist = _import_distributed()
        super().__init__(self._dist.get_rank(process_group), self._dist.get_world_size(process_group))
        config = self._dist.get_backend_config(process_group)
        if "cpu:" not in config:
            raise BackendUnavailable(
                f"TorchTransport: expected a process group with a CPU back end such as Gloo, got {config}"
            )
        self._group: ProcessGroup | None = process_group
        self._first_tag, self._next_tag = first_tag, first_tag + _TAGS_OF_A_TWIN
        self._owned = owned
        self._owns_default = owns_default
        # A waiter for each peer and direction that has been tracked, what they have heard, and what they wait for.
        self._waiters: dict[tuple[int, bool], _Waiter] = {}
        self._heard: SimpleQueue[tuple[int, RuntimeError | None]] = SimpleQueue()
        self._tracked: dict[int, tuple[Request, Hashable]] = {}
        self._tickets = count()
        # Gloo sends nothing that is not awaited, so the notice of an abort is awaited from the start.
        self._notices = [new_notice() for _ in self._peers]
        start = Operation("TorchTransport", 0, 0.0)
        self._listening: list[Request] = []
        for peer, notice in zip(self._peers, self._notices, strict=True):
            with contextlib.suppress(SparsecollError):  # has it closed already, whoever needs it will be told
                self._listening.append(self._start(peer, notice, NOTICE_TAG, start, is_send=False))

    def _start(self, peer: int, view: View, tag: int, operation: Operation, *, is_send: bool) -> Request:
        import torch

        tensor = torch.from_numpy(view if view.flags.writeable else _writable_alias(view))
        request = Request(None, peer, view, is_send)
        try:
            if is_send:
                work = self._dist.isend(tensor, group=self._group, tag=self._first_tag + tag, group_dst=peer)
            else:
                work = self._dist.irecv(tensor, group=self._group, tag=self._first_tag + tag, group_src=peer)
        except RuntimeError as exc:
            raise self._translate(exc, request, operation) from exc
        return request._replace(handle=work)

    def twin(self) -> TorchTransport:
        assert self._group is not None
        first_tag, self._next_tag = self._next_tag, self._next_tag + _TAGS_OF_A_TWIN
        return TorchTransport(self._group, first_tag=first_tag)

    def wait(self, requests: Sequence[Request], operation: Operation) -> None:
        for request in requests:
            try:
                request.handle.wait(_patience(operation))
            except RuntimeError as exc:
                raise self._translate(exc, request, operation) from exc

    def track(self, request: Request, key: Hashable, operation: Operation) -> None:
        waiter = self._waiters.get((request.peer, request.is_send))
        if waiter is None:
            waiter = _Waiter(
                self._heard, f"sparsecoll-{self.rank}-{'to' if request.is_send else 'from'}-{request.peer}"
            )
            self._waiters[request.peer, request.is_send] = waiter
        ticket = next(self._tickets)
        self._tracked[ticket] = request, key
        waiter.queue.put((ticket, request, operation))

    def ended(self, operation: Operation) -> list[Any]:
        keys: list[Any] = []
        while not keys or not self._heard.empty():
            try:
                # Waiters give up by themselves; see [Note: failures of Gloo].
                ticket, failure = self._heard.get(timeout=operation.remaining_s + _WAITER_GRACE_S)
            except Empty:
                request, _ = next(iter(self._tracked.values()))
                self._tracked.clear()
                text = f"expected the {request} to end within {operation.timeout_s} s"
                raise self._error(CollectiveTimeout, operation, text) from None
            if ticket not in self._tracked:
                continue  # of an operation that has failed
            request, key = self._tracked.pop(ticket)
            if failure is not None:
                self._tracked.clear()
                raise self._translate(failure, request, operation) from failure
            keys.append(key)
        return keys

    def _translate(self, exc: RuntimeError, request: Request, operation: Operation) -> SparsecollError:
        if (ending := self.heard_abort()) is not None:
            return self._error(PeerFailure, operation, f"expected all ranks to go on, {ending}")
        if _TIMED_OUT.search(str(exc)):
            text = f"expected the {request} to end within {operation.timeout_s} s"
            return self._error(CollectiveTimeout, operation, text)
        if _CLOSED.search(str(exc)):
            text = f"expected the {request} to end, the connection is closed: rank {request.peer} has died or given up"
            return self._error(PeerFailure, operation, text)
        return self._error(TransportError, operation, f"expected the {request} to end, got {exc}")

    def heard_abort(self) -> str | None:
        for peer, notice in zip(self._peers, self._notices, strict=True):
            if (reason := read_notice(notice)) is not None:
                return f"rank {peer} aborted: {reason}"
        return None

    def abort(self, reason: str) -> None:
        if self._ending is None and self._group is not None:
            super().abort(reason)
            self._disconnect()

    def _disconnect(self) -> None:
        """Closes all connections through a receive that times out; see [Note: failures of Gloo]."""
        nothing = np.empty(1, np.uint8)
        operation = Operation("abort", 0, 0.0)
        for peer in self._peers:  # one would do, were its connection sure to be open still
            with contextlib.suppress(SparsecollError):
                self.wait([self._start(peer, nothing, NOTICE_TAG + 1, operation, is_send=False)], operation)

    def close(self) -> None:
        if self._group is None:
            return
        self._ending = self._ending or f"rank {self.rank} has closed it"
        for waiter in self._waiters.values():
            waiter.queue.put(None)
        if self._owned and self._dist.is_initialized():
            self._dist.destroy_process_group(None if self._owns_default else self._group)
        # Connections close when nobody refers to the group any more.
        self._group = None
        self._listening.clear()
        # Python ends badly when it stops a thread inside Gloo. After an abort no wait takes long any more.
        deadline_s = time.monotonic() + _WAITER_GRACE_S
        for waiter in self._waiters.values():
            waiter.join(deadline_s - time.monotonic())
        self._waiters.clear()


class _Waiter:
    """A thread that waits for requests one after the other, as Gloo tells of an end in no other way.

    Requests of one peer and direction end in the order in which they were posted, so none is told late.
    """

    def __init__(self, heard: SimpleQueue[tuple[int, RuntimeError | None]], name: str) -> None:
        self.queue: SimpleQueue[tuple[int, Request, Operation] | None] = SimpleQueue()
        self._heard = heard
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits for the end, once ``queue`` has got None."""
        self._thread.join(max(0.0, timeout_s))

    def _serve(self) -> None:
        while (job := self.queue.get()) is not None:
            ticket, request, operation = job
            failure = None
            try:
                request.handle.wait(_patience(operation))
            except RuntimeError as exc:
                failure = exc
            self._heard.put((ticket, failure))
            del job, request  # or it would keep the buffers alive until the next one comes


def _patience(operation: Operation) -> timedelta:
    # Gloo takes zero for its own default of minutes.
    return timedelta(seconds=max(0.001, operation.remaining_s))


def _writable_alias(view: View) -> View:
    """The same memory without NumPy's mark of read-only, which torch does not know and warns about."""
    return np.asarray(_Alias(view))


class _Alias:
    """What NumPy reads an array's memory from; keeps ``view`` alive."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.__array_interface__ = {**view.__array_interface__, "data": (view.ctypes.data, False)}


def init_process_group(timeout_s: float) -> bool:
    """Initializes Gloo from the environment that torchrun sets, unless torch.distributed is initialized already.

    Collective: all ranks of the job call it.

    Returns:
        Whether it was initialized here, and so should be destroyed by whoever asked.

    Raises:
        CollectiveTimeout: not all ranks called it within ``timeout_s``; names those that are missing, as far as
            the store can tell.
        TransportError: the environment or the store is not usable.
    """
    dist = _import_distributed()
    if dist.is_initialized():
        return False
    operation = Operation("init_process_group", 0, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        _await_all(store, rank, world_size, operation)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as exc:
        raise _startup_error(exc, operation) from exc
    return True


def own_group(timeout_s: float) -> ProcessGroup:
    """Makes a Gloo group over all ranks, so that our messages cannot collide with those of the user.

    Collective: all ranks of the default group call it; torch.distributed is initialized.

    Raises:
        CollectiveTimeout: not all ranks called it within ``timeout_s``; names those that are missing.
    """
    dist = _import_distributed()
    operation = Operation("own_group", 0, timeout_s)
    try:
        store, rank, world_size = dist.group.WORLD.get_group_store(), dist.get_rank(), dist.get_world_size()
        _await_all(store, rank, world_size, operation)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # Once more: a rank that closes its group would break it for those that are still connecting to others.
        _await_all(store, rank, world_size, operation)
        return group
    except (RuntimeError, ValueError) as exc:
        raise _startup_error(exc, operation) from exc


def moves_device_memory(process_group: ProcessGroup) -> bool:
    """Whether the group has a back end for GPUs, and this process a GPU."""
    import torch

    return torch.cuda.is_available() and "cuda:" in _import_distributed().get_backend_config(process_group)


def control_group(process_group: ProcessGroup) -> ProcessGroup:
    """A Gloo group over the same ranks. Collective over these."""
    dist = _import_distributed()
    ranks = dist.get_process_group_ranks(process_group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _await_all(store: Any, rank: int, world_size: int, operation: Operation) -> None:
    """Meets all ranks at the store."""
    # A rank's own count of meetings tells one from the next, without a variable of this process.
    meeting = store.add(f"sparsecoll/{operation.name}/{rank}", 1)
    keys = [f"sparsecoll/{operation.name}/{meeting}/{other}" for other in range(world_size)]
    store.set(keys[rank], "here")
    # Polled, as the wait of a store would not say which keys are missing.
    while not store.check(keys):
        if operation.remaining_s == 0.0:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            raise CollectiveTimeout(
                f"{operation.name}: expected all ranks within {operation.timeout_s} s, "
                f"ranks {missing} have not reported to the store (rank {rank}/{world_size})"
            )
        time.sleep(min(0.01, operation.remaining_s))


def _startup_error(exc: Exception, operation: Operation) -> SparsecollError:
    if _TIMED_OUT.search(str(exc)):
        return CollectiveTimeout(f"{operation.name}: expected all ranks within {operation.timeout_s} s, got {exc}")
    return TransportError(f"{operation.name}: expected a process group, got {exc}")


def _import_distributed() -> Any:
    try:
        import torch.distributed as dist
    except ImportError as exc:
        raise BackendUnavailable('torch: expected an installed torch, try pip install "sparsecoll[torch]"') from exc
    if not dist.is_available():
        raise BackendUnavailable("torch: expected a torch with distributed support, this build has none")
    return dist
