"""What a rank measures of itself, for all ranks to agree on: how long it computes, and how much room it has.

Measurements go to the other ranks as integers, with the counts of routed tokens; what comes of them is the same number
on every rank (`sparsecoll.fssdp.layer`).
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsecoll.collectives import sparse_all_gather
from sparsecoll.group import Group
from sparsecoll.placement import Placement

__all__ = ["Meter", "bytes_per_s", "room_bytes"]

_WINDOW = 5
_TRIES = 3
_MOST_PROBE_BYTES = 1 << 20
_SHARE_OF_FREE_MEMORY = 0.5  # activations, gradients and other processes need some too


class Meter:
    """Durations of a layer's dense compute before it, and of its experts for each assignment.

    Medians of the last five count. On a GPU they are measured with events on the current stream, and one whose end the
    device has not reached yet is left out; nobody waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._dense: deque[tuple[Any, Any, int]] = deque(maxlen=_WINDOW)
        self._compute: deque[tuple[Any, Any, int]] = deque(maxlen=_WINDOW)

    def stamp(self) -> Any:
        """Now, or None where nothing can be measured."""
        if not self._is_cuda:
            return time.perf_counter_ns()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def dense(self, begin: Any) -> None:
        """The dense compute before the layer has ended; it began at the stamp ``begin``."""
        if begin is not None:
            self._dense.append((begin, self.stamp(), 1))

    def computed(self, begin: Any, num_assignments: int) -> None:
        """The experts' forward has ended."""
        if begin is not None and num_assignments:
            self._compute.append((begin, self.stamp(), num_assignments))

    def dense_ns(self) -> int:
        """0 before the first."""
        return self._median(self._dense, 1)

    def assignment_ps(self) -> int:
        """Picoseconds for one assignment, forward; 0 before the first."""
        return self._median(self._compute, 1000)

    def _median(self, spans: deque[tuple[Any, Any, int]], factor: int) -> int:
        found = [factor * ns / count for begin, end, count in spans if (ns := self._elapsed_ns(begin, end)) is not None]
        return round(statistics.median(found)) if found else 0

    def _elapsed_ns(self, begin: Any, end: Any) -> float | None:
        if not self._is_cuda:
            return float(end - begin)
        return float(begin.elapsed_time(end)) * 1e6 if end is not None and end.query() else None


def bytes_per_s(group: Group, expert_bytes: int) -> float:
    """With which all ranks receive when experts go to everyone, the same number on all ranks.

    On a CPU it is measured, by gathering an expert's bytes from each rank, at most 1 MB; the best of three, on the
    slowest rank. On GPUs it is what the group's Topology says of the links, as probed by `sparsecoll.probe` or assumed.

    Collective: all ranks call it.
    """
    topology, world_size = group.topology, group.world_size
    if world_size == 1 or group.is_stream_ordered:
        ranks = range(world_size)
        links = [topology.scale_out_of(r) if topology.num_nodes > 1 else topology.scale_up_of(r) for r in ranks]
        return min(link.bandwidth_bytes_per_s for link in links)
    place = Placement.even(world_size, world_size).replicate({c: range(world_size) for c in range(world_size)})
    mine, received = (torch.zeros(n, min(expert_bytes, _MOST_PROBE_BYTES), dtype=torch.uint8) for n in (1, world_size))
    times_ns = []
    for _ in range(_TRIES):
        group.barrier()
        begin = time.perf_counter_ns()
        sparse_all_gather(mine, place, group=group, out=received)
        times_ns.append(time.perf_counter_ns() - begin)
    slowest = np.max([np.frombuffer(each, np.int64) for each in group.exchange(np.array(times_ns).tobytes())], axis=0)
    return (world_size - 1) * mine.nbytes / (int(slowest.min()) * 1e-9)


def room_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Memory that this rank may use for replicas: half of what is free, shared with the other ranks of a CPU's node."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _SHARE_OF_FREE_MEMORY)
    return int(_available_bytes() * _SHARE_OF_FREE_MEMORY) // ranks_on_node


def _available_bytes() -> int:
    """Of the machine, as Linux tells it; else pages that nobody uses."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
