"""Quotas that make the busiest rank as little busy as replicas can (UltraEP, arXiv 2606.04101)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecoll import native
from sparsecoll.balance.base import Balance
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.balance.divide import divide_loads
from sparsecoll.balance.relief import Relief
from sparsecoll.balance.traffic import exposed_s
from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Quota"]


@dataclass(frozen=True)
class Quota:
    """Makes the busiest rank as little busy as replicas can, and no more replicas than pay.

    Owners stay as they are, and ranks that have too much hand assignments over to ranks that have little, each of which
    gets at most a given number of replicas for them (`sparsecoll.balance.relief`). Of several such numbers the one is
    taken with the shortest predicted time: computing, all-to-alls, and what is seen of the copies. Where none is
    faster than no replica by at least ``min_gain``, as with balanced loads, there is none.

    It departs from UltraEP in weighing copies against what they save, in filling the rank with the tightest room
    instead of the roomiest, which balances better with few replicas, and in using replicas that are there already.

    Attributes:
        most: replicas that a rank gets at most; None is the mean number of experts that a rank owns. (With as many,
            each rank could be filled up from a single owner, so more are hardly ever needed.)
        min_tokens: the least quota for which a rank gets a replica.
        min_gain: share of the layer's time that replicas have to save.
        exact: whether to ask after the router, as UltraEP does. Before it, replicas are chosen for predicted loads and
            their gather is hidden; with ``spread="quota"`` the true loads are then divided as evenly as those permit.
    """

    most: int | None = None
    min_tokens: int = 32
    min_gain: float = 0.02
    exact: bool = True

    def __post_init__(self) -> None:
        if (self.most is not None and self.most < 0) or self.min_tokens < 1 or not 0 <= self.min_gain <= 1:
            raise InvalidArgument(f"Quota: expected most >= 0, min_tokens >= 1 and min_gain in 0..1, got {self}")

    def balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """See `Balancer.balance`."""
        loads = np.ascontiguousarray(loads, np.int64)
        most = -(-base.num_chunks // base.world_size) if self.most is None else self.most
        most = min(most, costs.spare_experts)
        found = [
            Relief(*each) for each in native.relieve_ranks(loads, base.owners, base.holders, most, self.min_tokens)
        ]
        times_s = [_predicted_s(each, costs, self.exact) for each in found]
        best = times_s.index(min(times_s))
        if times_s[best] > (1 - self.min_gain) * times_s[0]:
            best = 0
        place, moves = base, found[best].moves
        if best:
            mask = base.holders.copy()
            mask[moves[:, 0], moves[:, 1]] = True
            place = Placement(base.owners, mask)
        if np.count_nonzero(base.holders) > base.num_chunks:
            # Moves start at the owners; what other holders have of their own would travel there and back.
            return Balance(place, divide_loads(loads, place, costs.topology.node_of))
        return Balance(place, _quotas_of(loads, base, moves)) if best else Balance(base)


def _quotas_of(loads: Loads, base: Placement, moves: NDArray[np.int64]) -> NDArray[np.int64]:
    experts, ranks, amounts = moves.T
    at_owner = loads.sum(axis=0)
    np.subtract.at(at_owner, experts, amounts)
    quotas = np.zeros(base.holders.shape, np.int64)
    quotas[np.arange(base.num_chunks), base.owners] = at_owner
    quotas[experts, ranks] = amounts
    return quotas


def _predicted_s(relief: Relief, costs: Costs, exact: bool) -> float:
    busiest, traffic = np.array([relief.level]), np.array([relief.traffic])
    return costs.layer_s(busiest, traffic, traffic) + exposed_s(relief.copies, costs, exact=exact)
