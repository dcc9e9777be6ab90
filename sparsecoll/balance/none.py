"""Plain expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecoll.balance.base import Balance
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.placement import Placement

__all__ = ["NoReplicas"]


@dataclass(frozen=True)
class NoReplicas:
    """No replicas at all: every token travels to its expert's owner."""

    exact: bool = False

    def balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """See `Balancer.balance`."""
        return Balance(base)
