"""The conformance table between processes: one start for each back end, a transport for each check and world size."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import sparsecoll as sc
from sparsecoll.transport.base import Transport
from tests.conformance import CHECKS
from tests.harness import spawn_checks
from tests.worker import CheckResults

BACKENDS = ["gloo", "mpi"]
WORLD_SIZES = (1, 2, 3, 4)
# The first test of a back end waits for all of its checks.
LIMIT_S = 120.0
pytestmark = pytest.mark.timeout(LIMIT_S + 10)


def __getattr__(name: str) -> Callable[[Transport], None]:
    """Each check of the table as a function of this module, for `spawn_checks` finds functions by name."""
    if name not in CHECKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def run(transport: Transport) -> None:
        with sc.Group(transport, timeout_s=15.0, checked=True) as group:
            CHECKS[name](group)

    return run


@functools.cache
def results_of(backend: str) -> CheckResults:
    return spawn_checks([f"{__name__}:{name}" for name in CHECKS], WORLD_SIZES, backend, timeout_s=LIMIT_S)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conformance(backend: str, name: str, world_size: int) -> None:
    failure = results_of(backend)[f"{__name__}:{name}", world_size]
    assert failure is None, failure
