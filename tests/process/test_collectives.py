"""The conformance table between processes: one start for each back end, a transport for each check and world size."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparsecoll as sc
from sparsecoll.transport.base import Operation, Transport
from tests.conformance import CHECKS, in_pieces
from tests.harness import RanksFailed, spawn, spawn_checks
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


def die_midway(transport: Transport) -> str:
    """Rank 1 kills itself when it has forwarded a part of what the others want of it."""
    place = sc.Placement.of_owners([0], 3).replicate({0: range(3)})
    plan = in_pieces(sc.plan_all_gather(place, 1 << 20, sc.Topology.flat(3), "relay"), 16)
    transport.exchange(b"ready", Operation("ready", 30_000, 30.0))
    num_calls = 0
    ended = transport.ended

    def ended_or_dead(operation: Operation) -> list[Any]:
        nonlocal num_calls
        num_calls += 1
        if transport.rank == 1 and num_calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return ended(operation)

    transport.ended = ended_or_dead  # type: ignore[method-assign]
    started_s = time.monotonic()
    with sc.Group(transport, timeout_s=30.0, checked=False) as group:
        shard = np.zeros((int(group.rank == 0), 1 << 20), np.uint8)
        with pytest.raises(sc.PeerFailure) as caught:
            sc.sparse_all_gather(shard, place, plan=plan, group=group)
            group.barrier()  # the owner may have sent all before
        assert time.monotonic() - started_s < 15.0
        with pytest.raises(sc.TransportError, match="unusable"):
            group.barrier()
    return str(caught.value)


def test_a_relay_that_is_killed_midway_ends_the_others() -> None:
    with pytest.raises(RanksFailed) as caught:
        spawn(f"{__name__}:die_midway", 3, "gloo")
    outcomes = caught.value.outcomes
    assert outcomes[1].exit_code == -signal.SIGKILL
    for rank in (0, 2):
        assert not outcomes[rank].traceback, outcomes[rank].traceback
        assert "rank 1 has died" in outcomes[rank].value or "aborted" in outcomes[rank].value
