"""How long the host takes to issue a collective: ``python -m bench.gpu.issue FILE`` as one of two ranks.

Where there is one GPU, ranks are different hosts to NCCL, and what they send goes through sockets. That makes a
collective slow and changes nothing about its issuing, which waits for nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import sparsecoll as sc

__all__ = ["NUM_EXPERTS", "NUM_RANKS", "collectives", "measure"]

NUM_RANKS, NUM_EXPERTS = 2, 32
_CHUNK_ELEMENTS = 8192
_NUM_WARM, _NUM_TIMED = 20, 200
_TIMEOUT_S = 60.0


def collectives(group: sc.Group) -> dict[str, Callable[[], object]]:
    """One layer's calls, warm: experts that all ranks hold, one piece each, plans made and memory taken before."""
    everyone = range(group.world_size)
    place = sc.Placement.even(NUM_EXPERTS, group.world_size).replicate(dict.fromkeys(range(NUM_EXPERTS), everyone))
    chunk_bytes = 2 * _CHUNK_ELEMENTS
    gather = sc.plan_all_gather(place, chunk_bytes, group.topology, "direct")
    reduce = sc.plan_reduce_scatter(place, chunk_bytes, group.topology, "direct", partial_bytes=2 * chunk_bytes)
    more: dict[str, Any] = {"dtype": torch.bfloat16, "device": group.device}
    num_owned = len(place.owned_by(group.rank))
    shard, held = torch.ones(num_owned, _CHUNK_ELEMENTS, **more), torch.ones(NUM_EXPERTS, _CHUNK_ELEMENTS, **more)
    gathered, reduced = torch.empty_like(held), torch.empty_like(shard)
    counts = [NUM_EXPERTS] * group.world_size
    rows = torch.ones(sum(counts), 1024, **more)
    return {
        "sparse_all_gather": lambda: sc.sparse_all_gather(shard, place, plan=gather, out=gathered, group=group),
        "sparse_reduce_scatter": lambda: sc.sparse_reduce_scatter(held, place, plan=reduce, out=reduced, group=group),
        "all_to_all": lambda: sc.all_to_all(rows, counts, counts, group=group),
    }


def measure(
    group: sc.Group,
    calls: Mapping[str, Callable[[], object]],
    settle: Callable[[], None],
    num_timed: int = _NUM_TIMED,
    num_warm: int = _NUM_WARM,
) -> dict[str, list[float]]:
    """Host seconds of each call, one list for each name. Collective.

    Args:
        settle: waits for the device, so that every call finds it idle and its queue empty.
    """
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        for number in range(num_warm + num_timed):
            settle()
            group.barrier()
            begin_s = time.perf_counter()
            call()
            elapsed_s = time.perf_counter() - begin_s
            if number >= num_warm:
                times_s[name].append(elapsed_s)
        settle()
    return times_s


def summarize(times_s: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and 90th percentile of each call, in microseconds."""
    return {
        name: {
            "median_us": statistics.median(values) * 1e6,
            "p90_us": statistics.quantiles(values, n=10, method="inclusive")[-1] * 1e6,
        }
        for name, values in times_s.items()
    }


def main(path: Path) -> None:
    """Runs as a rank that torchrun has started; rank 0 writes what it has measured."""
    if torch.cuda.device_count() < NUM_RANKS:
        os.environ |= {"NCCL_HOSTID": f"rank{os.environ['RANK']}", "NCCL_SOCKET_IFNAME": "lo"}
    with sc.init_group("nccl", timeout_s=_TIMEOUT_S) as group:
        torch.cuda.set_device(group.device)
        found = summarize(measure(group, collectives(group), torch.cuda.synchronize))
        if group.rank == 0:
            path.write_text(json.dumps({"ranks": group.world_size, "experts": NUM_EXPERTS, "calls": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
