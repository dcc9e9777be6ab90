"""Plans' predicted times over the time that no schedule can beat, on random cases.

Flat: all ranks reach each other alike. The optimum of fluid schedules among holders is known exactly there; it knows no
latency and no pipeline to fill, which the predicted times have to pay. Division is how evenly a plan (on one level, a
relayed one) shares the bytes alone: the time of its busiest port over the optimum. Two levels: ranks on nodes, against
the linear programme where that is small enough and against the bound elsewhere. Beside each stands the ratio to the
universal bound, which holds for any schedule and not only for those in which holders carry the chunks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sparsecoll as sc
from bench.bound.draw import FLAT_LINKS, TWO_LEVEL_LINKS
from bench.bound.outcome import flat_outcomes, two_level_outcomes
from bench.bound.tables import described, print_table, rows, summary, worst
from bench.machine import commit, describe
from bench.report import write_record

__all__ = ["run"]


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Plans every case, prints the tables, and writes ``--json``.

    Args:
        arguments: command line without the case's name.

    Returns:
        The record, as in the JSON file.
    """
    options = _parser().parse_args(list(arguments))
    started_s = time.perf_counter()
    _print_header(arguments, options)
    flat = print_table(flat_outcomes(options.seed, options.cases), "flat, over the optimum among holders")
    nodes = print_table(
        two_level_outcomes(options.seed, options.two_level_cases),
        "nodes, over the linear programme where it is small, else over the bound",
    )
    counts = {"num_cases": options.cases, "num_two_level_cases": options.two_level_cases}
    record = {
        "case": "bound",
        "command": " ".join(["python -m bench bound", *arguments]),
        "passed": all(each.right for each in flat + nodes),
        "summary": {**summary(flat, nodes), **counts},
        "results": rows(flat) + rows(nodes),
        "worst": worst(flat) + worst(nodes),
        "wrong": [described(each) for each in flat + nodes if not each.right],
        "num_programmes": sum(each.is_optimum for each in nodes),
        "bound_is_optimum": sum(each.is_optimum and each.bound_over_reference >= 1 - 1e-6 for each in nodes),
        "links": {name: _links(links) for name, links in {**FLAT_LINKS, **TWO_LEVEL_LINKS}.items()},
        "seed": options.seed,
        "time_s": time.perf_counter() - started_s,
        "machine": describe(),
        "commit": commit(),
    }
    _print_footer(record)
    if options.json is not None:
        write_record(record, options.json)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench bound", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cases", type=_positive, default=1000, metavar="N", help="flat cases; default 1000")
    parser.add_argument("--two-level-cases", type=_positive, default=300, metavar="N", help="on nodes; default 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-J", "--json", type=Path, metavar="FILE", help="file for the record")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _links(links: sc.Link | tuple[sc.Link | None, ...]) -> Any:
    return asdict(links) if isinstance(links, sc.Link) else [None if link is None else asdict(link) for link in links]


def _print_header(arguments: Sequence[str], options: argparse.Namespace) -> None:
    print(f"# sparsecoll {sc.__version__}, commit {commit() or 'unknown'}")
    print(f"# Case: bound, command: {' '.join(['python -m bench bound', *arguments])}")
    print(f"# {options.cases} flat cases and {options.two_level_cases} on nodes, seed {options.seed}")
    print("# Ratios: predicted time, with latency and pipeline, over a reference without either.")
    print("# p50, p99: by nearest rank; univ99: p99 over the bound for any schedule; division: bytes alone, the worst.")


def _print_footer(record: Mapping[str, Any]) -> None:
    for each in record["worst"]:
        which = " ".join(str(each[name]) for name in ("number", "links", "pattern", "op", "algorithm"))
        print(
            f"# worst {each['over_reference']:.3f}: case {which}, {each['world_size']} ranks, "
            f"{each['num_nodes']} nodes, {each['num_chunks']} chunks, {each['moved_bytes']} bytes, "
            f"{each['predicted_s'] * 1e6:.1f} us"
        )
    optima = f"{record['bound_is_optimum']} of {record['num_programmes']}"
    print(f"# bound equal to the programme in {optima} plans on nodes")
    for name, value in record["summary"].items():
        print(f"# {name}: {value:.6g}")
    print(f"# {record['time_s']:.0f} s, {'OK' if record['passed'] else 'FAILED'}")
