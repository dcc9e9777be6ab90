"""What the case prints and records."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sparsecoll as sc
from bench import machine
from bench.cluster.contestants import OURS
from bench.cluster.options import Options
from bench.cluster.placements import scene_name
from bench.cluster.rate import BURST_BYTES, FRAME_BYTES, SEGMENT_BYTES
from bench.cluster.rows import Row

__all__ = ["now", "print_footer", "print_header", "print_row", "record", "summarize"]

_MILLI = 1e3
_COLUMNS = {
    "pattern": 9,
    "coll": 4,
    "algorithm": 18,
    "iters": 5,
    "time": 8,
    "min": 8,
    "max": 8,
    "bound": 8,
    "t/bound": 7,
    "cross": 11,
    "must": 11,
    "wire": 11,
    "#wrong": 6,
}
_UNITS = dict.fromkeys(("time", "min", "max", "bound"), "(ms)") | dict.fromkeys(("cross", "must", "wire"), "(B)")
_BASELINE = {"ag": "broadcast", "rs": "reduce"}


def print_header(options: Options) -> None:
    """Everything that the table depends on."""
    found, link = machine.describe(), options.link
    _say(f"# sparsecoll {sc.__version__}, commit {machine.commit() or 'unknown'}")
    _say(f"# Back end torch: torch {found['torch']} (gloo); Python {found['python']}, NumPy {found['numpy']}")
    _say("# Collective test starting: cluster")
    _say(
        f"# World size {options.world_size}: {options.num_hosts} hosts on this machine, {options.ranks_per_host} ranks "
        f"on each; {found['usable_cores']} usable cores of {found['cpu']}"
    )
    _say(
        f"# Links: {options.rate_bits_per_s / 1e6:g} Mbit/s in each direction (tbf, burst {BURST_BYTES} B), which is "
        f"{link.bandwidth_bytes_per_s / 1e6:.2f} MB/s of payload"
    )
    _say(f"# and headers: Ethernet frames of {FRAME_BYTES} B carry {SEGMENT_BYTES} B of payload over TCP and IP.")
    _say(f"# iters: {options.iterations} after 1 untimed, validation: all, timeout: {options.timeout_s:g} s")
    _say(f"# seed: {options.seed}")
    _say(f"# Command: {options.command}")
    _say("#")
    _say("# time, min, max: over iterations, each the maximum over ranks. All take turns; others than auto get fewer")
    _say("# iterations if they are slow, and none that is untimed if one takes more than a second. Plans and process")
    _say("# groups are made before the timing. The garbage collector of Python is off, for every contestant.")
    _say(
        f"# bound: no schedule is faster on links of that payload and {link.latency_s * 1e6:g} us of latency (assumed)."
    )
    _say(f"# After a pause the burst is free, which can save {_burst_ms(options):.2f} ms of a time.")
    _say(
        "# cross: payload that the plan sends between hosts; must: what has to cross; wire: what the interfaces of the"
    )
    _say("# hosts counted, with acknowledgements and headers (one for each batch of segments, not for each segment).")
    _say("#" + _join({name: name for name in _COLUMNS})[1:])
    _say("#" + _join({name: _UNITS.get(name, "") for name in _COLUMNS})[1:])


def print_row(row: Row) -> None:
    """A row as it comes."""
    name = f"{row.algorithm}={row.detail}" if row.algorithm == OURS else row.algorithm
    cells = {
        "pattern": scene_name(row.pattern, row.number),
        "coll": row.collective,
        "algorithm": name,
        "iters": str(len(row.times_s)),
        "time": f"{row.time_s * _MILLI:.1f}",
        "min": f"{min(row.times_s) * _MILLI:.1f}",
        "max": f"{max(row.times_s) * _MILLI:.1f}",
        "bound": f"{row.bound_s * _MILLI:.1f}",
        "t/bound": f"{row.over_bound:.3f}",
        "cross": "N/A" if row.cross_bytes is None else str(row.cross_bytes),
        "must": str(row.must_cross_bytes),
        "wire": str(row.wire_bytes),
        "#wrong": str(row.num_wrong),
    }
    _say(_join(cells))


def print_footer(found: Mapping[str, Any]) -> None:
    """The summary of a `record`."""
    out = found["out_of_bounds"]
    _say(f"# Packets dropped by the links : {found['dropped_packets']}")
    _say(f"# Out of bounds values : {out['count']} {'OK' if out['okay'] else 'FAILED'}")
    for name, value in found["summary"].items():
        _say(f"# {name} : {value}" if isinstance(value, int) else f"# {name} : {value:.3f}")
    _say("# Collective test concluded: cluster")


def summarize(rows: Sequence[Row], ranks_per_host: int) -> dict[str, float]:
    """The figures that a reader would quote, for each pattern and collective.

    ``…_over_bound`` is the median time of ``auto`` over the bound, on the worst placement of a pattern.
    ``…_direct_over_ours`` and ``…_broadcast_over_ours`` are other times over that of ``auto``, of all placements
    together; beside a reduce-scatter the broadcasts are reductions. Where hosts have several ranks, ``…_cross_bytes``
    is the payload that ``auto`` sends between hosts, ``…_must_cross_bytes`` what it has to, and ``…_wire_bytes`` what
    the interfaces counted.
    """
    found: dict[str, float] = {}
    for pattern, collective in dict.fromkeys((row.pattern, row.collective) for row in rows):
        some = [row for row in rows if (row.pattern, row.collective) == (pattern, collective)]
        ours = [row for row in some if row.algorithm == OURS]
        key = f"{pattern}_{collective}"
        found[f"{key}_over_bound"] = max(row.over_bound for row in ours)
        for name, algorithm in (("direct", "direct"), ("broadcast", _BASELINE[collective])):
            theirs = [row for row in some if row.algorithm == algorithm]
            found[f"{key}_{name}_over_ours"] = _total_s(theirs) / _total_s(ours)
        if ranks_per_host > 1:
            found[f"{key}_cross_bytes"] = sum(row.cross_bytes or 0 for row in ours)
            found[f"{key}_must_cross_bytes"] = sum(row.must_cross_bytes for row in ours)
            found[f"{key}_wire_bytes"] = sum(row.wire_bytes for row in ours)
    return found


def record(
    options: Options, rows: Sequence[Row], errors: Sequence[str], dropped_packets: int | None, start_time: str
) -> dict[str, Any]:
    """The JSON of the case; without rows, or with errors, nothing has passed."""
    num_wrong = sum(row.num_wrong for row in rows)
    results = [row.record() for row in rows]
    bandwidths = [each["out_of_place"]["bus_bw"] for each in results if each["algorithm"] == OURS]
    topology = options.topology
    return {
        "case": "cluster",
        "command": options.command,
        "passed": bool(rows) and not errors and num_wrong == 0,
        "summary": summarize(rows, options.ranks_per_host),
        "version": sc.__version__,
        "commit": machine.commit(),
        "seed": options.seed,
        "world_size": options.world_size,
        "nodes": options.num_hosts,
        "link": {
            "rate_bits_per_s": options.rate_bits_per_s,
            "burst_bytes": BURST_BYTES,
            "payload_bytes_per_s": options.link.bandwidth_bytes_per_s,
            "latency_s": options.link.latency_s,
            "scale_up_bytes_per_s": topology.scale_up_of(0).bandwidth_bytes_per_s,
            "shared_by_ranks": options.ranks_per_host,
        },
        "dropped_packets": dropped_packets,
        "machine": machine.describe(),
        "start_time": start_time,
        "end_time": now(),
        "args": list(options.arguments),
        "env": {},
        "nccl_version": None,
        "config": {
            "nthreads": 1,
            "ngpus": 0,
            "warmup_iters": 1,
            "iterations": options.iterations,
            "aggregated_iterations": 1,
            "validation": options.iterations + 1,
            "graph": 0,
            "blocking_collectives": 1,
            "chunks": options.num_chunks,
            "chunk_bytes": options.chunk_bytes,
            "timeout_s": options.timeout_s,
        },
        "devices": [
            {"rank": rank, "group": 0, "hostname": f"host{host}", "device": rank, "device_info": "cpu"}
            for rank, host in enumerate(topology.node_of)
        ],
        "results": results,
        "out_of_bounds": {"count": num_wrong, "okay": num_wrong == 0},
        "average_bus_bandwidth": {"bandwidth": _mean(bandwidths), "okay": True},
        "errors": list(errors),
    }


def now() -> str:
    """For a record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _burst_ms(options: Options) -> float:
    return BURST_BYTES * 8 / options.rate_bits_per_s * _MILLI


def _total_s(rows: Iterable[Row]) -> float:
    return sum(row.time_s for row in rows)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _join(cells: Mapping[str, str]) -> str:
    return " ".join(cells[name].rjust(width) for name, width in _COLUMNS.items())


def _say(line: str) -> None:
    print(line, flush=True)
