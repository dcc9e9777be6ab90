"""In which round of grouped messages each piece of a Plan travels, for back ends that move groups of messages.

NCCL carries out a group of sends and receives as one kernel, which ends when the last of its messages has arrived; a
rank's next group starts then. A *round* is a group whose number is the same at both ends of every message. So whoever
is in the earliest unfinished round finds its peers there or on their way, and no two ranks can wait for each other.

[Note: how many rounds] In few rounds a relay waits for all that comes before it; each round more costs a launch, and
where rounds are shorter than pieces take, links wait for each other. So a few numbers are tried and the fastest taken.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.plan.costs import costs_of
from sparsecoll.plan.plan import Plan
from sparsecoll.plan.simulate import needs_of, pieces_of
from sparsecoll.plan.transfer import Table

__all__ = ["Rounds", "rounds_of"]

_ROUND_S = 10e-6
"""What one more round costs beside its bytes: the launch of a group and the wait for its slowest message."""

_NUM_BUCKETS = (1, 2, 4, 8, 16, 32)


class Rounds(NamedTuple):
    """The round of every piece; equal on all ranks.

    Attributes:
        row, piece: in the order in which messages of a pair of ranks are posted.
        number: of the round; a piece that is forwarded comes at least one round earlier than it goes on.
        num_rounds: in all.
        time_s: what they take on the plan's topology if every round waits for the one before on all ranks.
    """

    row: NDArray[np.int32]
    piece: NDArray[np.int32]
    number: NDArray[np.int64]
    num_rounds: int
    time_s: float


@lru_cache(maxsize=512)
def rounds_of(plan: Plan) -> Rounds:
    """Divides a plan into rounds by its stages."""
    table = plan.transfers
    row, piece, stage = pieces_of(table)
    if not len(table):
        return Rounds(row, piece, stage, 0, 0.0)
    before, after = _edges(table, gathers=plan.op == "all_gather")
    last = int(stage.max())
    busy = _Busy(plan, row, piece)
    best: Rounds | None = None
    for buckets in sorted({min(number, last + 1) for number in _NUM_BUCKETS}):
        number = stage * buckets // (last + 1)
        number = _after_needs(table, row, piece, number, before, after)
        # A round in which nothing travels would be a launch for nothing.
        used, number = np.unique(number, return_inverse=True)
        time_s = busy.time_s(number, len(used)) + len(used) * _ROUND_S
        if best is None or time_s < best.time_s:
            best = Rounds(row, piece, number.astype(np.int64), len(used), time_s)
    assert best is not None
    return best


class _Busy:
    """How long each piece keeps the links at both its ends."""

    def __init__(self, plan: Plan, row: NDArray[np.int32], piece: NDArray[np.int32]) -> None:
        table, costs = plan.transfers, costs_of(plan.topology)
        size, pieces = plan.transfer_bytes[row], table["pieces"][row].astype(np.int64)
        length = size * (piece + 1) // pieces - size * piece // pieces
        node_of = np.asarray(plan.topology.node_of)
        src, dst = table["src"][row], table["dst"][row]
        up, out, node = (np.asarray(each, np.float64) * costs.tick_s for each in (costs.up, costs.out, costs.node))
        crosses = node_of[src] != node_of[dst]
        world, nodes = len(node_of), int(node_of.max()) + 1
        # Every rank has a link to its node and one to other nodes, and every node one that its ranks share.
        self._ends = [
            (np.where(crosses, world + src, src), length * np.where(crosses, out[src], up[src]), 2 * world),
            (np.where(crosses, world + dst, dst), length * np.where(crosses, out[dst], up[dst]), 2 * world),
        ]
        if len(node):
            shared = length * crosses
            self._ends.append((node_of[src], shared * node[node_of[src]], nodes))
            self._ends.append((node_of[dst], shared * node[node_of[dst]], nodes))

    def time_s(self, number: NDArray[np.int64], count: int) -> float:
        """The sum over rounds of the time of the busiest link."""
        longest = np.zeros(count)
        for link, busy_s, num_links in self._ends:
            by_round = np.bincount(number * num_links + link, busy_s, count * num_links)
            longest = np.maximum(longest, by_round.reshape(count, num_links).max(axis=1))
        return float(longest.sum())


def _edges(table: Table, *, gathers: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that must have arrived, and the rows that wait for them."""
    needs = needs_of(table, gathers=gathers)
    before = [need for each in needs for need in each]
    after = [number for number, each in enumerate(needs) for _ in each]
    return np.array(before, np.int64), np.array(after, np.int64)


def _after_needs(
    table: Table,
    row: NDArray[np.int32],
    piece: NDArray[np.int32],
    number: NDArray[np.int64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Moves pieces later until each comes after what it forwards. Ranges that wait for each other are cut alike."""
    counts = table["pieces"].astype(np.int64)
    first = np.cumsum(counts) - counts
    at = first[row] + piece
    by_piece = np.empty(len(row), np.int64)
    by_piece[at] = number
    each = np.repeat(np.arange(len(before)), counts[before])
    offset = np.arange(len(each)) - np.repeat(np.cumsum(counts[before]) - counts[before], counts[before])
    sources, targets = first[before][each] + offset, first[after][each] + offset
    while (by_piece[targets] <= by_piece[sources]).any():
        np.maximum.at(by_piece, targets, by_piece[sources] + 1)
        if by_piece.max() > len(row) + int(number.max()):
            raise InvalidArgument("plan: expected transfers that do not wait for each other in a circle")
    return by_piece[at]
