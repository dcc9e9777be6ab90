"""Divides loads among ranks that hold the experts already: the busiest rank as little busy as can be, tokens near.

Every assignment starts at the holder nearest to its source, which is as near as all of them can be. Ranks above a level
T then pass assignments on, over paths on which each rank takes some of one expert and gives up some of another, always
over a path that takes fewest assignments away from where they are (a minimum-cost flow by shortest paths, so that in
the end they are as near as T permits). Where no path leads to a rank below T, the ranks that were reached have no one
else to turn to, and their mean load is the next T.

An assignment is 0 away at its source, 1 in the source's node, and 2 elsewhere. Of an expert's assignments only numbers
count: as many are at home on a rank as that rank asked for, and as many in a node as that node asked for.

All numbers are integers, so that the native twin in ``csrc/balance_divide.cpp``, which is what runs, gives the same.

Legend: ``W`` ranks, ``E`` experts. A *pool* is the holders of an expert in one node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll import native
from sparsecoll.balance.costs import Loads
from sparsecoll.placement import Placement

__all__ = ["divide_loads", "divide_readably"]


def divide_loads(loads: Loads, place: Placement, node_of: Sequence[int]) -> NDArray[np.int64]:
    """Quotas ``[E, W]`` of holders for which the busiest rank computes as little as ``place`` permits.

    Of all such quotas they are some for which assignments are nearest to their sources.

    Args:
        loads: ``[W, E]``.
        node_of: ``[W]``, the node of each rank, counted from 0.
    """
    nodes = np.asarray(node_of, np.int32)
    return native.divide_loads(np.ascontiguousarray(loads, np.int64), place.owners, place.holders, nodes)


def divide_readably(
    loads: Loads, owners: NDArray[np.int32], holders: NDArray[np.bool_], node_of: NDArray[np.int32]
) -> NDArray[np.int64]:
    """What `divide_loads` does, step by step."""
    division = _Division(loads, owners, holders, node_of.tolist())
    level = division.least_level
    while (higher := division.reach(level)) is not None:
        level = higher
    return division.quotas()


@dataclass
class _Pool:
    """Assignments of an expert to the holders of one node; ``local`` came from there."""

    expert: int
    amount: int
    local: int
    seats: list[_Seat]


@dataclass
class _Seat:
    """A holder in a pool: what it computes of the expert, and how much of the expert it asked for."""

    pool: int
    rank: int
    amount: int
    local: int


class _Step(NamedTuple):
    """How a search came to a place: from another one, by giving up or taking on assignments of a pool or a seat.

    Attributes:
        limit: how many assignments the step costs the same for; None for any number.
        what: of what the amount changes, by ``sign`` for each assignment.
    """

    came_from: int
    limit: int | None
    what: _Pool | _Seat
    sign: int


class _Division:
    """Places of a search are ranks, then pools, then experts."""

    def __init__(
        self, loads: Loads, owners: NDArray[np.int32], holders: NDArray[np.bool_], node_of: Sequence[int]
    ) -> None:
        self.loads, self.owners, self.holders, self.node_of = loads, owners.tolist(), holders, node_of
        self.num_experts, self.world_size = holders.shape
        self.fixed = [0] * self.world_size
        self.hot = [expert for expert in range(self.num_experts) if holders[expert].sum() > 1]
        load = loads.sum(axis=0).tolist()
        for expert in {*range(self.num_experts)} - {*self.hot}:
            self.fixed[self.owners[expert]] += load[expert]
        self.least_level = max(-(-sum(load) // self.world_size), *self.fixed)

    def reach(self, level: int) -> int | None:
        """Starts anew and brings all ranks down to a level; a higher one that is needed if that cannot be."""
        self._start()
        while any(each > level for each in self.computed):
            end = self._search(level)
            if end is None:
                reached = [rank for rank in range(self.world_size) if self.cost[rank] is not None]
                return -(-sum(self.computed[rank] for rank in reached) // len(reached))
            self._move_along(end, level)
        return None

    def quotas(self) -> NDArray[np.int64]:
        quotas = np.zeros((self.num_experts, self.world_size), np.int64)
        quotas[np.arange(self.num_experts), self.owners] = self.loads.sum(axis=0)
        quotas[self.hot] = 0
        for pool in self.pools:
            for seat in pool.seats:
                quotas[pool.expert, seat.rank] = seat.amount
        return quotas

    def _start(self) -> None:
        """Every assignment at a nearest holder: those of a pool that are nobody's own go to the least busy one."""
        self.computed = list(self.fixed)
        self.pools: list[_Pool] = []
        self.pools_of: dict[int, list[int]] = {}
        self.seats_of: list[list[_Seat]] = [[] for _ in range(self.world_size)]
        strays = []
        for expert in self.hot:
            self.pools_of[expert] = []
            away = int(self.loads[:, expert].sum())
            for node in range(max(self.node_of) + 1):
                ranks = [rank for rank in range(self.world_size) if self.node_of[rank] == node]
                held = [rank for rank in ranks if self.holders[expert, rank]]
                if not held:
                    continue
                number = len(self.pools)
                asked = {rank: int(self.loads[rank, expert]) for rank in ranks}
                pool = _Pool(expert, sum(asked.values()), sum(asked.values()), [])
                pool.seats = [_Seat(number, rank, asked[rank], asked[rank]) for rank in held]
                self.pools.append(pool)
                self.pools_of[expert].append(number)
                for seat in pool.seats:
                    self.seats_of[seat.rank].append(seat)
                    self.computed[seat.rank] += seat.amount
                strays.append((pool.amount - sum(asked[rank] for rank in held), pool))
                away -= pool.amount
            for number in self.pools_of[expert]:
                for seat in self.pools[number].seats:
                    if seat.rank == self.owners[expert]:
                        seat.amount += away
                        self.pools[number].amount += away
                        self.computed[seat.rank] += away
        for stray, pool in sorted(strays, key=lambda each: -each[0]):
            owner = self.owners[pool.expert]
            seat = min(pool.seats, key=lambda seat: (self.computed[seat.rank], seat.rank != owner, seat.rank))
            seat.amount += stray
            self.computed[seat.rank] += stray

    def _search(self, level: int) -> int | None:
        """Finds cheapest ways from ranks above the level; the nearest rank below it, if one was reached."""
        num_places = self.world_size + len(self.pools) + self.num_experts
        self.cost: list[int | None] = [None] * num_places
        self.step: list[_Step | None] = [None] * num_places
        self.waiting = deque(rank for rank in range(self.world_size) if self.computed[rank] > level)
        self.is_waiting = [False] * num_places
        for rank in self.waiting:
            self.cost[rank] = 0
            self.is_waiting[rank] = True
        first_expert = self.world_size + len(self.pools)
        while self.waiting:
            place = self.waiting.popleft()
            self.is_waiting[place] = False
            if place < self.world_size:
                for seat in self.seats_of[place]:
                    if seat.amount:
                        self._give_up(place, self.world_size + seat.pool, seat)
            elif place < first_expert:
                pool = self.pools[place - self.world_size]
                for seat in pool.seats:
                    self._take_on(place, seat.rank, seat)
                if len(self.pools_of[pool.expert]) > 1 and pool.amount:
                    self._give_up(place, first_expert + pool.expert, pool)
            else:
                for number in self.pools_of[place - first_expert]:
                    self._take_on(place, self.world_size + number, self.pools[number])
        ends = [
            (cost, rank)
            for rank, cost in enumerate(self.cost[: self.world_size])
            if cost is not None and self.computed[rank] < level
        ]
        return min(ends)[1] if ends else None

    def _give_up(self, place: int, to: int, what: _Pool | _Seat) -> None:
        """Those who are not at home here go first, and are no farther away elsewhere."""
        if what.amount > what.local:
            self._relax(place, to, -1, _Step(place, what.amount - what.local, what, -1))
        else:
            self._relax(place, to, 0, _Step(place, what.amount, what, -1))

    def _take_on(self, place: int, to: int, what: _Pool | _Seat) -> None:
        if what.amount < what.local:
            self._relax(place, to, 0, _Step(place, what.local - what.amount, what, 1))
        else:
            self._relax(place, to, 1, _Step(place, None, what, 1))

    def _relax(self, place: int, to: int, cost: int, step: _Step) -> None:
        there, here = self.cost[to], self.cost[place]
        assert here is not None
        if there is None or here + cost < there:
            self.cost[to] = here + cost
            self.step[to] = step
            if not self.is_waiting[to]:
                self.is_waiting[to] = True
                self.waiting.append(to)

    def _move_along(self, end: int, level: int) -> None:
        amount = level - self.computed[end]
        steps = []
        begin = end
        while (step := self.step[begin]) is not None:
            steps.append(step)
            amount = amount if step.limit is None else min(amount, step.limit)
            begin = step.came_from
        amount = min(amount, self.computed[begin] - level)
        for step in steps:
            step.what.amount += step.sign * amount
        self.computed[begin] -= amount
        self.computed[end] += amount
