"""Measures a collective on the ranks of a group: ours, the library's and a copy in turn, checked in the same run."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench import launch, traffic
from bench.arguments import DTYPES, Options, parse
from bench.memory import memory_of
from bench.report import Report, Row, write_record
from bench.trial import Setting, Trial
from bench.values import poison

__all__ = ["run_case"]

_DEVICE_BYTES, _HOST_LENGTH = 256, 64
_STDERR = 2


def run_case(trial: type[Trial], arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a case under the launcher that started this process, or starts ranks for it.

    Args:
        arguments: command line without the case's name.

    Returns:
        The record; complete on rank 0, and on every rank with ``passed``.

    Raises:
        InvalidArgument: flags that do not fit together, or the launcher.
    """
    options = parse(trial.case, trial.ops, trial.skews, trial.is_sparse, arguments)
    # Before anything imports mpi4py: sparsecoll starts MPI with better settings than MPI's own.
    group = sc.init_group(options.backends[0] if options.launched else "auto", timeout_s=options.timeout_s)
    # On a machine with a GPU a process that nobody has launched is a world of one as well.
    if group.backend == "local" or (group.backend, group.world_size, options.launched) == ("nccl", 1, False):
        group.close()
        return launch.run_all(options, lambda local: _measure_all(local, trial, options))
    with group:
        _check_launcher(group, options)
        record = _measure_all(group, trial, options)
        if group.rank == 0 and options.output is not None:
            write_record(record, options.output)
    return record


def _check_launcher(group: sc.Group, options: Options) -> None:
    if options.backends not in ((), (group.backend,)):
        raise sc.InvalidArgument(
            f"--backend: expected {group.backend} (as the launcher that started this rank), got "
            f"{','.join(options.backends)}"
        )
    if options.ranks not in (None, group.world_size):
        raise sc.InvalidArgument(f"--ranks: expected {group.world_size} (as the launcher started), got {options.ranks}")


def _measure_all(group: sc.Group, trial: type[Trial], options: Options) -> dict[str, Any]:
    """Every row of the table; collective."""
    settings = list(_settings(group, trial, options))
    devices = _devices(group)
    report = Report(options, group, devices) if group.rank == 0 else None
    num_wrong = 0
    try:
        for dtype, setting in settings:
            _watch(group, options.timeout_s)
            row = _measure(group, trial(group, setting), dtype, setting, options)
            num_wrong += row.num_wrong or 0
            if report is not None:
                report.add(row)
    finally:
        _watch(group, None)
    return {"passed": num_wrong == 0} if report is None else report.end()


def _watch(group: sc.Group, timeout_s: float | None) -> None:
    """Ends this process with the stacks of its threads if a row takes longer; a library's collective may hang."""
    if group.backend == "local" and group.rank != 0:
        return
    faulthandler.cancel_dump_traceback_later()
    if timeout_s is not None:
        # The descriptor, as what stands for sys.stderr under a test or in a notebook may have none.
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=_STDERR)


def _settings(group: sc.Group, trial: type[Trial], options: Options) -> Iterator[tuple[str, Setting]]:
    """What to measure, in the table's order, with nccl-tests' name of the element type."""
    world_size = group.world_size
    ranks_on_node = max(np.bincount(group.topology.node_of).tolist())
    cold_bytes = memory_of(group).cold_bytes(ranks_on_node)
    given = None if options.matrix is None else traffic.read_traffic(options.matrix, world_size)
    sizes = options.sizes if given is None else (int(given.sum(axis=1).max()),)
    combinations = [
        (op, dtype) for op in options.ops for dtype in options.dtypes if op != "mean" or "int" not in DTYPES[dtype]
    ]
    if not combinations:
        raise sc.InvalidArgument(f"-o: expected sum for {options.dtypes[0]}, got mean, which is for floats")
    for op, dtype in combinations:
        for size_bytes in sizes:
            matrix = given
            if matrix is None and not trial.is_sparse:
                matrix = traffic.draw_traffic(options.skew, size_bytes, options.num_chunks, world_size, options.seed)
            setting = Setting(
                size_bytes=size_bytes,
                dtype=DTYPES[dtype],
                op=op,
                num_chunks=options.num_chunks,
                density=options.density,
                skew=options.skew,
                algorithm=options.algorithm,
                seed=options.seed,
                traffic=matrix,
                num_steps=options.num_steps,
                cold_bytes=cold_bytes,
            )
            yield dtype, setting


@dataclass
class _Tally:
    """What this rank has seen over the timed iterations of one row."""

    times_s: dict[str, list[float]]
    wire_bytes: int = 0
    num_wrong: int = 0
    num_wrong_dense: int = 0


def _measure(group: sc.Group, trial: Trial, dtype: str, setting: Setting, options: Options) -> Row:
    runs = {"ours": trial.run, "dense": trial.run_dense, "copy": trial.run_copy}
    if not trial.has_baseline:
        del runs["dense"]
    tally, memory = _Tally({name: [] for name in runs}), memory_of(group)
    for step in range(options.num_steps):
        is_timed = step > options.warmup
        for name, run in runs.items():
            if name in trial.outputs:
                poison(trial.outputs[name])
            before = group.stats()
            memory.settle()
            with _no_garbage_collection():
                group.barrier()
                elapsed_s = memory.time_s(partial(run, step))
            if is_timed:
                tally.times_s[name].append(elapsed_s)
                if name == "ours":
                    moved = group.stats().since(before)
                    tally.wire_bytes += max(moved.sent_bytes, moved.received_bytes)
        if step >= options.num_steps - options.checks:
            tally.num_wrong += trial.count_wrong(step)
            tally.num_wrong_dense += trial.count_wrong_dense(step) if trial.has_baseline else 0
    return _row(group, trial, dtype, setting, options, tally)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As in timeit: a collection that happens to fall into a timed span says nothing about what is timed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _row(group: sc.Group, trial: Trial, dtype: str, setting: Setting, options: Options, tally: _Tally) -> Row:
    """Puts together what all ranks have seen."""
    counts = _everyones(group, np.array([tally.wire_bytes, tally.num_wrong, tally.num_wrong_dense], np.int64))
    if counts[:, 2].any():
        raise RuntimeError(
            f"{trial.case}: expected right results from {trial.baseline}, got {counts[:, 2].sum()} wrong elements at "
            f"{trial.facts.size_bytes} bytes"
        )
    return Row(
        facts=trial.facts,
        dtype=dtype,
        op=setting.op,
        baseline=trial.baseline,
        times_s={name: _everyones(group, np.array(times)) for name, times in tally.times_s.items()},
        wire_bytes=round(int(counts[:, 0].max()) / options.iterations),
        num_wrong=int(counts[:, 1].sum()) if options.checks else None,
        traffic=setting.traffic,
    )


def _everyones(group: sc.Group, mine: NDArray[Any]) -> NDArray[Any]:
    """``[world_size, *mine.shape]``."""
    records = group.exchange(mine.tobytes(), "bench")
    return np.stack([np.frombuffer(record, mine.dtype) for record in records])


def _devices(group: sc.Group) -> list[dict[str, Any]]:
    """Where every rank runs; collective."""
    mine = {"rank": group.rank, "group": 0, "pid": os.getpid(), "hostname": socket.gethostname()[:_HOST_LENGTH]}
    device = {"device": group.rank, **memory_of(group).describe()}
    records = group.exchange(json.dumps({**mine, **device}).encode().ljust(_DEVICE_BYTES), "bench")
    return [json.loads(record) for record in records]
