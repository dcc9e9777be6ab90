"""The transports between processes: the checks that every transport passes, and the death of processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sparsecoll.errors import BackendUnavailable, CollectiveTimeout, PeerFailure
from sparsecoll.transport.base import Message, Operation, Transport
from tests.harness import RanksFailed, spawn, spawn_checks
from tests.transport_checks import (
    CHECKS,
    CLOSURE_CHECKS,
    SIZE_CHECKS,
    check_ends_are_told,
    pattern,
    peers_of,
    poisoned,
)
from tests.worker import CheckResults

BACKENDS = ["gloo", "mpi"]
WORLD_SIZES = (1, 2, 3, 4)


def check_stall(transport: Transport) -> None:
    """Rank 1 is stopped in the middle and resumed before anybody has lost patience: nothing is lost."""
    if transport.world_size == 1:
        return
    pids = [int(record) for record in transport.exchange(b"%10d" % os.getpid(), Operation("pids", 0, 30.0))]
    for sequence in range(4):
        op = Operation("stalled", sequence, 30.0)
        sends = [Message(peer, pattern(transport.rank, peer, sequence, 200_000)) for peer in peers_of(transport)]
        receives = [Message(peer, poisoned(200_000)) for peer in peers_of(transport)]
        if sequence == 2 and transport.rank == 0:
            os.kill(pids[1], signal.SIGSTOP)
        requests = transport.post(sends, receives, op)
        if sequence == 2 and transport.rank == 0:
            time.sleep(0.2)
            os.kill(pids[1], signal.SIGCONT)
        transport.wait(requests, op)
        for peer, view in receives:
            np.testing.assert_array_equal(view, pattern(peer, transport.rank, sequence, 200_000))


def check_waiters_end(transport: Transport) -> None:
    """Threads that wait for tracked messages end with their transport, after a failure too: Python would end badly."""
    check_ends_are_told(transport)
    op = Operation("in vain", 9, 0.2)
    for peer in peers_of(transport):
        (request,) = transport.post([], [Message(peer, poisoned(8))], op)
        transport.track(request, peer, op)
    waiters = [thread for thread in threading.enumerate() if thread.name.startswith(f"sparsecoll-{transport.rank}-")]
    assert len(waiters) == 2 * len(peers_of(transport)), "one for each peer and direction"
    if waiters:
        with pytest.raises((CollectiveTimeout, PeerFailure)) as caught:
            transport.ended(op)
        transport.abort(str(caught.value))
    transport.close()
    assert not any(thread.is_alive() for thread in waiters)


GLOO_CHECKS = (*CHECKS, *CLOSURE_CHECKS, f"{__name__}:check_stall", f"{__name__}:check_waiters_end")
MPI_CHECKS = (*CHECKS, *SIZE_CHECKS, f"{__name__}:check_stall")


@pytest.fixture(scope="module")
def gloo_results() -> CheckResults:
    return spawn_checks(GLOO_CHECKS, WORLD_SIZES, "gloo", timeout_s=55.0)


@pytest.fixture(scope="module")
def mpi_results() -> CheckResults:
    return spawn_checks(MPI_CHECKS, WORLD_SIZES, "mpi", timeout_s=55.0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("check", GLOO_CHECKS)
def test_gloo(check: str, world_size: int, gloo_results: CheckResults) -> None:
    failure = gloo_results[check, world_size]
    assert failure is None, failure


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("check", MPI_CHECKS)
def test_mpi(check: str, world_size: int, mpi_results: CheckResults) -> None:
    failure = mpi_results[check, world_size]
    assert failure is None, failure


def die_in_the_middle(transport: Transport) -> str:
    """Rank 1 kills itself while both others wait for a message of it."""
    op = Operation("doomed", 5, 30.0)
    receives = [Message(peer, poisoned(100_000)) for peer in peers_of(transport)]
    requests = transport.post([], receives, op)
    transport.exchange(b"posted", Operation("ready", 4, 30.0))
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started_s = time.monotonic()
    with pytest.raises(PeerFailure) as caught:
        transport.wait(requests[transport.rank // 2 :], op)  # rank 1's is the first of rank 0 and the second of rank 2
    assert time.monotonic() - started_s < 10.0
    return str(caught.value)


def test_killed_rank_is_named_by_gloo() -> None:
    with pytest.raises(RanksFailed) as caught:
        spawn(f"{__name__}:die_in_the_middle", 3, "gloo")
    outcomes = caught.value.outcomes
    assert outcomes[1].exit_code == -signal.SIGKILL
    for rank in (0, 2):
        assert not outcomes[rank].traceback, outcomes[rank].traceback
        assert re.match(r"doomed #5: .* rank 1 has died", outcomes[rank].value)


def test_killed_rank_ends_an_mpi_job() -> None:
    started_s = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        spawn(f"{__name__}:die_in_the_middle", 3, "mpi", timeout_s=50.0)
    assert not caught.value.timed_out
    assert time.monotonic() - started_s < 40.0
    assert "Killed (signal 9)" in caught.value.output


def make_second_transport_without_last_rank(transport: Transport) -> None:
    last = transport.world_size - 1
    if transport.rank != last:
        started_s = time.monotonic()
        with pytest.raises(CollectiveTimeout, match=rf"ranks \[{last}\]"):
            if transport.backend == "mpi":
                from sparsecoll.transport.mpi import MpiTransport

                MpiTransport(timeout_s=0.5)
            else:
                from sparsecoll.transport.torch import own_group

                own_group(0.5)
        assert time.monotonic() - started_s < 5.0
    transport.exchange(b"through", Operation("end", 0, 30.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_that_never_arrives_is_named(backend: str) -> None:
    spawn(f"{__name__}:make_second_transport_without_last_rank", 2, backend)


UNDER_TORCHRUN = """
import os
import torch.distributed as dist
from sparsecoll.errors import CollectiveTimeout
from sparsecoll.transport.base import Operation
from sparsecoll.transport.torch import TorchTransport, init_process_group, own_group

init_process_group(30.0)
init_process_group(30.0)  # initialized already: nothing to do
transport = TorchTransport(own_group(30.0), owned=True)
assert transport.exchange(b"%d" % transport.rank, Operation("hello", 0, 30.0)) == [b"0", b"1"]
transport.close()
dist.destroy_process_group()
if os.environ["RANK"] == "0":
    try:
        init_process_group(0.5)
    except CollectiveTimeout as exc:
        assert "ranks [1] have not reported" in str(exc), exc
    else:
        raise AssertionError("rank 1 was not missed")
"""


def test_start_under_torchrun() -> None:
    """All ranks start; then rank 0 tries once more without rank 1."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    with subprocess.Popen(
        [*torchrun, sys.executable, "-c", UNDER_TORCHRUN],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=50.0)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun then ends its ranks
    assert process.returncode == 0, output


@pytest.mark.parametrize(("module", "extra"), [("mpi4py", "mpi"), ("torch.distributed", "torch")])
def test_missing_back_end_names_the_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecoll.transport.mpi import MpiTransport
    from sparsecoll.transport.torch import own_group

    monkeypatch.setenv("MPIR_CVAR_CH4_CMA_ENABLE", "0")  # what the import sets by default is of no use here
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailable, match=re.escape(f'pip install "sparsecoll[{extra}]"')):
        MpiTransport() if extra == "mpi" else own_group(1.0)
