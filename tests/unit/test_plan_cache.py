"""The cache of plans, against a list of what was used last."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import Placement, Topology, plan_all_gather
from sparsecoll.plan.cache import PlanCache


def plan_of(num_bytes: int) -> Any:
    return SimpleNamespace(transfers=np.zeros(num_bytes, np.uint8))


@given(
    uses=st.lists(st.integers(0, 9), max_size=60),
    sizes=st.lists(st.sampled_from([0, 1, 10, 25, 200]), min_size=10, max_size=10),
    max_plans=st.integers(1, 6),
)
def test_keeps_what_was_used_last_within_both_bounds(uses: list[int], sizes: list[int], max_plans: int) -> None:
    cache = PlanCache(max_plans, max_bytes=60)
    kept: list[int] = []  # oldest first
    plans: dict[int, Any] = {}
    for key in uses:
        made: list[int] = []

        def make(key: int = key, made: list[int] = made) -> Any:
            made.append(key)
            return plan_of(sizes[key])

        plan = cache.get(key, make)
        assert bool(made) == (key not in kept), "made only if it is not there"
        if key in kept:
            assert plan is plans[key]
            kept.remove(key)
        plans[key] = plan
        kept.append(key)
        while len(kept) > max_plans or (len(kept) > 1 and sum(sizes[each] for each in kept) > 60):
            kept.pop(0)
        assert cache.num_plans == len(kept) and cache.num_bytes == sum(sizes[each] for each in kept)


def test_a_plan_beyond_the_bound_is_kept_alone() -> None:
    cache = PlanCache(4, max_bytes=100)
    cache.get("small", lambda: plan_of(10))
    large = cache.get("large", lambda: plan_of(1000))
    assert cache.num_plans == 1 and cache.num_bytes == 1000
    assert cache.get("large", lambda: pytest.fail("it is there")) is large


def test_a_failure_is_not_kept() -> None:
    cache = PlanCache(4, max_bytes=100)

    def fail() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.get("key", fail)
    assert cache.get("key", lambda: plan_of(3)).transfers.nbytes == 3 == cache.num_bytes


def test_threads_that_plan_the_same_at_once_get_one_plan() -> None:
    cache, barrier = PlanCache(4, max_bytes=1000), threading.Barrier(4)
    found: list[Any] = []

    def make() -> Any:
        barrier.wait(10)  # all have missed
        return plan_of(7)

    threads = [threading.Thread(target=lambda: found.append(cache.get("key", make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 4 and len({id(each) for each in found}) == 1
    assert cache.num_plans == 1 and cache.num_bytes == 7


def test_equal_arguments_give_one_plan_however_they_are_written() -> None:
    def place() -> Placement:
        return Placement.even(4, 3).replicate({0: [1, 2]})

    one = plan_all_gather(place(), 1 << 20, Topology.flat(3))
    assert plan_all_gather(place(), [1 << 20] * 4, Topology.flat(3), chunks=range(4)) is one
    assert plan_all_gather(place(), np.full(4, 1 << 20, np.uint32), Topology((0, 0, 0))) is one
    assert plan_all_gather(place(), (1 << 20) + 1, Topology.flat(3)) is not one
    assert plan_all_gather(place(), 1 << 20, Topology.flat(3), divisible=False) is not one
    assert plan_all_gather(place(), 1 << 20, Topology.flat(3), chunks=range(3)) is not one
