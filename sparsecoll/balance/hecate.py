"""Hecate's sparse materialization (Algorithm 1 of the paper, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecoll.balance.base import Balance
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.balance.traffic import Spread, exposed_s, predicted_s
from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Hecate"]


@dataclass(frozen=True)
class Hecate:
    """Copies of the busiest experts on all ranks, as many as dense compute hides; on some ranks where memory is short.

    The paper copies the t experts with most load, t being what the dense compute hides, or, where memory has room for
    only m < t on a rank, divides the W m slots among them by load. Both are measured here (`Costs.overlap_degree`,
    `Costs.spare_experts`). We depart from it in three things:

    * Experts are not taken by load alone, but each time that which takes most off the rank that is slowest by then, in
      computing or in traffic; and of that list only the part with the shortest predicted time. Copies of a hot expert
      whose owner is idle otherwise help nobody.
    * With ``exposed`` the list goes on beyond t, for as long as what copies save is more than what is seen of them.
    * Slots are divided only if that is predicted to be faster than m experts everywhere.

    So the predicted time, copies included, is never longer than without copies.

    Attributes:
        most: experts that are copied at most; None is as many as pay.
        exposed: whether copies may take time that is not hidden.
    """

    most: int | None = None
    exposed: bool = True

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 0:
            raise InvalidArgument(f"Hecate: expected most >= 0, got {self.most}")

    @property
    def exact(self) -> bool:
        return False

    def balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """See `Balancer.balance`."""
        loads = np.asarray(loads, np.int64)
        hidden, spare = costs.overlap_degree, costs.spare_experts
        limit = spare if self.exposed else min(spare, hidden)
        most = base.num_chunks if self.most is None else self.most
        everywhere, everywhere_s, is_full = _copy_everywhere(loads, base, costs, most, limit)
        if is_full and spare < hidden:
            some = Balance(_divide_slots(loads, base, costs, min(most, hidden)))
            if predicted_s(loads, some, costs) < everywhere_s:
                return some
        return Balance(everywhere)


def _copy_everywhere(
    loads: Loads, base: Placement, costs: Costs, most: int, limit: int
) -> tuple[Placement, float, bool]:
    """The first branch: up to ``most`` experts go to all ranks, up to ``limit`` to each.

    Returns:
        The Placement, its predicted time with what is seen of the copies, and whether more would not have fit.
    """
    spread = Spread(loads, base, costs)
    # Nobody computes less than the mean, whatever is copied.
    mean = -(-loads.sum(keepdims=True) // base.world_size)
    least_s = costs.layer_s(mean, mean * 0, mean * 0)
    best, best_s, seen_s = 0, costs.layer_s(*spread.traffic), 0.0
    while len(spread.order) < most and least_s + seen_s < best_s:
        fits = np.logical_not(spread.missing[:, spread.copies >= limit].any(axis=1))
        useful = _useful(spread, fits)
        if not useful:
            return spread.place(best), best_s, not fits.all()
        layer_s, expert = min((costs.layer_s(*spread.preview(each)), each) for each in useful)
        spread.copy(expert)
        seen_s = exposed_s(int(spread.copies.max()), costs)
        if layer_s + seen_s < best_s:
            best, best_s = len(spread.order), layer_s + seen_s
    return spread.place(best), best_s, False


def _useful(spread: Spread, fits: NDArray[np.bool_]) -> set[int]:
    """Of experts that fit, those that take most off the rank that computes most, and off the one that talks most."""
    computed, sent, received = spread.traffic
    slowest, inbound, outbound = computed.argmax(), received.argmax(), sent.argmax()
    talk = spread.arriving[inbound] if received[inbound] >= sent[outbound] else spread.leaving[outbound]
    useful = set()
    for relief in (spread.arriving[slowest] - spread.leaving[slowest], talk):
        expert = int((relief * fits).argmax())
        if fits[expert] and relief[expert] > 0:
            useful.add(expert)
    return useful


def _divide_slots(loads: Loads, base: Placement, costs: Costs, most: int) -> Placement:
    """The second branch: the slots of all ranks are divided by load among the ``most`` experts with most load."""
    by_expert = loads.sum(axis=0)
    hot = np.argsort(-by_expert, kind="stable")[:most]
    counts = _divide(base.world_size * costs.spare_experts, by_expert[hot], (~base.holders[hot]).sum(axis=1))
    nodes = np.array(costs.topology.node_of)
    free = np.full(base.world_size, costs.spare_experts)
    mask = base.holders.copy()
    for expert, count in zip(hot[counts > 0], counts[counts > 0], strict=True):
        ranks = _seats(mask[expert], free, nodes)[:count]
        mask[expert, ranks] = True
        free[ranks] -= 1
    return Placement(base.owners, mask)


def _divide(slots: int, weights: NDArray[np.int64], caps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shares of ``slots`` by weight, with largest remainders; what is beyond a cap goes to the others."""
    shares = np.zeros_like(caps)
    is_open = (caps > 0) & (weights > 0)
    slots = min(slots, int(caps[is_open].sum()))
    while slots:
        open_weights = np.where(is_open, weights, 0)
        share, rest = np.divmod(slots * open_weights, open_weights.sum())
        share[np.argsort(-rest, kind="stable")[: slots - int(share.sum())]] += 1
        over = is_open & (share > caps)
        if not over.any():
            return share + shares
        shares[over] = caps[over]
        slots -= int(caps[over].sum())
        is_open &= ~over
    return shares


def _seats(holds: NDArray[np.bool_], free: NDArray[np.int64], nodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks that can take a replica, best first: by copies in the node, then free slots of the node, then their own."""
    open_ranks = np.flatnonzero(~holds & (free > 0))
    by_node = open_ranks[np.lexsort((open_ranks, -free[open_ranks], nodes[open_ranks]))]
    there = nodes[by_node]
    turn = np.arange(len(there)) - np.searchsorted(there, there)
    copies = np.bincount(nodes[holds], minlength=nodes.max() + 1)[there] + turn
    node_free = np.bincount(nodes, free)[there]
    return by_node[np.lexsort((by_node, -free[by_node], -node_free, copies))]
