"""What one rank does: every contestant on every scene in turn, timed and checked."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import sparsecoll as sc
from bench.cluster.baselines import Subgroups, baselines
from bench.cluster.buffers import Buffers
from bench.cluster.contestants import ALGORITHMS, OURS, Contestant, Ours
from bench.cluster.hosts import INTERFACE
from bench.cluster.leash import end_with, limited
from bench.cluster.options import Options
from bench.cluster.placements import Scene
from bench.cluster.rows import Row

__all__ = ["measure_all"]

COLLECTIVES = ("ag", "rs")

# Ours gets all timed iterations, another contestant as many as fit. Where not even one fits, the first execution is
# timed, which is for warming up else. So a run ends in a minute or two.
_SPAN_S = 1.0

# The library gives up after the timeout and says on what. Whatever else hangs is ended here, that much later.
_PATIENCE = 1.25


def measure_all(options: Options, report: Callable[[Row], None]) -> None:
    """Measures all rows; rank 0 hands each to ``report`` as it comes."""
    end_with(options.launcher)
    torch.set_num_threads(1)
    # As in timeit: a collection that happens to fall into a timed span says nothing about what is timed.
    gc.disable()
    gc.freeze()  # what the imports have left would take 0.1 s of each collection between the runs
    with _limited("init_group", options):
        group = sc.init_group("torch", timeout_s=options.timeout_s, topology=options.topology)
    with group:
        for scene in options.scenes:
            with _limited("new_group", options):
                groups = Subgroups(scene)
            for collective in COLLECTIVES:
                for row in _measure(group, scene, collective, groups, options):
                    if group.rank == 0:
                        report(row)
            group.barrier()  # a rank that leaves a process group breaks it for those that are still in it
            groups.close(group.rank)


def _measure(group: sc.Group, scene: Scene, collective: str, groups: Subgroups, options: Options) -> Sequence[Row]:
    buffers = Buffers(scene, collective, group.rank)
    ours = [Ours(group, scene, collective, buffers, name) for name in ALGORITHMS]
    contestants = [*ours, *baselines(scene, collective, buffers, group.rank, groups)]
    runs: dict[str, list[NDArray[np.float64]]] = {contestant.name: [] for contestant in contestants}
    most = dict.fromkeys(runs, options.iterations)
    number = 0
    for iteration in range(1 + options.iterations):
        gc.collect()
        for contestant in contestants:
            if iteration > most[contestant.name]:
                continue
            number += 1
            with _limited(f"{scene.name} {collective} {contestant.name}", options):
                seen = _run(group, contestant, buffers, number, options.ranks_per_host)
            runs[contestant.name].append(seen)
            if iteration == 0 and contestant.name != OURS:
                most[contestant.name] = min(options.iterations, int(_SPAN_S / seen[:, 0].max()))
    host_of = group.topology.node_of
    bound_s = ours[0].plan.bound_s
    return [
        Row.of(scene, collective, contestant, bound_s, host_of, np.stack(runs[contestant.name]))
        for contestant in contestants
    ]


def _run(
    group: sc.Group, contestant: Contestant, buffers: Buffers, number: int, ranks_per_host: int
) -> NDArray[np.float64]:
    """One execution as all ranks have seen it: ``[world_size, 5]``, as `Row.of` wants it."""
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


def _limited(what: str, options: Options) -> AbstractContextManager[None]:
    return limited(what, options.timeout_s * _PATIENCE)
