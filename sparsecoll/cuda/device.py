"""One GPU as the library uses it: streams in one order, events, memory, kernels.

[Note: one order] NCCL kernels of different communicators that run at the same time wait for each other where ranks
start them in different orders, and then for ever. So everything that this process issues on a device goes through its
lanes: one at a time, and a lane starts where the lane used before it has ended. The host's order of issue is then the
device's order of execution, over all communicators. It is the same on all ranks if their programs are, which is why
nothing is issued from threads of our own.

[Note: capture] While a stream is captured into a CUDA graph, nothing may be allocated or asked about, and no event
from before may be waited for. What has run once needs none of that. A graph uses the addresses that it was captured
with, so the memory behind them is kept from then on. A replay is in the order of the stream that it is launched on, and
takes no turn on the lanes: nothing else of this library may be in flight meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecoll.cuda.kernels import Kernels
from sparsecoll.cuda.launcher import CudaLauncher, Launcher
from sparsecoll.errors import BackendUnavailable, InvalidArgument

__all__ = [
    "Device",
    "Event",
    "Lane",
    "Memory",
    "cuda_device",
    "current_device",
    "kernels_for",
    "num_devices",
]

_COPY_ANYWHERE = 4  # cudaMemcpyDefault: the driver knows from the addresses which memory is whose


class Memory:
    """Device memory, given back when nobody refers to it any more."""

    def __init__(self, address: int, num_bytes: int, owner: Any) -> None:
        self.address, self.num_bytes = address, num_bytes
        self._owner = owner


class Event:
    """A point in a stream."""

    def __init__(self, cupy: Any) -> None:
        self._runtime = cupy.cuda.runtime
        self._event = cupy.cuda.Event(disable_timing=True)
        self._handle = self._event.ptr

    def record(self, stream: int) -> None:
        """Puts the point behind all that is in ``stream`` now."""
        self._runtime.eventRecord(self._handle, stream)

    def hold(self, stream: int) -> None:
        """Lets ``stream`` go on only when the point has been reached; waits for nothing on the host."""
        self._runtime.streamWaitEvent(stream, self._handle)

    def is_done(self) -> bool:
        """Whether the point has been reached."""
        return bool(self._event.done)


class Lane:
    """A stream of one priority, shared by all communicators of a device.

    Attributes:
        priority: smaller is sooner, as in CUDA.
        owner: CuPy's stream.
        stream: its handle.
        is_captured: whether what it was begun for is being captured; see [Note: capture].
    """

    is_captured = False

    def __init__(self, device: Device, priority: int) -> None:
        self.priority = priority
        self.owner = device.new_stream(priority)
        self.stream: int = self.owner.ptr
        self._device = device
        self._start, self._end = device.new_event(), device.new_event()
        self._staging = Memory(0, 0, None)

    @cached_property
    def torch_stream(self) -> Any:
        """The stream as torch's object."""
        import torch

        return torch.cuda.ExternalStream(self.stream, device=self._device.index)

    @property
    def staging_bytes(self) -> int:
        """What is kept for operations to come."""
        return self._staging.num_bytes

    def staging(self, num_bytes: int) -> int:
        """Address of memory for one operation; the next one on the lane has the same.

        Raises:
            InvalidArgument: there is not yet so much, and the stream is being captured.
        """
        if self._staging.num_bytes < num_bytes:
            self._staging = self._device.allocate(num_bytes, self)
        self._device.keep_if_captured(self._staging, self)
        return self._staging.address

    def begin(self, caller: int, before: Lane | None) -> None:
        """Comes after all that is in the stream ``caller``, and after the end of ``before``."""
        self._start.record(caller)
        self._start.hold(self.stream)
        self.is_captured = self._device.is_capturing(self.stream)
        if before is not None and before is not self and not self.is_captured:
            before._end.hold(self.stream)

    def end(self) -> None:
        """Where the next lane may begin."""
        self._end.record(self.stream)


class Device:
    """A GPU, or what behaves like one.

    Attributes:
        index: its number in this process.
        name: as torch writes it.
        kernels: ours, on this device.
    """

    def __init__(self, index: int, cupy: Any, launcher: Launcher) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        self.kernels = Kernels(launcher)
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._issuing = threading.RLock()
        self._lanes: dict[int, Lane] = {}
        self._last: Lane | None = None
        self._resident: dict[int, tuple[Any, Memory]] = {}
        self._captured: set[Memory] = set()

    @property
    def cupy(self) -> Any:
        """The module behind it."""
        return self._cupy

    def use(self) -> None:
        """Makes this the calling thread's device."""
        self._cupy.cuda.Device(self.index).use()

    def use_beside_captures(self) -> None:
        """The same for a thread whose questions must not spoil another's capture."""
        self.use()
        with contextlib.suppress(OSError, AttributeError):
            relaxed = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; CuPy has no call for it
            ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))

    def new_event(self) -> Event:
        """An event that has not been recorded yet."""
        return Event(self._cupy)

    def new_stream(self, priority: int) -> Any:
        """A stream that does not wait for the default stream."""
        with self._cupy.cuda.Device(self.index):
            return self._cupy.cuda.Stream(non_blocking=True, priority=priority)

    def caller_stream(self, framework: str) -> int:
        """Handle of the stream on which the caller's ``torch`` or ``cupy`` arrays are computed at present."""
        if framework == "torch":
            import torch

            return torch.cuda.current_stream(self.index).cuda_stream
        return int(self._cupy.cuda.get_current_stream().ptr)

    def protect(self, tensors: Sequence[Any], lane: Lane, framework: str) -> Any:
        """Sees to it that the memory of ``tensors`` is not reused before what is in ``lane`` now has ended.

        Returns:
            What must stay alive until then: nothing for torch, whose allocator is told.
        """
        if framework != "torch":
            return tensors
        for tensor in tensors:
            tensor.record_stream(lane.torch_stream)
        return None

    def torch_view(self, address: int, num_bytes: int) -> Any:
        """Bytes of the device as a torch tensor that does not own them."""
        import torch

        return torch.as_tensor(_Bytes(address, num_bytes), device=self.name)

    def is_capturing(self, stream: int) -> bool:
        """Whether ``stream`` is being captured; see [Note: capture]."""
        return bool(self._runtime.streamIsCapturing(stream))

    def allocate(self, num_bytes: int, lane: Lane) -> Memory:
        """Memory that is used on ``lane``, and reused there only.

        Raises:
            InvalidArgument: the lane is being captured.
        """
        if lane.is_captured:
            raise _refusal(f"memory for {num_bytes} bytes")
        with self._cupy.cuda.Device(self.index), lane.owner:
            owner = self._cupy.cuda.alloc(max(1, num_bytes))
        return Memory(owner.ptr, num_bytes, owner)

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """Host memory that copies to and from the device need not wait for."""
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(max(1, num_bytes)), np.uint8, num_bytes)

    def copy(self, destination: int, source: int, num_bytes: int, stream: int) -> None:
        """Copies between addresses on the host and the device."""
        self._runtime.memcpyAsync(destination, source, num_bytes, _COPY_ANYWHERE, stream)

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        """Fills memory with zeros."""
        self._runtime.memsetAsync(address, 0, num_bytes, stream)

    def resident(self, words: NDArray[np.int64], lane: Lane) -> int:
        """Address of a copy of ``words`` that stays on the device as long as this very array lives on the host.

        Raises:
            InvalidArgument: it is not there yet, and the lane is being captured.
        """
        number = id(words)
        known = self._resident.get(number)
        if known is None:
            memory = self.allocate(words.nbytes, lane)
            self.copy(memory.address, words.ctypes.data, words.nbytes, lane.stream)
            known = weakref.ref(words, lambda _: self._resident.pop(number, None)), memory
            self._resident[number] = known
        self.keep_if_captured(known[1], lane)
        return known[1].address

    def keep_if_captured(self, memory: Memory, lane: Lane) -> None:
        """Keeps ``memory`` for good if a graph is about to know its address; see [Note: capture]."""
        if lane.is_captured:
            self._captured.add(memory)

    @contextmanager
    def lane(self, caller: int, priority: int = 0) -> Iterator[Lane]:
        """Holds the device's order; see [Note: one order].

        Args:
            caller: what is in this stream now comes before whatever is issued on the lane.
        """
        # Events and streams belong to the device that is current when they are made and used.
        callers_device = self._runtime.getDevice()
        if callers_device != self.index:
            self._runtime.setDevice(self.index)
        try:
            with self._issuing:
                lane = self._lanes.get(priority)
                if lane is None:
                    if self.is_capturing(caller):
                        raise _refusal(f"a stream of priority {priority}")
                    lane = self._lanes[priority] = Lane(self, priority)
                lane.begin(caller, self._last)
                try:
                    yield lane
                finally:
                    lane.end()
                    # What a capture has recorded is no point that anything outside of it could wait for.
                    self._last = None if lane.is_captured else lane
        finally:
            if callers_device != self.index:
                self._runtime.setDevice(callers_device)

    @property
    def staging_bytes(self) -> int:
        """What the lanes keep for operations to come."""
        return sum(lane.staging_bytes for lane in self._lanes.values())


def _refusal(what: str) -> InvalidArgument:
    error = InvalidArgument(
        f"capture: expected an operation that has run once before with equal sizes, {what} is missing"
    )
    error.agreed = True  # type: ignore[attr-defined]  # nothing has moved, so the group stays usable
    return error


class _Bytes:
    """What torch reads an array's memory from."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


@cache
def cuda_device(index: int) -> Device:
    """The GPU of that number; one object for each, as it keeps the device's order of issue.

    Raises:
        BackendUnavailable: CuPy is not installed, or there is no such GPU.
    """
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable('cuda: expected an installed CuPy, try pip install "sparsecoll[cuda13]"') from error
    if not 0 <= index < num_devices():
        raise BackendUnavailable(f"cuda: expected one of {num_devices()} GPUs, got number {index}")
    return Device(index, cupy, CudaLauncher(index))


@cache
def num_devices() -> int:
    """GPUs that CuPy sees; 0 without CuPy or a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")  # the driver's own library; CuPy takes longer to say that there is none
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except (OSError, ImportError, RuntimeError):
        return 0


def current_device() -> int:
    """CUDA's current device of this thread."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDevice())
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailable(f"cuda: expected CuPy and a GPU, got {error}") from error


@cache
def kernels_for(index: int) -> Kernels | None:
    """Our kernels on that GPU, or None where CuPy is not installed."""
    try:
        return cuda_device(index).kernels
    except BackendUnavailable:
        return None
