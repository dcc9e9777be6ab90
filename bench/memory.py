"""Where the arrays of a bench lie, and how time passes there: NumPy's on the host, CuPy's on a group's GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench import machine

__all__ = ["DeviceMemory", "HostMemory", "Memory", "memory_of"]


class HostMemory:
    """NumPy arrays.

    Attributes:
        xp: makes and copies arrays, NumPy or what has its functions.
        copy: what copies bytes there, by name.
    """

    xp: Any = np
    copy = "np.copyto"

    def cold_bytes(self, ranks_on_node: int) -> int:
        """A rank that goes round this much memory finds none of it in the cache, which ranks of a node share."""
        return -(-2 * machine.last_level_cache_bytes() // ranks_on_node)

    def to_host(self, array: Any) -> NDArray[Any]:
        """The array itself, or a copy."""
        return np.asarray(array)

    def settle(self) -> None:
        """Waits for what has been started."""

    def time_s(self, run: Callable[[], None]) -> float:
        """How long ``run`` takes until its results are there."""
        begin_s = time.perf_counter()
        run()
        return time.perf_counter() - begin_s

    def describe(self) -> dict[str, Any]:
        """This rank's device, as nccl-tests lists it."""
        return {"device_hex": None, "device_info": "cpu"}


class DeviceMemory(HostMemory):
    """CuPy arrays on the current device, and its events.

    Args:
        cupy: the module.
    """

    copy = "a device copy"

    def __init__(self, cupy: Any) -> None:
        self.xp = cupy
        self._begin, self._end = cupy.cuda.Event(), cupy.cuda.Event()

    def cold_bytes(self, ranks_on_node: int) -> int:
        return 2 * int(self.xp.cuda.Device().attributes["L2CacheSize"])

    def to_host(self, array: Any) -> NDArray[Any]:
        return self.xp.asnumpy(array)

    def settle(self) -> None:
        self.xp.cuda.runtime.deviceSynchronize()

    def time_s(self, run: Callable[[], None]) -> float:
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return float(self.xp.cuda.get_elapsed_time(self._begin, self._end)) * 1e-3

    def describe(self) -> dict[str, Any]:
        device = self.xp.cuda.Device()
        name = self.xp.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        return {"device": device.id, "device_hex": device.pci_bus_id, "device_info": name}


Memory = HostMemory


def memory_of(group: sc.Group) -> Memory:
    """What ``group`` moves."""
    if group.device == "cpu":
        return HostMemory()
    import cupy

    return DeviceMemory(cupy)
