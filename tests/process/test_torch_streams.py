"""Collectives in rounds over a torch process group, as on a GPU, with Gloo and tensors on the CPU.

The device's streams are the host itself: what is put on them has happened, as it has where Gloo's messages are waited
for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import sparsecoll as sc
from sparsecoll.transport.torch import TorchTransport
from sparsecoll.transport.torch_stream import TorchStreamTransport
from tests.conformance import CHECKS
from tests.emulation.fake_cupy import HOST, EmulatedDevice, FakeCupy, Wires
from tests.harness import spawn_checks
from tests.worker import CheckResults

WORLD_SIZES = (2, 4)
LIMIT_S = 120.0
pytestmark = pytest.mark.timeout(LIMIT_S + 10)


class HostDevice(EmulatedDevice):
    """A device whose only stream is the calling thread."""

    def new_stream(self, priority: int) -> Any:
        return SimpleNamespace(ptr=HOST)

    def allocate(self, num_bytes: int, lane: Any) -> Any:
        block = self.cupy.cuda.alloc(num_bytes)
        return SimpleNamespace(address=block.ptr, num_bytes=num_bytes, owner=block)


def __getattr__(name: str) -> Callable[[TorchTransport], None]:
    """Each check of the table as a function of this module, for `spawn_checks` finds functions by name."""
    if name not in CHECKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def run(control: TorchTransport) -> None:
        cupy = FakeCupy(Wires())
        transport = TorchStreamTransport(control, control._group, HostDevice(cupy))  # type: ignore[arg-type]
        with sc.Group(transport, timeout_s=15.0, checked=True) as group:
            CHECKS[name](group)
        cupy.close()

    return run


@functools.cache
def results() -> CheckResults:
    return spawn_checks([f"{__name__}:{name}" for name in CHECKS], WORLD_SIZES, "gloo", timeout_s=LIMIT_S)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CHECKS)
def test_conformance(name: str, world_size: int) -> None:
    failure = results()[f"{__name__}:{name}", world_size]
    assert failure is None, failure
