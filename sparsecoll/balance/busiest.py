"""Copies of the busiest experts on every rank (the first branch of Hecate's Algorithm 1, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Busiest"]


@dataclass(frozen=True)
class Busiest:
    """Up to ``most`` of the busiest experts go to all ranks, each only if it is worth the copy.

    An expert on every rank is computed where its tokens are. It is worth its copy if that takes at least ``min_gain``
    assignments off the busiest rank. (Copying a chunk of b bytes there and its gradient back takes 2 b / bandwidth;
    an assignment costs 6 floating point operations for each of its parameters. So in float32 the copy costs as much
    time as about 4/3 * FLOP/s / (bytes/s) assignments: around 30 on a CPU core with shared memory, thousands between
    GPUs on different nodes, unless it is hidden behind other compute, when it costs none.)

    Attributes:
        most: Hecate's t; None is a quarter of the experts.
        min_gain: in assignments per iteration.
        window: iterations whose mean load counts (5, as in Hecate).
    """

    most: int | None = None
    min_gain: int = 32
    window: int = 5

    def __post_init__(self) -> None:
        if (self.most is not None and self.most < 0) or self.min_gain < 0 or self.window < 1:
            raise InvalidArgument(f"Busiest: expected most >= 0, min_gain >= 0 and window >= 1, got {self}")

    def place(self, history: Sequence[NDArray[np.int64]], base: Placement) -> Placement:
        """See `Balancer.place`."""
        if not history:
            return base
        recent = history[-self.window :]
        # Sums, not means: integers compare alike on every rank and machine.
        loads = np.sum(recent, axis=0)
        by_expert = loads.sum(axis=0)
        by_rank = np.zeros(base.world_size, np.int64)
        np.add.at(by_rank, base.owners, by_expert)
        most = -(-base.num_chunks // 4) if self.most is None else min(self.most, base.num_chunks)
        chosen = []
        for expert in np.argsort(-by_expert, kind="stable")[:most]:
            without = by_rank.copy()
            without[base.owners[expert]] -= by_expert[expert]
            without += loads[:, expert]
            if by_rank.max() - without.max() >= max(1, self.min_gain * len(recent)):
                chosen.append(int(expert))
                by_rank = without
        return base.replicate({expert: range(base.world_size) for expert in chosen})
