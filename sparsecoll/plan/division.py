"""Divides work among those who may do it, so that the busiest is as little busy as it can be.

Each item of work may be split among the bins that it allows; a bin starts with a base that nobody can take off it, and
bins may share a second account (the ranks of a node share its link). The least level T that all accounts can stay under
is the optimum of a restricted load-balancing problem whose fractional form is a parametric maximum flow
(`docs/bounds.md`). Bins are filled up to a level greedily, paths of exchanges put right what that misses, and where
there is none the items and bins that are in each other's way give the next level.

All numbers are integers, so that the native planner does the same to the byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Division", "divide"]

_RATE_BITS = 40
_NOWHERE = -1
_ENDLESS = 1 << 62


class Division(NamedTuple):
    """Who does what.

    Attributes:
        level: ticks; no account is above it.
        shares: for each item ``(bin, bytes)`` in ascending order of bins, each positive, in all the item's work.
    """

    level: int
    shares: list[list[tuple[int, int]]]


def divide(
    work: Sequence[int],
    base: Sequence[int],
    allowed: Sequence[Sequence[int]],
    cost: Sequence[int],
    floor: int = 0,
    home: Sequence[int] | None = None,
    pool_of: Sequence[int] | None = None,
    pool_cost: Sequence[int] = (),
) -> Division:
    """Splits ``work[item]`` bytes among ``allowed[item]``.

    Args:
        work: bytes of each item; an item with work allows at least one bin.
        base: bytes on each bin's account from the start.
        allowed: ascending bins of each item.
        cost: ticks that a byte takes each bin, positive.
        floor: least level to aim at, in ticks; a higher one leaves more choice, and so fewer and larger shares.
        home: for each item a bin that does all of it where it has room; -1, or no list, for none.
        pool_of: for each bin the pool with which it shares a second account; none by default.
        pool_cost: ticks that a byte takes each pool; 0 is nothing.

    Returns:
        The least level of at least ``floor`` that is enough, to a byte of each account (to one part in 2^13 where
        costs differ), and shares that keep it.
    """
    home = [_NOWHERE] * len(work) if home is None else home
    filling = _Filling(work, base, allowed, cost, floor, home, pool_of or [0] * len(base), pool_cost or [0])
    while filling.left:
        if not filling.exchange():
            filling.raise_level()
    shares = [sorted((each, share) for each, share in done.items() if share) for done in filling.done]
    return Division(filling.level, shares)


class _Filling:
    def __init__(
        self,
        work: Sequence[int],
        base: Sequence[int],
        allowed: Sequence[Sequence[int]],
        cost: Sequence[int],
        floor: int,
        home: Sequence[int],
        pool_of: Sequence[int],
        pool_cost: Sequence[int],
    ) -> None:
        self.allowed, self.cost, self.pool_of, self.pool_cost = allowed, cost, pool_of, pool_cost
        self.used = list(base)
        self.pool_used = [0] * len(pool_cost)
        for each, amount in enumerate(base):
            self.pool_used[pool_of[each]] += amount
        accounts = [*zip(self.used, cost, strict=True), *zip(self.pool_used, pool_cost, strict=True)]
        self.done: list[dict[int, int]] = [{} for _ in work]
        # Who has least choice goes first, and of those the largest.
        order = sorted(range(len(work)), key=lambda item: (len(allowed[item]), -work[item], item))
        self.left = {item: work[item] for item in order if work[item]}
        self.level = max([floor, self._average(work, base), *(amount * ticks for amount, ticks in accounts)])
        self._reached_bins: list[int] = []
        self._reached_pools: dict[int, int] = {}
        for item in list(self.left):
            self._fill(item, home[item])

    def _average(self, work: Sequence[int], base: Sequence[int]) -> int:
        """The level at which all bins that may do anything have room for everything."""
        bins = sorted({each for item in self.left for each in self.allowed[item]})
        if not bins:
            return 0
        total = sum(work) + sum(base[each] for each in bins)
        return -(-(total << _RATE_BITS) // sum((1 << _RATE_BITS) // self.cost[each] for each in bins))

    def _own_room(self, each: int) -> int:
        """Bytes that a bin can still take by itself."""
        return self.level // self.cost[each] - self.used[each]

    def _pool_room(self, pool: int) -> int:
        ticks = self.pool_cost[pool]
        return self.level // ticks - self.pool_used[pool] if ticks else _ENDLESS

    def _room(self, each: int) -> int:
        return min(self._own_room(each), self._pool_room(self.pool_of[each]))

    def _fill(self, item: int, home: int) -> None:
        """Gives an item to its home, or to the roomiest bins and the rest to the tightest that holds it."""
        rest = self.left[item]
        if home >= 0 and self._room(home) >= rest:
            self._move(item, home, rest)
            rest = 0
        else:
            roomy = sorted(self.allowed[item], key=lambda each: (-self._room(each), each))
            for position, each in enumerate(roomy):
                room = self._room(each)  # less than when it was sorted, if one of its pool has taken something
                if room >= rest:
                    for other in roomy[position + 1 :]:
                        if self._room(other) < rest:
                            break
                        each = other
                    self._move(item, each, rest)
                    rest = 0
                    break
                if room > 0:
                    self._move(item, each, room)
                    rest -= room
        if rest:
            self.left[item] = rest
        else:
            del self.left[item]

    def _move(self, item: int, each: int, amount: int) -> None:
        self.used[each] += amount
        self.pool_used[self.pool_of[each]] += amount
        self.done[item][each] = self.done[item].get(each, 0) + amount

    def exchange(self) -> bool:
        """Finds one path from what is left over to a bin with room, along which each item moves some work on.

        A bin with room of its own whose pool is full is on the way to the other bins of its pool: one of those can
        move something elsewhere.
        """
        on_bin: dict[int, list[int]] = {}
        for item, done in enumerate(self.done):
            for each, share in done.items():
                if share:
                    on_bin.setdefault(each, []).append(item)
        came_from: dict[int, int] = {}  # bin → item that wants to move there
        through: dict[int, int] = {}  # bin → bin of the same pool that would take its room
        left_bin = dict.fromkeys(self.left, _NOWHERE)  # item → bin that it would leave
        self._reached_bins, self._reached_pools = [], {}
        waiting = deque(self.left)
        while waiting:
            item = waiting.popleft()
            for each in self.allowed[item]:
                if each in came_from or each in through:
                    continue
                came_from[each] = item
                leaving = [each]
                pool = self.pool_of[each]
                if self._own_room(each) > 0:
                    if self._pool_room(pool) > 0:
                        self._move_along(each, came_from, through, left_bin)
                        return True
                    if pool not in self._reached_pools:
                        self._reached_pools[pool] = each
                        for other, its_pool in enumerate(self.pool_of):
                            if its_pool == pool and other not in came_from and other not in through:
                                through[other] = each
                                leaving.append(other)
                for bin_ in leaving:
                    self._reached_bins.append(bin_)
                    for other in on_bin.get(bin_, ()):
                        if other not in left_bin:
                            left_bin[other] = bin_
                            waiting.append(other)
        return False

    def _move_along(
        self, end: int, came_from: dict[int, int], through: dict[int, int], left_bin: dict[int, int]
    ) -> None:
        path: list[tuple[int, int]] = []  # (item, to) from the end backwards
        amount = self._room(end)
        each = end
        while True:
            item = came_from[each]
            path.append((item, each))
            if left_bin[item] == _NOWHERE:
                break
            each = left_bin[item]
            amount = min(amount, self.done[item][each])
            if each in through:
                each = through[each]
                amount = min(amount, self._own_room(each))
        amount = min(amount, self.left[path[-1][0]])
        for item, to in path:
            self._move(item, to, amount)
            if left_bin[item] != _NOWHERE:
                self._move(item, left_bin[item], -amount)
        item = path[-1][0]
        self.left[item] -= amount
        if not self.left[item]:
            del self.left[item]

    def raise_level(self) -> None:
        """To where the accounts that the last search found full hold what is left over."""
        costs = [self.pool_cost[pool] for pool in self._reached_pools]
        costs += [self.cost[each] for each in self._reached_bins if self.pool_of[each] not in self._reached_pools]
        rise = -(-(sum(self.left.values()) << _RATE_BITS) // sum((1 << _RATE_BITS) // each for each in costs))
        # At least a byte for each; and where costs differ, not one byte after the other.
        self.level += max(rise, max(costs) if max(costs) == min(costs) else self.level >> 13, 1)
