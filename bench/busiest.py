"""A balancer that replicates without regard to gain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import sparsecoll as sc
from sparsecoll.balance import Balance, Costs, Loads

__all__ = ["Busiest"]


@dataclass(frozen=True)
class Busiest:
    """The busiest experts on every rank, whether that gains anything or not.

    Attributes:
        most: how many.
    """

    most: int
    exact: bool = False

    def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Balance:
        """See `sparsecoll.balance.Balancer`."""
        chosen = np.argsort(-loads.sum(axis=0), kind="stable")[: self.most].tolist()
        return Balance(base.replicate({expert: range(base.world_size) for expert in chosen}))
