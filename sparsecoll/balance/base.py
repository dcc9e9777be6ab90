"""The one interface of balancers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.placement import Placement

__all__ = ["Balance", "Balancer"]


@dataclass(frozen=True, eq=False)
class Balance:
    """Where the experts of a layer are computed in a forward.

    Attributes:
        place: who holds which expert.
        quotas: int64 ``[E, W]``, how many of each expert's assignments each rank computes; a row sums to the expert's
            load, and only holders have quotas. None leaves it to the dispatcher, which prefers near holders.
    """

    place: Placement
    quotas: NDArray[np.int64] | None = None


@runtime_checkable
class Balancer(Protocol):
    """Decides which experts get replicas, where, and how many assignments each holder takes."""

    @property
    def exact(self) -> bool:
        """Whether it is asked after the router, with the loads of this very forward; nothing hides its gathers then.

        Otherwise it is asked before, with predicted loads, and its quotas are not used.
        """
        ...

    def balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """The answer for one layer and forward.

        Must be a pure function of its arguments, for every rank computes it for itself.

        Args:
            loads: ``[W, E]``, predicted or true.
            base: owners, and the replicas that are there already; the answer has at least these.
            costs: of the layer.
        """
        ...
