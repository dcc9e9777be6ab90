"""Relieves busy ranks: others compute some of their assignments, with replicas of as few experts as that takes.

Owners start with all assignments of their experts. For a level T, ranks above it hand over what is too much, the
busiest rank first and of each the busiest expert: to ranks below T that hold the expert, and else to ranks below T that
have a slot free, each of which makes a replica. The least T for which this works is found by bisection, once for every
number of slots that is worth a try, since copies cost time as well (UltraEP, arXiv 2606.04101, solves this for a fixed
number of slots).

All numbers are integers, so that the native twin in ``csrc/balance_relief.cpp``, which is what runs, gives the same.

Legend: ``W`` ranks, ``E`` experts, ``M`` moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Relief", "relieve_ranks"]

_NEAR_MEAN = 7
"""Shift: a level within 1/128 of the mean load is as good as the mean, and needs fewer replicas."""


class Relief(NamedTuple):
    """One way to relieve the busy ranks.

    Attributes:
        level: assignments that the busiest rank computes.
        traffic: assignments that leave or reach a rank, on the rank where they are most.
        copies: experts that a rank receives, or of its own sends, on the rank where they are most.
        moves: int64 ``[M, 3]``, rows of (expert, rank, assignments): what is not computed by the expert's owner. A pair
            comes once.
    """

    level: int
    traffic: int
    copies: int
    moves: NDArray[np.int64]


def relieve_ranks(
    loads: NDArray[np.int64],
    owners: NDArray[np.int32],
    holders: NDArray[np.bool_],
    most: int,
    min_tokens: int,
) -> list[Relief]:
    """Ways to balance ``loads`` ``[W, E]``, each with more slots than the last and a lower level.

    Args:
        owners, holders: ``[E]`` and ``[E, W]``, as in a Placement; replicas that are there take part without a copy.
        most: slots for new replicas on each rank.
        min_tokens: the least number of assignments for which a rank gets a replica, at least 1.

    Returns:
        First one without new replicas, then those with 1, 2, 4, ... and ``most`` slots that are better than all before;
        none after one that is near the mean.
    """
    relieving = _Relieving(loads, owners, holders, min_tokens)
    found = [relieving.summary(relieving.least_level(0, relieving.at_owner_level) or [])]
    slots = 1
    while slots <= most and found[-1].level > relieving.near_mean:
        moves = relieving.least_level(slots, found[-1].level)
        if moves is not None:
            found.append(relieving.summary(moves))
        slots = most + 1 if slots == most else min(2 * slots, most)
    return found


Moves = list[tuple[int, int, int]]


class _Relieving:
    """What does not depend on the level."""

    def __init__(
        self, loads: NDArray[np.int64], owners: NDArray[np.int32], holders: NDArray[np.bool_], min_tokens: int
    ) -> None:
        self.loads, self.owners, self.min_tokens = loads, owners.tolist(), min_tokens
        self.world_size = holders.shape[1]
        self.load: list[int] = loads.sum(axis=0).tolist()
        self.held = [np.flatnonzero(mask).tolist() for mask in holders]
        self.has_replicas = int(holders.sum()) > len(owners)
        self.at_owner = [0] * self.world_size
        self.owned: list[list[int]] = [[] for _ in range(self.world_size)]
        for expert in sorted(range(len(self.load)), key=lambda expert: (-self.load[expert], expert)):
            self.at_owner[self.owners[expert]] += self.load[expert]
            self.owned[self.owners[expert]].append(expert)
        self.busiest = sorted(range(self.world_size), key=lambda rank: (-self.at_owner[rank], rank))
        self.at_owner_level = self.at_owner[self.busiest[0]]
        mean = -(-sum(self.load) // self.world_size)
        self.step = max(1, mean >> _NEAR_MEAN)
        self.near_mean = mean + (mean >> _NEAR_MEAN)

    def least_level(self, slots: int, above: int) -> Moves | None:
        """The moves of the least level below ``above``, to a step; None if no such level is found."""
        if above <= self.near_mean or not (slots or self.has_replicas):
            return None
        found = self.moves_at(self.near_mean, slots)
        if found is not None:
            return found
        below, stride = self.near_mean, self.step
        while above - below > self.step:
            middle = (below + above) // 2
            if found is None:
                # It is mostly near the mean: strides double from there until one is enough.
                middle = min(middle, below + stride)
                stride *= 2
            moves = self.moves_at(middle, slots)
            if moves is None:
                below = middle
            else:
                above, found = middle, moves
        return found

    def moves_at(self, level: int, slots: int) -> Moves | None:
        """Moves after which no rank is above ``level``; None if these rules find none."""
        computed = list(self.at_owner)
        free = [slots] * self.world_size
        moves: Moves = []
        for rank in self.busiest:
            excess = computed[rank] - level
            for expert in self.owned[rank]:
                if excess <= 0:
                    break
                left, takers = self.load[expert], set(self.held[expert])
                for least, ranks in ((1, self.held[expert]), (self.min_tokens, range(self.world_size))):
                    is_copy = ranks is not self.held[expert]
                    while excess > 0 and left >= least:
                        # More than the excess where that is too little to be worth a replica.
                        wanted = min(max(excess, least), left)
                        room = {
                            each: level - computed[each]
                            for each in ranks
                            if level - computed[each] >= least and (not is_copy or (free[each] and each not in takers))
                        }
                        if not room:
                            break
                        taker = _best_fit(room, wanted)
                        amount = min(wanted, room[taker])
                        moves.append((expert, taker, amount))
                        takers.add(taker)
                        free[taker] -= is_copy
                        computed[taker] += amount
                        computed[rank] -= amount
                        excess -= amount
                        left -= amount
            if excess > 0:
                return None
        return moves

    def summary(self, moves: Sequence[tuple[int, int, int]]) -> Relief:
        computed, left = list(self.at_owner), list(self.load)
        received, sent = [0] * self.world_size, [0] * self.world_size
        stays = [0] * self.world_size
        copied = set()
        for expert, rank, amount in moves:
            owner = self.owners[expert]
            computed[owner] -= amount
            computed[rank] += amount
            left[expert] -= amount
            stays[rank] += min(amount, int(self.loads[rank, expert]))
            if rank not in self.held[expert]:
                received[rank] += 1
                sent[owner] += expert not in copied
                copied.add(expert)
        for expert, owner in enumerate(self.owners):
            stays[owner] += min(left[expert], int(self.loads[owner, expert]))
        asked: list[int] = self.loads.sum(axis=1).tolist()
        away = [max(there, here) - stay for there, here, stay in zip(computed, asked, stays, strict=True)]
        return Relief(max(computed), max(away), max(*received, *sent), np.array(moves, np.int64).reshape(-1, 3))


def _best_fit(room: dict[int, int], wanted: int) -> int:
    """The tightest of those with room for all of it; otherwise the roomiest; the lowest rank of equals."""
    return min(room, key=lambda rank: (room[rank] < wanted, abs(room[rank] - wanted), rank))
