"""A GPU for each thread, with the part of CuPy's face that sparsecoll uses, over CPU memory.

Streams are queues that a thread of the device works off, picking at random among those that can go on, so that a
missing event shows as a wrong result. NCCL is emulated at its worst: a group is one kernel that ends when its last
message has been matched, sizes that differ are an error, and only one such kernel runs on a device at a time, so that
ranks that start them in different orders wait for ever.

The stream `HOST` is the calling thread itself: what is recorded there has happened, and who makes it wait, waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from sparsecoll.cuda.device import Device, Lane
from tests.emulation.kernels import EmulatedLauncher

__all__ = ["HOST", "EmulatedDevice", "FakeCupy", "Wires"]

HOST = 1
_LIMIT_S = 20.0
_POISON = 0xA5

Step = Callable[[], bool]
"""One thing on a stream; says whether it has ended, and is asked again until it has."""


class Wires:
    """What the devices of one emulated world share: messages of which one side has been posted."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.numbers = itertools.count(1)
        self.waiting: dict[tuple[int, int, int], deque[_End]] = defaultdict(deque)
        self.arrived: dict[bytes, set[int]] = defaultdict(set)
        self.problems: list[str] = []

    def post(self, end: _End) -> None:
        """Matches one side of a message with the other, or leaves it for the other to find."""
        with self.news:
            queue = self.waiting[end.key]
            if not queue or queue[0].is_send == end.is_send:
                queue.append(end)
                return
            other = queue.popleft()
            if other.num_bytes != end.num_bytes:
                self.problems.append(f"{end.key}: {other.num_bytes} bytes against {end.num_bytes}")
            source, destination = (end, other) if end.is_send else (other, end)
            ctypes.memmove(destination.address, source.address, min(end.num_bytes, other.num_bytes))
            end.has_ended = other.has_ended = True
            self.news.notify_all()


class _End:
    """One side of a message."""

    def __init__(self, key: tuple[int, int, int], address: int, num_bytes: int, is_send: bool) -> None:
        self.key, self.address, self.num_bytes, self.is_send = key, address, num_bytes, is_send
        self.has_ended = False


class FakeCupy:
    """What ``import cupy`` would give on this rank.

    Attributes:
        cuda: the sub-module.
        capturing: streams that are being captured, and what has been put on them since.
    """

    def __init__(self, wires: Wires, seed: int = 0) -> None:
        self.wires = wires
        self.capturing: dict[int, list[tuple[int, Callable[[], Step]]]] = {}
        self.cuda = SimpleNamespace(
            runtime=_Runtime(self),
            nccl=_Nccl(self),
            Stream=lambda **_: _Stream(self),
            Event=lambda **_: _Event(self),
            Device=lambda _: contextlib.nullcontext(),
            alloc=self._alloc,
            alloc_pinned_memory=lambda size: bytearray(size),
        )
        self.current = HOST
        self._random = random.Random(seed)
        self._queues: dict[int, deque[Step]] = defaultdict(deque)
        self._stack: list[int] = []
        self._has_ended = False
        self.kernel: object | None = None  # the NCCL kernel that runs at the moment
        self.aborted: set[int] = set()  # communicators
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, stream: int, make: Callable[[], Step]) -> None:
        """Puts something behind all that is on ``stream``."""
        if stream in self.capturing:
            self.capturing[stream].append((stream, make))
            return
        if stream == HOST:
            self.wait_for(make())
            return
        with self.wires.news:
            self._queues[stream].append(make())
            self.wires.news.notify_all()

    def run_on(self, stream: int, function: Callable[[], object]) -> None:
        """Puts a function of the test on ``stream``."""

        def step() -> bool:
            function()
            return True

        self.put(stream, lambda: step)

    def drain(self, stream: int | None = None) -> None:
        """Blocks until all of ``stream``, or of all streams, has ended."""
        self.wait_for(lambda: not any(queue for key, queue in self._queues.items() if stream in (None, key)))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.wires.news:
            if not self.wires.news.wait_for(lambda: condition() or self._has_ended, _LIMIT_S):
                raise TimeoutError(f"emulated device: { ({k: len(q) for k, q in self._queues.items() if q}) } left")

    def close(self) -> None:
        with self.wires.news:
            self._has_ended = True
            self.wires.news.notify_all()
        self._thread.join()

    @contextlib.contextmanager
    def capture(self, stream: int) -> Iterator[list[tuple[int, Callable[[], Step]]]]:
        """Collects what is put on ``stream``, and on streams that wait for it, instead of running it."""
        graph: list[tuple[int, Callable[[], Step]]] = []
        self.capturing[stream] = graph
        try:
            yield graph
        finally:
            self.capturing.clear()

    def replay(self, graph: list[tuple[int, Callable[[], Step]]]) -> None:
        """Runs what a capture has collected once more."""
        for stream, make in graph:
            self.put(stream, make)

    def refuse_capture(self, what: str) -> None:
        """What CUDA forbids while any stream is captured."""
        if self.capturing:
            raise RuntimeError(f"emulated device: {what} during a capture")

    def _alloc(self, num_bytes: int) -> Any:
        self.refuse_capture("cudaMalloc")
        stream = self._stack[-1] if self._stack else HOST
        memory = np.full(num_bytes + 256, _POISON, np.uint8)

        def forget() -> None:
            # The pool gives freed memory to whoever allocates on the same stream next.
            self.run_on(stream, lambda: memory.fill(_POISON))

        return _Block(memory, -(-memory.ctypes.data // 256) * 256, forget)

    def _work(self) -> None:
        news = self.wires.news
        while True:
            with news:
                if self._has_ended:
                    return
                streams = [stream for stream, queue in self._queues.items() if queue]
            self._random.shuffle(streams)
            for stream in streams:
                if self._queues[stream][0]():
                    with news:
                        self._queues[stream].popleft()
                        news.notify_all()
                    break
            else:
                with news:
                    news.wait(0.0005)


class _Block:
    def __init__(self, memory: np.ndarray, ptr: int, forget: Callable[[], None]) -> None:
        self.memory, self.ptr, self._forget = memory, ptr, forget

    def __del__(self) -> None:
        self._forget()


class _Stream:
    def __init__(self, cupy: FakeCupy) -> None:
        self.ptr = HOST + next(cupy.wires.numbers)
        self._cupy = cupy

    def __enter__(self) -> _Stream:
        self._cupy._stack.append(self.ptr)
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy._stack.pop()


class _Token:
    """One record of an event."""

    def __init__(self) -> None:
        self.has_passed = False
        self.graph: list[tuple[int, Callable[[], Step]]] | None = None


class _Event:
    """An event remembers its last record; who waits for it waits for that one."""

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy
        self.token = _Token()
        self.token.has_passed = True
        self.ptr = id(self)
        cupy.cuda.runtime.events[self.ptr] = self

    @property
    def done(self) -> bool:
        self._cupy.refuse_capture("cudaEventQuery")
        return self.token.has_passed


class _Runtime:
    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy
        self.events: dict[int, _Event] = {}

    def eventRecord(self, event: int, stream: int) -> None:
        token = self.events[event].token = _Token()
        token.graph = self._cupy.capturing.get(stream)
        if stream == HOST:
            token.has_passed = True
            return

        def make() -> Step:
            token.has_passed = False  # again, when a graph is replayed

            def step() -> bool:
                token.has_passed = True
                return True

            return step

        self._cupy.put(stream, make)

    def streamWaitEvent(self, stream: int, event: int) -> None:
        cupy, token = self._cupy, self.events[event].token
        if stream == HOST:
            cupy.wait_for(lambda: token.has_passed)
            return
        if token.graph is not None:
            if not any(graph is token.graph for graph in cupy.capturing.values()):
                raise RuntimeError("emulated device: a stream waits for an event of a capture that has ended")
            cupy.capturing.setdefault(stream, token.graph)  # it joins the capture
        elif stream in cupy.capturing:
            raise RuntimeError("emulated device: a captured stream waits for an event from before the capture")
        cupy.put(stream, lambda: lambda: token.has_passed)

    def getDevice(self) -> int:
        return 0

    def streamIsCapturing(self, stream: int) -> bool:
        return stream in self._cupy.capturing

    def memcpyAsync(self, destination: int, source: int, size: int, kind: int, stream: int) -> None:
        assert kind == 4
        self._cupy.run_on(stream, lambda: ctypes.memmove(destination, source, size))

    def memsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        self._cupy.run_on(stream, lambda: ctypes.memset(address, value, size))


class _Nccl:
    """``cupy.cuda.nccl``."""

    available = True

    def __init__(self, cupy: FakeCupy) -> None:
        self.cupy = cupy
        self.NcclCommunicator = lambda size, unique_id, rank: _Communicator(cupy, size, unique_id, rank)
        self._group: list[tuple[_End, int]] | None = None

    def get_unique_id(self) -> bytes:
        return f"world {next(self.cupy.wires.numbers)}".encode().ljust(128, b"\1")

    def groupStart(self) -> None:
        assert self._group is None
        self._group = []

    def groupEnd(self) -> None:
        assert self._group is not None
        group, self._group = self._group, None
        if group:
            (stream,) = {stream for _, stream in group}
            self.launch([end for end, _ in group], stream)

    def add(self, end: _End, stream: int) -> None:
        if self._group is None:
            self.launch([end], stream)
        else:
            self._group.append((end, stream))

    def launch(self, ends: list[_End], stream: int) -> None:
        self.cupy.put(
            stream, lambda: _GroupKernel(self.cupy, [(e.key, e.address, e.num_bytes, e.is_send) for e in ends])
        )


class _GroupKernel:
    def __init__(self, cupy: FakeCupy, ends: list[tuple[tuple[int, int, int], int, int, bool]]) -> None:
        self._cupy, self._ends = cupy, [_End(*each) for each in ends]

    def __call__(self) -> bool:
        if self._cupy.kernel not in (None, self):
            return False
        if self._cupy.kernel is None:
            self._cupy.kernel = self
            for end in self._ends:
                self._cupy.wires.post(end)
        if not all(end.has_ended or end.key[0] in self._cupy.aborted for end in self._ends):
            return False
        self._cupy.kernel = None
        return True


class _Communicator:
    def __init__(self, cupy: FakeCupy, size: int, unique_id: bytes, rank: int) -> None:
        wires = cupy.wires
        with wires.news:
            wires.arrived[unique_id].add(rank)
            wires.news.notify_all()
            if not wires.news.wait_for(lambda: len(wires.arrived[unique_id]) == size, _LIMIT_S):
                raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: not all ranks came")
        self._cupy, self._rank, self._size = cupy, rank, size
        self.number = int(unique_id.rstrip(b"\1").split()[1])
        self.is_open = True
        self.error: str | None = None

    def send(self, address: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert self.is_open and count > 0 and dtype == 1 and peer != self._rank
        self._cupy.cuda.nccl.add(_End((self.number, self._rank, peer), address, count, True), stream)

    def recv(self, address: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert self.is_open and count > 0 and dtype == 1 and peer != self._rank
        self._cupy.cuda.nccl.add(_End((self.number, peer, self._rank), address, count, False), stream)

    def allGather(self, source: int, destination: int, count: int, dtype: int, stream: int) -> None:
        assert self.is_open and dtype == 1
        nccl = self._cupy.cuda.nccl
        own = destination + self._rank * count
        self._cupy.run_on(stream, lambda: ctypes.memmove(own, source, count))
        nccl.groupStart()
        for peer in range(self._size):
            if peer != self._rank:
                self.recv(destination + peer * count, count, dtype, peer, stream)
                self.send(source, count, dtype, peer, stream)
        nccl.groupEnd()

    def check_async_error(self) -> None:
        if self.error is not None:
            raise RuntimeError(self.error)

    def abort(self) -> None:
        self._cupy.aborted.add(self.number)
        self.is_open = False

    def destroy(self) -> None:
        self.is_open = False


class _StreamLauncher:
    """Kernels run on the emulated streams."""

    num_multiprocessors = 4

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy, self._launcher = cupy, EmulatedLauncher()

    def launch(
        self, source: str, kernel: str, grid: int, block: int, shared_bytes: int, arguments: np.ndarray, stream: int
    ) -> None:
        kept = arguments.copy()
        self._cupy.run_on(stream, lambda: self._launcher.launch(source, kernel, grid, block, shared_bytes, kept, 0))


class EmulatedDevice(Device):
    """The device of one rank; its tensors are torch's and NumPy's on the CPU."""

    def __init__(self, cupy: FakeCupy) -> None:
        super().__init__(0, cupy, _StreamLauncher(cupy))
        self.name = "cpu"
        self.fake = cupy

    def use(self) -> None:
        pass

    def use_beside_captures(self) -> None:
        pass

    def caller_stream(self, framework: str) -> int:
        return self.fake.current

    def protect(self, tensors: Any, lane: Lane, framework: str) -> Any:
        return tuple(tensors)

    def torch_view(self, address: int, num_bytes: int) -> Any:
        import torch

        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


@contextlib.contextmanager
def fake_device(wires: Wires, seed: int = 0) -> Iterator[EmulatedDevice]:
    """A device whose thread ends with the block."""
    cupy = FakeCupy(wires, seed)
    try:
        yield EmulatedDevice(cupy)
    finally:
        cupy.close()
        time.sleep(0)
