"""What the sparse collectives of a step take when nothing hides them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import sparsecoll as sc
from sparsecoll.moe import MoELayer

__all__ = ["alone_s"]

_TRIES = 3


def alone_s(model: sc.FSSDPModule, group: sc.Group, num_gathers: int = 1) -> float:
    """Gathers the last step's replicas of all layers and reduces as many bytes back, one after the other.

    Collective: all ranks call it.

    Args:
        num_gathers: of each layer in a step.

    Returns:
        The sum; of each collective the median time of the slowest rank.
    """
    total_s = 0.0
    for layer in model.modules():
        plan = model.last_plan(layer) if isinstance(layer, MoELayer) else None
        if plan is None or not plan.chunks:
            continue
        shard = tuple(weight.detach() for weight in layer.experts.weights)
        options: dict[str, Any] = {"chunks": plan.chunks, "group": group}
        held = sc.sparse_all_gather(shard, plan.place, **options)
        total_s += num_gathers * _timed(group, partial(sc.sparse_all_gather, shard, plan.place, out=held, **options))
        total_s += _timed(group, partial(sc.sparse_reduce_scatter, held, plan.place, **options))
    return total_s


def _timed(group: sc.Group, run: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIES):
        group.barrier()
        begin_s = time.perf_counter()
        run()
        mine = np.array([time.perf_counter() - begin_s])
        times.append(max(float(np.frombuffer(each)[0]) for each in group.exchange(mine.tobytes())))
    return float(np.median(times))
