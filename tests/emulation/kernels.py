"""The CUDA kernels on the CPU: their very text, compiled as C++ by `cuda_on_cpu.hpp`, behind a launcher."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["EmulatedLauncher", "LaunchFailed", "compile_text", "launch_now"]

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE.parents[1] / "csrc"
_BUILD = _HERE.parents[1] / "build" / "emulation"
_building = threading.Lock()


class LaunchFailed(Exception):
    """What a device would have refused, got stuck in, or trapped."""


class EmulatedLauncher:
    """A device whose kernels have run when a launch returns; streams are ignored. May be used from any thread.

    Args:
        num_multiprocessors: what geometry follows.
        seed: draws the order of blocks and threads.

    Attributes:
        launched: names of the kernels so far.
        allowed: pairs of addresses between which kernels may read and write; all may be touched while there are none.
    """

    def __init__(self, num_multiprocessors: int = 132, seed: int = 0) -> None:
        self._num_multiprocessors, self._seed = num_multiprocessors, seed
        self.launched: list[str] = []
        self.allowed: list[tuple[int, int]] = []

    @property
    def num_multiprocessors(self) -> int:
        return self._num_multiprocessors

    def launch(
        self,
        source: str,
        kernel: str,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: NDArray[np.int64],
        stream: int,
    ) -> None:
        self.launched.append(kernel)
        launch_now(kernel, grid, block, shared_bytes, arguments, seed=self._seed, allowed=self.allowed)


def launch_now(
    kernel: str,
    grid: int,
    block: int,
    shared_bytes: int,
    arguments: NDArray[np.int64],
    *,
    blocks: range | None = None,
    seed: int = 0,
    allowed: Sequence[tuple[int, int]] = (),
    library: ctypes.CDLL | None = None,
) -> None:
    """Runs a kernel.

    Args:
        blocks: those of the grid that run; None for all.
        seed, allowed: as `EmulatedLauncher` has them.
        library: of `compile_text`; None for the kernels of the package.

    Raises:
        LaunchFailed: the launch is impossible, or its threads did what they must not.
    """
    library = library or _library()
    assert arguments.dtype == np.int64 and arguments.flags.c_contiguous
    num_bytes = ctypes.c_longlong.in_dll(library, f"{kernel}_bytes").value
    if arguments.nbytes != num_bytes:
        raise LaunchFailed(f"{kernel}: {arguments.nbytes} bytes of arguments for {num_bytes}")
    blocks = range(grid) if blocks is None else blocks
    ranges = np.array(allowed, np.int64)
    failure: bytes = library.run_kernel(
        *(getattr(library, kernel), arguments.ctypes.data, grid, block, shared_bytes),
        *(blocks.start, len(blocks), seed, ranges.ctypes.data, len(ranges)),
    )
    if failure:
        raise LaunchFailed(f"{kernel}: {failure.decode()}")


def compile_text(text: str) -> ctypes.CDLL:
    """Compiles kernels, in the words of `csrc/kernels.cuh`, to be launched by name; what has been is not again."""
    headers = [_HERE / "cuda_on_cpu.hpp", *sorted(_SOURCES.glob("*.cu*")), _SOURCES / "dtype.hpp"]
    content = hashlib.blake2b(text.encode() + b"".join(each.read_bytes() for each in headers), digest_size=16)
    path = _BUILD / f"{content.hexdigest()}.so"
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:  # or each of several ranks would compile it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(text, path)
    library = ctypes.CDLL(str(path))
    library.run_kernel.restype = ctypes.c_char_p
    library.run_kernel.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_ulonglong),
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint),
    ]
    return library


def _compile(text: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=_BUILD) as folder:
        fresh = Path(folder) / "kernels.so"
        subprocess.run(
            [
                *("g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"),
                *("-Wno-unknown-pragmas", f"-I{_SOURCES}", "-include", str(_HERE / "cuda_on_cpu.hpp")),
                *("-x", "c++", "-", "-o", str(fresh)),
            ],
            input=text,
            text=True,
            check=True,
        )
        fresh.replace(path)


def _library() -> ctypes.CDLL:
    with _building:
        return _build()


@cache
def _build() -> ctypes.CDLL:
    return compile_text("".join(f'#include "{source}"\n' for source in sorted(_SOURCES.glob("*.cu"))))
