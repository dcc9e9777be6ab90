"""What the case prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import sparsecoll as sc
from bench.footprint.contest import Row
from bench.footprint.growth import Growth
from bench.footprint.training import KINDS
from bench.machine import commit, describe

__all__ = ["print_footer", "print_growth", "print_header", "print_row"]

_COLUMNS = {"contestant": 12, "rank": 4, "peak": 12, "/EP": 6, "/params": 7} | dict.fromkeys(KINDS, 11) | {"diff": 8}
_UNITS = {"peak": "(B)"} | dict.fromkeys(KINDS, "(B)")


def print_header(options: argparse.Namespace) -> None:
    """Everything that the table depends on."""
    found = describe()
    _say(f"# sparsecoll {sc.__version__}, commit {commit() or 'unknown'}")
    _say(f"# torch {found['torch']}, Python {found['python']}, NumPy {found['numpy']}")
    _say(
        f"# {options.ranks} ranks, threads of one process; {options.layers} layers of {options.experts} experts, the "
        f"{options.most} busiest on all ranks; width {options.width}, hidden {options.hidden}, {options.tokens} tokens "
        "on each rank, top-2"
    )
    _say("# bfloat16; AdamW with master weights in float32: parameters, gradients and state are 8 times the parameters")
    _say(f"# peak of {options.iters} steps after {options.warmup_iters}, on the rank that has most; ep: no replicas")
    _say("# replicas: copies and their gradients, and what is kept for the next ones; staging: of collectives")
    _say("#" + _join({name: name for name in _COLUMNS})[1:])
    _say("#" + _join({name: _UNITS.get(name, "") for name in _COLUMNS})[1:])


def print_row(row: Row) -> None:
    cells = {
        "contestant": row.contestant,
        "rank": str(row.rank),
        "peak": str(row.peak_bytes),
        "/EP": f"{row.over_ep:.3f}",
        "/params": f"{row.over_params:.2f}",
        **{kind: str(num_bytes) for kind, num_bytes in row.kinds.items()},
        "diff": f"{row.loss_rel_diff:.1e}",
    }
    _say(_join(cells) + ("" if row.right else "  WRONG"))
    for place, num_bytes in row.rest.items():
        _say(f"#   rest: {num_bytes:>9} {place}")


def print_growth(growth: Growth, num_steps: int) -> None:
    _say(
        f"# from step {num_steps // 10} to {num_steps} of a small training: {growth.growth_bytes} bytes more than "
        f"{growth.begin_bytes}, resident memory of the process {growth.rss_growth_bytes}"
        + ("" if growth.right else "  WRONG")
    )


def print_footer(record: Mapping[str, Any]) -> None:
    """The summary."""
    for name, value in record["summary"].items():
        _say(f"# {name} {value:.4g}")
    _say(f"# {'OK' if record['passed'] else 'FAILED'}")


def _join(cells: Mapping[str, str]) -> str:
    return " ".join(cells[name].rjust(width) for name, width in _COLUMNS.items())


def _say(line: str) -> None:
    print(line, flush=True)
