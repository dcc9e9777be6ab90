"""Which rank computes which token, and in what order the tokens travel. Pure integers, equal on all ranks.

Legend: ``W`` ranks, ``E`` experts, ``H`` experts that a rank holds, ``N`` assignments of a rank (tokens times top-k),
``M`` assignments that a rank receives. Its own assignments are among them: a rank sends to itself as to any other.
Experts with several holders are *hot*.
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
        experts: ``[H]``, the experts that the rank holds: hot ones ascending, then the others ascending. Weights of hot
            ones are gathered in this order, and those of the others are the rank's own, so that rows that compute with
            one buffer are consecutive.
        expert_counts: ``[H]``, rows of each of them.
        num_hot: how many of them are hot.
    """

    send_order: Integers
    send_counts: Integers
    recv_counts: Integers
    recv_order: Integers
    experts: Integers
    expert_counts: Integers
    num_hot: int


@dataclass(frozen=True, eq=False)
class Routes:
    """Where all assignments go.

    Attributes:
        quotas: int64 ``[W, E, W]``: of source s, for expert e, how many assignments rank d computes.
        holders: bool ``[E, W]``; only holders have quotas.
    """

    quotas: Integers
    holders: NDArray[np.bool_]

    def of_rank(self, rank: int) -> RankRoutes:
        """The share of one rank; costs O(E * W + N + M)."""
        sent, received = self.quotas[rank], self.quotas[:, :, rank]
        held, is_hot = self.holders[:, rank], self.holders.sum(axis=1) > 1
        hot, others = np.flatnonzero(held & is_hot), np.flatnonzero(held & ~is_hot)
        experts = np.concatenate([hot, others])
        return RankRoutes(
            send_order=_swap_grouping(sent),
            send_counts=sent.sum(axis=0),
            recv_counts=received.sum(axis=1),
            recv_order=_swap_grouping(received, experts),
            experts=experts,
            expert_counts=received.sum(axis=0)[experts],
            num_hot=len(hot),
        )


def plan_routes(counts: ArrayLike, holders: ArrayLike, owners: ArrayLike, node_of: Sequence[int]) -> Routes:
    """Sends each token to the nearest holder of its expert, and otherwise to the owner (Hecate, section 4.4).

    A source that holds the expert keeps its tokens. One that does not spreads them over the holders in its own node,
    as evenly as integers allow; the holders that take one more are rotated by ``source + expert``, so that small
    counts do not all land on a node's first holder. Without a holder in the node, the owner takes them all.

    Args:
        counts: ``[W, E]``, assignments of each source to each expert.
        holders: bool ``[E, W]``, owners included.
        owners: ``[E]``.
        node_of: ``[W]``, the node of each rank, counted from 0.

    Raises:
        InvalidArgument: shapes that do not fit together, or a negative count.
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
    return Routes(quotas, mask)


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
