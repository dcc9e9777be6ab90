"""A measured line: one contestant, part and routing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["TOLERANCE", "Row", "read_rows", "write_rows"]

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
        exposed_s: of FSSDP, for which a rank waited for sparse collectives; mean over ranks, median over iterations.
        alone_s: of FSSDP, what the sparse collectives of the last iteration take with nothing else to do, one after
            the other; for each the slowest rank.
    """

    backend: str
    part: str
    routing: str
    contestant: str
    times_s: list[float]
    differences: dict[str, float] = field(default_factory=dict)
    imbalance: float | None = None
    sparse_bytes: float | None = None
    exposed_s: float | None = None
    alone_s: float | None = None

    @property
    def time_s(self) -> float:
        """The median."""
        return float(np.median(self.times_s))

    @property
    def hidden_fraction(self) -> float | None:
        """How much of the sparse collectives' time nobody sees; None where there were none."""
        return 1 - self.exposed_s / self.alone_s if self.alone_s and self.exposed_s is not None else None

    @property
    def is_right(self) -> bool:
        """Whether all that was compared is equal up to rounding; a NaN is not."""
        return all(value <= TOLERANCE for value in self.differences.values())

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        p5, p95 = np.quantile(self.times_s, [0.05, 0.95])
        derived = {"time_s": self.time_s, "p5_s": float(p5), "p95_s": float(p95), "right": self.is_right}
        return {**asdict(self), **derived, "hidden_fraction": self.hidden_fraction}


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Appends them, for another process to read; what is there already stays."""
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """What was written; nothing, if there is no such file."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
