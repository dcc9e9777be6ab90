"""``python -m bench all_to_all``: uneven rows between all ranks, beside the library's own all-to-all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench import traffic
from bench.library import library_of
from bench.memory import memory_of
from bench.runner import run_case
from bench.trial import ColdCopy, Facts, Setting, Trial, num_sets
from bench.values import Values

__all__ = ["run"]

Array = NDArray[Any]


class AllToAllTrial(Trial):
    """Every rank sends each other one a run of elements; both sides know all counts before."""

    case = "all_to_all"
    skews = traffic.SKEWS
    is_sparse = False

    def __init__(self, group: sc.Group, setting: Setting) -> None:
        assert setting.traffic is not None
        self.group, self.setting, self.memory = group, setting, memory_of(group)
        xp = self.memory.xp
        counts = setting.traffic // setting.itemsize
        self._counts = counts
        self._sends, self._receives = counts[group.rank].tolist(), counts[:, group.rank].tolist()
        self.facts = _facts(setting.traffic, setting.itemsize, group.topology)
        self._values = Values(setting.dtype, group.world_size, int(counts.max()))
        self._num_sets = num_sets(int(setting.traffic.sum(axis=1).max()), setting)
        inputs = np.empty((self._num_sets, sum(self._sends)), setting.dtype)
        for number, x in enumerate(inputs):
            for dst, part in enumerate(_split(x, self._sends)):
                part[:] = self._values.row(group.rank, dst, number, len(part))
        self._inputs = xp.asarray(inputs)
        self._copy = ColdCopy(sum(self._receives) * setting.itemsize, setting, self.memory)
        self._out = xp.empty(0, setting.dtype)
        self.outputs = {"copy": self._copy.destination}
        library = library_of(group)
        if library is None:
            self.baseline, self.has_baseline = "none, as threads have no library", False
        else:
            self._dense = library.all_to_all(self._sends, self._receives)
            self.baseline = self._dense.name
            self.outputs["dense"] = xp.empty(sum(self._receives), setting.dtype)

    def run(self, step: int) -> None:
        x = self._inputs[step % self._num_sets]
        self._out = sc.all_to_all(x, self._sends, self._receives, group=self.group)

    def run_dense(self, step: int) -> None:
        self._dense.call(self._inputs[self._dense_number(step)], self.outputs["dense"])

    def run_copy(self, step: int) -> None:
        self._copy.run(step)

    def count_wrong(self, step: int) -> int:
        return self._count(self._out, step % self._num_sets)

    def count_wrong_dense(self, step: int) -> int:
        return self._count(self.outputs["dense"], self._dense_number(step))

    def _dense_number(self, step: int) -> int:
        return (step + self._num_sets // 2) % self._num_sets

    def _count(self, out: Any, number: int) -> int:
        return sum(
            int(np.count_nonzero(part != self._values.row(src, self.group.rank, number, len(part))))
            for src, part in enumerate(_split(self.memory.to_host(out), self._receives))
        )


def _split(array: Array, counts: Sequence[int]) -> list[Array]:
    return np.split(array, np.cumsum(counts)[:-1])


def _facts(matrix: NDArray[np.int64], itemsize: int, topology: sc.Topology) -> Facts:
    """Bytes of a matrix. Dense is the all-to-all that pads every message to the largest."""
    world_size = len(matrix)
    between = matrix * ~np.eye(world_size, dtype=bool)
    padded = int(between.max()) * world_size * (world_size - 1)
    size_bytes = int(max(matrix.sum(axis=0).max(), matrix.sum(axis=1).max()))
    return Facts(
        size_bytes=size_bytes,
        count=size_bytes // (world_size * itemsize),
        useful_bytes=int(between.sum(axis=0).max()),
        density=float(between.sum() / padded) if padded else 0.0,
        bound_s=_bound_s(between, topology),
        algorithm="direct",
    )


def _bound_s(between: NDArray[np.int64], topology: sc.Topology) -> float:
    """What each rank must send, and must receive, over each of its two links."""
    nodes = np.array(topology.node_of)
    inside = nodes[:, None] == nodes[None, :]
    times = [0.0]
    for link, crossing in ((topology.scale_up_of(0), inside), (topology.scale_out_of(0), ~inside)):
        busiest = max((between * crossing).sum(axis=axis).max() for axis in (0, 1))
        if busiest:
            times.append(link.latency_s + float(busiest) / link.bandwidth_bytes_per_s)
    return max(times)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measures and reports; see `bench.runner.run_case`."""
    return run_case(AllToAllTrial, arguments)
