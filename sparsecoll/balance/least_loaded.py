"""Overflow to the least loaded ranks, from the loads of this very forward (LLEP, arXiv 2601.17111)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecoll.balance.base import Balance
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.balance.divide import divide_loads
from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["LeastLoaded"]

_ENDLESS = 1 << 62


@dataclass(frozen=True)
class LeastLoaded:
    """Experts in descending order of load fill their owner up to a capacity, and then the least loaded ranks.

    Nothing happens below a threshold of imbalance: of ranks, as in the authors' code, and not of experts, as in the
    paper. We depart from both where an overflow is small, or no rank has enough room or memory left. There it is moved
    all the same; here it stays with the owner, because it is not worth a replica.

    Attributes:
        threshold: the paper's λ; the busiest rank's load over the mean from which on there is something to do.
        capacity: the paper's α; what ranks may take over, up to which load over the mean.
        min_tokens: the paper's m, the least number of assignments that is worth a replica. None is as many as take as
            long as copying the expert and its gradients; with the paper's GPUs that comes near to its 1,024.
    """

    threshold: float = 1.3
    capacity: float = 1.0
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        if not (self.threshold >= 1 and self.capacity >= 1) or (self.min_tokens is not None and self.min_tokens < 1):
            raise InvalidArgument(f"LeastLoaded: expected no value below 1, got {self}")

    @property
    def exact(self) -> bool:
        return True

    def balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """See `Balancer.balance`."""
        loads = np.asarray(loads, np.int64)
        by_expert = loads.sum(axis=0)
        at_owner = np.bincount(base.owners, by_expert, base.world_size).astype(np.int64)
        if at_owner.max() * base.world_size < self.threshold * at_owner.sum():
            return Balance(base)
        capacity = math.ceil(self.capacity * int(at_owner.sum()) / base.world_size)
        quotas = _overflow(by_expert, at_owner, base, capacity, self._min_tokens(costs), costs.spare_experts)
        is_new = (quotas > 0) & ~base.holders
        place = Placement(base.owners, base.holders | is_new) if is_new.any() else base
        if len(base.replicated()):
            # Owners were filled first; what other holders have of their own would travel there and back.
            return Balance(place, divide_loads(loads, place, costs.topology.node_of))
        return Balance(base) if place is base else Balance(place, quotas)

    def _min_tokens(self, costs: Costs) -> int:
        if self.min_tokens is not None:
            return self.min_tokens
        compute_s = 3 * costs.token_s
        return math.ceil(min(2 * costs.copy_s / compute_s, _ENDLESS)) if compute_s else _ENDLESS


def _overflow(
    by_expert: NDArray[np.int64],
    at_owner: NDArray[np.int64],
    base: Placement,
    capacity: int,
    min_tokens: int,
    slots: int,
) -> NDArray[np.int64]:
    """Quotas ``[E, W]``."""
    quotas = np.zeros(base.holders.shape, np.int64)
    used = at_owner.tolist()
    free = [slots] * base.world_size
    owners, loads = base.owners.tolist(), by_expert.tolist()
    for expert in np.argsort(-by_expert, kind="stable").tolist():
        owner = owners[expert]
        # Of the owner's load, what is not moved yet counts in full, also that of experts whose turn is still to come.
        over = min(loads[expert], used[owner] - capacity)
        quotas[expert, owner] = loads[expert]
        if over <= 0:
            continue
        least = [1 if holds else min_tokens for holds in base.holders[expert].tolist()]
        for load, rank in sorted((load, rank) for rank, load in enumerate(used)):
            room = capacity - load
            if min(over, room) < least[rank] or not (base.holders[expert, rank] or free[rank]):
                continue
            amount = min(over, room)
            quotas[expert, rank] += amount
            quotas[expert, owner] -= amount
            used[rank] += amount
            used[owner] -= amount
            over -= amount
            free[rank] -= not base.holders[expert, rank]
    return quotas
