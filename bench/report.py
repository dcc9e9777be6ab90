"""What a case prints and records: nccl-tests' table with the columns that sparsity needs, and its JSON."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench import machine
from bench.arguments import Options
from bench.memory import memory_of
from bench.trial import Facts

__all__ = ["Report", "Row", "merge_records", "write_record"]

_GIGA = 1e9
_MICRO = 1e6
_ENVIRONMENT = ("SPARSECOLL_", "OMP_", "MPIR_", "MPICH_", "OMPI_MCA", "UCX_", "GLOO_", "NCCL_", "CUDA_")

_COLUMNS = {
    "size": 12,
    "count": 12,
    "type": 8,
    "useful": 12,
    "wire": 12,
    "density": 7,
    "time": 8,
    "algbw": 7,
    "busbw": 7,
    "bound": 8,
    "eff": 6,
    "xdense": 7,
    "#wrong": 6,
}
_UNITS = {"size": "(B)", "count": "(elements)", "useful": "(B)", "wire": "(B)", "time": "(us)", "algbw": "(GB/s)"}
_UNITS |= {"busbw": "(GB/s)", "bound": "(us)"}
_PER_ITERATION = {"i_min": 8, "i_max": 8, "i_p99": 8, "i_cv%": 6}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        times_s: of ``ours``, ``dense`` and ``copy``, each ``[world_size, iterations]``.
        wire_bytes: per operation, max over ranks of max(sent, received), as the transport counted them.
        num_wrong: over all ranks and checked iterations; None when not checked.
        traffic: bytes between ranks, for the all-to-all.
    """

    facts: Facts
    dtype: str
    op: str
    baseline: str
    times_s: Mapping[str, NDArray[np.float64]]
    wire_bytes: int
    num_wrong: int | None
    traffic: NDArray[np.int64] | None

    def series_s(self, name: str, average: int) -> NDArray[np.float64]:
        """``[iterations]``, from the times of all ranks as ``-a`` says."""
        times = self.times_s[name]
        return [times[0], times.mean(axis=0), times.min(axis=0), times.max(axis=0)][average]

    def time_s(self, name: str, average: int) -> float | None:
        """The median over iterations; None where it was not measured."""
        return float(np.median(self.series_s(name, average))) if name in self.times_s else None


class Report:
    """Prints the header when made and each row as it comes; rank 0 has one.

    Args:
        devices: where every rank runs.
    """

    def __init__(self, options: Options, group: sc.Group, devices: Sequence[Mapping[str, Any]]) -> None:
        self._options, self._group = options, group
        self._rows: list[Row] = []
        self._started = _now()
        self._on_device = group.device != "cpu"
        self._machine = {**machine.describe(), **(machine.describe_gpu() if self._on_device else {})}
        self._commit = machine.commit()
        self._devices = list(devices)
        self._backend_version = machine.backend_version(group)
        self._environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)}
        self._print_header()

    def add(self, row: Row) -> None:
        """Prints a row."""
        if not self._rows or row.baseline != self._rows[-1].baseline:
            copy = memory_of(self._group).copy
            _say(f"# Baseline (dense): {row.baseline}; copy: {copy} of a rank's output bytes on all ranks at once")
        if row.op != "none" and (not self._rows or row.op != self._rows[-1].op):
            _say(f"# redop: {row.op}")
        if not self._rows:
            self._print_columns()
        self._rows.append(row)
        _say(self._latency_line(row) if self._options.latency else self._line(row))
        if self._options.summary:
            self._print_ranks(row)

    def end(self) -> dict[str, Any]:
        """Prints the footer and returns the record."""
        record = self._record()
        count = record["out_of_bounds"]["count"]
        if self._options.latency and count:
            sizes = [row.facts.size_bytes for row in self._rows if row.num_wrong]
            _say(f"# Validation failed at message sizes: {', '.join(map(str, sizes))}")
        _say(f"# Out of bounds values : {count} {'OK' if record['passed'] else 'FAILED'}")
        _say(f"# Avg bus bandwidth    : {record['average_bus_bandwidth']['bandwidth']:.4g}")
        for name, value in record["summary"].items():
            _say(f"# {name} at {self._largest().facts.size_bytes} bytes : {value:.3f}")
        _say(f"# Collective test concluded: {self._options.case}")
        return record

    def _print_header(self) -> None:
        options, group = self._options, self._group
        kind, step = options.step
        found, topology = self._machine, group.topology
        _say(f"# sparsecoll {sc.__version__}, commit {self._commit or 'unknown'}")
        _say(f"# Back end {group.backend}: {self._backend_version}")
        _say(f"# Python {found['python']}, NumPy {found['numpy']}, torch {found['torch']}, mpi4py {found['mpi4py']}")
        _say(f"# Collective test starting: {options.case}")
        sizes = f"minbytes {options.sizes[0]} maxbytes {options.sizes[-1]} {kind.replace('step_', 'step: ')} {step}"
        if options.matrix is not None:
            sizes = f"sizes from {options.matrix}"
        _say(
            f"# {sizes} warmup iters: {options.warmup} iters: {options.iterations} agg iters: 1 "
            f"validation: {options.checks} graph: 0 unalign: 0"
        )
        if self._is_sparse:
            _say(f"# chunks: {options.num_chunks} density: {options.density:g} skew: {options.skew} (of hot owners)")
        elif options.matrix is None:
            _say(f"# skew: {options.skew} experts: {options.num_chunks}")
        timeout = f"timeout: {options.timeout_s:g} s"
        _say(f"# seed: {options.seed} average: {options.average} {timeout} checked: {int(group.checked)}")
        hardware = f"{found['usable_cores']} usable cores of {found['cpu']}"
        _say(f"# World size {group.world_size}, nodes {topology.num_nodes}, {hardware}")
        settings = " ".join(f"{name}={value}" for name, value in self._environment.items())
        _say(f"# Environment: {settings or 'nothing set'}")
        _say(f"# Command: {options.command}")
        _say("# Using devices")
        for each in self._devices:
            _say(
                f"#  Rank {each['rank']:2d} Group {each['group']:2d} Pid {each['pid']:6d} on {each['hostname']} "
                f"device {each['device']:2d} [{each['device_hex'] or '-'}] {each['device_info']}"
            )
        _say("#")
        if options.latency:
            return
        if self._is_sparse:
            _say("# algbw is dense-equivalent (size / time) and may exceed the link rate; busbw is wire / time.")
            _say("# Plans are made before the timing. xdense: time of the dense collective of all chunks / time.")
        else:
            _say("# algbw is size / time, size the most that a rank sends or gets, its own part included; busbw is")
            _say("# wire / time. density: beside padding to the largest message. xdense: the library's time / time.")
        inside, between = (
            f"{link.bandwidth_bytes_per_s / _GIGA:g} GB/s and {link.latency_s * _MICRO:g} us"
            for link in (topology.scale_up_of(0), topology.scale_out_of(0))
        )
        _say(f"# bound and eff assume links of {inside} in a node, {between} between nodes (not measured).")
        if self._on_device:
            _say("# Times are the device's, from the call until its result is ready in the caller's stream.")
        _say("# Times are taken with the garbage collector of Python off, for every contestant.")

    def _print_columns(self) -> None:
        if self._options.latency:
            _say(
                "# Size".ljust(10)
                + "".join(
                    name.rjust(20)
                    for name in ("Avg Latency(us)", "Min Latency(us)", "Max Latency(us)", "Iterations", "Validation")
                )
            )
            return
        columns = {**_COLUMNS, **(_PER_ITERATION if self._options.per_iteration else {})}
        _say("#" + _join(columns, {name: name for name in columns})[1:])
        _say("#" + _join(columns, {name: _UNITS.get(name, "") for name in columns})[1:])

    def _line(self, row: Row) -> str:
        result = self._result(row)
        time_s, bound_us = result["out_of_place"]["time"], row.facts.bound_s * _MICRO
        cells = {
            "size": str(row.facts.size_bytes),
            "count": str(row.facts.count),
            "type": row.dtype,
            "useful": str(row.facts.useful_bytes),
            "wire": str(row.wire_bytes),
            "density": _fit(row.facts.density, 7, 3),
            "time": _fit(time_s, 8, 1),
            "algbw": _fit(result["out_of_place"]["alg_bw"], 7, 2),
            "busbw": _fit(result["out_of_place"]["bus_bw"], 7, 2),
            "bound": _fit(bound_us, 8, 1),
            "eff": _fit(bound_us / time_s, 6, 2),
            "xdense": "N/A" if result["xdense"] is None else _fit(result["xdense"], 7, 2),
            "#wrong": "N/A" if row.num_wrong is None else str(row.num_wrong),
        }
        columns = dict(_COLUMNS)
        if self._options.per_iteration:
            found = _statistics(row.series_s("ours", self._options.average))
            names = ("min_us", "max_us", "p99_us", "cv_pct")
            columns |= _PER_ITERATION
            cells |= {
                column: _fit(found[name], width, 1)
                for (column, width), name in zip(_PER_ITERATION.items(), names, strict=True)
            }
        return _join(columns, cells)

    def _latency_line(self, row: Row) -> str:
        averages = row.times_s["ours"].mean(axis=1) * _MICRO
        validation = "-" if row.num_wrong is None else "Fail" if row.num_wrong else "Pass"
        numbers = [_fit(float(value), 19, 2) for value in (averages.mean(), averages.min(), averages.max())]
        cells = [*numbers, str(self._options.iterations), validation]
        return str(row.facts.size_bytes).ljust(10) + "".join(cell.rjust(20) for cell in cells)

    def _print_ranks(self, row: Row) -> None:
        assert row.traffic is not None
        medians = np.median(row.times_s["ours"], axis=1)
        _say("#  rank   send_bytes   recv_bytes  alg_bw  bus_bw")
        for rank, time_s in enumerate(medians):
            sent, received = int(row.traffic[rank].sum()), int(row.traffic[:, rank].sum())
            own = int(row.traffic[rank, rank])
            bandwidths = [max(sent, received), max(sent, received) - own]
            cells = "".join(_fit(each / time_s / _GIGA, 7, 2).rjust(8) for each in bandwidths)
            _say(f"#  {rank:4d} {sent:12d} {received:12d}{cells}")

    @property
    def _is_sparse(self) -> bool:
        return self._options.case != "all_to_all"

    def _largest(self) -> Row:
        """The row that the summary quotes: the largest size of the first type and reduction."""
        first = self._rows[0]
        return max(
            (row for row in self._rows if (row.dtype, row.op) == (first.dtype, first.op)),
            key=lambda row: row.facts.size_bytes,
        )

    def _record(self) -> dict[str, Any]:
        options, group = self._options, self._group
        results = [self._result(row) for row in self._rows]
        num_wrong = sum(row.num_wrong or 0 for row in self._rows)
        largest = results[self._rows.index(self._largest())]
        ratio = "dense_over_sparse" if self._is_sparse else "library_over_ours"
        summary = {ratio: largest["xdense"], "time_over_copy": largest["time_over_copy"]}
        links = {"scale_up": asdict(group.topology.scale_up_of(0)), "scale_out": asdict(group.topology.scale_out_of(0))}
        kind, step = options.step
        return {
            "case": options.case,
            "command": options.command,
            "passed": num_wrong == 0,
            "summary": {name: value for name, value in summary.items() if value is not None},
            "version": sc.__version__,
            "commit": self._commit,
            "seed": options.seed,
            "world_size": group.world_size,
            "nodes": group.topology.num_nodes,
            "link": {**links, "measured": False},
            "machine": {**self._machine, "backends": {group.backend: self._backend_version}},
            "start_time": self._started,
            "end_time": _now(),
            "args": list(options.arguments),
            "env": self._environment,
            "nccl_version": self._machine.get("nccl"),
            "config": {
                "nthreads": 1,
                "ngpus": int(self._on_device),
                "minimum_bytes": options.sizes[0],
                "maximum_bytes": options.sizes[-1],
                kind: step,
                "warmup_iters": options.warmup,
                "iterations": options.iterations,
                "aggregated_iterations": 1,
                "validation": options.checks,
                "graph": 0,
                "blocking_collectives": 1,
                "per_iter_timing": options.per_iteration,
                "per_iter_skip": 1,
                "parallel_init": False,
                "average": options.average,
                "chunks": options.num_chunks,
                "skew": options.skew,
                "matrix": None if options.matrix is None else str(options.matrix),
                "checked": group.checked,
            },
            "devices": self._devices,
            "results": results,
            "out_of_bounds": {"count": num_wrong, "okay": num_wrong == 0},
            "average_bus_bandwidth": {
                "bandwidth": float(np.mean([result["out_of_place"]["bus_bw"] for result in results])),
                "okay": True,
            },
            "errors": [],
        }

    def _result(self, row: Row) -> dict[str, Any]:
        average, facts = self._options.average, row.facts
        time_s, dense_s, copy_s = (row.time_s(name, average) for name in ("ours", "dense", "copy"))
        assert time_s is not None and copy_s is not None
        quantiles = np.quantile(row.series_s("ours", average), [0.05, 0.95]) * _MICRO
        result = {
            "experiment_name": f"{self._options.case}_{self._group.backend}",
            "size": facts.size_bytes,
            "count": facts.count,
            "type": row.dtype,
            "redop": row.op,
            "root": -1,
            "out_of_place": {
                "time": time_s * _MICRO,
                "alg_bw": facts.size_bytes / time_s / _GIGA,
                "bus_bw": row.wire_bytes / time_s / _GIGA,
                "nwrong": row.num_wrong,
            },
            "in_place": None,
            "actual_iterations": self._options.iterations,
            "backend": self._group.backend,
            "algorithm": facts.algorithm,
            "useful_bytes": facts.useful_bytes,
            "wire_bytes": row.wire_bytes,
            "density": facts.density,
            "bound_us": facts.bound_s * _MICRO,
            "time_p5_us": float(quantiles[0]),
            "time_p95_us": float(quantiles[1]),
            "dense": row.baseline,
            "dense_time_us": None if dense_s is None else dense_s * _MICRO,
            "copy_time_us": copy_s * _MICRO,
            "xdense": None if dense_s is None else dense_s / time_s,
            "time_over_copy": time_s / copy_s,
            "overlap_pct": None,
            "peak_staging_bytes": facts.peak_staging_bytes,
            "plan_digest": facts.plan_digest,
        }
        if self._options.per_iteration:
            result["out_of_place_per_iter"] = {
                **_statistics(row.series_s("ours", average)),
                "times_us": (row.series_s("ours", average) * _MICRO).tolist(),
                "per_process_max_times_us": (row.times_s["ours"].max(axis=1) * _MICRO).tolist(),
            }
        return result


def merge_records(options: Options, records: Mapping[str, Mapping[str, Any]], errors: Sequence[str]) -> dict[str, Any]:
    """One record of a case that was run over several back ends, of which the first gives the plain summary."""
    merged: dict[str, Any] = {"case": options.case, "summary": {}, "results": []}
    for record in records.values():
        merged = {**record, **merged}
    merged |= {"command": options.command, "args": list(options.arguments), "errors": list(errors)}
    merged["passed"] = not errors and all(record["passed"] for record in records.values())
    for backend, record in records.items():
        merged["results"] += record["results"]
        for name, value in record["summary"].items():
            merged["summary"].setdefault(name, value)
            if len(options.backends) > 1:
                merged["summary"][f"{backend}_{name}"] = value
    if records:
        versions = {name: version for each in records.values() for name, version in each["machine"]["backends"].items()}
        merged["machine"] = {**merged["machine"], "backends": versions}
        count = sum(record["out_of_bounds"]["count"] for record in records.values())
        merged["out_of_bounds"] = {"count": count, "okay": count == 0}
        bandwidths = [result["out_of_place"]["bus_bw"] for result in merged["results"]]
        merged["average_bus_bandwidth"] = {"bandwidth": float(np.mean(bandwidths)), "okay": True}
        merged["end_time"] = max(record["end_time"] for record in records.values())
    return merged


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Writes the JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _statistics(series_s: NDArray[np.float64]) -> dict[str, Any]:
    """nccl-tests' numbers of single iterations; percentiles by nearest rank."""
    times_us = series_s * _MICRO
    p50, p95, p99 = np.quantile(times_us, [0.5, 0.95, 0.99], method="inverted_cdf")
    mean, stdev = float(times_us.mean()), float(times_us.std())
    return {
        "min_us": float(times_us.min()),
        "max_us": float(times_us.max()),
        "avg_us": mean,
        "p50_us": float(p50),
        "p95_us": float(p95),
        "p99_us": float(p99),
        "stdev_us": stdev,
        "cv_pct": 100 * stdev / mean,
        "skipped_iterations": 1,
    }


def _fit(value: float, width: int, decimals: int) -> str:
    """Drops decimals before the number outgrows its column."""
    for count in range(decimals, 0, -1):
        if len(text := f"{value:.{count}f}") <= width:
            return text
    return f"{value:.0f}"


def _join(columns: Mapping[str, int], cells: Mapping[str, str]) -> str:
    return " ".join(cells[name].rjust(width) for name, width in columns.items())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _say(line: str) -> None:
    print(line, flush=True)
