"""Whether training grows: a small model, trained for many steps with everything switched on that allocates."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sparsecoll as sc
from bench.busiest import Busiest
from bench.footprint.model import Sizes
from bench.footprint.training import Training
from sparsecoll.balance import Costs

__all__ = ["Growth", "measure_growth"]

_RANKS = 2
# Routing repeats itself, so that after a tenth of 1,000 steps and after all of them the same experts have replicas, and
# every byte that is more is one that nobody will give back.
_SIZES = Sizes(layers=2, experts=8, width=16, hidden=32, tokens=8, period=6, checkpointed=1)
_BUSIEST = Busiest(most=2)
_LIMIT_S = 1800.0


class Growth(NamedTuple):
    """On the rank that has grown most.

    Attributes:
        begin_bytes: alive after a tenth of the steps.
        growth_bytes: how many more are alive after all of them.
        rss_growth_bytes: the same of the process's resident memory, as the system sees it; for all ranks together.
        right: calibration took part, and the counted bytes are those of the model's own report.
    """

    begin_bytes: int
    growth_bytes: int
    rss_growth_bytes: int
    right: bool


def measure_growth(num_steps: int) -> Growth:
    """Trains with ranks of its own."""
    ranks = sc.run_local(partial(_train, num_steps=num_steps), _RANKS, timeout_s=_LIMIT_S)
    worst = max(ranks, key=lambda each: each.growth_bytes)
    return worst._replace(right=all(each.right for each in ranks))


def _train(group: sc.Group, num_steps: int) -> Growth:
    """Re-materializes, calibrates, copies other experts in each step, and computes a layer again in backward."""
    cheap = Costs(group.topology, expert_bytes=1000, token_bytes=100, bytes_per_s=1e12, token_s=1e-3)
    costs = {f"layers.{number}": cheap for number in range(_SIZES.layers)}
    options = {"balancer": _BUSIEST, "rematerialize": True, "calibrate": True, "costs": costs}
    training = Training(group, _SIZES, options)

    def train(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            training.step()
        gc.collect()
        group.barrier()
        return training.ledger.now().num_bytes, _resident_bytes()

    num_first = num_steps // 10
    begin, resident_begin = train(num_first)
    end, resident_end = train(num_steps - num_first)
    is_right = training.most_hot > _BUSIEST.most and training.is_counted_right()
    return Growth(begin, end - begin, resident_end - resident_begin, is_right)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
