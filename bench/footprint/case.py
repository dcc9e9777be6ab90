"""``python -m bench memory``: how many bytes a rank of FSSDP takes in training, beside plain expert parallelism.

Ranks are threads, each of which counts the tensors that it allocates (`bench.footprint.ledger`) and the staging memory
of its group; the figure is the most that was alive at once in steps after a warm-up, on the rank that has most. A
balancer copies the ten busiest of 64 experts to all ranks, other experts in every step. Losses are compared in the same
run, and counted bytes with those that FSSDP reports. A second, smaller training goes on for 1,000 steps, and must not
grow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import sparsecoll as sc
from bench.footprint.contest import run_contest
from bench.footprint.growth import measure_growth
from bench.footprint.report import print_footer, print_growth, print_header, print_row
from bench.machine import commit, describe
from bench.report import write_record

__all__ = ["run"]


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Trains all contestants one after the other, then for growth."""
    options = _parser().parse_args(list(arguments))
    torch.set_num_threads(1)
    print_header(options)
    rows = []
    for row in run_contest(options):
        rows.append(row)
        print_row(row)
    growth = measure_growth(options.steps)
    print_growth(growth, options.steps)
    record = {
        "case": "memory",
        "command": " ".join(["python -m bench memory", *arguments]),
        "passed": growth.right and all(row.right for row in rows),
        "summary": {
            **{f"{row.contestant}_over_ep": row.over_ep for row in rows[1:]},
            f"growth_bytes_{options.steps}_steps": growth.growth_bytes,
        },
        "config": {key: value for key, value in vars(options).items() if key != "json"},
        "results": [asdict(row) for row in rows],
        "growth": growth._asdict(),
        "world_size": options.ranks,
        "version": sc.__version__,
        "machine": describe(),
        "commit": commit(),
    }
    print_footer(record)
    if options.json is not None:
        write_record(record, options.json)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench memory", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=32)
    add("--layers", type=int, default=12)
    add("--experts", type=int, default=64, help="of each layer, over all ranks")
    add("--most", type=int, default=10, help="experts that are copied to all ranks")
    add("--width", type=int, default=48)
    add("--hidden", type=int, default=512)
    add("--tokens", type=int, default=1, help="on each rank; few, as nothing is said here about activations")
    add("--steps", type=int, default=1000, help="of the training that must not grow")
    add("-n", "--iters", type=int, default=2, help="steps in which the peak is looked for")
    add("-w", "--warmup_iters", type=int, default=2, help="steps before them")
    add("-J", "--json", type=Path, metavar="FILE", help="record in JSON")
    return parser
