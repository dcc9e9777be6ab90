"""What an answer of a balancer makes of the true loads of a forward, by the routes that the dispatcher would take."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from bench.balance.settings import Setting
from sparsecoll.balance import Balance, Loads, divide_loads, exposed_s, predicted_s
from sparsecoll.moe import plan_routes

__all__ = ["Spread", "Weight", "weigh"]

Spread = Literal["nearest", "quota"]


class Weight(NamedTuple):
    """One forward.

    Attributes:
        before, after: assignments on the busiest rank over the mean, with owners alone and with the answer.
        copies: experts that a rank receives, on the rank where they are most.
        copied: replicas made, on all ranks together.
        left: share of assignments that leave the rank of their token.
        layer_s: computing and all-to-alls, forward and backward.
        seen_s: what is seen of the copies, and of their gradients.
        right: whether the answer is sound, and each assignment is computed once and by a holder.
    """

    before: float
    after: float
    copies: int
    copied: int
    left: float
    layer_s: float
    seen_s: float
    right: bool


def weigh(loads: Loads, answer: Balance, setting: Setting, *, exact: bool, spread: Spread = "nearest") -> Weight:
    """An answer that is not sound counts as one without replicas.

    Args:
        loads: ``[W, E]``.
        exact: whether its copies are known after the router only, so that nothing hides their gather.
        spread: how holders share what the answer has no quotas for.
    """
    costs, base = setting.costs, setting.base
    is_sound = _is_sound(loads, answer, setting)
    place, quotas = (answer.place, answer.quotas) if is_sound else (base, None)
    nodes = costs.topology.node_of
    if quotas is None and spread == "quota":
        quotas = divide_loads(loads, place, nodes)
    routes = plan_routes(loads, place.holders, place.owners, nodes, quotas).quotas

    moved = routes.sum(axis=1)  # [from rank, to rank]
    computed, stays = moved.sum(axis=0), moved.diagonal()
    sent, received = moved.sum(axis=1) - stays, computed - stays
    layer_s = costs.layer_s(computed, sent, received)
    is_right = np.array_equal(routes.sum(axis=2), loads) and not routes.sum(axis=0)[~place.holders].any()

    new = place.holders & ~base.holders
    copies = int(new.sum(axis=0).max())
    at_owner = np.bincount(base.owners, loads.sum(axis=0), base.world_size)
    return Weight(
        before=float(at_owner.max() / at_owner.mean()),
        after=float(computed.max() / computed.mean()),
        copies=copies,
        copied=int(new.sum()),
        left=float(sent.sum() / loads.sum()),
        layer_s=layer_s,
        seen_s=exposed_s(copies, costs, exact=exact),
        right=is_sound and is_right and layer_s == predicted_s(loads, Balance(place, quotas), costs),
    )


def _is_sound(loads: Loads, answer: Balance, setting: Setting) -> bool:
    """Owners stay, memory is respected, and quotas are the holders' and as many as the loads."""
    base, place, quotas = setting.base, answer.place, answer.quotas
    if place.holders.shape != base.holders.shape or not np.array_equal(place.owners, base.owners):
        return False
    if int((place.holders & ~base.holders).sum(axis=0).max()) > setting.costs.spare_experts:
        return False
    if quotas is None:
        return True
    if (quotas < 0).any() or quotas[~place.holders].any():
        return False
    return np.array_equal(quotas.sum(axis=1), loads.sum(axis=0))
