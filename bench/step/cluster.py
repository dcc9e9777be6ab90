"""The case on emulated hosts, whose links are slow: `bench.cluster.hosts`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import sparsecoll as sc
from bench.cluster.hosts import Hosts
from bench.cluster.launch import RankFailed, run_ranks
from bench.cluster.leash import end_with, limited
from bench.cluster.rate import topology_of
from bench.cluster.signals import terminable
from bench.step.options import LAUNCHED, Options
from bench.step.rows import Row, read_rows
from bench.step.traces import Trace

__all__ = ["Found", "measure_on_host", "run_on_hosts"]


class Found(NamedTuple):
    """What ranks on hosts have left.

    Attributes:
        choice: fields of `bench.step.attention.Choice`; empty where the length was given.
        problem: why ranks ended early, or None.
    """

    rows: list[Row]
    choice: dict[str, Any]
    dropped_packets: int
    problem: str | None


def run_on_hosts(options: Options) -> Found:
    """Makes the hosts and runs one rank on each.

    Raises:
        BackendUnavailable: this machine cannot make hosts.
    """
    problem = None
    with (
        terminable(),
        tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as name,
        Hosts(options.ranks, options.rate_bits_per_s) as hosts,
    ):
        folder = Path(name)
        output = folder / "rows.jsonl"
        command = ["-m", "bench", "step", *options.arguments, LAUNCHED, str(os.getpid()), "--json", str(output)]
        try:
            run_ranks(hosts, 1, command, folder)
        except RankFailed as error:
            problem = str(error)
        chosen = _choice_file(output)
        return Found(
            rows=read_rows(output),
            choice=json.loads(chosen.read_text()) if chosen.exists() else {},
            dropped_packets=hosts.dropped_packets(),
            problem=problem,
        )


def measure_on_host(options: Options, trace: Trace | None, report: Callable[[list[Row]], None]) -> None:
    """What each rank does: chooses a length, if none was given, and measures."""
    from bench.step.attention import choose_length
    from bench.step.contest import measure, settle

    assert options.output is not None
    end_with(options.launcher)
    settle()
    topology = topology_of(options.ranks, 1, options.rate_bits_per_s)
    with limited("init_group", options.timeout_s):
        group = sc.init_group("torch", timeout_s=options.timeout_s, topology=topology)
    with group:
        if options.chooses_length:
            choice = choose_length(group, options.sizes)
            options = replace(options, sizes=choice.applied(options.sizes))
            if group.rank == 0:
                print(f"# {choice}", flush=True)
                _choice_file(options.output).write_text(json.dumps(choice._asdict()))
        measure(group, options, trace, report)
        group.barrier()  # a rank that leaves breaks the process group for those that are still in it


def _choice_file(output: Path) -> Path:
    return output.with_suffix(".choice")
