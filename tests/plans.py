"""Random cases for planners, and plans walked through in plain Python, apart from the vectorized code under test."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from sparsecoll import Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan.transfer import GRANULE_BYTES, piece_bounds

__all__ = [
    "ALGORITHMS",
    "Case",
    "Piece",
    "Range",
    "Row",
    "cases",
    "check_cover",
    "draw_case",
    "gathered",
    "pieces_of",
    "reduced",
    "rows_of",
]

ALGORITHMS = ["direct", "relay", "hierarchical", "dense"]

Range = tuple[int, int]


class Case(NamedTuple):
    """Arguments of a planner; ``chunks`` is None for all."""

    place: Placement
    chunk_bytes: list[int]
    chunks: list[int] | None
    topology: Topology
    divisible: bool = True

    @property
    def subset(self) -> list[int]:
        return list(range(self.place.num_chunks)) if self.chunks is None else self.chunks

    @property
    def moving(self) -> list[int]:
        return [chunk for chunk in self.subset if self.chunk_bytes[chunk]]

    def holders(self, chunk: int) -> list[int]:
        return np.flatnonzero(self.place.holders[chunk]).tolist()

    def gather(self, algorithm: str = "auto") -> Plan:
        return plan_all_gather(
            self.place, self.chunk_bytes, self.topology, algorithm, chunks=self.chunks, divisible=self.divisible
        )

    def reduce(self, algorithm: str = "auto", *, width: int = 2) -> Plan:
        """Partial sums are ``width`` times as wide as contributions: twice for 16-bit floats."""
        return plan_reduce_scatter(
            self.place,
            self.chunk_bytes,
            self.topology,
            algorithm,
            chunks=self.chunks,
            partial_bytes=[width * size for size in self.chunk_bytes],
            divisible=self.divisible,
        )


def draw_case(
    random: np.random.Generator,
    *,
    world_size: int,
    num_chunks: int,
    sizes: Iterable[int],
    num_nodes: int = 1,
    alike: bool = True,
    has_node_links: bool = False,
) -> Case:
    """Owners and holders anyhow: a hot owner or many, few replicas or all, ranks on nodes in any order."""
    owners = random.integers(0, world_size, num_chunks)
    if random.random() < 0.4:
        owners[:] = random.integers(0, world_size)
    mask = random.random((num_chunks, world_size)) < random.choice([0.0, 0.2, 0.6, 1.0], p=[0.1, 0.3, 0.3, 0.3])
    mask[np.arange(num_chunks), owners] = True
    nodes = random.integers(0, num_nodes, world_size).tolist()
    numbered = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    links = [_draw_links(random, count, alike) for count in (world_size, world_size, len(numbered))]
    topology = Topology(tuple(numbered[node] for node in nodes), *links[: 3 if has_node_links else 2])
    return Case(Placement(owners, mask), random.choice(list(sizes), num_chunks).tolist(), None, topology)


def _draw_links(random: np.random.Generator, count: int, alike: bool) -> tuple[Link, ...]:
    latency_s = float(random.choice([0.0, 1e-6, 1e-3]))
    rates = random.choice([1e6, 2e6, 5e6, 1e9], 1 if alike else count).tolist()
    return tuple(Link(rate, latency_s) for rate in (rates * count if alike else rates))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Anything at all: no chunks, no bytes, one rank, subsets, chunks that must not be cut."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    case = draw_case(
        random,
        world_size=int(random.integers(1, 13)),  # not drawn, as small worlds would come too often
        num_chunks=int(random.integers(0, 13)),
        sizes=draw(st.sampled_from([[0], [1], [64], [0, 1, 7, 1000, 1 << 20], [50_000, 65_536, 99_999, 3 << 20]])),
        num_nodes=draw(st.integers(1, 4)),
        alike=draw(st.booleans()),
        has_node_links=draw(st.booleans()),
    )
    if draw(st.booleans()):
        case = case._replace(chunks=np.flatnonzero(random.random(case.place.num_chunks) < 0.5).tolist())
    return case._replace(divisible=draw(st.sampled_from([True, True, False])))


class Row(NamedTuple):
    """A row of `Plan.transfers`, with its position."""

    number: int
    stage: int
    span: int
    src: int
    dst: int
    chunk: int
    pieces: int
    begin: int
    end: int
    partial: bool

    @property
    def range(self) -> Range:
        return self.begin, self.end

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class Piece(NamedTuple):
    """What travels at once."""

    stage: int
    src: int
    dst: int
    chunk: int
    range: Range
    partial: bool
    row: int
    number: int


def rows_of(plan: Plan, *, played: bool = False) -> list[Row]:
    """The rows of a plan, or those that its prediction is made with."""
    table = plan.played if played else plan.transfers
    columns = [table[name].tolist() for name in Row._fields[1:]]
    return [Row(number, *values) for number, values in enumerate(zip(*columns, strict=True))]


def pieces_of(plan: Plan) -> list[Piece]:
    """All pieces by stage, and within a stage as the table has them."""
    found = []
    for row in rows_of(plan):
        bounds = piece_bounds(row.begin, row.end, row.pieces)
        assert (bounds[0], bounds[-1]) == row.range and row.pieces >= 1 and row.span >= 1 and row.stage >= 0
        for number, (begin, end) in enumerate(pairwise(bounds)):
            assert begin < end, "a piece has bytes"
            assert begin % GRANULE_BYTES == 0, "cuts fall between elements of any size"
            stage = row.stage + number * row.span // row.pieces
            found.append(Piece(stage, row.src, row.dst, row.chunk, (begin, end), row.partial, row.number, number))
    return sorted(found, key=lambda piece: piece.stage)


def _stages(plan: Plan) -> Iterator[list[Piece]]:
    return (list(pieces) for _, pieces in groupby(pieces_of(plan), key=lambda piece: piece.stage))


def check_cover(ranges: Iterable[Range], size: int) -> None:
    """Each byte of a chunk once."""
    ordered = sorted(ranges)
    assert [begin for begin, _ in ordered] == [0, *(end for _, end in ordered[:-1])] and ordered[-1][1] == size


def gathered(plan: Plan) -> dict[tuple[int, int], list[Range]]:
    """Walks through an all-gather: ``(rank, chunk)`` → the ranges that arrive, each byte at most once."""
    arrived: dict[tuple[int, int], set[Range]] = defaultdict(set)
    for stage in _stages(plan):
        for piece in stage:
            assert piece.src != piece.dst and not piece.partial
            if piece.src != plan.place.owners[piece.chunk]:
                assert piece.range in arrived[piece.src, piece.chunk], "a rank sends what it had before the stage"
        for piece in stage:
            assert piece.dst != plan.place.owners[piece.chunk]
            assert piece.range not in arrived[piece.dst, piece.chunk], "nothing arrives twice"
            arrived[piece.dst, piece.chunk].add(piece.range)
    return {key: _disjoint(ranges) for key, ranges in arrived.items() if ranges}


def reduced(plan: Plan) -> dict[int, dict[Range, Counter[int]]]:
    """Walks through a reduce-scatter: chunk → for each range at its owner, whose contributions have arrived."""
    arrived: dict[tuple[int, int], dict[Range, Counter[int]]] = defaultdict(dict)
    sent: set[tuple[int, int, Range]] = set()
    for stage in _stages(plan):
        carried = []
        for piece in stage:
            assert piece.src != piece.dst
            assert (piece.src, piece.chunk, piece.range) not in sent, "a rank sends a range on once"
            sent.add((piece.src, piece.chunk, piece.range))
            so_far = arrived[piece.src, piece.chunk].get(piece.range)
            assert piece.partial == (so_far is not None), "exactly what has passed a relay is a sum"
            own = Counter([piece.src] if plan.place.holders[piece.chunk, piece.src] else [])
            carried.append((piece, own + (so_far or Counter())))
        for piece, contributions in carried:
            assert (piece.dst, piece.chunk, piece.range) not in sent, "a sum is complete before it goes on"
            there = arrived[piece.dst, piece.chunk]
            there[piece.range] = there.get(piece.range, Counter()) + contributions
    for ranges in arrived.values():
        _disjoint(ranges)
    return {chunk: ranges for (rank, chunk), ranges in arrived.items() if ranges and rank == plan.place.owners[chunk]}


def _disjoint(ranges: Iterable[Range]) -> list[Range]:
    ordered = sorted(ranges)
    assert all(before[1] <= after[0] for before, after in pairwise(ordered)), "bytes arrive once, cut alike"
    return ordered
