"""How long it takes to plan and to balance, natively and on one core, with nothing remembered from an earlier call.

Every call plans sizes that no call before it had, as ``sc.plan_all_gather(..., algorithm="auto")``: from the check of
the arguments to the complete table of transfers, and with the cache of plans full, so that each plan takes the place of
an older one. Not counted: the digest of the Placement, which is computed once for each and not for each plan, and what
a Plan computes only when it is asked (bytes, bounds, predictions). The last plan of each case is held against the
readable planner's, byte for byte. How balancers are timed is told in `bench.balancers`.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sparsecoll as sc
from bench.balancers import BalancerResult, time_balancers
from bench.machine import commit, describe
from bench.report import write_record

__all__ = ["run"]

_CHUNK_BYTES, _GRANULE_BYTES = 8 << 20, 64
_RANKS_PER_NODE = 8
_NUM_FILLING = 600  # more than the cache of plans keeps
_SUMMARY = {
    "256x64": ("plan_us_256x64", 1.0),
    "512x1024": ("plan_ms_512x1024", 1e-3),
    "256x64 all held": ("plan_us_256x64_all_held", 1.0),
    "256x64 on nodes": ("plan_us_256x64_nodes", 1.0),
    "512x1024 on nodes": ("plan_ms_512x1024_nodes", 1e-3),
}


class _Shape(NamedTuple):
    """One case: ``num_hot`` chunks that ``num_holders`` ranks each hold; owners are even.

    Attributes:
        series: rows of one series differ in ``num_hot`` only; none outside the sweep.
    """

    name: str
    num_chunks: int
    world_size: int
    num_hot: int
    num_holders: int
    per_node: int
    series: str | None = None

    def place(self, seed: int) -> sc.Placement:
        random = np.random.default_rng([seed, *self[1:6]])
        hot = random.choice(self.num_chunks, self.num_hot, replace=False).tolist()
        holders = {
            chunk: random.choice(self.world_size, self.num_holders, replace=False).tolist() for chunk in sorted(hot)
        }
        return sc.Placement.even(self.num_chunks, self.world_size).replicate(holders)

    @property
    def topology(self) -> sc.Topology:
        return sc.Topology(tuple(rank // self.per_node for rank in range(self.world_size)))


@dataclass(frozen=True)
class _Result:
    """One row; times are of single calls."""

    case: str
    series: str | None
    num_chunks: int
    world_size: int
    num_nodes: int
    num_hot: int
    deliveries: int
    algorithm: str
    transfers: int
    min_us: float
    median_us: float
    p95_us: float
    ns_per_delivery: float
    right: bool


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Times every case, prints the table, and writes ``--json``.

    Args:
        arguments: command line without the case's name.

    Returns:
        The record, as in the JSON file.
    """
    options = _parser().parse_args(list(arguments))
    command = " ".join(["python -m bench planner", *arguments])
    print(f"# sparsecoll {sc.__version__}, commit {commit() or 'unknown'}")
    print(f"# Case: planner, command: {command}")
    print(f"# {options.iters} calls of each case after {options.warmup_iters} untimed ones; every one plans anew")
    print("# The digest of the Placement is not counted; the cache of plans is full. Garbage collection is off.")
    print(f"# {'case':<24}{'deliveries':>11} {'algorithm':<13}{'rows':>7}{'min us':>9}{'median':>9}{'p95':>9}  ns/del")
    _fill_cache()
    results = list(_measure(options))
    print("# 256 experts on 64 ranks, Zipf 1.2: saved is the share of the layer's predicted time, copies not counted")
    print(f"# {'balancer':<24}{'replicas':>11} {'saved':<13}{'':>7}{'min us':>9}{'median':>9}{'p95':>9}")
    balanced = list(_measure_balancers(options))
    plans_are_right, answers_are_sound = all(each.right for each in results), all(each.right for each in balanced)
    record = {
        "case": "planner",
        "command": command,
        "passed": plans_are_right and answers_are_sound,
        "summary": {**_summary(results), **_balance_summary(balanced)},
        "results": [asdict(each) for each in results],
        "balancers": [asdict(each) for each in balanced],
        "iterations": options.iters,
        "seed": options.seed,
        "machine": describe(),
        "commit": commit(),
    }
    for name, value in record["summary"].items():
        print(f"# {name}: {value:.4g}")
    print(f"# equal to the readable planner's: {'OK' if plans_are_right else 'FAILED'}")
    print(f"# answers of balancers sound: {'OK' if answers_are_sound else 'FAILED'}")
    if options.json is not None:
        write_record(record, options.json)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench planner", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument("-n", "--iters", type=_positive, default=40, metavar="N", help="timed calls; default 40")
    parser.add_argument(
        "-w", "--warmup_iters", type=_positive, default=5, metavar="N", help="untimed calls before them"
    )
    parser.add_argument(
        "--most-ranks", type=_positive, default=1024, metavar="N", help="leaves out cases of more ranks"
    )
    parser.add_argument("--seed", type=int, default=0, help="which chunks are hot, and who holds them")
    parser.add_argument("-J", "--json", type=Path, metavar="FILE", help="file for the record")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _shapes() -> Iterator[_Shape]:
    for suffix, small, large in (("", 64, 1024), (" on nodes", _RANKS_PER_NODE, _RANKS_PER_NODE)):
        yield _Shape(f"256x64{suffix}", 256, 64, 32, 64, small)
        yield _Shape(f"256x64 all held{suffix}", 256, 64, 256, 64, small)
        yield _Shape(f"512x1024{suffix}", 512, 1024, 32, 64, large)
    for world_size in (64, 256, 1024):
        for suffix, per_node in (("", world_size), (" on nodes", _RANKS_PER_NODE)):
            series = f"512x{world_size}{suffix}"
            for num_hot in (8, 32, 128, 512):
                yield _Shape(f"{series}, {num_hot} hot", 512, world_size, num_hot, 64, per_node, series)


def _measure(options: argparse.Namespace) -> Iterator[_Result]:
    for shape in _shapes():
        if shape.world_size > options.most_ranks:
            continue
        result = _time(shape, options)
        print(
            f"  {result.case:<24}{result.deliveries:>11} {result.algorithm:<13}{result.transfers:>7}"
            f"{result.min_us:>9.0f}{result.median_us:>9.0f}{result.p95_us:>9.0f}{result.ns_per_delivery:>8.0f}"
            f"{'' if result.right else '  WRONG'}",
            flush=True,
        )
        yield result


def _measure_balancers(options: argparse.Namespace) -> Iterator[BalancerResult]:
    for result in time_balancers(options):
        print(
            f"  {result.balancer:<24}{result.replicas:>11.1f} {result.saved:<13.1%}{'':>7}"
            f"{result.min_us:>9.0f}{result.median_us:>9.0f}{result.p95_us:>9.0f}{'' if result.right else '  WRONG'}",
            flush=True,
        )
        yield result


def _fill_cache() -> None:
    shape = next(_shapes())
    place, topology, first_bytes = shape.place(0), shape.topology, _fresh_bytes()
    for number in range(_NUM_FILLING):
        sc.plan_all_gather(place, first_bytes + number * _GRANULE_BYTES, topology)


def _fresh_bytes() -> int:
    """A chunk size at which another run in this process has hardly begun."""
    return _CHUNK_BYTES + _GRANULE_BYTES * (time.perf_counter_ns() & 0xFFFF)


def _time(shape: _Shape, options: argparse.Namespace) -> _Result:
    place, topology, first_bytes = shape.place(options.seed), shape.topology, _fresh_bytes()
    times_s = []
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        for iteration in range(options.warmup_iters + options.iters):
            chunk_bytes = first_bytes + iteration * _GRANULE_BYTES
            begin_s = time.perf_counter()
            plan = sc.plan_all_gather(place, chunk_bytes, topology, algorithm="auto")
            times_s.append(time.perf_counter() - begin_s)
    finally:
        if is_collecting:
            gc.enable()
    low, median, p95 = np.quantile(times_s[options.warmup_iters :], [0.0, 0.5, 0.95]) * 1e6
    deliveries = int(place.holders.sum()) - place.num_chunks
    # On the sweep by the algorithm that was chosen, as the readable planner needs seconds for all of them.
    algorithm = "auto" if shape.series is None else plan.algorithm
    return _Result(
        case=shape.name,
        series=shape.series,
        num_chunks=shape.num_chunks,
        world_size=shape.world_size,
        num_nodes=topology.num_nodes,
        num_hot=shape.num_hot,
        deliveries=deliveries,
        algorithm=plan.algorithm,
        transfers=len(plan.transfers),
        min_us=float(low),
        median_us=float(median),
        p95_us=float(p95),
        ns_per_delivery=float(median) * 1e3 / deliveries,
        right=_is_right(plan, plan.redrafted(algorithm)),
    )


def _is_right(plan: sc.Plan, readable: sc.Plan) -> bool:
    same = plan.transfers.dtype == readable.transfers.dtype
    return same and plan.algorithm == readable.algorithm and plan.transfers.tobytes() == readable.transfers.tobytes()


def _summary(results: Sequence[_Result]) -> Mapping[str, float]:
    summary = {
        _SUMMARY[each.case][0]: each.median_us * _SUMMARY[each.case][1] for each in results if each.case in _SUMMARY
    }
    series: dict[str, list[_Result]] = {}
    for each in results:
        if each.series is not None:
            series.setdefault(each.series, []).append(each)
    # 1 is linear; from a number of deliveries on where what a call costs anyway no longer counts.
    growth = [
        math.log(rows[-1].median_us / rows[-2].median_us) / math.log(rows[-1].deliveries / rows[-2].deliveries)
        for rows in series.values()
    ]
    if growth:
        summary["growth_exponent_max"] = max(growth)
        summary["ns_per_delivery_max"] = max(rows[-1].ns_per_delivery for rows in series.values())
    return summary


def _balance_summary(results: Sequence[BalancerResult]) -> Mapping[str, float]:
    summary = {f"balance_{each.balancer}_us_256x64": each.median_us for each in results}
    return {"balance_us_256x64": min(summary.values()), **summary}
