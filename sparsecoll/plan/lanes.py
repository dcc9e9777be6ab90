"""Which piece of a Plan keeps which link busy, and when: its timeline, seen from the links.

A lane is one direction of one link. It carries one piece at a time, so what a lane shows never overlaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.plan.costs import costs_of

if TYPE_CHECKING:
    from sparsecoll.plan.plan import Plan

__all__ = ["Lane", "Pieces", "lanes_of"]

Integers = NDArray[np.int64]


class Pieces(NamedTuple):
    """Columns, with an entry for each piece of ``plan.played`` in the order of the plan's timeline.

    Attributes:
        row: its transfer.
        number: which of the transfer's pieces; of messages that share their links, which part of it.
        chunk, src, dst: what travels, from where, to where.
        bytes: on the wire.
        forwarded: whether a relay passes on what it has received, or the sum that it has made.
        sent: tick at which it begins to leave.
        arrived: tick at which all of it is there.
    """

    row: Integers
    number: Integers
    chunk: Integers
    src: Integers
    dst: Integers
    bytes: Integers
    forwarded: NDArray[np.bool_]
    sent: Integers
    arrived: Integers


class Lane(NamedTuple):
    """One direction of a link.

    Attributes:
        level: ``scale-up`` or ``scale-out``, links of a rank; or ``node``, what a node's ranks share.
        number: of the rank or the node.
        outgoing: out of the rank or node, else into it.
        piece: which pieces, in order of time.
        begin, end: ticks between which the lane is busy with each. Arrivals count from when the latency is over, so
            that a lane into a rank ends with what has arrived.
    """

    level: str
    number: int
    outgoing: bool
    piece: Integers
    begin: Integers
    end: Integers

    @property
    def busy(self) -> int:
        """Ticks."""
        return int((self.end - self.begin).sum())


def lanes_of(plan: Plan) -> tuple[Pieces, list[Lane]]:
    """The pieces of ``plan``, and a lane for each direction of every link of the kinds that carry any.

    Lanes stand in the order of ranks, scale-up before scale-out, out before in; then those of nodes.
    """
    pieces = _pieces(plan)
    costs, node_of = costs_of(plan.topology), np.asarray(plan.topology.node_of, np.int64)
    src, dst = pieces.src, pieces.dst
    crosses = node_of[src] != node_of[dst]
    lanes = []
    for level, which, cost in (("scale-up", ~crosses, costs.up), ("scale-out", crosses, costs.out)):
        if not which.any():
            continue
        ticks = np.asarray(cost, np.int64)
        leaves, enters = pieces.sent, pieces.arrived - pieces.bytes * ticks[dst]
        lanes += _split(level, True, len(ticks), which, src, leaves, leaves + pieces.bytes * ticks[src])
        lanes += _split(level, False, len(ticks), which, dst, enters, pieces.arrived)
    lanes.sort(key=lambda lane: (lane.number, lane.level == "scale-out", not lane.outgoing))
    if crosses.any() and any(costs.node):
        lanes += _node_lanes(plan, pieces, node_of, crosses)
    return pieces, lanes


def _pieces(plan: Plan) -> Pieces:
    times, table = plan.timeline, plan.played
    row, number = times.row.astype(np.int64), times.piece.astype(np.int64)
    count, total = table["pieces"][row].astype(np.int64), plan.transfer_bytes[row]
    chunk, src = table["chunk"][row].astype(np.int64), table["src"][row].astype(np.int64)
    gathers = plan.op == "all_gather"
    return Pieces(
        row=row,
        number=number,
        chunk=chunk,
        src=src,
        dst=table["dst"][row].astype(np.int64),
        bytes=total * (number + 1) // count - total * number // count,
        forwarded=src != plan.place.owners[chunk] if gathers else table["partial"][row],
        sent=times.sent,
        arrived=times.arrived,
    )


def _node_lanes(plan: Plan, pieces: Pieces, node_of: Integers, crosses: NDArray[np.bool_]) -> list[Lane]:
    """The timeline does not tell when a piece passes its nodes' links, so these are played through again.

    As in `sparsecoll.plan.simulate`: pieces come in the order in which they were sent, and a link that is free forwards
    a piece while it still comes in.
    """
    costs = costs_of(plan.topology)
    num_nodes = len(costs.node)
    free = ([0] * num_nodes, [0] * num_nodes)
    ends = (np.zeros(len(crosses), np.int64), np.zeros(len(crosses), np.int64))
    order = np.flatnonzero(crosses)
    order = order[np.lexsort((pieces.src[order], pieces.sent[order]))]
    columns = (each[order].tolist() for each in (pieces.sent, pieces.src, pieces.dst, pieces.bytes))
    for piece, begin, src, dst, size in zip(order.tolist(), *columns, strict=True):
        end = begin + size * costs.out[src]
        for side, node in enumerate((int(node_of[src]), int(node_of[dst]))):
            begin = max(begin, free[side][node])
            end = max(end, begin + size * costs.node[node])
            ends[side][piece] = free[side][node] = end
    ticks = np.asarray(costs.node, np.int64)
    lanes = []
    for side, rank in enumerate((pieces.src, pieces.dst)):
        node = node_of[rank]
        end = ends[side] + side * costs.out_latency
        lanes += _split("node", side == 0, num_nodes, crosses, node, end - pieces.bytes * ticks[node], end)
    return sorted(lanes, key=lambda lane: (lane.number, not lane.outgoing))


def _split(
    level: str,
    outgoing: bool,
    count: int,
    which: NDArray[np.bool_],
    number: Integers,
    begin: Integers,
    end: Integers,
) -> list[Lane]:
    """A lane for each of ``count`` links, of the pieces in ``which``; ``number`` tells the link of each piece."""
    chosen = np.flatnonzero(which)
    chosen = chosen[np.lexsort((end[chosen], begin[chosen], number[chosen]))]
    cuts = np.searchsorted(number[chosen], np.arange(count + 1))
    parts = (chosen[cuts[link] : cuts[link + 1]] for link in range(count))
    return [Lane(level, link, outgoing, part, begin[part], end[part]) for link, part in enumerate(parts)]
