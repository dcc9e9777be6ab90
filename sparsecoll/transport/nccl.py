"""Device memory over NCCL, through CuPy, or through nccl4py where it is installed.

Payload travels as bytes, so that every element type does. Reductions are our own kernels': NCCL's own have no say.

[Note: breaking off] NCCL lets another thread end a communicator safely only if it is a nonblocking one, which CuPy
cannot make and nccl4py can. With CuPy's, the watcher waits for the thread that is inside NCCL before it ends the
communicator, and goes ahead without it after a grace, as the alternative is a process that hangs for ever.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from sparsecoll.cuda.device import Device, Lane
from sparsecoll.errors import BackendUnavailable, CollectiveTimeout, PeerFailure, SparsecollError, TransportError
from sparsecoll.transport.base import HostTransport, Operation
from sparsecoll.transport.stream import Buffer, Round, StreamTransport

__all__ = ["CupyLibrary", "Library", "Nccl4pyLibrary", "NcclTransport", "find_library"]

_BYTES = 1  # ncclUint8
_ID_BYTES = 128
_GRACE_S = 5.0
_POLL_S = 1e-4


class Library(ABC):
    """NCCL as a Python package offers it. Communicators are the package's own objects.

    Attributes:
        group_start, group_end: around the messages of a group.
        errors: what its calls raise.
    """

    group_start: Callable[[], Any]
    group_end: Callable[[], Any]
    errors: tuple[type[Exception], ...] = (RuntimeError, TimeoutError)

    @abstractmethod
    def unique_id(self) -> bytes:
        """What all ranks of a communicator must have from one of them."""

    @abstractmethod
    def connect(self, world_size: int, unique_id: bytes, rank: int) -> Any:
        """A communicator; collective."""

    @abstractmethod
    def send(self, comm: Any) -> Callable[[int, int, int, int, int], Any]:
        """A function of address, bytes, element type, peer and stream."""

    @abstractmethod
    def recv(self, comm: Any) -> Callable[[int, int, int, int, int], Any]:
        """The same."""

    @abstractmethod
    def all_gather(self, comm: Any, source: int, destination: int, num_bytes: int, stream: int) -> None:
        """Equal pieces of all ranks to all ranks."""

    @abstractmethod
    def settle(self, comm: Any, deadline_s: float) -> None:
        """Waits until ``comm`` has taken up what was called last; raises TimeoutError after ``deadline_s``."""

    @abstractmethod
    def problem(self, comm: Any) -> str | None:
        """An error that arose meanwhile."""

    @abstractmethod
    def abort(self, comm: Any) -> None:
        """Ends everything of ``comm`` at once."""

    @abstractmethod
    def destroy(self, comm: Any) -> None:
        """Gives ``comm`` back."""


class CupyLibrary(Library):
    """``cupy.cuda.nccl``: blocking communicators."""

    def __init__(self, nccl: Any) -> None:
        self._nccl = nccl
        self.group_start, self.group_end = nccl.groupStart, nccl.groupEnd

    def unique_id(self) -> bytes:
        return bytes(self._nccl.get_unique_id())

    def connect(self, world_size: int, unique_id: bytes, rank: int) -> Any:
        return self._nccl.NcclCommunicator(world_size, unique_id, rank)

    def send(self, comm: Any) -> Callable[[int, int, int, int, int], Any]:
        return comm.send

    def recv(self, comm: Any) -> Callable[[int, int, int, int, int], Any]:
        return comm.recv

    def all_gather(self, comm: Any, source: int, destination: int, num_bytes: int, stream: int) -> None:
        comm.allGather(source, destination, num_bytes, _BYTES, stream)

    def settle(self, comm: Any, deadline_s: float) -> None:
        pass  # a blocking communicator has when the call returns

    def problem(self, comm: Any) -> str | None:
        try:
            comm.check_async_error()
        except RuntimeError as error:
            return str(error)
        return None

    def abort(self, comm: Any) -> None:
        comm.abort()

    def destroy(self, comm: Any) -> None:
        comm.destroy()


class Nccl4pyLibrary(Library):
    """``nccl.bindings.nccl``: nonblocking communicators, which any thread may end; see [Note: breaking off].

    Its calls take "in progress" for no error; what became of it, `settle` and `problem` ask for.
    """

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings
        self.group_start, self.group_end = bindings.group_start, bindings.group_end
        self.errors = (RuntimeError, TimeoutError, bindings.NCCLError)

    def unique_id(self) -> bytes:
        return bytes(self._bindings.get_unique_id())

    def connect(self, world_size: int, unique_id: bytes, rank: int) -> Any:
        config = self._bindings.Config()
        config.blocking = 0
        return self._bindings.comm_init_rank_scalable(world_size, rank, 1, bytearray(unique_id), config.ptr)

    def send(self, comm: Any) -> Callable[[int, int, int, int, int], Any]:
        send = self._bindings.send
        return lambda address, num_bytes, dtype, peer, stream: send(address, num_bytes, dtype, peer, comm, stream)

    def recv(self, comm: Any) -> Callable[[int, int, int, int, int], Any]:
        recv = self._bindings.recv
        return lambda address, num_bytes, dtype, peer, stream: recv(address, num_bytes, dtype, peer, comm, stream)

    def all_gather(self, comm: Any, source: int, destination: int, num_bytes: int, stream: int) -> None:
        self._bindings.all_gather(source, destination, num_bytes, _BYTES, comm, stream)

    def settle(self, comm: Any, deadline_s: float) -> None:
        while self._bindings.comm_get_async_error(comm) == self._bindings.Result.InProgress:
            if time.monotonic() >= deadline_s:
                raise TimeoutError("NCCL: still in progress")
            time.sleep(_POLL_S)
        if (text := self.problem(comm)) is not None:
            raise RuntimeError(text)

    def problem(self, comm: Any) -> str | None:
        results = self._bindings.Result
        result = self._bindings.comm_get_async_error(comm)
        return None if result in (results.Success, results.InProgress) else f"NCCL: {results(result).name}"

    def abort(self, comm: Any) -> None:
        self._bindings.comm_abort(comm)

    def destroy(self, comm: Any) -> None:
        self._bindings.comm_destroy(comm)


def find_library() -> Library:
    """nccl4py where it is installed, else CuPy.

    Raises:
        BackendUnavailable: neither can be used; says what to install.
    """
    try:
        from nccl.bindings import nccl as bindings

        return Nccl4pyLibrary(bindings)
    except ImportError:
        pass
    try:
        from cupy.cuda import nccl as cupy_nccl
    except ImportError as error:
        raise BackendUnavailable(
            'nccl: expected an installed CuPy with NCCL, try pip install "sparsecoll[cuda13]"'
        ) from error
    if not cupy_nccl.available:
        raise BackendUnavailable('nccl: expected CuPy to find NCCL, try pip install "sparsecoll[cuda13]"')
    return CupyLibrary(cupy_nccl)


class _Channel:
    """One communicator, with its calls looked up once."""

    def __init__(self, library: Library, comm: Any) -> None:
        self.comm = comm
        self.send, self.recv = library.send(comm), library.recv(comm)


class NcclTransport(StreamTransport):
    """One rank of NCCL communicators over all ranks of ``control``.

    Collective: all ranks make it, each with a device of its own (several ranks share one only if NCCL takes them for
    ranks of different hosts, ``NCCL_HOSTID``).

    Args:
        control: carries NCCL's id, records, and the notice of an abort; closed with this one.
        timeout_s: for the start.

    Raises:
        CollectiveTimeout: not all ranks came in time.
        TransportError: NCCL refused, for instance two ranks on one device.
    """

    backend = "nccl"

    def __init__(self, control: HostTransport, gpu: Device, library: Library, *, timeout_s: float) -> None:
        super().__init__(control, gpu)
        self._library = library
        self._inside = threading.Lock()
        self._channels: dict[int, _Channel] = {}
        gpu.use()
        self._channels[0] = self._connect(Operation("NcclTransport", 0, timeout_s))

    def issue(self, group: Round, buffers: Sequence[Buffer], lane: Lane) -> None:
        channel, stream = self._channels[lane.priority], lane.stream
        send, recv = channel.send, channel.recv
        addresses = [each.address for each in buffers]
        with self._inside:
            try:
                self._library.group_start()
                try:
                    for peer, buffer, offset, num_bytes in group.receives:
                        recv(addresses[buffer] + offset, num_bytes, _BYTES, peer, stream)
                    for peer, buffer, offset, num_bytes in group.sends:
                        send(addresses[buffer] + offset, num_bytes, _BYTES, peer, stream)
                finally:
                    self._library.group_end()
                self._library.settle(channel.comm, self._deadline_s())
            except self._library.errors as error:
                raise self._translate(error) from error

    def gather(self, source: Buffer, destination: Buffer, lane: Lane) -> None:
        channel = self._channels[lane.priority]
        with self._inside:
            try:
                self._library.all_gather(channel.comm, source.address, destination.address, source.nbytes, lane.stream)
                self._library.settle(channel.comm, self._deadline_s())
            except self._library.errors as error:
                raise self._translate(error) from error

    def open_lane(self, priority: int, operation: Operation) -> None:
        """Makes the communicator of another priority; collective, and not while a stream is captured."""
        if priority not in self._channels:
            self._channels[priority] = self._connect(operation)

    def _connect(self, operation: Operation) -> _Channel:
        """A communicator over all ranks, whose id rank 0 makes."""
        mine, problem = b"", None
        if self.rank == 0:
            try:
                mine = self._library.unique_id()
            except self._library.errors as error:
                problem = error
        unique_id, *_ = self.control.exchange(mine.ljust(_ID_BYTES, b"\0"), operation)
        if not any(unique_id):
            text = f"expected an id of NCCL from rank 0, got {problem or 'none'}"
            raise self._error(TransportError, operation, text)
        try:
            comm = self._library.connect(self.world_size, unique_id, self.rank)
            self._library.settle(comm, operation.deadline_s)
        except TimeoutError as error:
            text = f"expected all ranks to connect within {operation.timeout_s} s"
            raise self._error(CollectiveTimeout, operation, text) from error
        except self._library.errors as error:
            text = f"expected NCCL to connect on {self.gpu.name}, got {error}"
            raise self._error(TransportError, operation, text) from error
        return _Channel(self._library, comm)

    def _deadline_s(self) -> float:
        """The operation's own deadline is the watcher's; here a call must only not wait for ever."""
        return time.monotonic() + 10 * _GRACE_S

    def _translate(self, error: BaseException) -> SparsecollError:
        if self.failure is not None:
            return self.failure
        return TransportError(f"nccl: expected a group of messages to start, got {error} ({self._place})")

    @property
    def _place(self) -> str:
        return f"rank {self.rank}/{self.world_size} on {self.gpu.name}"

    def _problem(self) -> SparsecollError | None:
        if not self._inside.acquire(blocking=False):
            return None  # whoever is inside hears of it
        try:
            for channel in self._channels.values():
                if (text := self._library.problem(channel.comm)) is not None:
                    kind = PeerFailure if "remote" in text.lower() else TransportError
                    return kind(f"nccl: expected messages to arrive, got {text} ({self._place})")
        finally:
            self._inside.release()
        return None

    def _break_off(self) -> None:
        has_lock = self._inside.acquire(timeout=_GRACE_S)
        try:
            for channel in self._channels.values():
                self._library.abort(channel.comm)
        finally:
            if has_lock:
                self._inside.release()

    def _release(self) -> None:
        for channel in self._channels.values():
            self._library.destroy(channel.comm)
        self._channels.clear()
