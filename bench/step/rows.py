"""A measured line: one contestant, part and routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

import sparsecoll as sc

__all__ = ["TOLERANCE", "Row"]

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """How one contestant did one part of the step under one routing.

    Attributes:
        backend: ``torch`` (Gloo) or ``mpi``.
        contestant: of `Options.contestants`.
        times_s: of timed iterations, each the maximum over ranks.
        differences: largest relative differences to hand-written expert parallelism, by the norm and over ranks: of
            ``outputs``, of the ``inputs``' gradients, and of the parameters' ``gradients``. Empty for what is not
            compared.
        imbalance: of FSSDP, what the busiest rank computed over the mean, in assignments; mean over layers, last
            iteration.
        sparse_bytes: of FSSDP, sent for replicas and their gradients in the last iteration, mean over ranks.
    """

    backend: str
    part: str
    routing: str
    contestant: str
    times_s: list[float]
    differences: dict[str, float] = field(default_factory=dict)
    imbalance: float | None = None
    sparse_bytes: float | None = None

    def of_fssdp(self, loads: Sequence[Any], group: sc.Group) -> Row:
        """With what the layers of FSSDP report; all ranks call it."""
        return replace(
            self,
            imbalance=float(np.mean([load.imbalance_after for load in loads])),
            sparse_bytes=group.mean(sum(load.sparse_bytes for load in loads)),
        )

    @property
    def time_s(self) -> float:
        """The median."""
        return float(np.median(self.times_s))

    @property
    def is_right(self) -> bool:
        """Whether all that was compared is equal up to rounding; a NaN is not."""
        return all(value <= TOLERANCE for value in self.differences.values())

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        p5, p95 = np.quantile(self.times_s, [0.05, 0.95])
        return {**asdict(self), "time_s": self.time_s, "p5_s": float(p5), "p95_s": float(p95), "right": self.is_right}
