"""The conformance table on device memory: its checks unchanged, behind a stand-in for the package.

The checks make tensors and arrays of the CPU. Here ``sc`` in their module stands for something that copies arguments to
the device, torch tensors as such and NumPy arrays as CuPy's, calls the real collective, and copies results back. Groups
that move host memory, which checks make beside the one under test, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import sparsecoll as sc
from sparsecoll.work import Work
from tests import conformance

__all__ = ["CHECKS"]

CHECKS = [f"{__name__}:{name}" for name in conformance.CHECKS]


def __getattr__(name: str) -> Callable[[sc.Group], None]:
    """Each check of the table as a function of this module."""
    if name not in conformance.CHECKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def run(group: sc.Group) -> None:
        conformance.sc = Package()
        try:
            conformance.CHECKS[name](group)
        finally:
            conformance.sc = sc

    return run


class Package:
    """Stands for ``sparsecoll``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sc, name)

    def sparse_all_gather(self, shard: Any, *arguments: Any, **more: Any) -> Any:
        return _call(sc.sparse_all_gather, shard, *arguments, **more)

    def sparse_reduce_scatter(self, held: Any, *arguments: Any, **more: Any) -> Any:
        return _call(sc.sparse_reduce_scatter, held, *arguments, **more)

    def all_to_all(self, x: Any, *arguments: Any, **more: Any) -> Any:
        return _call(sc.all_to_all, x, *arguments, **more)


class HostWork:
    """A `Work` whose result is brought back."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def result(self, timeout_s: float | None = None) -> Any:
        return _to_host(self._work.result(timeout_s))


def _call(collective: Callable[..., Any], value: Any, *arguments: Any, group: sc.Group, **more: Any) -> Any:
    if not group.is_stream_ordered:
        return collective(value, *arguments, group=group, **more)
    there, out = _to_device(value, group.device), more.pop("out", None)
    if out is None:
        result = collective(there, *arguments, group=group, **more)
        return HostWork(result) if isinstance(result, Work) else _to_host(result)
    destination = _rows_within(value, there, out)
    if destination is None:
        destination = _to_device(out, group.device)
    assert collective(there, *arguments, group=group, out=destination, **more) is destination
    with torch.no_grad():
        _copy_to_host(destination, out)
    return out


def _to_device(value: Any, device: str) -> Any:
    """A copy, whatever the form; what is no array stays as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(each, device) for each in value)
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, np.ndarray):
        if device == "cpu":  # emulated
            return value.copy()
        import cupy

        return cupy.array(value)
    return value


def _to_host(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(each) for each in value)
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return value if isinstance(value, np.ndarray) else value.get()


def _rows_within(value: Any, there: Any, out: Any) -> Any:
    """Where ``out`` is a run of the rows of ``value``, the same rows of its copy; otherwise None."""
    if not (isinstance(value, np.ndarray) and isinstance(out, np.ndarray) and np.shares_memory(value, out)):
        return None
    first = (out.ctypes.data - value.ctypes.data) // value.strides[0]
    return there[first : first + len(out)]


def _copy_to_host(source: Any, destination: Any) -> None:
    if isinstance(destination, torch.Tensor):
        destination.copy_(source)
    else:
        destination[...] = _to_host(source)
