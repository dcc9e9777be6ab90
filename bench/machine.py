"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import sparsecoll as sc

__all__ = ["backend_version", "commit", "describe", "describe_gpu", "last_level_cache_bytes", "nccl_version"]

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE_BYTES = 32 << 20


def describe() -> dict[str, Any]:
    """The machine and the versions of what is installed on it."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "torch": _version("torch"),
        "mpi4py": _version("mpi4py"),
        "sparsecoll": sc.__version__,
    }


def backend_version(group: sc.Group) -> str:
    """The library below a group; it is loaded by now."""
    if group.backend == "mpi":
        from mpi4py import MPI

        return " ".join(MPI.Get_library_version().split("\n")[0].replace("\0", "").split())
    if group.backend == "nccl":
        return f"NCCL {nccl_version()}, meeting over the launcher's back end"
    if group.backend == "torch":
        return f"torch {_version('torch')} ({sys.modules['torch.distributed'].get_backend()})"
    return f"threads of Python {platform.python_version()}"


def describe_gpu() -> dict[str, Any]:
    """The current device and what drives it; CuPy is there."""
    import cupy

    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    return {
        "device": properties["name"].decode(),
        "compute_capability": device.compute_capability,
        "multiprocessors": int(properties["multiProcessorCount"]),
        "l2_cache_bytes": int(properties["l2CacheSize"]),
        "device_memory_bytes": int(properties["totalGlobalMem"]),
        "driver": _driver_version(),
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "nccl": nccl_version(),
        "cupy": cupy.__version__,
    }


def nccl_version() -> str:
    """Of the library that CuPy has loaded."""
    from cupy.cuda import nccl

    number = nccl.get_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _driver_version() -> str | None:
    try:
        found = re.search(r"\s(\d+(\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def last_level_cache_bytes() -> int:
    """As the kernel reports it; 32 MiB where it does not."""
    sizes = []
    for path in _CPU.glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=_UNKNOWN_CACHE_BYTES)


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ from it; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--match="],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
