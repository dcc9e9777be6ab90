"""Threads as ranks, each with an emulated GPU, and NCCL between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import sparsecoll as sc
from sparsecoll import group as groups
from sparsecoll.transport.local import LocalTransport, run_local
from sparsecoll.transport.nccl import CupyLibrary, NcclTransport
from tests.emulation.fake_cupy import EmulatedDevice, Wires, fake_device

__all__ = ["device_of", "run_emulated"]

T = TypeVar("T")


def run_emulated(
    fn: Callable[[sc.Group], T],
    world_size: int,
    *,
    timeout_s: float = 30.0,
    checked: bool = True,
    topology: sc.Topology | None = None,
    seed: int = 0,
) -> list[T]:
    """`sparsecoll.run_local` over NCCL on emulated devices."""
    wires = Wires()

    def main(control: LocalTransport) -> T:
        with fake_device(wires, seed + control.rank) as device:
            library = CupyLibrary(device.fake.cuda.nccl)
            transport = NcclTransport(control, device, library, timeout_s=timeout_s)
            with sc.Group(transport, topology, timeout_s=timeout_s, checked=checked) as group:
                groups._local_default.set(group)
                return fn(group)

    results = run_local(main, world_size, timeout_s=timeout_s)
    assert not wires.problems, wires.problems
    return results


def device_of(group: sc.Group) -> EmulatedDevice:
    """The emulated device of a rank."""
    gpu: Any = group.transport.gpu  # type: ignore[attr-defined]
    assert isinstance(gpu, EmulatedDevice)
    return gpu
