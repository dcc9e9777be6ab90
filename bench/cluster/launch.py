"""Starts one process for each rank on emulated hosts, and does not leave any behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.cluster.hosts import INTERFACE, Hosts
from bench.cluster.signals import undisturbed

__all__ = ["RankFailed", "run_ranks"]

_PORT = 29500  # of the rendezvous; host 0 has all ports to itself
_GRACE_S = 2.0
_POLL_S = 0.02
_ROOT = Path(__file__).resolve().parents[2]


class RankFailed(Exception):
    """A rank ended with a status; the message has what it wrote to stderr."""


def run_ranks(hosts: Hosts, ranks_per_host: int, arguments: Sequence[str], folder: Path) -> None:
    """Runs ``python <arguments>`` as every rank, with the environment that torchrun would set, to the end.

    Args:
        folder: for what ranks write to stderr, which nobody sees unless one fails.

    Raises:
        RankFailed: the first that did. The others are ended.
    """
    sys.stdout.flush()
    logs = [folder / f"rank{rank}.log" for rank in range(hosts.num_hosts * ranks_per_host)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            processes.append(_start(hosts, ranks_per_host, rank, arguments, log))
        failed = _wait(processes)
    finally:
        _end(processes)
    if failed:
        raise RankFailed(_describe(failed, processes, logs, ranks_per_host))


def _start(
    hosts: Hosts, ranks_per_host: int, rank: int, arguments: Sequence[str], log: Path
) -> subprocess.Popen[bytes]:
    host, local_rank = divmod(rank, ranks_per_host)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(hosts.num_hosts * ranks_per_host),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_host),
        "GROUP_RANK": str(host),
        "GROUP_WORLD_SIZE": str(hosts.num_hosts),
        "MASTER_ADDR": hosts.address(0),
        "MASTER_PORT": str(_PORT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            hosts.command(host, [sys.executable, *arguments]),
            cwd=_ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stderr=file,
            # Ctrl-C is for this process, which then ends its ranks.
            start_new_session=True,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for all, or not much longer than for the first that fails; returns those that did, in that order."""
    failed: list[int] = []
    deadline_s = float("inf")
    while time.monotonic() < deadline_s and any(process.poll() is None for process in processes):
        failed += _new_failures(processes, failed)
        if failed and deadline_s == float("inf"):
            deadline_s = time.monotonic() + _GRACE_S
        time.sleep(_POLL_S)
    return failed + list(_new_failures(processes, failed))


def _new_failures(processes: Sequence[subprocess.Popen[bytes]], known: Sequence[int]) -> Iterator[int]:
    return (rank for rank, process in enumerate(processes) if process.poll() and rank not in known)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    with undisturbed():
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()


def _describe(
    failed: Sequence[int], processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], ranks_per_host: int
) -> str:
    first = failed[0]
    parts = [
        f"rank {first} on host {first // ranks_per_host} ended with status {processes[first].returncode}:",
        logs[first].read_text(errors="replace").rstrip(),
    ]
    for rank in failed[1:]:
        # The error and where it was, or what faulthandler says.
        last = logs[rank].read_text(errors="replace").splitlines()[-2:]
        parts.append(f"then rank {rank}: {'; '.join(line.strip() for line in last)}")
    return "\n".join(parts)
