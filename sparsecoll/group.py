"""Group: the ranks that take part, their transport and topology, and the one order of their operations."""

from __future__ import annotations

import contextvars
import hashlib
import logging
import os
import queue
import socket
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from sparsecoll.arena import ArenaPool
from sparsecoll.config import Config, Launcher
from sparsecoll.cuda.device import Device, cuda_device, current_device, num_devices
from sparsecoll.errors import CollectiveMismatch, InvalidArgument, SparsecollError, TransportError
from sparsecoll.topology import Seat, Topology
from sparsecoll.transport.base import Counters, HostTransport, Operation, Transport
from sparsecoll.transport.local import LocalTransport, LocalWorld
from sparsecoll.transport.local import run_local as run_local_transports
from sparsecoll.transport.stream import StreamTransport
from sparsecoll.work import Work

__all__ = ["Group", "default_group", "init_group", "resolve_group", "run_local"]

T = TypeVar("T")

_log = logging.getLogger("sparsecoll")
_MOST_REMEMBERED = 256
_NO_TOPOLOGY, _TOPOLOGY, _UNSOUND_TOPOLOGY = range(3)


class _Start(NamedTuple):
    """What ranks tell each other first.

    Attributes:
        checked: the group's.
        given: whether a topology was given, and whether it is sound.
        digest: of that topology.
        host, node, rank, local_rank, local_size: the `Seat`, names as digests, 0 and -1 for None.
    """

    checked: bool
    given: int
    digest: bytes
    host: bytes
    node: bytes
    rank: int
    local_rank: int
    local_size: int

    @classmethod
    def here(cls, checked: bool, given: int, digest: bytes) -> _Start:
        launcher = Launcher.from_environment()
        host = _name_digest(socket.gethostname())
        node = b"" if launcher.node is None else _name_digest(launcher.node)
        rank, local_rank, local_size = (
            -1 if number is None else number for number in (launcher.rank, launcher.local_rank, launcher.local_size)
        )
        return cls(checked, given, digest, host, node, rank, local_rank, local_size)

    @property
    def seat(self) -> Seat:
        numbers = (None if number < 0 else number for number in self[5:])
        return Seat(self.host.hex(), self.node.hex() if any(self.node) else None, *numbers)


_START = struct.Struct("<?B16s16s16siii")


def _name_digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


class Group:
    """Ranks that communicate, in one order of operations.

    Operations run one after the other in the order in which they were issued, the same on every rank. Blocking ones
    run on the caller's thread when nothing is in flight; with ``async_op`` they run on the group's own thread.

    Attributes:
        transport: moves the bytes.
        topology: which ranks share a node, and link speeds.
        timeout_s: for operations that name none.
        checked: whether every call starts with an exchange of digests.
        arenas: staging memory of operations.
    """

    def __init__(
        self,
        transport: Transport,
        topology: Topology | str | os.PathLike[str] | None = None,
        *,
        timeout_s: float,
        checked: bool,
    ) -> None:
        self.transport = transport
        self.timeout_s = timeout_s
        self.checked = checked
        self.arenas = ArenaPool()
        self._sequence = 0
        self._in_flight = 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._remembered: OrderedDict[Any, Any] = OrderedDict()
        self._broken: str | None = None
        self._closed = False
        self._twin: Group | None = None
        # Records of all operations have one length, so that ranks in different operations still understand each other.
        self._record_bytes = 64 + 16 * self.world_size
        self.topology = self._agree_on_topology(topology)

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def world_size(self) -> int:
        return self.transport.world_size

    @property
    def backend(self) -> str:
        """``local``, ``torch``, ``mpi`` or ``nccl``."""
        return self.transport.backend

    @property
    def device(self) -> str:
        """Where the tensors are that collectives take and give: ``cpu``, or ``cuda:0`` and so on."""
        return self.transport.device

    @property
    def is_stream_ordered(self) -> bool:
        """Whether operations are issued in the order of CUDA streams, and nobody waits for them on the host."""
        return isinstance(self.transport, StreamTransport)

    @property
    def staging_bytes(self) -> int:
        """Staging memory that is kept for operations to come."""
        if isinstance(self.transport, StreamTransport):
            return self.transport.gpu.staging_bytes
        return self.arenas.reserved_bytes + (0 if self._twin is None else self._twin.staging_bytes)

    @property
    def record_bytes(self) -> int:
        """Length of the records that `sparsecoll.collectives.agreement` exchanges."""
        return self._record_bytes

    def reserve_record(self, num_bytes: int) -> None:
        """Makes room for records of ``num_bytes``; collective, with an equal argument on all ranks."""
        self._record_bytes = max(self._record_bytes, num_bytes)

    def remember(self, key: Any, value: Any) -> None:
        """Keeps what an operation has found out together with the other ranks, for later ones.

        All ranks remember and recall equal keys in the same order, so that all of them know the same.
        """
        self._remembered[key] = value
        if len(self._remembered) > _MOST_REMEMBERED:
            self._remembered.popitem(last=False)

    def recall(self, key: Any) -> Any:
        """What was remembered under ``key``, or None."""
        if key in self._remembered:
            self._remembered.move_to_end(key)
        return self._remembered.get(key)

    def operation(self, name: str, timeout_s: float | None = None) -> Operation:
        """Numbers the next operation; called in the same order on all ranks.

        Raises:
            InvalidArgument: the group is closed, or the timeout is not positive.
            TransportError: an earlier operation failed midway, so that ranks may stand at different points.
        """
        if self._closed:
            raise InvalidArgument(f"{name}: expected an open group, got a closed one {self.place_of_error}")
        if self._broken is not None:
            raise TransportError(f"{name}: the group is unusable since {self._broken} {self.place_of_error}")
        limit = self.timeout_s if timeout_s is None else timeout_s
        if not limit > 0:
            raise InvalidArgument(f"{name}: expected timeout_s > 0, got {timeout_s} {self.place_of_error}")
        self._sequence += 1
        return Operation(name, self._sequence, limit)

    @property
    def place_of_error(self) -> str:
        """``(rank 3/8)``, for error messages."""
        return f"(rank {self.rank}/{self.world_size})"

    def run(self, operation: Operation, body: Callable[[], T]) -> T:
        """Runs ``body`` after everything that is in flight, and returns what it returns."""
        if self._in_flight == 0:
            return self._guarded(operation, body)
        return self.start(operation, body).result()

    def start(self, operation: Operation, body: Callable[[], Any], *buffers: Any) -> Work:
        """Runs ``body`` on the group's thread after everything that is in flight; ``buffers`` live until it ends."""
        if self._worker is None:
            self._worker = threading.Thread(target=self._serve, name=f"sparsecoll-{self.rank}", daemon=True)
            self._worker.start()
        work = Work(str(operation), buffers)
        self._in_flight += 1

        def run() -> None:
            result, failure = None, None
            try:
                result = self._guarded(operation, body)
            except BaseException as error:
                failure = error
            self._in_flight -= 1
            work.finish(result, failure)

        self._queue.put(run)
        return work

    def exchange(self, record: bytes, name: str = "exchange", timeout_s: float | None = None) -> list[bytes]:
        """Gives every rank the equally long records of all, in rank order."""
        operation = self.operation(name, timeout_s)
        return self.run(operation, lambda: self.transport.exchange(record, operation))

    def mean(self, value: float) -> float:
        """The mean of a number over all ranks, summed in rank order; for metrics."""
        values = self.exchange(struct.pack("<d", value), "mean")
        return float(sum(struct.unpack("<d", each)[0] for each in values) / self.world_size)

    def barrier(self, timeout_s: float | None = None) -> None:
        """Returns when all ranks have called it."""
        self.exchange(b"\0", "barrier", timeout_s)

    def twin(self) -> Group:
        """The group of the same ranks whose operations have an order of their own, beside those of this one.

        On CPUs it has its own messages and its own thread. On GPUs it is this very group, as operations are put on
        streams in one order, and the host waits for none. It is closed with this group, whose `stats` have its traffic.

        Collective when it is first asked for.
        """
        if not isinstance(self.transport, HostTransport) or self.world_size == 1:
            return self
        if self._twin is None:
            self._twin = Group(self.transport.twin(), self.topology, timeout_s=self.timeout_s, checked=self.checked)
        return self._twin

    @property
    def is_busy(self) -> bool:
        """Whether an operation is on the group's thread, so that another one would wait for it."""
        return self._in_flight > 0

    def stats(self) -> Counters:
        """What this rank has sent and received so far, as the transport counted it."""
        mine = self.transport.counters.snapshot()
        return mine if self._twin is None else mine + self._twin.stats()

    def close(self) -> None:
        """Lets operations in flight end (each has its timeout) and gives back threads and buffers. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            self._queue.put(None)
            self._worker.join()
        if self._twin is not None:
            self._twin.close()
        self.transport.close()
        _forget_default(self)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, world_size={self.world_size}, backend={self.backend!r})"

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            job()
            del job  # Or it would keep its operation's buffers alive until the next one comes.

    def _guarded(self, operation: Operation, body: Callable[[], T]) -> T:
        if self._broken is not None:
            raise TransportError(f"{operation}: the group is unusable since {self._broken} {self.place_of_error}")
        try:
            return body()
        except BaseException as error:
            if not _is_agreed(error):
                self._broken = f"{operation}: {type(error).__name__}: {error}"
                self.transport.abort(self._broken)
            raise

    def _agree_on_topology(self, wanted: Topology | str | os.PathLike[str] | None) -> Topology:
        """What all ranks were given, or else nodes as the launcher and host names tell them.

        Also where ranks find out that they were started with different settings.
        """
        given, problem = None, None
        try:
            given = self._given_topology(wanted)
        except InvalidArgument as error:
            problem = error
        kind = _UNSOUND_TOPOLOGY if problem else _NO_TOPOLOGY if given is None else _TOPOLOGY
        mine = _Start.here(self.checked, kind, bytes.fromhex(given.digest) if given else b"")
        starts = [_Start(*_START.unpack(each)) for each in self.exchange(_START.pack(*mine), "init_group")]
        if problem is not None:
            raise problem
        for rank, start in enumerate(starts):
            if start.checked != starts[0].checked:
                raise self._unequal("equal checked on all ranks", starts[0].checked, rank, start.checked)
            if start.given == _UNSOUND_TOPOLOGY:
                raise CollectiveMismatch(
                    f"init_group: expected a sound topology on all ranks, rank {rank} has none {self.place_of_error}"
                )
            if start[1:3] != starts[0][1:3]:
                digests = [each.digest.hex() if each.given else "none" for each in (starts[0], start)]
                raise self._unequal("equal topologies (by digest) on all ranks", digests[0], rank, digests[1])
        if given is not None:
            return given
        found = Topology.from_seats([start.seat for start in starts])
        return found.with_gpus() if self.is_stream_ordered else replace(found, shared_memory=True)

    def _unequal(self, rule: str, first: object, rank: int, other: object) -> CollectiveMismatch:
        return CollectiveMismatch(
            f"init_group: expected {rule}, got {first} on rank 0 and {other} on rank {rank} {self.place_of_error}"
        )

    def _given_topology(self, wanted: Topology | str | os.PathLike[str] | None) -> Topology | None:
        if wanted is None:
            return None
        if isinstance(wanted, (str, os.PathLike)):
            given = Topology.load(wanted)
        elif isinstance(wanted, Topology):
            given = wanted
        else:
            raise InvalidArgument(
                f"Group: expected topology to be a Topology or the path of a file, got {wanted!r} {self.place_of_error}"
            )
        if given.world_size != self.world_size:
            raise InvalidArgument(
                f"Group: expected a topology of {self.world_size} ranks, got {given.world_size} {self.place_of_error}"
            )
        return replace(given, in_rounds=self.is_stream_ordered)


def _is_agreed(error: BaseException) -> bool:
    """Whether all ranks raise at the same point, so that the group stays usable."""
    return isinstance(error, SparsecollError) and getattr(error, "agreed", False)


_local_default: contextvars.ContextVar[Group | None] = contextvars.ContextVar("sparsecoll_group", default=None)
_adopted: WeakKeyDictionary[Any, Group] = WeakKeyDictionary()


class _ProcessDefault:
    """The process's default group, as torch.distributed has one; threads as ranks have their own."""

    group: Group | None = None


def default_group() -> Group:
    """What ``group=None`` means.

    Raises:
        InvalidArgument: `init_group` has not been called.
    """
    group = _local_default.get() or _ProcessDefault.group
    if group is None:
        raise InvalidArgument("group: expected a default group; call sparsecoll.init_group() first")
    return group


def _forget_default(group: Group) -> None:
    if _ProcessDefault.group is group:
        _ProcessDefault.group = None
    if _local_default.get() is group:
        _local_default.set(None)


def init_group(
    backend: str = "auto",
    *,
    timeout_s: float | None = None,
    checked: bool | None = None,
    topology: Topology | str | os.PathLike[str] | None = None,
    device: int | None = None,
) -> Group:
    """Makes the default group of all ranks that the launcher started.

    Collective: all ranks call it.

    Args:
        backend: ``auto`` takes ``nccl`` where there is a GPU and CuPy; else ``mpi`` under mpirun, ``torch`` under
            torchrun or where torch.distributed is initialised, and a world of one elsewhere. Or ``nccl``, which starts
            and exchanges records over what ``auto`` would take without a GPU; ``mpi``; ``torch`` (Gloo); ``local`` (a
            world of one; for threads as ranks see `run_local`).
        timeout_s: for operations that name none, and for the start; by default ``SPARSECOLL_TIMEOUT_S`` or 300.
        checked: whether every call starts with an exchange of digests, so that a mismatch or a bad argument on one
            rank raises on all before payload moves; by default ``SPARSECOLL_CHECKED``, or True except for ``nccl``,
            where it would make the host wait for the other ranks at every call.
        topology: nodes and links, equal on all ranks; or the path of a file that `Topology.save` wrote, which every
            rank reads. By default nodes are what the launcher says, or else one per host name, and links have the
            speeds of ``Topology``'s own defaults; `sparsecoll.probe` measures them.
        device: number of this rank's GPU, for ``nccl``; by default its number on its node, as the launcher says, among
            the visible ones, or CUDA's current device.

    Raises:
        BackendUnavailable: the back end is not installed, or there is no such GPU.
        InvalidArgument: the topology is of another world size, or its file unsound.
        CollectiveMismatch: ranks were given different topologies, or differ in ``checked``.
        CollectiveTimeout: a rank did not arrive in time.
    """
    config = Config.from_environment()
    limit = config.timeout_s if timeout_s is None else timeout_s
    transport = _make_transport(_choose_backend() if backend == "auto" else backend, limit, device)
    group = Group(transport, topology, timeout_s=limit, checked=_is_checked(checked, config, transport))
    _ProcessDefault.group = group
    if group.rank == 0:
        _log.info("%s, timeout_s=%s, checked=%s", group, group.timeout_s, group.checked)
    return group


def _is_checked(wanted: bool | None, config: Config, transport: Transport) -> bool:
    if wanted is not None:
        return wanted
    return config.checked if config.checked is not None else not isinstance(transport, StreamTransport)


def _choose_backend() -> str:
    return "nccl" if _has_gpu() else _choose_host_backend()


def _choose_host_backend() -> str:
    launcher = Launcher.from_environment().name
    if launcher == "mpirun":
        return "mpi"
    if launcher == "torchrun" or _torch_is_initialised():
        return "torch"
    return "local"


def _torch_is_initialised() -> bool:
    import sys

    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _make_transport(backend: str, timeout_s: float, device: int | None) -> Transport:
    if backend == "nccl":
        from sparsecoll.transport import nccl as nccl_transport

        # Before the others are kept waiting: what a rank lacks, it says at once.
        library, gpu = nccl_transport.find_library(), _device_of_rank(device)
        control = _make_host_transport(_choose_host_backend(), timeout_s)
        try:
            return nccl_transport.NcclTransport(control, gpu, library, timeout_s=timeout_s)
        except SparsecollError as error:
            control.abort(str(error))
            control.close()
            raise
    if device is not None:
        raise InvalidArgument(f"init_group: expected a device for backend nccl only, got {device} for {backend}")
    return _make_host_transport(backend, timeout_s)


def _make_host_transport(backend: str, timeout_s: float) -> HostTransport:
    if backend == "local":
        return LocalTransport(LocalWorld(1), 0)
    if backend == "torch":
        from sparsecoll.transport import torch as torch_transport

        is_ours = torch_transport.init_process_group(timeout_s)
        return torch_transport.TorchTransport(torch_transport.own_group(timeout_s), owned=True, owns_default=is_ours)
    if backend == "mpi":
        from sparsecoll.transport import mpi as mpi_transport

        return mpi_transport.MpiTransport(timeout_s=timeout_s)
    raise InvalidArgument(f"init_group: expected backend auto, local, torch, mpi or nccl, got {backend!r}")


def _device_of_rank(wanted: int | None) -> Device:
    """The GPU that was asked for, or that of the rank's number on its node."""
    if wanted is not None:
        return cuda_device(wanted)
    local_rank = Launcher.from_environment().local_rank
    return cuda_device(current_device() if local_rank is None else local_rank % max(1, num_devices()))


def _has_gpu() -> bool:
    """Whether CuPy is installed and sees a GPU."""
    return num_devices() > 0


def resolve_group(group: Any) -> Group:
    """A Group from what users have: a Group, None (the default), a torch ProcessGroup, a one-dimensional DeviceMesh
    or an mpi4py communicator. Foreign ones are wrapped once, at first use, which is collective over their ranks.

    Raises:
        InvalidArgument: anything else, or a mesh of several axes.
    """
    if group is None:
        return default_group()
    if isinstance(group, Group):
        return group
    kind = type(group).__module__.split(".")[0]
    if kind == "torch" and type(group).__name__ in ("ProcessGroup", "DeviceMesh"):
        process_group = _process_group_of(group)
        if process_group not in _adopted:
            _adopted[process_group] = _adopt(_transport_over(process_group))
        return _adopted[process_group]
    if kind == "mpi4py":
        from sparsecoll.transport import mpi as mpi_transport

        return mpi_transport.attached(group, _adopt)
    raise InvalidArgument(
        f"group: expected a Group, None, a ProcessGroup, a DeviceMesh axis or an mpi4py communicator, got {group!r}"
    )


def _transport_over(process_group: Any) -> Transport:
    """Over the user's own process group: on the GPU where it has NCCL and there is one, else on the CPU."""
    from sparsecoll.transport import torch as torch_transport

    if not torch_transport.moves_device_memory(process_group):
        return torch_transport.TorchTransport(process_group)
    from sparsecoll.transport import torch_stream

    control = torch_transport.TorchTransport(torch_transport.control_group(process_group), owned=True)
    return torch_stream.TorchStreamTransport(control, process_group, cuda_device(current_device()))


def _process_group_of(group: Any) -> Any:
    if not hasattr(group, "get_group"):
        return group
    if group.ndim != 1:
        raise InvalidArgument(f"group: expected one axis of a DeviceMesh (mesh['axis']), got {group.ndim} axes")
    return group.get_group()


def _adopt(transport: Transport) -> Group:
    config = Config.from_environment()
    return Group(transport, timeout_s=config.timeout_s, checked=_is_checked(None, config, transport))


def run_local(
    fn: Callable[[Group], T],
    world_size: int,
    *,
    timeout_s: float = 60.0,
    checked: bool = True,
    topology: Topology | str | os.PathLike[str] | None = None,
) -> list[T]:
    """Runs ``fn(group)`` on ``world_size`` threads as ranks and returns their results in rank order.

    Each thread's group is its default group. The first exception of a rank ends the others with `PeerFailure` and is
    raised here.
    """

    def rank_main(transport: Transport) -> T:
        with Group(transport, topology, timeout_s=timeout_s, checked=checked) as group:
            _local_default.set(group)
            return fn(group)

    return run_local_transports(rank_main, world_size, timeout_s=timeout_s)
