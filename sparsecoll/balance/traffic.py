"""What a Balance makes of loads: assignments that ranks compute, send and receive, and the time that takes.

The rule is the dispatcher's: without quotas a source keeps what it holds, spreads the rest over the holders in its own
node, and otherwise turns to the owner; with quotas a source keeps what the quota lets it, and the rest leaves.

Legend: ``W`` ranks, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.balance.base import Balance
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.placement import Placement

__all__ = ["Spread", "Traffic", "copying_s", "exposed_s", "predicted_s", "traffic_of"]

Integers = NDArray[np.int64]


class Traffic(NamedTuple):
    """int64 ``[W]`` each: assignments that a rank computes, that leave it, and that come to it from others."""

    computed: Integers
    sent: Integers
    received: Integers


def traffic_of(
    loads: Loads, place: Placement, node_of: Sequence[int], quotas: NDArray[np.int64] | None = None
) -> Traffic:
    """Where the assignments of ``loads`` go.

    Args:
        loads: ``[W, E]``.
        node_of: ``[W]``, the node of each rank, counted from 0.
        quotas: ``[E, W]`` whose rows sum to the experts' loads, or None.
    """
    loads = np.asarray(loads, np.int64)
    if quotas is None:
        leaving, arriving = journeys_of(loads, place, node_of)
    else:
        kept = np.minimum(loads, quotas.T)
        leaving, arriving = loads - kept, quotas.T - kept
    sent, received = leaving.sum(axis=1), arriving.sum(axis=1)
    return Traffic(loads.sum(axis=1) - sent + received, sent, received)


def journeys_of(loads: Loads, place: Placement, node_of: Sequence[int]) -> tuple[Integers, Integers]:
    """int64 ``[W, E]`` twice: assignments for each expert that leave each rank, and that arrive there; no quotas."""
    held, nodes = place.holders.T, np.asarray(node_of)
    leaving = np.where(held, 0, loads)
    arriving = np.zeros_like(leaving)
    experts = np.arange(place.num_chunks)

    hot = place.replicated()
    if not len(hot):
        arriving[place.owners, experts] = leaving.sum(axis=0)
        return leaving, arriving

    # [node, expert]: holders in a node, and their list as a stretch of ``ranks`` (by expert, then node).
    by_node = np.argsort(nodes, kind="stable")
    node_starts = np.searchsorted(nodes[by_node], np.arange(nodes.max() + 1))
    sizes = np.add.reduceat(held[by_node], node_starts, axis=0, dtype=np.int64)
    is_near = sizes[nodes] > 0
    arriving[place.owners, experts] = np.where(is_near, 0, leaving).sum(axis=0)

    ranks = by_node[np.nonzero(place.holders[:, by_node])[1]]
    starts = (np.cumsum(sizes.T) - sizes.T.ravel()).reshape(sizes.T.shape)
    source, expert = np.nonzero(is_near & (leaving > 0))
    size, start = sizes[nodes[source], expert], starts[expert, nodes[source]]
    share, extra = np.divmod(leaving[source, expert], size)
    pair = np.repeat(np.arange(len(size)), size)
    turn = np.arange(len(pair)) - np.repeat(np.cumsum(size) - size, size)
    takes_extra = (turn - source[pair] - expert[pair]) % size[pair] < extra[pair]
    np.add.at(arriving, (ranks[start[pair] + turn], expert[pair]), share[pair] + takes_extra)
    return leaving, arriving


def predicted_s(loads: Loads, balance: Balance, costs: Costs) -> float:
    """Expert compute and all-to-alls of a forward and backward, on the rank that takes longest; no copies."""
    return costs.layer_s(*traffic_of(loads, balance.place, costs.topology.node_of, balance.quotas))


def copying_s(base: Placement, place: Placement, costs: Costs, *, exact: bool = False) -> float:
    """What is seen of the copies that make ``place`` of ``base``, and of their gradients; see `exposed_s`."""
    most = int((place.holders & ~base.holders).sum(axis=0).max())
    return exposed_s(most, costs, exact=exact)


def exposed_s(copies: int, costs: Costs, *, exact: bool = False) -> float:
    """How much longer a layer takes because a rank receives so many experts, and gives their gradients back.

    Each way hides under the dense compute before the layer, for backward has at least as much of it; but nothing hides
    a gather that is decided after the router.
    """
    each_way_s = copies * costs.copy_s
    hidden_once_s = max(0.0, each_way_s - costs.hidden_s)
    return hidden_once_s + (each_way_s if exact else hidden_once_s)


class Spread:
    """Experts copied to all ranks one after the other, and what is left of the layer's traffic by then.

    Attributes:
        leaving, arriving: int64 ``[W, E]``, see `journeys_of`; zero for experts that are everywhere.
        copies: int64 ``[W]``, new replicas on each rank.
        order: the experts copied so far.
        traffic: what is left.
        missing: bool ``[E, W]``, who does not hold an expert in the base.
    """

    def __init__(self, loads: Loads, base: Placement, costs: Costs) -> None:
        loads = np.asarray(loads, np.int64)
        self.base = base
        self.leaving, self.arriving = journeys_of(loads, base, costs.topology.node_of)
        self.copies = np.zeros(base.world_size, np.int64)
        self.order: list[int] = []
        sent, received = self.leaving.sum(axis=1), self.arriving.sum(axis=1)
        self.traffic = Traffic(loads.sum(axis=1) - sent + received, sent, received)
        self.missing = ~base.holders

    def preview(self, expert: int) -> Traffic:
        """What copying one more makes of the traffic."""
        leaving, arriving = self.leaving[:, expert], self.arriving[:, expert]
        computed, sent, received = self.traffic
        return Traffic(computed + (leaving - arriving), sent - leaving, received - arriving)

    def copy(self, expert: int) -> None:
        self.traffic = self.preview(expert)
        self.leaving[:, expert] = self.arriving[:, expert] = 0
        self.copies += self.missing[expert]
        self.order.append(expert)

    def place(self, most: int) -> Placement:
        """The Placement after the first ``most`` copies."""
        mask = self.base.holders.copy()
        mask[self.order[:most]] = True
        return Placement(self.base.owners, mask)
