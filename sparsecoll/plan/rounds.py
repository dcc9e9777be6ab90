"""In which round of grouped messages each piece of a Plan travels, for back ends that move groups of messages.

NCCL carries out a group of sends and receives as one kernel, which ends when the last of its messages has arrived; a
rank's next group starts then. A *round* is a group whose number is the same at both ends of every message. So whoever
is in the earliest unfinished round finds its peers there or on their way, and no two ranks can wait for each other.

[Note: how many rounds] In few rounds a relay waits for all that comes before it; each round more costs a launch, and
where rounds are shorter than pieces take, links wait for each other. So a few numbers are tried and the fastest taken.
Pieces that share a round are one message, so more of them than rounds would only make this slower: with at most 8 a
range, times on 8 to 64 ranks were those with all to 4 %.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.plan.costs import costs_of
from sparsecoll.plan.plan import Plan
from sparsecoll.plan.transfer import Table

__all__ = ["Rounds", "rounds_of"]

_ROUND_S = 10e-6
"""What one more round costs beside its bytes: the launch of a group and the wait for its slowest message."""

_NUM_BUCKETS = (1, 2, 4, 8, 16, 32)
_MOST_PIECES = 8

Integers = NDArray[np.int64]


class Rounds(NamedTuple):
    """The round of every piece; equal on all ranks.

    Attributes:
        pieces: ``[num_transfers]``, into how many each transfer is cut here.
        row, piece: of every piece, row by row.
        number: of the round; a piece that is forwarded comes at least one round earlier than it goes on.
        num_rounds: in all.
        time_s: what they take on the plan's topology if every round waits for the one before on all ranks.
    """

    pieces: Integers
    row: Integers
    piece: Integers
    number: Integers
    num_rounds: int
    time_s: float


@lru_cache(maxsize=512)
def rounds_of(plan: Plan) -> Rounds:
    """Divides a plan into rounds by its stages."""
    table = plan.transfers
    pieces = np.minimum(table["pieces"], _MOST_PIECES).astype(np.int64)
    first = np.cumsum(pieces) - pieces
    row = np.repeat(np.arange(len(table)), pieces)
    piece = np.arange(len(row)) - first[row]
    if not len(table):
        return Rounds(pieces, row, piece, row, 0, 0.0)
    stage = table["stage"][row].astype(np.int64) + piece * table["span"][row] // pieces[row]
    before, after = _edges(table, pieces, first, gathers=plan.op == "all_gather")
    busy, last = _Busy(plan, pieces, row, piece), int(stage.max())
    best: Rounds | None = None
    for buckets in sorted({min(number, last + 1) for number in _NUM_BUCKETS}):
        number = _after_needs(stage * buckets // (last + 1), before, after)
        # A round in which nothing travels would be a launch for nothing.
        used = np.bincount(number) > 0
        number, num_rounds = (np.cumsum(used) - 1)[number], int(used.sum())
        time_s = busy.time_s(number, num_rounds) + num_rounds * _ROUND_S
        if best is None or time_s < best.time_s:
            best = Rounds(pieces, row, piece, number, num_rounds, time_s)
    assert best is not None
    return best


class _Busy:
    """How long each piece keeps the links at both its ends."""

    def __init__(self, plan: Plan, pieces: Integers, row: Integers, piece: Integers) -> None:
        table, costs = plan.transfers, costs_of(plan.topology)
        size, count = plan.transfer_bytes[row], pieces[row]
        length = size * (piece + 1) // count - size * piece // count
        node_of = np.asarray(plan.topology.node_of)
        src, dst = table["src"][row], table["dst"][row]
        up, out, node = (np.asarray(each, np.float64) * costs.tick_s for each in (costs.up, costs.out, costs.node))
        crosses = node_of[src] != node_of[dst]
        world, nodes = len(node_of), int(node_of.max()) + 1
        # Every rank has a link to its node and one to other nodes, and every node one that its ranks share.
        self._ends = [
            (np.where(crosses, world + src, src), length * np.where(crosses, out[src], up[src]), 2 * world),
            (np.where(crosses, world + dst, dst), length * np.where(crosses, out[dst], up[dst]), 2 * world),
            (node_of[src], length * crosses * node[node_of[src]], nodes),
            (node_of[dst], length * crosses * node[node_of[dst]], nodes),
        ]

    def time_s(self, number: Integers, count: int) -> float:
        """The sum over rounds of the time of the busiest link."""
        longest = np.zeros(count)
        for link, busy_s, num_links in self._ends:
            by_round = np.bincount(number * num_links + link, busy_s, count * num_links)
            longest = np.maximum(longest, by_round.reshape(count, num_links).max(axis=1))
        return float(longest.sum())


def _edges(table: Table, pieces: Integers, first: Integers, *, gathers: bool) -> tuple[Integers, Integers]:
    """Pieces that must have arrived, and the pieces that wait for them; ranges that do are cut alike.

    As `sparsecoll.plan.simulate.needs_of` has it, for tables of many rows.
    """
    cuts, cut = np.unique(table["begin"], return_inverse=True)
    number = table["chunk"].astype(np.int64) * len(cuts) + cut
    width = int(max(table["src"].max(), table["dst"].max())) + 1
    arrives, leaves = number * width + table["dst"], number * width + table["src"]
    waiting = np.arange(len(table)) if gathers else np.flatnonzero(table["partial"])
    order = np.argsort(arrives, kind="stable")
    begin = np.searchsorted(arrives[order], leaves[waiting], "left")
    count = np.searchsorted(arrives[order], leaves[waiting], "right") - begin
    after = np.repeat(waiting, count)
    before = order[np.arange(len(after)) + np.repeat(begin - (np.cumsum(count) - count), count)]
    each = np.repeat(np.arange(len(before)), pieces[before])
    offset = np.arange(len(each)) - np.repeat(np.cumsum(pieces[before]) - pieces[before], pieces[before])
    return first[before][each] + offset, first[after][each] + offset


def _after_needs(number: Integers, before: Integers, after: Integers) -> Integers:
    """Moves pieces later until each comes after what it forwards."""
    limit = len(number) + int(number.max())
    while (number[after] <= number[before]).any():
        number = number.copy()
        np.maximum.at(number, after, number[before] + 1)
        if number.max() > limit:
            raise InvalidArgument("plan: expected transfers that do not wait for each other in a circle")
    return number
