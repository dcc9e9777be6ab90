"""The conformance table on threads as ranks, and sums bit for bit."""

from __future__ import annotations

import functools
from collections import defaultdict
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

import sparsecoll as sc
from tests.conformance import CHECKS, in_pieces
from tests.plans import Range, pieces_of

WORLD_SIZES = [1, 2, 3, 4, 7, 128]
# Those whose subject is not the checking itself.
UNCHECKED = [
    "all_gather",
    "reduce_scatter",
    "mean",
    "bytes_sent",
    "pieces",
    "pieces_of_segments",
    "tuple_and_list",
    "all_to_all",
    "async",
    "gradients",
    "bitwise_repeatable",
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CHECKS)
def test_conformance(name: str, world_size: int) -> None:
    sc.run_local(CHECKS[name], world_size, timeout_s=150.0)


@pytest.mark.parametrize("node_of", [(0, 1), (0, 0, 1, 1), (0, 1, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("name", UNCHECKED)
def test_conformance_unchecked_on_two_nodes(name: str, node_of: tuple[int, ...]) -> None:
    sc.run_local(CHECKS[name], len(node_of), checked=False, topology=sc.Topology(node_of))


def test_unchecked_calls_exchange_nothing_beside_the_payload() -> None:
    place = sc.Placement.even(6, 3).replicate({0: [1, 2], 5: [0]})

    def main(group: sc.Group) -> None:
        before = group.stats()
        held = sc.sparse_all_gather(np.ones((2, 4)), place)
        sc.sparse_reduce_scatter(held, place)
        counts = [1 if rank == 0 else 0 for rank in range(3)]
        sc.all_to_all(np.ones((1, 4)), counts, [1, 1, 1] if group.rank == 0 else [0, 0, 0])
        moved = group.stats().since(before)
        assert moved.control_messages == moved.control_bytes == 0
        assert moved.sent_messages > 0

    sc.run_local(main, 3, checked=False)


def test_a_checked_call_exchanges_one_record() -> None:
    place = sc.Placement.even(6, 3).replicate({0: [1, 2]})

    def main(group: sc.Group) -> None:
        for call in (
            lambda: sc.sparse_all_gather(np.ones((2, 4)), place),
            lambda: sc.sparse_reduce_scatter(np.ones((len(place.held_by(group.rank)), 4)), place),
            lambda: sc.all_to_all(np.ones((3, 4)), [1, 1, 1]),
        ):
            before = group.stats()
            call()
            assert group.stats().since(before).control_messages == 2, "one to each other rank"

    sc.run_local(main, 3)


SIZE = 257


def awkward(chunk: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of many magnitudes and both signs, whose sum depends on the order, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(1000 * chunk + rank)
    values = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    values *= 2.0 ** torch.randint(-9, 6, (SIZE,), generator=generator)
    values[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    values[4] = -0.0
    return values.to(dtype)


def random_placement(num_chunks: int, world_size: int, seed: int) -> sc.Placement:
    random = np.random.default_rng(seed)
    owners = random.integers(0, world_size, num_chunks)
    mask = random.random((num_chunks, world_size)) < 0.6
    mask[np.arange(num_chunks), owners] = True
    return sc.Placement(owners, mask)


def held_rows(place: sc.Placement, rank: int, dtype: torch.dtype) -> torch.Tensor:
    made = [awkward(int(chunk), rank, dtype) for chunk in place.held_by(rank)]
    return torch.stack(made) if made else torch.empty((0, SIZE), dtype=dtype)


def sum_by_hand(plan: sc.Plan, dtype: torch.dtype, op: str) -> dict[int, torch.Tensor]:
    """Walks through the plan with one addition after the other in float32 and rounds once, at the owner.

    An own contribution comes first, then arrivals in the order of the plan; a relay passes on its sum in float32.
    """
    place, width = plan.place, dtype.itemsize
    arrived: dict[tuple[int, int, Range], list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def own(rank: int, chunk: int, begin: int, end: int) -> torch.Tensor:
        return awkward(chunk, rank, dtype).float()[begin // width : end // width]

    def total(rank: int, chunk: int, span: Range) -> torch.Tensor:
        terms = [own(rank, chunk, *span)] if place.holders[chunk, rank] else []
        terms += [term for _, term in sorted(arrived[rank, chunk, span], key=lambda each: each[0])]
        result = terms[0].clone()
        for term in terms[1:]:
            result += term
        return result

    for _, pieces in groupby(pieces_of(plan), key=lambda piece: piece.stage):
        landing = []
        for piece in pieces:
            if piece.partial:
                payload = total(piece.src, piece.chunk, piece.range)
            elif place.holders[piece.chunk, piece.src]:
                payload = own(piece.src, piece.chunk, *piece.range)
            else:
                payload = torch.zeros((piece.range[1] - piece.range[0]) // width)
            landing.append(((piece.dst, piece.chunk, piece.range), (piece.row, payload)))
        for key, payload in landing:
            arrived[key].append(payload)
    divisors = place.holders.sum(axis=1) if op == "mean" else np.ones(place.num_chunks)
    sums = {}
    for chunk in plan.chunks:
        owner = int(place.owners[chunk])
        spans = sorted(span for rank, each, span in arrived if (rank, each) == (owner, chunk))
        parts = [total(owner, chunk, span) for span in spans] or [own(owner, chunk, 0, width * SIZE)]
        sums[chunk] = (torch.cat(parts) / float(divisors[chunk])).to(dtype)
    return sums


def bits(tensor: torch.Tensor) -> list[Any]:
    return tensor.contiguous().view(torch.uint8).tolist()


NODES = sc.Topology((0, 0, 1, 1, 1), sc.Link(1e10, 1e-6), sc.Link(1e9, 1e-6))


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("algorithm", ["direct", "relay", "hierarchical", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_taken_in_float32_in_the_order_of_the_plan(dtype: torch.dtype, algorithm: str, op: str) -> None:
    place = random_placement(9, 5, seed=3)
    plan = sc.plan_reduce_scatter(place, dtype.itemsize * SIZE, NODES, algorithm, partial_bytes=4 * SIZE)
    if algorithm != "direct":
        assert plan.transfers["partial"].any()
    plan = in_pieces(plan, 3)

    def main(group: sc.Group) -> torch.Tensor:
        return sc.sparse_reduce_scatter(held_rows(place, group.rank, dtype), place, plan=plan, op=op)

    owned = sc.run_local(main, 5)
    expected = sum_by_hand(plan, dtype, op)
    num_unlike_naive = 0
    for rank in range(5):
        for chunk, result in zip(place.owned_by(rank).tolist(), owned[rank], strict=True):
            assert bits(result) == bits(expected[chunk])
            terms = [awkward(chunk, other, dtype) for other in np.flatnonzero(place.holders[chunk]).tolist()]
            naive = functools.reduce(torch.add, terms)
            num_unlike_naive += bits(naive) != bits(result)
    assert num_unlike_naive > 0, "the values tell this from adding in the order of ranks, rounding each time"


@pytest.mark.parametrize("algorithm", ["direct", "relay", "hierarchical", "dense"])
def test_the_same_plan_gives_the_same_bits_in_every_run(algorithm: str) -> None:
    place = random_placement(12, 4, seed=8)
    topology = sc.Topology((0, 0, 1, 1), sc.Link(1e10, 1e-6), sc.Link(1e9, 1e-6))
    plan = in_pieces(sc.plan_reduce_scatter(place, SIZE * 2, topology, algorithm, partial_bytes=SIZE * 4))

    def main(group: sc.Group) -> Any:
        held = held_rows(place, group.rank, torch.bfloat16)
        results = [sc.sparse_reduce_scatter(held, place, plan=plan) for _ in range(3)]
        results += [work.result() for work in [sc.sparse_reduce_scatter(held, place, plan=plan, async_op=True)]]
        alias = torch.empty_like(results[0])
        sc.sparse_reduce_scatter(held, place, plan=plan, out=alias)
        assert len({str(bits(result)) for result in [*results, alias]}) == 1
        return bits(results[0])

    first = sc.run_local(main, 4)
    assert first == sc.run_local(main, 4) == sc.run_local(main, 4, checked=False)
    assert first == sc.run_local(main, 4, topology=sc.Topology((0, 0, 1, 1)))


def test_backward_runs_the_mirror_over_the_same_bytes() -> None:
    place = sc.Placement.even(4, 2).replicate({0: [1], 3: [0]})

    def main(group: sc.Group) -> None:
        shard = torch.ones((2, 8), requires_grad=True)
        before = group.stats()
        held = sc.sparse_all_gather(shard, place, algorithm="direct")
        forward = group.stats().since(before)
        held.sum().backward()
        backward = group.stats().since(before).since(forward)
        assert (backward.sent_bytes, backward.received_bytes) == (forward.received_bytes, forward.sent_bytes)
        counts = place.holders.sum(axis=1)[place.owned_by(group.rank)].tolist()
        assert shard.grad is not None and shard.grad[:, 0].tolist() == counts

    sc.run_local(main, 2)


@pytest.mark.parametrize(
    "arguments",
    [{"plan": "text"}, {"chunks": 5}, {"chunks": [0.5]}, {"place": None}, {"algorithm": ["direct"]}, {"out": 3}],
    ids=str,
)
def test_rubbish_on_one_rank_raises_a_typed_error_on_all_and_the_group_works_on(arguments: dict[str, Any]) -> None:
    place = sc.Placement.even(4, 2)

    def main(group: sc.Group) -> type[BaseException] | None:
        given: dict[str, Any] = {"place": place, **(arguments if group.rank == 1 else {})}
        try:
            sc.sparse_all_gather(np.ones((2, 3)), given.pop("place"), **given, timeout_s=5.0)
        except sc.SparsecollError as error:
            assert len(sc.sparse_all_gather(np.ones((2, 3)), place)) == 2
            return type(error)
        return None

    assert sc.run_local(main, 2) == [sc.CollectiveMismatch, sc.InvalidArgument]


def test_a_plan_of_other_sizes_is_refused() -> None:
    """Partial sums of 16-bit floats are wider than what travels from a holder; a plan that does not know is wrong."""
    place = sc.Placement.even(3, 3).replicate(dict.fromkeys(range(3), range(3)))
    flat = sc.Topology.flat(3)
    unsound = {
        "op reduce_scatter": sc.plan_all_gather(place, 6, flat),
        "with place": sc.plan_reduce_scatter(sc.Placement.even(3, 3), 6, flat, partial_bytes=12),
        "with chunks": sc.plan_reduce_scatter(place, 6, flat, partial_bytes=12, chunks=[0, 1]),
        "chunk_bytes 6 for chunk 0": sc.plan_reduce_scatter(place, 8, flat, partial_bytes=12),
        "partial": sc.plan_reduce_scatter(place, 6, flat, "dense"),
    }

    def main(group: sc.Group) -> None:
        held = torch.ones((3, 3), dtype=torch.bfloat16)
        for text, plan in unsound.items():
            with pytest.raises(sc.InvalidArgument, match=text):
                sc.sparse_reduce_scatter(held, place, plan=plan)
        sound = sc.plan_reduce_scatter(place, 6, flat, "dense", partial_bytes=12)
        before = group.stats()
        assert sc.sparse_reduce_scatter(held, place, plan=sound).tolist() == [[3.0] * 3]
        assert group.stats().since(before).sent_bytes == sound.sent_bytes[group.rank]

    sc.run_local(main, 3)
