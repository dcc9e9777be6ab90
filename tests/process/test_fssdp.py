"""The wrapper between processes: some of the checks that threads as ranks go through, one start for each back end."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import sparsecoll as sc
from sparsecoll.transport.base import Transport
from tests import fssdp_checks, reshard_checks
from tests.harness import spawn_checks
from tests.worker import CheckResults

BACKENDS = ["gloo", "mpi"]
WORLD_SIZES = (2, 3)
# The first test of a back end waits for all of its checks.
LIMIT_S = 120.0
pytestmark = pytest.mark.timeout(LIMIT_S + 10)


def on_transport(check: Callable[[sc.Group], None]) -> Callable[[Transport], None]:
    def run(transport: Transport) -> None:
        with sc.Group(transport, timeout_s=15.0, checked=True) as group:
            check(group)

    return run


parity = on_transport(fssdp_checks.check_parity)
options = on_transport(fssdp_checks.check_options)
moves = on_transport(reshard_checks.check_moves)
capacity = on_transport(fssdp_checks.check_capacity)
reported_bytes = on_transport(fssdp_checks.check_bytes)
state_dict = on_transport(fssdp_checks.check_state_dict)
disagreement = on_transport(fssdp_checks.check_disagreement)

CHECKS = ["parity", "options", "moves", "capacity", "reported_bytes", "state_dict", "disagreement"]


@functools.cache
def results_of(backend: str) -> CheckResults:
    return spawn_checks([f"{__name__}:{name}" for name in CHECKS], WORLD_SIZES, backend, timeout_s=LIMIT_S)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_check(backend: str, name: str, world_size: int) -> None:
    failure = results_of(backend)[f"{__name__}:{name}", world_size]
    assert failure is None, failure
