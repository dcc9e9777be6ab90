"""Starting a kernel: what `Kernels` asks for, and how CuPy's driver calls do it."""

from __future__ import annotations

import ctypes
import threading
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sparsecoll.cuda.source import cached_kernels, default_cache
from sparsecoll.errors import BackendUnavailable

__all__ = ["CudaLauncher", "Launcher"]


class Launcher(Protocol):
    """Where kernels run."""

    @property
    def num_multiprocessors(self) -> int:
        """Blocks that the device runs side by side at least; geometry follows it, results do not."""
        ...

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
        """Puts one launch into a stream, and waits for nothing.

        Args:
            source: name of the file that holds the kernel.
            grid, block: numbers of blocks, and of threads in each.
            shared_bytes: dynamic shared memory of a block.
            arguments: the kernel's only parameter, a struct of 64-bit integers; copied before this returns.
            stream: handle of a stream of this device.
        """
        ...


class CudaLauncher:
    """Launches on one GPU. Kernels of a file are compiled and loaded when one of them is launched first; that takes
    some tenths of a second, and cannot happen while a stream is captured. May be used from any thread.

    Args:
        device_id: CUDA's number of the device.

    Raises:
        BackendUnavailable: CuPy is not installed, or finds no such device.
    """

    def __init__(self, device_id: int) -> None:
        try:
            from cupy.cuda import Device, driver, runtime
        except ImportError as error:
            raise BackendUnavailable(
                f"CudaLauncher: expected CuPy, which pip install 'sparsecoll[cuda13]' brings, got: {error}"
            ) from None
        self._driver, self._runtime = driver, runtime
        self._device_id = device_id
        try:
            self._arch = int(Device(device_id).compute_capability)
            self._num_multiprocessors = int(
                runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device_id)
            )
        except runtime.CUDARuntimeError as error:
            raise BackendUnavailable(f"CudaLauncher: expected CUDA device {device_id}, got: {error}") from None
        self._loading = threading.Lock()
        self._modules: dict[str, int] = {}
        self._functions: dict[tuple[str, str], int] = {}

    @property
    def num_multiprocessors(self) -> int:
        """Multiprocessors of the device."""
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
        """As `Launcher.launch`.

        Raises:
            CUDADriverError: CuPy's, if the driver refuses the launch, or reports a fault of what was launched before.
        """
        caller_device = self._runtime.getDevice()
        self._runtime.setDevice(self._device_id)
        try:
            function = self._functions.get((source, kernel)) or self._load(source, kernel)
            # The driver reads the struct through a table of addresses of parameters, of which there is one. Both are
            # this call's own, as other threads launch at the same time.
            parameters = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(arguments.data)))
            self._driver.launchKernel(
                function, grid, 1, 1, block, 1, 1, shared_bytes, stream, ctypes.addressof(parameters), 0
            )
        finally:
            if caller_device != self._device_id:
                self._runtime.setDevice(caller_device)

    def _load(self, source: str, kernel: str) -> int:
        with self._loading:
            if source not in self._modules:
                self._runtime.free(0)  # makes the device's context, if nothing has yet
                self._modules[source] = self._driver.moduleLoadData(cached_kernels(source, self._arch, default_cache()))
            function: int = self._driver.moduleGetFunction(self._modules[source], kernel)
            return self._functions.setdefault((source, kernel), function)
