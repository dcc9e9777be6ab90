"""The division of forward work against a linear programme, and its manners: who is at home does the work where it
fits, and a higher level leaves more choice."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from sparsecoll.plan.division import Division, divide


class Load(NamedTuple):
    """Arguments of `divide`."""

    work: list[int]
    base: list[int]
    allowed: list[list[int]]
    cost: list[int]
    pool_of: list[int]
    pool_cost: list[int]

    def divide(self, floor: int = 0, home: list[int] | None = None) -> Division:
        return divide(self.work, self.base, self.allowed, self.cost, floor, home, self.pool_of, self.pool_cost)

    def accounts(self, division: Division) -> list[int]:
        """Ticks on the account of every bin and every pool."""
        used = list(self.base)
        for shares in division.shares:
            for each, amount in shares:
                used[each] += amount
        pools = [0] * len(self.pool_cost)
        for each, amount in enumerate(used):
            pools[self.pool_of[each]] += amount
        pairs = [*zip(used, self.cost, strict=True), *zip(pools, self.pool_cost, strict=True)]
        return [amount * ticks for amount, ticks in pairs]

    def optimum(self) -> float:
        """The least level, by a linear programme over shares of items."""
        columns = [(item, each) for item, bins in enumerate(self.allowed) for each in bins]
        scale = max(sum(self.work) + sum(self.base), 1)
        num_accounts = len(self.cost) + len(self.pool_cost)
        upper = np.zeros((num_accounts, len(columns) + 1))
        limits = np.zeros(num_accounts)
        for each, amount in enumerate(self.base):
            pool = len(self.cost) + self.pool_of[each]
            limits[each] -= amount * self.cost[each] / scale
            limits[pool] -= amount * self.pool_cost[self.pool_of[each]] / scale
        equal = np.zeros((len(self.work), len(columns) + 1))
        for column, (item, each) in enumerate(columns):
            equal[item, column] = 1.0
            upper[each, column] = self.work[item] * self.cost[each] / scale
            upper[len(self.cost) + self.pool_of[each], column] = (
                self.work[item] * self.pool_cost[self.pool_of[each]] / scale
            )
        upper[:, -1] = -1.0
        has_work = [item for item, amount in enumerate(self.work) if amount]
        objective = np.zeros(len(columns) + 1)
        objective[-1] = 1.0
        found = linprog(objective, upper, limits, equal[has_work], np.ones(len(has_work)), method="highs")
        assert found.status == 0, found.message
        return float(found.fun) * scale


def draw_load(random: np.random.Generator, *, alike: bool = False, has_pools: bool = True) -> Load:
    num_bins, num_items = int(random.integers(1, 9)), int(random.integers(0, 12))
    density = random.choice([0.2, 0.5, 1.0])
    allowed = []
    for _ in range(num_items):
        bins = np.flatnonzero(random.random(num_bins) < density).tolist()
        allowed.append(bins or [int(random.integers(num_bins))])
    work = random.choice([0, 1, 1000, 1 << 20, 3_333_333], num_items)
    base = random.choice([0, 0, 5, 1 << 19, 2 << 20], num_bins)
    cost = random.integers(2048, 40_000, num_bins) if not alike else np.full(num_bins, 2048)
    num_pools = int(random.integers(1, 4)) if has_pools else 1
    pool_of = random.integers(0, num_pools, num_bins)
    pool_cost = random.choice([0, 700, 2048, 9000], num_pools) if has_pools else np.zeros(1, np.int64)
    arrays = (work, base, cost, pool_of, pool_cost)
    work, base, cost, pool_of, pool_cost = (each.tolist() for each in arrays)
    return Load(work, base, allowed, cost, pool_of, pool_cost)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return draw_load(random, alike=draw(st.booleans()), has_pools=draw(st.booleans()))


def check_sound(load: Load, division: Division) -> None:
    """Shares sum to the work, in allowed bins only, and keep all accounts within the level."""
    assert len(division.shares) == len(load.work)
    for amount, bins, shares in zip(load.work, load.allowed, division.shares, strict=True):
        assert sum(share for _, share in shares) == amount
        assert all(share > 0 for _, share in shares)
        those = [each for each, _ in shares]
        assert those == sorted(set(those)) and set(those) <= set(bins)
    assert max(load.accounts(division), default=0) <= division.level


@settings(deadline=None, max_examples=150)
@given(load=loads())
def test_the_level_is_the_least_that_is_enough(load: Load) -> None:
    division = load.divide()
    check_sound(load, division)
    optimum = load.optimum()
    # To a byte of each account: what is left over of a few bytes cannot be cut.
    bytes_apart = (len(load.cost) + 1) * max(load.cost + load.pool_cost)
    assert optimum * (1 - 1e-6) - 1 <= division.level <= optimum * 1.001 + bytes_apart


@settings(deadline=None)
@given(load=loads(), factor=st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(9, 8), Fraction(3)]))
def test_a_floor_is_kept(load: Load, factor: Fraction) -> None:
    least = load.divide().level
    floor = int(least * factor)
    division = load.divide(floor)
    check_sound(load, division)
    assert division.level >= floor
    # Where costs differ a level may be a part of 2^13 above the least one, wherever the search begins.
    assert division.level <= max(floor, least * (1 + 2**-12) + max(load.cost + load.pool_cost))


@settings(deadline=None, max_examples=50)
@given(load=loads())
def test_levels_grow_with_the_floor(load: Load) -> None:
    least = load.divide().level
    slack = least * 2**-12 + max(load.cost + load.pool_cost)
    levels = [load.divide(least * tenths // 10).level for tenths in range(0, 21, 2)]
    assert all(before <= after + slack for before, after in pairwise(levels))
    assert levels[-1] == 2 * least


@settings(deadline=None, max_examples=50)
@given(load=loads())
def test_home_does_it_all_where_there_is_room(load: Load) -> None:
    home = [bins[-1] for bins in load.allowed]
    total = (sum(load.work) + sum(load.base)) * max(load.cost + load.pool_cost)
    division = load.divide(total, home)
    expected = [[(each, amount)] if amount else [] for each, amount in zip(home, load.work, strict=True)]
    assert division.shares == expected
    assert total <= division.level <= total * (1 + 2**-20) + 1
    # And never at the price of a higher level.
    tight = load.divide(0, home)
    check_sound(load, tight)
    slack = tight.level * 2**-12 + (len(load.cost) + 1) * max(load.cost + load.pool_cost)
    assert tight.level <= load.divide().level + slack


def test_home_is_left_where_it_does_not_fit() -> None:
    division = divide([100, 100, 100], [0, 0, 0], [[0, 1, 2]] * 3, [1, 1, 1], home=[0, 0, 0])
    assert division.level == 100
    assert sorted(shares[0][0] for shares in division.shares) == [0, 1, 2]
    assert division.shares[0] == [(0, 100)], "who comes first stays at home"


def test_what_has_room_is_not_cut() -> None:
    """A level with room for whole items gives whole items."""
    division = divide([60, 30, 30], [0] * 4, [[0, 1, 2, 3]] * 3, [1] * 4, floor=60)
    assert all(len(shares) == 1 for shares in division.shares)


def test_by_hand() -> None:
    # Bin 0 has 30 already, and the only item that may go elsewhere is the second.
    assert divide([10, 50], [30, 0, 0], [[0], [0, 1, 2]], [1, 1, 1]).level == 40
    # A bin that is half as fast takes half as much.
    division = divide([300], [0, 0], [[0, 1]], [1, 2])
    assert division.level == 200 and division.shares == [[(0, 200), (1, 100)]]
    # Bins 0 and 1 share a link that takes 3 ticks for a byte: together they do no more than bin 2 does by itself.
    division = divide([120], [0, 0, 0], [[0, 1, 2]], [1, 1, 1], pool_of=[0, 0, 1], pool_cost=[3, 0])
    assert 90 <= division.level <= 93 and dict(division.shares[0])[2] == 90
    # A chain: item 0 must leave bin 1 for item 1 to fit.
    division = divide([50, 100], [0, 50], [[0, 1], [1]], [1, 1])
    assert division.level == 150 and division.shares == [[(0, 50)], [(1, 100)]]


@pytest.mark.parametrize("work", [[], [0, 0]])
def test_nothing_to_divide(work: list[int]) -> None:
    division = divide(work, [7, 3], [[0]] * len(work), [2, 5])
    assert division.level == 15 and division.shares == [[] for _ in work]
    assert divide(work, [7, 3], [[0]] * len(work), [2, 5], floor=40).level == 40


def test_a_large_case_is_near_the_average() -> None:
    """512 items of 64 bins each among 1,024: everything fits evenly, as it can go nearly anywhere."""
    random = np.random.default_rng(5)
    allowed = [sorted(random.choice(1024, 64, replace=False).tolist()) for _ in range(512)]
    work = random.integers(1 << 20, 40 << 20, 512).tolist()
    load = Load(work, [0] * 1024, allowed, [2048] * 1024, [0] * 1024, [0])
    division = load.divide()
    check_sound(load, division)
    assert division.level <= 1.001 * sum(work) * 2048 / 1024


def test_equal_inputs_give_equal_shares() -> None:
    load = draw_load(np.random.default_rng(3))
    assert load.divide() == load.divide()
