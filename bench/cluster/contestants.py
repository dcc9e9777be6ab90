"""What takes part in a run, and the library's own algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

import sparsecoll as sc
from bench.cluster.buffers import Buffers
from bench.cluster.placements import Scene

__all__ = ["ALGORITHMS", "OURS", "Contestant", "Ours"]

OURS = "auto"
ALGORITHMS = (OURS, "direct", "relay", "hierarchical", "dense")


class Contestant(ABC):
    """A way to run one collective on one scene; all ranks make it and call it in the same order.

    Attributes:
        name: in the table.
        detail: what the name does not say.
    """

    name: str
    detail: str = ""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Untimed: brings the input into the form that `run` wants."""

    @abstractmethod
    def run(self) -> None:
        """Timed: from the buffers' source to their destination."""

    def finish(self) -> None:  # noqa: B027
        """Untimed: brings the output into the buffers' destination."""


class Ours(Contestant):
    """The library with one algorithm; the plan is made before."""

    def __init__(self, group: sc.Group, scene: Scene, collective: str, buffers: Buffers, algorithm: str) -> None:
        self._is_gather = collective == "ag"
        make_plan = sc.plan_all_gather if self._is_gather else sc.plan_reduce_scatter
        self.plan = make_plan(scene.place, scene.chunk_bytes, group.topology, algorithm)
        self.name = algorithm
        self.detail = self.plan.algorithm if algorithm == OURS else ""
        self._group, self._place = group, scene.place
        self._source, self._destination = list(buffers.source.values()), list(buffers.destination.values())

    def run(self) -> None:
        call = sc.sparse_all_gather if self._is_gather else sc.sparse_reduce_scatter
        call(self._source, self._place, plan=self.plan, group=self._group, out=self._destination)

    def cross_bytes(self, host_of: Sequence[int]) -> int:
        """Payload that the plan sends from one host to another."""
        host = np.asarray(host_of)
        transfers = self.plan.transfers
        crosses = host[transfers["src"]] != host[transfers["dst"]]
        return int(self.plan.transfer_bytes[crosses].sum())
