"""Runs a table of checks in one start of processes, on one group for as long as nothing fails.

A start takes long on a GPU, and so does a communicator. A check that fails gets its group replaced on all ranks; one
that hangs ends its processes, and the others are started again without it.
"""

from __future__ import annotations

import faulthandler
import json
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sparsecoll as sc
from sparsecoll.transport.base import Transport
from sparsecoll.transport.torch import TorchTransport, own_group
from tests.harness import RanksFailed, spawn
from tests.worker import on_device, resolve

__all__ = ["GROUP_TIMEOUT_S", "another_group", "run_checks", "run_table"]

GROUP_TIMEOUT_S = 30.0
_CHECK_LIMIT_S = 60.0
_START_LIMIT_S = 300.0
_NOT_BEGUN = "no rank got so far: "


def run_table(names: Sequence[str], backend: str, world_size: int) -> dict[str, str | None]:
    """Runs checks named ``module:function`` on all ranks; gives what went wrong, or None, for each."""
    results: dict[str, str | None] = {}
    left = list(names)
    while left:
        problem = "expected every check to end"
        with tempfile.TemporaryDirectory(prefix="sparsecoll-gpu-") as folder:
            try:
                spawn(f"{__name__}:run_checks", world_size, backend, backend, left, folder, timeout_s=_START_LIMIT_S)
            except RanksFailed as error:
                problem = str(error)
            begun, ended = _read(Path(folder), world_size)
        results |= ended
        left = [name for name in left if name not in ended]
        if left and left[0] not in begun:
            return {**results, **dict.fromkeys(left, _NOT_BEGUN + problem)}
        if left:
            results[left.pop(0)] = problem
    return results


def run_checks(transport: Transport, backend: str, names: Sequence[str], folder: str) -> None:
    """Calls ``check(group)`` for each name and writes down what came of it, one file for each rank."""
    group = _group_over(transport)
    with (Path(folder) / f"rank{group.rank}").open("w") as file:
        for name in names:
            print(json.dumps([name]), file=file, flush=True)
            faulthandler.dump_traceback_later(_CHECK_LIMIT_S, exit=True)
            failure = _failure(resolve(name), group)
            failed_somewhere = _any_rank(failure is not None)
            print(json.dumps([name, failure]), file=file, flush=True)
            if failed_somewhere:
                group.transport.abort(f"{name} failed")
                group.close()
                if group.device != "cpu":
                    torch.cuda.synchronize()  # a device that has failed for good ends this process here
                group = another_group(backend)
        faulthandler.cancel_dump_traceback_later()
    group.close()


def another_group(backend: str = "nccl", timeout_s: float = GROUP_TIMEOUT_S) -> sc.Group:
    """A group over the same ranks with communicators of its own. Collective."""
    return _group_over(on_device(TorchTransport(own_group(timeout_s), owned=True), backend, timeout_s))


def _group_over(transport: Transport) -> sc.Group:
    return sc.Group(transport, timeout_s=GROUP_TIMEOUT_S, checked=True)


def _failure(check: Callable[[sc.Group], object], group: sc.Group) -> str | None:
    try:
        check(group)
        if group.device != "cpu":
            torch.cuda.synchronize()
    except (Exception, pytest.fail.Exception) as error:
        group.transport.abort(f"{type(error).__name__}: {error}")
        return traceback.format_exc()
    return None


def _any_rank(flag: bool) -> bool:
    """Meets all ranks beside their group, which may have failed."""
    found = torch.tensor([int(flag)])
    dist.all_reduce(found)
    return bool(found)


def _read(folder: Path, world_size: int) -> tuple[set[str], dict[str, str | None]]:
    """Checks that a rank has begun, and those that all ranks have ended."""
    begun: set[str] = set()
    failures: list[dict[str, str | None]] = []
    for rank in range(world_size):
        path = folder / f"rank{rank}"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        begun |= {line[0] for line in lines}
        failures.append({line[0]: line[1] for line in lines if len(line) == 2})
    ended = [name for name in failures[0] if all(name in each for each in failures)]
    return begun, {name: _joined([each[name] for each in failures]) for name in ended}


def _joined(failures: Sequence[str | None]) -> str | None:
    return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None) or None
