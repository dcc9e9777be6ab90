"""Balancers: pure functions from loads to a Placement that keeps its owners."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparsecoll as sc
from sparsecoll.balance import Balancer, Busiest, NoReplicas, find_balancer

Loads = NDArray[np.int64]


@st.composite
def situations(draw: st.DrawFn) -> tuple[sc.Placement, list[Loads]]:
    """Owners in any order, and a history in which many loads are zero or tie."""
    world_size, num_experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    owners = draw(st.lists(st.integers(0, world_size - 1), min_size=num_experts, max_size=num_experts))
    load = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 10_000))
    size = world_size * num_experts
    rounds = draw(st.lists(st.lists(load, min_size=size, max_size=size), max_size=4))
    history = [np.array(each, np.int64).reshape(world_size, num_experts) for each in rounds]
    return sc.Placement.of_owners(owners, world_size), history


busiest = st.builds(
    Busiest, most=st.none() | st.integers(0, 12), min_gain=st.integers(0, 500), window=st.integers(1, 5)
)


def slowest_rank(loads: Loads, base: sc.Placement, everywhere: set[int]) -> int:
    """Assignments that the busiest rank computes if ``everywhere`` are computed where their tokens are."""
    by_rank = np.zeros(base.world_size, np.int64)
    for expert, owner in enumerate(base.owners):
        if expert in everywhere:
            by_rank += loads[:, expert]
        else:
            by_rank[owner] += loads[:, expert].sum()
    return int(by_rank.max())


@given(situations(), busiest)
def test_busiest_keeps_owners_and_limits(situation: tuple[sc.Placement, list[Loads]], balancer: Busiest) -> None:
    base, history = situation
    place = balancer.place(history, base)
    np.testing.assert_array_equal(place.owners, base.owners)
    hot = place.replicated()
    most = -(-base.num_chunks // 4) if balancer.most is None else balancer.most
    assert len(hot) <= most
    assert place.holders[hot].all(), "on all ranks or on none but the owner"
    cold = np.setdiff1d(np.arange(base.num_chunks), hot)
    np.testing.assert_array_equal(place.holders[cold], base.holders[cold])


@given(situations(), busiest)
def test_busiest_replicates_only_what_is_worth_it(
    situation: tuple[sc.Placement, list[Loads]], balancer: Busiest
) -> None:
    """Busiest first, each must take ``min_gain`` assignments an iteration off the slowest rank."""
    base, history = situation
    hot = {int(expert) for expert in balancer.place(history, base).replicated()}
    recent = history[-balancer.window :]
    loads = np.sum(recent, axis=0) if recent else np.zeros((base.world_size, base.num_chunks), np.int64)
    by_expert = loads.sum(axis=0)
    everywhere: set[int] = set()
    for expert in sorted(hot, key=lambda each: (-by_expert[each], each)):
        gain = slowest_rank(loads, base, everywhere) - slowest_rank(loads, base, everywhere | {expert})
        assert gain >= max(1, balancer.min_gain * len(recent))
        everywhere.add(expert)
    # And what is hotter than the coldest copy has not been passed over if it was worth a copy on its own turn.
    most = -(-base.num_chunks // 4) if balancer.most is None else balancer.most
    taken: set[int] = set()
    for expert in sorted(range(base.num_chunks), key=lambda each: (-by_expert[each], each))[:most]:
        gain = slowest_rank(loads, base, taken) - slowest_rank(loads, base, taken | {expert})
        assert (expert in hot) == (gain >= max(1, balancer.min_gain * len(recent)))
        taken |= {expert} & hot


@given(situations(), st.one_of(busiest, st.just(NoReplicas())))
def test_balancers_are_pure(situation: tuple[sc.Placement, list[Loads]], balancer: Balancer) -> None:
    base, history = situation
    shown = copy.deepcopy(history)
    first = balancer.place(shown, base)
    assert first == balancer.place(tuple(each.copy() for each in history), base)
    assert first == copy.deepcopy(balancer).place(shown, base), "nothing is remembered from call to call"
    for before, after in zip(history, shown, strict=True):
        np.testing.assert_array_equal(before, after)


@given(situations())
def test_no_replicas_at_all(situation: tuple[sc.Placement, list[Loads]]) -> None:
    base, history = situation
    assert NoReplicas().place(history, base) == base


@given(situations(), busiest)
def test_empty_history_and_idle_iterations_give_the_base(
    situation: tuple[sc.Placement, list[Loads]], balancer: Busiest
) -> None:
    base, _ = situation
    assert balancer.place([], base) == base
    assert balancer.place([np.zeros((base.world_size, base.num_chunks), np.int64)], base) == base


@given(situations(), busiest)
def test_busiest_looks_at_its_window_only(situation: tuple[sc.Placement, list[Loads]], balancer: Busiest) -> None:
    base, history = situation
    older = [np.full((base.world_size, base.num_chunks), 7 * age, np.int64) for age in (1, 2)]
    if len(history) >= balancer.window:
        assert balancer.place(older + history, base) == balancer.place(history, base)


def test_busiest_by_hand() -> None:
    """Four ranks with one expert each: expert 2 takes 90 of 120 assignments, 30 of them from its own rank."""
    base = sc.Placement.even(4, 4)
    loads = np.array([[5, 0, 20, 5], [0, 5, 20, 5], [0, 0, 30, 0], [5, 5, 20, 0]])
    # Without its copies rank 2 computes 90, with them nobody more than 30: a gain of 60.
    assert Busiest(most=1, min_gain=60).place([loads], base).replicated().tolist() == [2]
    assert Busiest(most=1, min_gain=61).place([loads], base).replicated().tolist() == []
    assert Busiest(most=0, min_gain=0).place([loads], base) == base
    assert Busiest(min_gain=60).place([loads, loads, loads], base).replicated().tolist() == [2], "per iteration"
    assert Busiest(min_gain=61).place([loads, loads, loads], base).replicated().tolist() == []


def test_busiest_leaves_an_expert_whose_copies_would_not_help() -> None:
    """All tokens of the hottest expert come from its owner already."""
    base = sc.Placement.even(2, 2)
    loads = np.array([[100, 0], [0, 10]])
    assert Busiest(most=2, min_gain=0).place([loads], base) == base


def test_one_rank_has_nothing_to_copy() -> None:
    base = sc.Placement.even(8, 1)
    assert Busiest(most=8, min_gain=0).place([np.full((1, 8), 50)], base) == base


@pytest.mark.parametrize("options", [{"most": -1}, {"min_gain": -1}, {"window": 0}], ids=str)
def test_busiest_refuses(options: dict[str, int]) -> None:
    with pytest.raises(sc.InvalidArgument, match=f"expected .*{next(iter(options))}"):
        Busiest(**options)


def test_find_balancer() -> None:
    assert find_balancer("busiest") == Busiest() and find_balancer("none") == NoReplicas()
    mine = Busiest(most=1)
    assert find_balancer(mine) is mine
    bad: list[Any] = ["fair", "", None, 3, object(), Busiest.place]
    for each in bad:
        with pytest.raises(sc.InvalidArgument, match="expected busiest, none"):
            find_balancer(each)


def test_find_balancer_refuses_a_class() -> None:
    with pytest.raises(sc.InvalidArgument, match="expected busiest, none"):
        find_balancer(Busiest)  # type: ignore[arg-type]
