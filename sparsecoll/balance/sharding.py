"""Who owns which expert, in all layers together (Hecate's Algorithm 2, section 4.3), and whether moving pays.

Legend: ``L`` layers, ``W`` ranks, ``E`` experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from sparsecoll.balance.base import Balancer
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.balance.traffic import copying_s, predicted_s
from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Sharding", "best_sharding", "migration_bytes", "shard_experts", "sharding_gain_s"]

_MOST_OVER_MEAN = 1.1


class Sharding(NamedTuple):
    """Owners ``[L]`` without replicas, and the predicted seconds of an iteration that they save."""

    owners: list[Placement]
    gain_s: float


def best_sharding(
    loads: Sequence[Loads], current: Sequence[Placement], costs: Sequence[Costs], balancer: Balancer
) -> Sharding:
    """What `shard_experts` makes of several guesses of how many experts will be copied; the one that saves most time.

    The overlap degree is Hecate's guess. What a balancer copies is more where seen copies pay, and fewer where it has
    rules or memory of its own; owners that are level for the wrong experts are slower than before. So three guesses are
    tried: the overlap degree, what the balancer copies now, and none. If no owners save time, ``current`` is the answer
    (without its replicas), and nothing moves.
    """
    kept = [Placement.of_owners(place.owners, place.world_size) for place in current]
    now_s, now = _step(loads, kept, balancer, costs)
    best = Sharding(kept, 0.0)
    degrees = [cost.overlap_degree for cost in costs]
    for num_copied in (degrees, now, [0] * len(kept)):
        owners = shard_experts(loads, kept, costs, num_copied)
        gain_s = now_s - _step(loads, owners, balancer, costs)[0]
        if gain_s > best.gain_s:
            best = Sharding(owners, gain_s)
    return best


def shard_experts(
    loads: Sequence[Loads],
    current: Sequence[Placement],
    costs: Sequence[Costs],
    num_copied: Sequence[int] | None = None,
) -> list[Placement]:
    """Owners such that in every layer nodes and ranks have nearly equal load of the experts that get no copies.

    Every rank owns as many experts as any other over all layers, give or take one, and any number of one layer. The
    experts of a layer with most load will be copied, so it does not matter who owns them, and they fill what is left.
    All others come by load, layers with the busiest of them first; each goes to the node and the rank with least load
    of its layer that have a slot, to those with fewer slots among equals. We depart from the paper in that nothing
    moves without a cause: an expert stays where it is as long as there is a slot, and neither rank nor node get more
    than a tenth above the mean, or than some would get if experts were dealt out anew. (Without the tenth, noise in the
    loads of equal experts would move half of them.)

    Args:
        loads: ``[L]``, of each layer; means of recent forwards, say.
        current: ``[L]``, present owners; replicas do not matter.
        costs: ``[L]``.
        num_copied: ``[L]``, how many experts of each layer will be copied; None is Hecate's t (`Costs.overlap_degree`).

    Returns:
        ``[L]`` placements without replicas.

    Raises:
        InvalidArgument: lists of different lengths, or layers on different ranks.
    """
    if not len(loads) == len(current) == len(costs):
        raise InvalidArgument(
            f"shard_experts: expected loads, owners and costs of all layers, got {len(loads)}, {len(current)} and "
            f"{len(costs)}"
        )
    if not current:
        return []
    nodes = costs[0].topology.node_of
    for layer, (place, cost) in enumerate(zip(current, costs, strict=True)):
        if place.world_size != len(nodes) or cost.topology.node_of != nodes:
            raise InvalidArgument(
                f"shard_experts: expected all layers on the same {len(nodes)} ranks, got layer {layer}"
            )

    by_expert = [np.asarray(each, np.int64).sum(axis=0).tolist() for each in loads]
    ranking = [np.argsort(-np.array(each), kind="stable").tolist() for each in by_expert]
    if num_copied is None:
        num_copied = [cost.overlap_degree for cost in costs]
    hot = [order[:count] for order, count in zip(ranking, num_copied, strict=True)]
    cold = [order[count:] for order, count in zip(ranking, num_copied, strict=True)]

    free = _slots(current)
    owners = [place.owners.tolist() for place in current]
    busiest_first = sorted(
        (layer for layer in range(len(current)) if cold[layer]), key=lambda each: -by_expert[each][cold[each][0]]
    )
    for layer in busiest_first:
        _place_cold(cold[layer], by_expert[layer], owners[layer], free, nodes)
    for layer, experts in enumerate(hot):
        _place_hot(experts, owners[layer], free)
    return [Placement.of_owners(each, len(nodes)) for each in owners]


def _slots(current: Sequence[Placement]) -> list[int]:
    """``[W]``, how many experts each rank is to own; what does not divide evenly goes to those that own most now."""
    owned = np.sum([np.bincount(place.owners, minlength=place.world_size) for place in current], axis=0)
    share, extra = divmod(int(owned.sum()), len(owned))
    slots = np.full(len(owned), share)
    slots[np.argsort(-owned, kind="stable")[:extra]] += 1
    return slots.tolist()


def _place_cold(
    experts: Sequence[int], loads: Sequence[int], owners: list[int], free: list[int], nodes: Sequence[int]
) -> None:
    """Writes into ``owners`` those of a layer's experts, which come by load, and takes their slots from ``free``."""
    members: list[list[int]] = [[] for _ in range(max(nodes) + 1)]
    for rank, node in enumerate(nodes):
        members[node].append(rank)
    by_load, sizes = [loads[expert] for expert in experts], [len(ranks) for ranks in members]
    of_rank, of_node = [0] * len(nodes), [0] * len(members)
    most_of_rank, most_of_node = _fair(by_load, [1] * len(nodes)), _fair(by_load, sizes)

    def stays(rank: int, load: int) -> bool:
        node = nodes[rank]
        fits_node = of_node[node] + load <= most_of_node * sizes[node]
        return free[rank] > 0 and of_rank[rank] + load <= most_of_rank and fits_node

    def least_loaded(present: int) -> int:
        open_nodes = [node for node, ranks in enumerate(members) if any(free[rank] for rank in ranks)]
        node = min(
            open_nodes,
            key=lambda each: (
                of_node[each] / sizes[each],
                each != nodes[present],
                sum(free[rank] for rank in members[each]),
            ),
        )
        open_ranks = [rank for rank in members[node] if free[rank]]
        return min(open_ranks, key=lambda rank: (of_rank[rank], rank != present, free[rank]))

    for expert in experts:
        load, present = loads[expert], owners[expert]
        owner = present if stays(present, load) else least_loaded(present)
        owners[expert] = owner
        free[owner] -= 1
        of_rank[owner] += load
        of_node[nodes[owner]] += load


def _fair(loads: Sequence[int], sizes: Sequence[int]) -> float:
    """The load for each unit of size that a bin may have: of the fullest if loads went to the emptiest, or the mean."""
    bins = [(0.0, number) for number in range(len(sizes))]
    for load in loads:
        full, number = heappop(bins)
        heappush(bins, (full + load / sizes[number], number))
    return max(_MOST_OVER_MEAN * sum(loads) / sum(sizes), max(bins)[0])


def _place_hot(experts: Sequence[int], owners: list[int], free: list[int]) -> None:
    """The same for experts that will be copied: they stay, or go where fewest of them are."""
    here = [0] * len(free)
    for expert in experts:
        if not free[owners[expert]]:
            owners[expert] = min(
                (rank for rank, slots in enumerate(free) if slots), key=lambda rank: (here[rank], -free[rank])
            )
        free[owners[expert]] -= 1
        here[owners[expert]] += 1


def sharding_gain_s(
    loads: Sequence[Loads],
    old: Sequence[Placement],
    new: Sequence[Placement],
    balancer: Balancer,
    costs: Sequence[Costs],
) -> float:
    """Predicted seconds of an iteration that new owners save; below 0 if it gets longer.

    Each layer is balanced by ``balancer`` before and after, and counts with what is seen of the copies. Arguments are
    ``[L]``.
    """

    return _step(loads, old, balancer, costs)[0] - _step(loads, new, balancer, costs)[0]


def _step(
    loads: Sequence[Loads], owners: Sequence[Placement], balancer: Balancer, costs: Sequence[Costs]
) -> tuple[float, list[int]]:
    """Predicted seconds of all layers, and ``[L]``, how many experts of each are copied."""
    total_s, num_copied = 0.0, []
    for load, base, cost in zip(loads, owners, costs, strict=True):
        balance = balancer.balance(load, base, cost)
        total_s += predicted_s(load, balance, cost) + copying_s(base, balance.place, cost, exact=balancer.exact)
        num_copied.append(len(balance.place.replicated()))
    return total_s, num_copied


def migration_bytes(old: Sequence[Placement], new: Sequence[Placement], state_bytes: Sequence[int]) -> int:
    """What the busiest rank sends or receives when experts move from old to new owners, whichever is more.

    Args:
        old, new: ``[L]``.
        state_bytes: ``[L]``, one expert's parameters and optimizer state.
    """
    if not old:
        return 0
    traffic = np.zeros((2, old[0].world_size), np.int64)
    for before, after, each in zip(old, new, state_bytes, strict=True):
        moves = before.owners != after.owners
        np.add.at(traffic[0], before.owners[moves], each)
        np.add.at(traffic[1], after.owners[moves], each)
    return int(traffic.max())
