"""What the case prints and records."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sparsecoll as sc
from bench.cluster.rate import link_of
from bench.machine import commit, describe
from bench.step.figures import best_balancers, summarize, summarize_hiding, times_of
from bench.step.options import DDP, EP, FSDP2, IDEAL, Options
from bench.step.rows import TOLERANCE, Row

__all__ = ["label", "now", "print_footer", "print_header", "print_rows", "print_tables", "record"]

_LABELS = {EP: "EP", IDEAL: "ideal", FSDP2: "FSDP2", DDP: "DDP"}
_BACKENDS = {"torch": "gloo", "mpi": "mpi"}
_COLUMNS = {
    "backend": 8,
    "part": 5,
    "routing": 8,
    "contestant": 12,
    "iters": 5,
    "time": 8,
    "p5": 8,
    "p95": 8,
    "EP/x": 6,
    "x/ideal": 7,
    "imbal": 6,
    "sparse": 10,
    "exposed": 8,
    "alone": 8,
    "diff": 8,
}
_UNITS = dict.fromkeys(("time", "p5", "p95", "exposed", "alone"), "(ms)") | {"sparse": "(B)"}
_MILLI = 1e3


def label(contestant: str) -> str:
    """A contestant as readers see it."""
    return _LABELS.get(contestant, f"FSSDP {contestant}")


def print_header(options: Options, origin: str | None) -> None:
    """Everything that the table depends on.

    Args:
        origin: of the recorded routing, if it is replayed.
    """
    found, sizes = describe(), options.sizes
    length = "of a length that ranks choose" if options.chooses_length else f"of {sizes.length} tokens"
    lines = [
        f"sparsecoll {sc.__version__}, commit {commit() or 'unknown'}",
        f"torch {found['torch']}, mpi4py {found['mpi4py']}, Python {found['python']}, NumPy {found['numpy']}",
        f"{options.ranks} ranks, one thread each, on {found['usable_cores']} usable cores of {found['cpu']}",
        f"{sizes.layers} layers of {sizes.experts} experts, top-{sizes.top_k}, width {sizes.width}, "
        f"hidden {sizes.hidden}, {sizes.tokens} tokens on each rank in sequences {length}, float32",
        "block: the MoE layers, forward and backward",
        "step: a language model around them (embedding, causal attention, norms, head, loss) and AdamW, all of a step",
        "EP: expert parallelism by hand over the back end's own collectives; ideal: the same under balanced routing",
        f"iters: {options.iterations} after {options.warmup} untimed; all take turns; slices, FSDP2 and DDP, which "
        f"move most, in one of {options.every} iterations",
        "time: median of the slowest rank's; imbal: assignments of the busiest rank over the mean, as computed",
        "sparse: sent for replicas and their gradients; exposed: how long ranks waited for them, mean",
        "alone: what the sparse collectives take with nothing else to do",
        f"diff: largest relative difference of outputs and gradients to EP's, at most {TOLERANCE:g}",
        f"seed: {options.seed}",
        f"Command: {options.command}",
    ]
    if options.rate_bits_per_s is not None:
        rate, payload = options.rate_bits_per_s / 1e6, link_of(options.rate_bits_per_s).bandwidth_bytes_per_s / 1e6
        lines.insert(
            3, f"on a host each, with links of {rate:g} Mbit/s in each direction, {payload:.1f} MB/s of payload"
        )
    if origin is not None:
        lines.insert(-2, f"recorded: {origin}")
    for line in lines:
        _say(f"# {line}")
    _say("#" + _join({name: name for name in _COLUMNS})[1:])
    _say("#" + _join({name: _UNITS.get(name, "") for name in _COLUMNS})[1:])


def print_rows(rows: Sequence[Row]) -> None:
    """The rows of one part and routing."""
    (times,) = times_of(rows).values()
    for row in rows:
        result = row.record()
        cells = {
            "backend": _BACKENDS[row.backend],
            "part": row.part,
            "routing": row.routing,
            "contestant": row.contestant,
            "iters": str(len(row.times_s)),
            "time": f"{row.time_s * _MILLI:.1f}",
            "p5": f"{result['p5_s'] * _MILLI:.1f}",
            "p95": f"{result['p95_s'] * _MILLI:.1f}",
            "EP/x": f"{times[EP] / row.time_s:.3f}",
            "x/ideal": f"{row.time_s / times[IDEAL]:.3f}",
            "imbal": "-" if row.imbalance is None else f"{row.imbalance:.3f}",
            "sparse": "-" if row.sparse_bytes is None else f"{row.sparse_bytes:.0f}",
            "exposed": "-" if row.exposed_s is None else f"{row.exposed_s * _MILLI:.1f}",
            "alone": "-" if row.alone_s is None else f"{row.alone_s * _MILLI:.1f}",
            "diff": f"{max(row.differences.values()):.1e}" if row.differences else "-",
        }
        _say(_join(cells))


def print_tables(rows: Sequence[Row]) -> None:
    """A table for each back end and part: what a step takes, EP's time over it, and it over the ideal's."""
    contests = times_of(rows)
    for backend, part in dict.fromkeys((row.backend, row.part) for row in rows):
        routings = {key[2]: times for key, times in contests.items() if key[:2] == (backend, part)}
        _say(f"# {part} over {_BACKENDS[backend]}: ms, EP/x, x/ideal")
        _say("# " + "contestant".ljust(18) + "".join(routing.rjust(24) for routing in routings))
        for name in next(iter(routings.values())):
            cells = [
                f"{times[name] * _MILLI:.1f} {times[EP] / times[name]:.3f} {times[name] / times[IDEAL]:.3f}".rjust(24)
                for times in routings.values()
            ]
            _say("# " + label(name).ljust(18) + "".join(cells))


def print_footer(found: Mapping[str, Any]) -> None:
    """The summary of a `record`, without the figures of single balancers, which the tables have."""
    for name, value in found["summary"].items():
        if not any(f"_{balancer}" in name for balancer in found["config"]["balancers"]):
            _say(f"# {name} {value:.3f}")
    for error in found["errors"]:
        _say(f"# {error}")
    _say(f"# {'OK' if found['passed'] else 'FAILED'}")


def record(options: Options, rows: Sequence[Row], errors: Sequence[str], start_time: str) -> dict[str, Any]:
    """The JSON of the case; without rows, or with errors, nothing has passed."""
    sizes = options.sizes
    return {
        "case": "step",
        "command": options.command,
        "passed": bool(rows) and not errors and all(row.is_right for row in rows),
        "summary": summarize(rows) | (summarize_hiding(rows) if options.on_cluster else {}),
        "best": best_balancers(rows),
        "version": sc.__version__,
        "commit": commit(),
        "seed": options.seed,
        "world_size": options.ranks,
        "start_time": start_time,
        "end_time": now(),
        "machine": describe(),
        "config": {
            **asdict(sizes),
            "backends": list(options.backends),
            "parts": list(options.parts),
            "routings": list(options.routings),
            "balancers": list(options.balancers),
            "iterations": options.iterations,
            "warmup_iters": options.warmup,
            "every": options.every,
            "trace": options.trace.name,
            "tolerance": TOLERANCE,
            "rate_bits_per_s": options.rate_bits_per_s,
            **options.fssdp,
        },
        "results": [row.record() for row in rows],
        "errors": list(errors),
    }


def now() -> str:
    """For a record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _join(cells: Mapping[str, str]) -> str:
    return " ".join(cells[name].rjust(width) for name, width in _COLUMNS.items())


def _say(line: str) -> None:
    print(line, flush=True)
