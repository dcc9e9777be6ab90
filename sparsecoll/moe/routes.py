"""Which rank computes which token, and in what order the tokens travel. Pure integers, equal on all ranks.

Legend: ``W`` ranks, ``E`` experts, ``H`` experts that a rank holds, ``N`` assignments of a rank (tokens times top-k),
``M`` assignments that a rank receives. Its own assignments are among them: a rank sends to itself as to any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsecoll.errors import InvalidArgument

__all__ = ["RankRoutes", "Routes", "plan_routes"]

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RankRoutes:
    """What one rank needs in order to send its assignments, compute those it gets, and bring them back.

    Attributes:
        send_order: ``[N]``, the place in the rank's assignments (sorted by expert) of the row that is sent i-th.
            Rows are sent grouped by destination, then by expert, then in their old order.
        send_counts: ``[W]``, rows to each rank.
        recv_counts: ``[W]``, rows from each rank.
        recv_order: ``[M]``, the place in the received rows (grouped by source, then by expert) of the row that is
            computed i-th. Rows are computed grouped by expert, in the order of ``experts``, then by source.
        experts: ``[H]``, the experts that the rank holds, in the order that was asked for.
        expert_counts: ``[H]``, rows of each of them.
    """

    send_order: Integers
    send_counts: Integers
    recv_counts: Integers
    recv_order: Integers
    experts: Integers
    expert_counts: Integers


@dataclass(frozen=True, eq=False)
class Routes:
    """Where all assignments go.

    Attributes:
        quotas: int64 ``[W, E, W]``: of source s, for expert e, how many assignments rank d computes.
        holders: bool ``[E, W]``; only holders have quotas.
    """

    quotas: Integers
    holders: NDArray[np.bool_]

    def of_rank(self, rank: int, experts: ArrayLike | None = None) -> RankRoutes:
        """The share of one rank; costs O(E * W + N + M).

        Args:
            experts: those that the rank holds, in the order in which it computes them, so that rows that compute with
                one buffer are consecutive; ascending by default.
        """
        sent, received = self.quotas[rank], self.quotas[:, :, rank]
        held = np.flatnonzero(self.holders[:, rank]) if experts is None else np.asarray(experts, np.int64)
        return RankRoutes(
            send_order=_swap_grouping(sent),
            send_counts=sent.sum(axis=0),
            recv_counts=received.sum(axis=1),
            recv_order=_swap_grouping(received, held),
            experts=held,
            expert_counts=received.sum(axis=0)[held],
        )


def plan_routes(
    counts: ArrayLike,
    holders: ArrayLike,
    owners: ArrayLike,
    node_of: Sequence[int],
    quotas: ArrayLike | None = None,
) -> Routes:
    """Sends each token to the nearest holder of its expert: at its source, in the same node, or elsewhere.

    With ``quotas`` holders take as many as those say. A source first fills its own quota. What it has left over goes to
    what is left of the quotas in its node, and then to any; sources take turns in ascending order and fill one holder
    after the other, so that messages are few.

    Without (Hecate, section 4.4), a source that holds the expert keeps its tokens. One that does not spreads them over
    the holders in its own node, as evenly as integers allow; the holders that take one more are rotated by
    ``source + expert``, so that small counts do not all land on a node's first holder. Without a holder in the node,
    the owner takes them all.

    Args:
        counts: ``[W, E]``, assignments of each source to each expert.
        holders: bool ``[E, W]``, owners included.
        owners: ``[E]``.
        node_of: ``[W]``, the node of each rank, counted from 0.
        quotas: ``[E, W]``, how many of each expert's assignments each rank computes.

    Raises:
        InvalidArgument: shapes that do not fit together, a negative count, or quotas that are not as many as the
            assignments or go to others than holders.
    """
    load, mask, owner_ranks = np.asarray(counts, np.int64), np.asarray(holders, np.bool_), np.asarray(owners, np.int64)
    nodes = np.asarray(node_of, np.int64)
    num_experts, world_size = len(owner_ranks), len(nodes)
    if load.shape != (world_size, num_experts) or mask.shape != (num_experts, world_size):
        raise InvalidArgument(
            f"plan_routes: expected counts [{world_size}, {num_experts}] and holders [{num_experts}, {world_size}], "
            f"got {list(load.shape)} and {list(mask.shape)}"
        )
    if load.size and load.min() < 0:
        raise InvalidArgument(f"plan_routes: expected counts of at least 0, got {load.min()}")
    if quotas is None:
        return Routes(_to_nearest(load, mask, owner_ranks, nodes), mask)
    return Routes(_by_quota(load, _checked_quotas(quotas, load, mask), nodes), mask)


def _checked_quotas(quotas: ArrayLike, load: Integers, mask: NDArray[np.bool_]) -> Integers:
    wanted = np.asarray(quotas, np.int64)
    if wanted.shape != mask.shape:
        raise InvalidArgument(f"plan_routes: expected quotas {list(mask.shape)}, got {list(wanted.shape)}")
    for expert, rank in np.argwhere((wanted < 0) | ((wanted > 0) & ~mask)):
        raise InvalidArgument(
            f"plan_routes: expected quotas of at least 0, and only of holders, got {wanted[expert, rank]} of expert "
            f"{expert} for rank {rank}"
        )
    sums, loads = wanted.sum(axis=1), load.sum(axis=0)
    for expert in np.flatnonzero(sums != loads):
        raise InvalidArgument(
            f"plan_routes: expected quotas for the {loads[expert]} assignments to expert {expert}, got {sums[expert]}"
        )
    return wanted


def _by_quota(load: Integers, wanted: Integers, nodes: Integers) -> Integers:
    world_size, num_experts = load.shape
    quotas = np.zeros((world_size, num_experts, world_size), np.int64)
    stays = np.minimum(load.T, wanted)
    expert, source = np.nonzero(stays)
    quotas[source, expert, source] = stays[expert, source]

    # Sources and holders, both by expert, then node, then rank; the first array has what is still to be sent, the
    # second what is still to be filled.
    by_node = np.argsort(nodes, kind="stable")
    sends, takes = (load.T - stays)[:, by_node], (wanted - stays)[:, by_node]
    from_expert, from_place = np.nonzero(sends)
    to_expert, to_place = np.nonzero(takes)
    from_rank, to_rank = by_node[from_place], by_node[to_place]
    left, room = sends[from_expert, from_place], takes[to_expert, to_place]
    num_nodes = int(nodes.max(initial=-1)) + 1
    near = from_expert * num_nodes + nodes[from_rank], to_expert * num_nodes + nodes[to_rank]
    for from_group, to_group in (near, (from_expert, to_expert)):
        if not left.any():
            break
        sender, taker, amounts = _match(left, from_group, room, to_group)
        # A pair comes at most once in each turn, and never in both: what is left of a node is on one side only.
        quotas[from_rank[sender], from_expert[sender], to_rank[taker]] = amounts
        np.subtract.at(left, sender, amounts)
        np.subtract.at(room, taker, amounts)
    return quotas


def _match(
    left: Integers, left_group: Integers, room: Integers, room_group: Integers
) -> tuple[Integers, Integers, Integers]:
    """Pairs what is left with what has room in the same group, both in their order; ``(left, room, amount)``.

    Groups ascend. Laid end to end, all that is paired is one line that both sides cut, each at its own places.
    """
    num_groups = int(max(left_group.max(initial=-1), room_group.max(initial=-1))) + 1
    offered, wanted = _group_sums(left, left_group, num_groups), _group_sums(room, room_group, num_groups)
    paired = np.minimum(offered, wanted)
    left_ends = _ends_on_line(left, left_group, offered, paired)
    room_ends = _ends_on_line(room, room_group, wanted, paired)
    cuts = np.sort(np.concatenate([left_ends, room_ends]))
    amounts = np.diff(cuts, prepend=0)
    begins, amounts = (cuts - amounts)[amounts > 0], amounts[amounts > 0]
    # The one that begins or goes on here is the first that ends later.
    return np.searchsorted(left_ends, begins, "right"), np.searchsorted(room_ends, begins, "right"), amounts


def _group_sums(amounts: Integers, group: Integers, num_groups: int) -> Integers:
    sums = np.zeros(num_groups, np.int64)
    np.add.at(sums, group, amounts)
    return sums


def _ends_on_line(amounts: Integers, group: Integers, sums: Integers, paired: Integers) -> Integers:
    """Where each ends on the line on which group after group has ``paired`` of its ``sums``."""
    inside = np.cumsum(amounts) - (np.cumsum(sums) - sums)[group]
    return (np.cumsum(paired) - paired)[group] + np.minimum(inside, paired[group])


def _to_nearest(load: Integers, mask: NDArray[np.bool_], owner_ranks: Integers, nodes: Integers) -> Integers:
    world_size, num_experts = load.shape
    quotas = np.zeros((world_size, num_experts, world_size), np.int64)
    stays = mask.T
    source, expert = np.nonzero(stays)
    quotas[source, expert, source] = load[source, expert]

    near = _holders_by_node(mask, nodes)
    source, expert = np.nonzero((load > 0) & ~stays)
    group = expert * near.num_nodes + nodes[source]
    is_near = near.sizes[group] > 0

    far_source, far_expert = source[~is_near], expert[~is_near]
    quotas[far_source, far_expert, owner_ranks[far_expert]] = load[far_source, far_expert]

    source, expert, group = source[is_near], expert[is_near], group[is_near]
    sizes = near.sizes[group]
    share, extra = np.divmod(load[source, expert], sizes)
    pair = np.repeat(np.arange(len(sizes)), sizes)
    turn = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    takes_extra = (turn - source[pair] - expert[pair]) % sizes[pair] < extra[pair]
    quotas[source[pair], expert[pair], near.ranks[near.starts[group[pair]] + turn]] = share[pair] + takes_extra
    return quotas


@dataclass(frozen=True)
class _NodeHolders:
    """Holders listed by expert, then by node: group ``expert * num_nodes + node`` is a stretch of ``ranks``."""

    num_nodes: int
    ranks: Integers
    sizes: Integers
    starts: Integers


def _holders_by_node(mask: NDArray[np.bool_], nodes: Integers) -> _NodeHolders:
    num_nodes = int(nodes.max(initial=-1)) + 1
    by_node = np.argsort(nodes, kind="stable")
    expert, place = np.nonzero(mask[:, by_node])
    ranks = by_node[place]
    sizes = np.bincount(expert * num_nodes + nodes[ranks], minlength=len(mask) * num_nodes)
    return _NodeHolders(num_nodes, ranks, sizes, np.cumsum(sizes) - sizes)


def _swap_grouping(sizes: Integers, order: Integers | slice = slice(None)) -> Integers:
    """Reorders rows grouped by (a, b), ``sizes[a, b]`` of each, to be grouped by (b, a): the old place of each row.

    The b come in ``order``, which has all that have rows.
    """
    starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    lengths = sizes.T[order].ravel()
    shift = starts.T[order].ravel() - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum()) + np.repeat(shift, lengths)
