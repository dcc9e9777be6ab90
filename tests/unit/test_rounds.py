"""Rounds and recipes: what travels together, that both ends agree, and that ranks cannot wait for each other."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsecoll as sc
from sparsecoll.executor import Recipe, Spot, gather_recipe, reduce_recipe
from sparsecoll.plan import rounds_of
from sparsecoll.plan.rounds import _ROUND_S
from sparsecoll.plan.simulate import needs_of
from sparsecoll.transport.stream import Round
from tests.plans import ALGORITHMS, cases


@st.composite
def plans(draw: st.DrawFn) -> sc.Plan:
    case = draw(cases())
    algorithm = draw(st.sampled_from([*ALGORITHMS, "auto"]))
    return (
        case.gather(algorithm) if draw(st.booleans()) else case.reduce(algorithm, width=draw(st.sampled_from([1, 2])))
    )


@given(plans())
def test_what_is_forwarded_has_come_in_an_earlier_round(plan: sc.Plan) -> None:
    rounds, table = rounds_of(plan), plan.transfers
    assert sorted(set(rounds.number.tolist())) == list(range(rounds.num_rounds))
    number = {key: n for *key, n in zip(rounds.row.tolist(), rounds.piece.tolist(), rounds.number.tolist(), strict=True)
              for key in [tuple(key)]}  # fmt: skip
    assert len(number) == rounds.pieces.sum()
    for row, needs in enumerate(needs_of(table, gathers=plan.op == "all_gather")):
        for need in needs:
            for piece in range(int(rounds.pieces[row])):
                assert number[need, piece] < number[row, piece]


@given(plans())
def test_both_ends_of_every_message_agree_and_no_ranks_wait_for_each_other(plan: sc.Plan) -> None:
    """NCCL's rule: a group ends when all its messages have met their other end, in order for each pair of ranks."""
    programs = [[step for step in recipe_of(plan, rank).steps if isinstance(step, Round)] for rank in ranks(plan)]
    heads = [0] * len(programs)
    waiting: dict[tuple[int, int, bool], deque[tuple[int, int]]] = {}
    missing = [0] * len(programs)

    def start(rank: int) -> None:
        group = programs[rank][heads[rank]]
        for is_send, slots in ((False, group.receives), (True, group.sends)):
            for slot in slots:
                src, dst = (rank, slot.peer) if is_send else (slot.peer, rank)
                others = waiting.setdefault((src, dst, not is_send), deque())
                if others:
                    other, num_bytes = others.popleft()
                    assert num_bytes == slot.num_bytes
                    missing[other] -= 1
                else:
                    waiting.setdefault((src, dst, is_send), deque()).append((rank, slot.num_bytes))
                    missing[rank] += 1

    for rank, rounds in enumerate(programs):
        if rounds:
            start(rank)
    while any(head < len(rounds) for head, rounds in zip(heads, programs, strict=True)):
        ended = [r for r, rounds in enumerate(programs) if heads[r] < len(rounds) and not missing[r]]
        assert ended, "ranks wait for each other"
        for rank in ended:
            heads[rank] += 1
            if heads[rank] < len(programs[rank]):
                start(rank)
    assert not any(waiting.values())


@given(plans())
def test_recipes_move_what_the_plan_says(plan: sc.Plan) -> None:
    for rank in ranks(plan):
        recipe = recipe_of(plan, rank)
        assert recipe.sent_bytes == plan.sent_bytes[rank] and recipe.received_bytes == plan.received_bytes[rank]
        assert recipe.sent_messages <= plan.sent_transfers[rank]


def ranks(plan: sc.Plan) -> range:
    return range(plan.place.world_size)


def recipe_of(plan: sc.Plan, rank: int) -> Recipe:
    """With one tensor for owned chunks, one for held ones, and one segment for each chunk."""
    sizes = {chunk: (plan.chunk_bytes[chunk],) for chunk in plan.chunks}
    owned = {c: (Spot(0, 0, *sizes[c]),) for c in plan.chunks if plan.place.owners[c] == rank}
    held = {c: (Spot(1, 0, *sizes[c]),) for c in plan.chunks if plan.place.holders[c, rank]}
    if plan.op == "all_gather":
        return gather_recipe(plan, rank, owned, held, sizes, 2)
    is_wide = plan.partial_bytes != plan.chunk_bytes
    return reduce_recipe(plan, rank, held, owned, sizes, ["bfloat16" if is_wide else "float32"], False, 2)


def test_a_direct_plan_is_one_round_and_nothing_is_none() -> None:
    place = sc.Placement.even(16, 4).replicate({0: range(4), 7: [0]})
    assert rounds_of(sc.plan_all_gather(place, 1 << 20, sc.Topology.flat(4), "direct")).num_rounds == 1
    assert rounds_of(sc.plan_all_gather(sc.Placement.even(4, 4), 1 << 20, sc.Topology.flat(4))).num_rounds == 0


@pytest.mark.parametrize("op", [sc.plan_all_gather, sc.plan_reduce_scatter])
@pytest.mark.parametrize("world_size", [4, 8, 16])
def test_hot_chunks_take_little_more_in_rounds_than_the_bound(world_size: int, op: object) -> None:
    place = sc.Placement.of_owners([0] * 8, world_size).replicate(dict.fromkeys(range(8), range(world_size)))
    plan = op(place, 1 << 24, sc.Topology.flat(world_size), "relay")  # type: ignore[operator]
    rounds = rounds_of(plan)
    assert rounds.time_s - rounds.num_rounds * _ROUND_S < 1.25 * plan.bound_s
    direct = op(place, 1 << 24, sc.Topology.flat(world_size), "direct")  # type: ignore[operator]
    assert 2 * rounds.time_s < rounds_of(direct).time_s


def test_transfers_that_wait_in_a_circle_are_refused() -> None:
    place = sc.Placement.of_owners([0], 3).replicate({0: range(3)})
    plan = sc.plan_all_gather(place, 1 << 20, sc.Topology.flat(3), "direct")
    table = plan.transfers.copy()
    table["src"], table["dst"] = [2, 1], [1, 2]
    with pytest.raises(sc.InvalidArgument, match="circle"):
        rounds_of(replace(plan, transfers=table))
