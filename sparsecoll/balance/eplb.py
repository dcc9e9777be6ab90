"""DeepSeek's expert-parallel load balancer (EPLB), for experts that stay with their owners.

Legend: ``W`` ranks, ``E`` experts, ``N`` items to be packed, ``P`` packs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsecoll.balance.base import Balance
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Eplb", "pack", "rebalance", "replicate"]

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Eplb:
    """Replicas of the experts with most load per holder, on the ranks with least load.

    EPLB's two steps: one replica after the other goes to the expert with most load per holder; then replicas, the
    heaviest first, go to the rank with least load that has a slot. It fills all slots, whether they help or not, and
    knows neither sources of assignments nor costs. We depart from it in that owners keep their experts, so that only
    replicas are packed; in that no rank gets an expert twice, and none that has no load is copied; and over several
    nodes: EPLB keeps a group of experts, with its replicas, inside a node, for routers that choose groups. Here a
    replica goes to one of the nodes with fewest holders of its expert, for the dispatcher sends the tokens of a node
    without any to the owner. (`rebalance` is the published algorithm as a whole.)

    Attributes:
        replicas: slots on each rank, as far as memory allows. DeepSeek's deployments have one or two.
    """

    replicas: int = 1

    def __post_init__(self) -> None:
        if self.replicas < 0:
            raise InvalidArgument(f"Eplb: expected replicas >= 0, got {self.replicas}")

    @property
    def exact(self) -> bool:
        return False

    def balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """See `Balancer.balance`."""
        by_expert = np.asarray(loads, np.int64).sum(axis=0)
        world_size, nodes = base.world_size, np.array(costs.topology.node_of)
        free = np.full(world_size, min(self.replicas, costs.spare_experts, base.num_chunks), np.int64)
        counts = base.holders.sum(axis=1)
        experts = replicate(by_expert, int(free.sum()), counts, most=world_size)
        weights = by_expert / (counts + np.bincount(experts, minlength=base.num_chunks))

        mask = base.holders.copy()
        busy = np.where(mask, weights[:, None], 0.0).sum(axis=0)
        for expert in experts[np.argsort(-weights[experts], kind="stable")]:
            there = np.bincount(nodes[mask[expert]], minlength=costs.topology.num_nodes)[nodes]
            is_open = (free > 0) & ~mask[expert]
            if weights[expert] > 0 and is_open.any():
                is_open &= there == there[is_open].min()
                rank = np.where(is_open, busy, np.inf).argmin()
                mask[expert, rank] = True
                free[rank] -= 1
                busy[rank] += weights[expert]
        return Balance(Placement(base.owners, mask))


def replicate(weights: ArrayLike, num_replicas: int, counts: ArrayLike, most: int | None = None) -> Integers:
    """Experts that get one replica more, one after the other: each time that with most weight per holder.

    Args:
        weights: ``[E]``.
        num_replicas: how many to share out; fewer are if all experts have ``most``.
        counts: ``[E]``, the holders that each has already.
        most: holders of an expert, at most; None is any number.

    Returns:
        int64, up to ``num_replicas`` experts, in the order in which they got them.
    """
    expert_weights, holders = np.asarray(weights, np.float64), np.array(counts, np.int64)
    chosen: list[int] = []
    shares = expert_weights / holders
    if most is not None:
        shares[holders >= most] = -1.0
    while len(chosen) < num_replicas and shares.max(initial=-1.0) >= 0:
        expert = int(shares.argmax())
        chosen.append(expert)
        holders[expert] += 1
        shares[expert] = -1.0 if holders[expert] == most else expert_weights[expert] / holders[expert]
    return np.array(chosen, np.int64)


def pack(weights: ArrayLike, num_packs: int) -> Integers:
    """Items into packs of equal numbers and nearly equal weights: the heaviest first, each into the lightest pack.

    Args:
        weights: ``[N]``, N a multiple of ``num_packs``.

    Returns:
        int64 ``[P, N / P]``, the items of each pack in the order in which they came.

    Raises:
        InvalidArgument: numbers of items that are not equal.
    """
    item_weights = np.asarray(weights, np.float64)
    if num_packs < 1 or len(item_weights) % num_packs:
        raise InvalidArgument(f"pack: expected packs of equal size, got {len(item_weights)} items in {num_packs} packs")
    size = len(item_weights) // num_packs
    if size == 1:
        return np.arange(num_packs)[:, None]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    full = np.zeros(num_packs)
    for item in np.argsort(-item_weights, kind="stable").tolist():
        lightest = int(full.argmin())
        packs[lightest].append(item)
        full[lightest] = full[lightest] + item_weights[item] if len(packs[lightest]) < size else np.inf
    return np.array(packs, np.int64)


def rebalance(weights: ArrayLike, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> Integers:
    """The published EPLB for one layer, whose experts may all move: which expert is in each slot.

    Where nodes can have equal numbers of groups, groups are packed onto nodes, experts replicated inside a node, and
    replicas packed onto its ranks. Otherwise all ranks are taken to be one node.

    Args:
        weights: ``[E]``; consecutive experts are a group.
        num_slots: of all ranks together.

    Returns:
        int64 ``[num_ranks, num_slots / num_ranks]``; an expert may be twice on a rank.

    Raises:
        InvalidArgument: numbers that do not divide each other, or fewer slots than experts.
    """
    expert_weights = np.asarray(weights, np.float64)
    num_experts = len(expert_weights)
    if num_groups < 1 or num_nodes < 1 or num_ranks < 1 or num_experts % num_groups:
        raise InvalidArgument(f"rebalance: expected groups of equal size, got {num_experts} in {num_groups} groups")
    if num_slots % num_ranks or num_ranks % num_nodes or num_slots < num_experts:
        raise InvalidArgument(
            f"rebalance: expected at least {num_experts} slots, equally many on each rank and ranks on each node, got "
            f"{num_slots} on {num_ranks} ranks on {num_nodes} nodes"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    groups = np.arange(num_experts).reshape(num_groups, -1)
    nodes = pack(expert_weights[groups].sum(axis=1), num_nodes)
    slots, ranks = num_slots // num_nodes, num_ranks // num_nodes
    return np.concatenate([_fill_node(expert_weights, groups[node].ravel(), slots, ranks) for node in nodes])


def _fill_node(weights: NDArray[np.float64], experts: Integers, num_slots: int, num_ranks: int) -> Integers:
    """``[num_ranks, slots of each]``: the ``experts`` of a node and replicas of them."""
    own, ones = weights[experts], np.ones(len(experts), np.int64)
    items = np.concatenate([np.arange(len(experts)), replicate(own, num_slots - len(experts), ones)])
    shares = own / np.bincount(items)
    return experts[items[pack(shares[items], num_ranks)]]
