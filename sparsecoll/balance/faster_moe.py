"""FasterMoE's shadowing of experts (He et al., PPoPP 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsecoll.balance.base import Balance
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.balance.traffic import Spread, exposed_s
from sparsecoll.placement import Placement

__all__ = ["FasterMoE"]


@dataclass(frozen=True)
class FasterMoE:
    """After the router, copies of the busiest experts on all ranks, one more for as long as the predicted time falls.

    As published, experts come by load, the first that does not shorten the time is the last to be looked at, and time
    is that of computing, of the all-to-alls, and of copies, which nothing hides so late. We depart from it where it
    counts the assignments of the busiest expert that has no copies: we count those of the busiest rank, since a rank
    may own several experts and computes its own tokens of copied ones. And a copy's gradients, which return, are
    counted as well as the copy.
    """

    @property
    def exact(self) -> bool:
        return True

    def balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """See `Balancer.balance`."""
        spread = Spread(loads, base, costs)
        best_s = costs.layer_s(*spread.traffic)
        for expert in np.argsort(-np.asarray(loads, np.int64).sum(axis=0), kind="stable"):
            copies = int((spread.copies + spread.missing[expert]).max())
            total_s = costs.layer_s(*spread.preview(expert)) + exposed_s(copies, costs, exact=True)
            if copies > costs.spare_experts or total_s >= best_s:
                break
            spread.copy(int(expert))
            best_s = total_s
        return Balance(spread.place(len(spread.order)))
