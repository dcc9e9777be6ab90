"""Starts a function in one process per rank, over Gloo, MPI or NCCL, and brings back what each rank returned or raised.

    values = spawn("tests.transport_checks:check_exchange", 2, "gloo", timeout_s=30)

The function gets the transport of its rank and the arguments. A start costs about two seconds, so `spawn_checks`
runs a whole table of functions in one. Nothing outlives a call: no process, no file, no port.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsecoll.cuda.device import num_devices
from tests.worker import STACKS_SIGNAL, CheckResults, Folder, Job, Outcome

__all__ = ["Outcome", "RanksFailed", "spawn", "spawn_checks"]

_ROOT = Path(__file__).resolve().parent.parent
_GRACE_S = 2.0


class RanksFailed(AssertionError):
    """At least one rank raised, died or did not end in time; the message has them in the order of their failures.

    Attributes:
        outcomes: of all ranks, in rank order.
        timed_out: whether the limit passed.
        output: what the ranks wrote to stdout and stderr.
    """

    def __init__(self, job: Job, outcomes: list[Outcome], *, timed_out: bool, output: str) -> None:
        self.outcomes, self.timed_out, self.output = outcomes, timed_out, output
        failed = sorted((each for each in outcomes if not each.is_good), key=lambda each: each.ended_s)
        limit = f" (limit of {job.timeout_s} s passed)" if timed_out else ""
        parts = [f"{job.target} on {job.world_size} {job.backend} ranks: {len(failed)} failed{limit}"]
        for each in failed:
            parts.append(f"--- rank {each.rank}, exit code {each.exit_code}\n{each.traceback}{each.stacks}")
        super().__init__("\n".join([*parts, "--- output", output]))


def spawn(target: str, world_size: int, backend: str, *arguments: Any, timeout_s: float = 45.0) -> list[Any]:
    """Runs ``module:function`` as ``function(transport, *arguments)`` on every rank.

    Args:
        backend: as in `Job`.
        timeout_s: wall-clock limit for everything, imports included; below pytest's own, which would hide the stacks.

    Returns:
        What the ranks returned, in rank order.

    Raises:
        RanksFailed: see there.
    """
    job = Job(target, arguments, world_size, backend, timeout_s)
    with tempfile.TemporaryDirectory(prefix="sparsecoll-") as path:
        folder = Folder(Path(path))
        folder.write_job(job)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, command in enumerate(_commands(job, folder)):
                processes.append(_start(command, _environment(job, rank), folder.output(rank)))
            timed_out = not _all_ended(processes, time.monotonic() + timeout_s)
            if timed_out:
                _ask_for_stacks(folder, world_size)
            exit_codes = [process.poll() for process in processes]
        finally:
            _kill(processes, folder, world_size)
        outcomes = []
        for rank in range(world_size):
            outcome = folder.read_outcome(rank) or Outcome(rank, traceback="(ended without a result)\n")
            outcome.exit_code = exit_codes[0 if backend == "mpi" else rank]
            if timed_out and folder.stacks(rank).exists():
                outcome.stacks = folder.stacks(rank).read_text()
            outcomes.append(outcome)
        output = "".join(folder.output(index).read_text(errors="replace") for index in range(len(processes)))
    if timed_out or not all(outcome.is_good for outcome in outcomes):
        raise RanksFailed(job, outcomes, timed_out=timed_out, output=output)
    return [outcome.value for outcome in outcomes]


def spawn_checks(
    checks: Sequence[str], world_sizes: Sequence[int], backend: str, *, timeout_s: float = 45.0
) -> CheckResults:
    """Runs each ``module:function`` of ``checks`` as ``function(transport)`` in worlds of all sizes, in one start.

    Each check has a transport of its own; worlds smaller than the largest are groups of its last ranks.

    Returns:
        For every check and size None, or the tracebacks of the ranks where it failed.
    """
    values = spawn("run_checks", max(world_sizes), backend, tuple(checks), tuple(world_sizes), timeout_s=timeout_s)
    results: CheckResults = {}
    for key in itertools.product(checks, world_sizes):
        ranks = values[-key[1] :]
        texts = [f"rank {rank}: {value[key]}" for rank, value in enumerate(ranks) if value[key] is not None]
        results[key] = "\n".join(texts) or None
    return results


def _commands(job: Job, folder: Folder) -> Iterator[list[str]]:
    worker = [sys.executable, "-m", "tests.worker", str(folder.path)]
    if job.backend == "mpi":
        yield [str(Path(sys.prefix) / "bin" / "mpirun"), "-n", str(job.world_size), *worker]
    elif job.backend in ("gloo", "nccl", "torch-nccl"):
        for rank in range(job.world_size):
            yield [*worker, str(rank)]
    else:
        raise ValueError(f"spawn: expected backend gloo, mpi, nccl or torch-nccl, got {job.backend!r}")


def _environment(job: Job, rank: int) -> dict[str, str]:
    """Of one process. NCCL takes ranks of one device only if it takes them for ranks of different hosts."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if job.backend.endswith("nccl") and num_devices() < job.world_size:
        environ |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo"}
    return environ


def _start(command: list[str], environ: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            command, cwd=_ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def _all_ended(processes: list[subprocess.Popen[bytes]], deadline_s: float) -> bool:
    for process in processes:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def _living(folder: Folder, world_size: int) -> Iterator[tuple[int, int]]:
    """Rank and process of those that still run; the command line tells them from others with a recycled number."""
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.pid(rank).read_text())
            if str(folder.path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield rank, pid


def _ask_for_stacks(folder: Folder, world_size: int) -> None:
    # A rank with an outcome may be past the end of Python, where the signal would kill it, and with it an MPI job.
    late = {rank: pid for rank, pid in _living(folder, world_size) if folder.read_outcome(rank) is None}
    for pid in late.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
    deadline_s = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline_s and any(folder.stacks(rank).stat().st_size == 0 for rank in late):
        time.sleep(0.02)


def _kill(processes: list[subprocess.Popen[bytes]], folder: Folder, world_size: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()  # mpirun then removes what it has started, on this and other hosts
    _all_ended(processes, time.monotonic() + (0.0 if len(processes) > 1 else _GRACE_S))
    for _, pid in _living(folder, world_size):  # mpirun gives each rank a process group of its own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for rank in range(world_size):
        if folder.shared_memory(rank).exists():
            for path in folder.shared_memory(rank).read_text().split():
                Path(path).unlink(missing_ok=True)
