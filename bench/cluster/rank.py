"""What one rank does: every contestant on every scene in turn, timed and checked."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sparsecoll as sc
from bench.cluster.baselines import Subgroups, baselines
from bench.cluster.buffers import Buffers
from bench.cluster.contestants import ALGORITHMS, OURS, Contestant, Ours
from bench.cluster.hosts import INTERFACE
from bench.cluster.options import Options
from bench.cluster.placements import Scene
from bench.cluster.rows import Row

__all__ = ["measure_all"]

COLLECTIVES = ("ag", "rs")

# A contestant gets as many of the timed iterations as fit, and at least one; ours gets all.
_SPAN_S = 1.0

_PR_SET_PDEATHSIG = 1
_STDERR = 2


def measure_all(options: Options, report: Callable[[Row], None]) -> list[Row]:
    """All rows; rank 0 hands each to ``report`` as it comes. All ranks get the same."""
    _die_with_launcher(options)
    torch.set_num_threads(1)
    # As in timeit: a collection that happens to fall into a timed span says nothing about what is timed.
    gc.disable()
    gc.freeze()  # what the imports have left would take 0.1 s of each collection between the runs
    _watch(options.timeout_s)
    rows: list[Row] = []
    with sc.init_group("torch", timeout_s=options.timeout_s, topology=options.topology) as group:
        for scene in options.scenes:
            groups = Subgroups(scene)
            for collective in COLLECTIVES:
                for row in _measure(group, scene, collective, groups, options):
                    rows.append(row)
                    if group.rank == 0:
                        report(row)
            group.barrier()  # a rank that leaves a process group breaks it for those that are still in it
            groups.close(group.rank)
        _watch(None)
    return rows


def _measure(group: sc.Group, scene: Scene, collective: str, groups: Subgroups, options: Options) -> Sequence[Row]:
    buffers = Buffers(scene, collective, group.rank)
    contestants: list[Contestant] = [Ours(group, scene, collective, buffers, name) for name in ALGORITHMS]
    contestants += baselines(scene, collective, buffers, group.rank, groups)
    runs: dict[str, list[NDArray[np.float64]]] = {contestant.name: [] for contestant in contestants}
    most = dict.fromkeys(runs, options.iterations)
    number = 0
    for iteration in range(1 + options.iterations):
        gc.collect()
        for contestant in contestants:
            if iteration > most[contestant.name]:
                continue
            number += 1
            _watch(options.timeout_s)
            seen = _run(group, contestant, buffers, number, options.ranks_per_host)
            runs[contestant.name].append(seen)
            if iteration == 0 and contestant.name != OURS:
                fitting = int(_SPAN_S / seen[:, 0].max())
                most[contestant.name] = min(options.iterations, max(1, fitting))
    host_of = group.topology.node_of
    plan = contestants[0].plan
    return [
        Row.of(scene, collective, contestant, plan.bound_s, host_of, np.stack(runs[contestant.name]))
        for contestant in contestants
    ]


def _run(
    group: sc.Group, contestant: Contestant, buffers: Buffers, number: int, ranks_per_host: int
) -> NDArray[np.float64]:
    """One execution as all ranks have seen it: ``[world_size, len(Row.SEEN)]``."""
    buffers.fill(number)
    contestant.prepare()
    group.barrier()
    wire, before = _wire_bytes(), group.stats()
    group.barrier()
    begin_s = time.perf_counter()
    contestant.run()
    elapsed_s = time.perf_counter() - begin_s
    moved = group.stats().since(before)
    contestant.finish()
    wrong = buffers.count_wrong(number)
    group.barrier()
    # One rank of a host speaks for its link.
    wire = _wire_bytes() - wire if group.rank % ranks_per_host == 0 else 0
    mine = np.array([elapsed_s, wrong, moved.sent_bytes, moved.received_bytes, wire], np.float64)
    return np.stack([np.frombuffer(each) for each in group.exchange(mine.tobytes(), "bench")])


def _wire_bytes() -> int:
    """What this host has sent over its link so far."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _watch(timeout_s: float | None) -> None:
    """Ends this process with the stacks of its threads if what follows takes longer; Gloo may hang."""
    faulthandler.cancel_dump_traceback_later()
    if timeout_s is not None:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=_STDERR)


def _die_with_launcher(options: Options) -> None:
    """Also when the launcher is killed and can end nobody."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != options.launcher:
        raise SystemExit("the launcher has ended")
