"""What balancers make of recorded and drawn routings: how level ranks get, what is copied, what the layer takes.

Balancers that are not exact are asked with predicted loads, the others with the true ones; all are judged on the true
ones. Where a balancer leaves open what each holder takes, it is judged twice: with tokens at the nearest holder, and
divided by quota. A layer's time is predicted from given costs, with what is seen of the copies; the ideal is the time
of plain expert parallelism under a router that sends every expert the same number of tokens from every rank. Balancers
may beat it, for copies spare tokens the way.

In the same run every answer is held to what it must keep: owners, memory, and each token computed once by a holder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sparsecoll as sc
from bench.balance.contest import PREDICTORS, WINDOW, Prediction, Result, compare_balancers, compare_predictors
from bench.balance.settings import SETTINGS, Setting, drawn, recorded
from bench.balance.tables import HEADER, line, tables
from bench.machine import commit, describe
from bench.report import write_record
from bench.step.options import RECORDED
from bench.step.traces import Trace, load_trace
from sparsecoll.balance import Loads

__all__ = ["run"]


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Asks all balancers and predictors, prints tables, and writes ``--json``.

    Args:
        arguments: command line without the case's name.

    Returns:
        The record, as in the JSON file.
    """
    options = _parser().parse_args(list(arguments))
    trace = load_trace(RECORDED, SETTINGS[0].num_experts)
    command = " ".join(["python -m bench balance", *arguments])
    print(f"# sparsecoll {sc.__version__}, commit {commit() or 'unknown'}")
    print(f"# Case: balance, command: {command}")
    print(f"# Recorded: {trace.origin}")
    results, predictions = list(_balance(trace, options)), list(_predict(trace))
    record = {
        "case": "balance",
        "command": command,
        "passed": all(each.right for each in results),
        "summary": _summary(results, predictions),
        "results": [asdict(each) for each in results],
        "predictions": [asdict(each) for each in predictions],
        "settings": [each.describe() for each in SETTINGS],
        "recorded": trace.origin,
        "iterations": options.iters,
        "seed": options.seed,
        "machine": describe(),
        "commit": commit(),
    }
    for table in tables(record).values():
        print(f"\n{table}")
    print()
    for name, value in record["summary"].items():
        print(f"# {name}: {value:.4g}")
    print(f"# answers of balancers sound: {'OK' if record['passed'] else 'FAILED'}")
    if options.json is not None:
        write_record(record, options.json)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench balance", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "-n", "--iters", type=_positive, default=10, metavar="N", help="judged forwards of drawn routings; default 10"
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn routings")
    parser.add_argument("-J", "--json", type=Path, metavar="FILE", help="file for the record")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _balance(trace: Trace, options: argparse.Namespace) -> Iterator[Result]:
    print("# copies: the most that a rank receives; MB: on all ranks; leave: tokens; time, seen: over the ideal")
    for setting in SETTINGS:
        print(HEADER)
        num_forwards = WINDOW + options.iters
        routings = [(each, drawn(setting, each, num_forwards, options.seed)) for each in setting.draws]
        for routing, series in (*_recorded(setting, trace), *routings):
            for result in compare_balancers(setting, routing, series):
                print(line(result), flush=True)
                yield result


def _predict(trace: Trace) -> Iterator[Prediction]:
    for setting in SETTINGS:
        for routing, series in _recorded(setting, trace):
            yield from compare_predictors(setting, routing, series)


def _recorded(setting: Setting, trace: Trace) -> list[tuple[str, list[Loads]]]:
    if not setting.replays:
        return []
    return [(f"recorded{layer}", recorded(setting, trace, layer)) for layer in range(trace.expert_ids.shape[1])]


def _summary(results: Sequence[Result], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Of each balancer its worst routing of a setting, tokens at nearest holders; of each predictor its errors."""
    summary: dict[str, float] = {}
    for result in results:
        if result.spread == "nearest":
            name = f"{result.setting}_{result.balancer}_over_ideal_max"
            summary[name] = max(summary.get(name, 0.0), result.over_ideal)
    for each in predictions:
        # Errors by expert are the same on any number of ranks.
        if each.predictor in PREDICTORS:
            summary[f"{each.routing}_{each.predictor}_error_{each.ahead}"] = each.by_expert
    return summary
