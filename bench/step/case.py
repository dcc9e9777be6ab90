"""``python -m bench step``: a training step of one model, from the same weights and tokens, by every way to train it.

Ways are FSSDP with each balancer, expert parallelism written by hand, torch's FSDP2 and DDP, and as the ideal expert
parallelism whose router happens to balance perfectly. They take turns iteration by iteration on the same ranks, and
their outputs and gradients are compared in the same run. Where tokens go is not left to an untrained router, but drawn
by Zipf's law, exactly balanced, or replayed from a model that has been trained without an auxiliary loss.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sparsecoll as sc
from bench.launch import run_ranks
from bench.report import write_record
from bench.step.cluster import measure_on_host, run_on_hosts
from bench.step.options import LAUNCHED, Options, parse
from bench.step.report import now, print_footer, print_header, print_rows, print_tables, record
from bench.step.rows import Row, read_rows, write_rows
from bench.step.traces import Trace, load_trace, save_trace

__all__ = ["run"]


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Starts the ranks over one back end after the other, or is one of them; or records a routing.

    Raises:
        InvalidArgument: the recorded routing cannot be read, or does not fit the model.
        BackendUnavailable: hosts were asked for, and this machine cannot make any.
    """
    options = parse(arguments)
    if options.recorded_to is not None:
        return _record_routing(options, options.recorded_to)
    trace = _trace(options)
    if options.launcher is not None:
        return _run_rank(options, trace)
    return _run_all(options, trace)


def _run_all(options: Options, trace: Trace | None) -> dict[str, Any]:
    start_time = now()
    print_header(options, None if trace is None else trace.origin)
    rows: list[Row] = []
    errors: list[str] = []
    of_hosts: dict[str, Any] = {}
    if options.on_cluster:
        seen = run_on_hosts(options)
        rows, errors = seen.rows, [] if seen.problem is None else [seen.problem]
        of_hosts = {"choice": seen.choice, "dropped_packets": seen.dropped_packets}
        chosen = {key: seen.choice[key] for key in ("length", "tokens") if key in seen.choice}
        options = replace(options, sizes=replace(options.sizes, **chosen))
    else:
        for backend in options.backends:
            try:
                status, more = _run_over(backend, options)
            except sc.BackendUnavailable as error:
                errors.append(f"{backend}: {error}")
                continue
            rows += more
            if status or not more:
                errors.append(f"{backend}: {options.ranks} ranks ended with status {status}")
    print_tables(rows)
    found = record(options, rows, errors, start_time) | of_hosts
    if options.output is not None:
        write_record(found, options.output)
        _draw(rows, found, options.output.with_suffix(".png"))
    print_footer(found)
    return found


def _run_over(backend: str, options: Options) -> tuple[int, list[Row]]:
    """Runs ranks to their end; returns their status, and the rows that they have measured until then."""
    with tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as folder:
        output = Path(folder, "rows.jsonl")
        status = run_ranks(
            backend, options.ranks, ["step", *options.arguments, LAUNCHED, str(os.getpid()), "--json", str(output)]
        )
        return status, read_rows(output)


def _run_rank(options: Options, trace: Trace | None) -> dict[str, Any]:
    from bench.step.contest import measure, settle  # loads torch, which takes a second

    output = options.output
    assert output is not None

    def report(rows: list[Row]) -> None:
        print_rows(rows)
        write_rows(rows, output)

    if options.on_cluster:
        measure_on_host(options, trace, report)
        return {"passed": True}
    settle()
    with sc.init_group() as group:
        measure(group, options, trace, report)
    return {"passed": True}


def _trace(options: Options) -> Trace | None:
    if "recorded" not in options.routings:
        return None
    sizes = options.sizes
    trace = load_trace(options.trace, sizes.experts)
    trace.check_fits(sizes.layers, sizes.experts, sizes.top_k)
    return trace


def _record_routing(options: Options, path: Path) -> dict[str, Any]:
    from bench.step.record import record_routing

    trace = record_routing(options.sizes, options.train_steps, options.seed)
    save_trace(trace, path)
    print(f"# wrote {path}: {trace.origin}")
    return {"passed": True}


def _draw(rows: Sequence[Row], found: dict[str, Any], path: Path) -> None:
    if not rows:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print('bench: expected matplotlib for the chart, try pip install "sparsecoll[bench]"', file=sys.stderr)
        return
    from bench.step.chart import draw_chart

    draw_chart(rows, f"{found['command']} on {found['machine']['cpu']}, commit {found['commit']}", path)
    print(f"# wrote {path}")
