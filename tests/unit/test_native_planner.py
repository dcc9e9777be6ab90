"""The native planner gives what the readable one gives, byte for byte: divisions, transfers, timelines."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecoll import Link, Placement, Topology, native
from sparsecoll.errors import InvalidArgument
from sparsecoll.plan import algorithms, compiled
from sparsecoll.plan import simulate as simulation
from sparsecoll.plan.algorithms import Case
from sparsecoll.plan.costs import costs_of
from sparsecoll.plan.division import divide
from sparsecoll.plan.transfer import TRANSFER, Table

ALGORITHMS = ["auto", "direct", "relay", "hierarchical", "dense"]
SIZES = [
    [0, 1, 7, 100, 1000, 1 << 20],
    [1 << 20],
    [64, 128, 4096, 100_000, 5, 300],
    [0, 1 << 16, (1 << 22) + 8, 1 << 28],
]
HUGE = [1 << 33, (1 << 41) + 1, 1 << 45, 77]
"""Bytes whose ticks need more than 63 bits."""

seeds = st.integers(0, 2**32 - 1)


def case_of(seed: int, sizes: list[list[int]] = SIZES) -> Case:
    """1 to 40 ranks on 1 to 6 nodes in any order, links alike or not, hot owners, few replicas or many."""
    random = np.random.default_rng(seed)
    world_size, num_chunks = int(random.integers(1, random.choice([5, 13, 41]))), int(random.integers(0, 25))
    topology = topology_of(random, world_size)
    owners = random.integers(0, world_size, num_chunks) if random.random() < 0.7 else np.zeros(num_chunks, int)
    mask = random.random((num_chunks, world_size)) < random.choice([0.0, 0.1, 0.3, 0.7, 1.0])
    mask[np.arange(num_chunks), owners] = True
    chunk_bytes = random.choice(sizes[random.integers(len(sizes))], num_chunks).astype(np.int64)
    gathers = bool(random.random() < 0.5)
    partial_bytes = chunk_bytes * (1 if gathers else random.choice([1, 2]))
    if not gathers and random.random() < 0.1:
        partial_bytes += random.integers(0, 5, num_chunks)
    takes_part = random.random(num_chunks) < random.choice([0.5, 1.0])
    return Case(
        gathers=gathers,
        place=Placement(owners, mask),
        chunks=np.flatnonzero(takes_part & (chunk_bytes > 0)),
        sizes=chunk_bytes,
        partial_sizes=partial_bytes,
        node_of=topology.node_of,
        costs=costs_of(topology),
        divisible=bool(random.random() < 0.7),
        shared_memory=bool(random.random() < 0.2),
    )


def topology_of(random: np.random.Generator, world_size: int) -> Topology:
    nodes = random.integers(0, random.integers(1, min(world_size, 6) + 1), world_size).tolist()
    if random.random() < 0.5:
        nodes.sort()
    if random.random() < 0.1:
        nodes = list(range(world_size))
    numbered = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    links = [links_of(random, count) for count in (world_size, world_size, len(numbered))]
    return Topology(tuple(numbered[node] for node in nodes), *links[: 2 if random.random() < 0.5 else 3])


def links_of(random: np.random.Generator, count: int) -> Link | tuple[Link, ...]:
    latencies = random.choice([0.0, 1e-6, 1e-3], count).tolist()
    if random.random() < 0.4:
        return Link(float(random.choice([1e6, 1e9, 2e11])), latencies[0])
    return tuple(map(Link, (10 ** random.uniform(6, 11, count)).tolist(), latencies))


def row_bytes_of(case: Case, table: Table) -> NDArray[np.int64]:
    """On the wire."""
    length = table["end"] - table["begin"]
    size, partial = case.sizes[table["chunk"]], case.partial_sizes[table["chunk"]]
    return np.where(table["partial"], np.where(length == size, partial, length * (partial // size)), length)


def played(case: Case, table: Table) -> Any:
    """By the readable planner and by the native one."""
    num_bytes = row_bytes_of(case, table)
    readable = simulation.simulate(table, num_bytes.tolist(), case.node_of, case.costs, gathers=case.gathers)
    return readable, compiled.simulate(table, num_bytes, case.node_of, case.costs, gathers=case.gathers)


def check_drafts(case: Case, algorithm: str) -> Table:
    readable, made = algorithms.draft(case, algorithm), compiled.draft(case, algorithm)
    assert made[:2] == readable[:2], "the algorithm, and the ticks that it is expected to take"
    assert made.table.dtype == TRANSFER and not made.table.flags.writeable
    np.testing.assert_array_equal(made.table, readable.table)
    assert made.table.tobytes() == readable.table.tobytes(), "also between the columns"
    return made.table


@settings(deadline=None, max_examples=120)
@given(seed=seeds)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_drafts_are_equal_to_the_byte(algorithm: str, seed: int) -> None:
    check_drafts(case_of(seed), algorithm)


def test_random_cases_come_to_every_algorithm() -> None:
    chosen = [compiled.draft(case_of(seed), "auto").algorithm for seed in range(100)]
    assert set(chosen) == {*ALGORITHMS} - {"auto"}


@settings(deadline=None, max_examples=100)
@given(seed=seeds, algorithm=st.sampled_from(ALGORITHMS))
def test_timelines_are_equal(seed: int, algorithm: str) -> None:
    case = case_of(seed)
    readable, made = played(case, compiled.draft(case, algorithm).table)
    assert made.finish == readable.finish
    for name in ("row", "piece", "sent", "arrived"):
        expected, found = getattr(readable, name), getattr(made, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=100)
@given(seed=seeds, algorithm=st.sampled_from(ALGORITHMS))
def test_ticks_may_need_more_than_63_bits(seed: int, algorithm: str) -> None:
    case = case_of(seed, [HUGE])
    table = check_drafts(case, algorithm)
    try:
        readable, made = played(case, table)
    except OverflowError:
        with pytest.raises(InvalidArgument, match="expected times of at most 63 bits of ticks"):
            compiled.simulate(table, row_bytes_of(case, table), case.node_of, case.costs, gathers=case.gathers)
    else:
        assert made.finish == readable.finish


@pytest.mark.parametrize("per_node", [64, 8])
@pytest.mark.parametrize("gathers", [True, False])
def test_a_case_of_some_size(per_node: int, gathers: bool) -> None:
    """Hot chunks of a few owners, so that shares have to be exchanged."""
    random = np.random.default_rng(0)
    owners = random.integers(0, 4, 48)
    mask = random.random((48, 64)) < 0.5
    mask[np.arange(48), owners] = True
    topology = Topology(tuple(rank // per_node for rank in range(64)))
    sizes = random.integers(1 << 20, 1 << 24, 48)
    case = Case(
        gathers,
        Placement(owners, mask),
        np.arange(48),
        sizes,
        2 * sizes,
        topology.node_of,
        costs_of(topology),
        True,
        False,
    )
    assert len(check_drafts(case, "auto")) > 1000


class TestDivision:
    @settings(deadline=None, max_examples=150)
    @given(seed=seeds)
    def test_divisions_are_equal(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        num_bins, num_items = int(random.integers(1, 16)), int(random.integers(0, 16))
        num_pools = int(random.integers(1, 5))
        work = random.choice([0, 1, 5, 1000, 1 << 20, (1 << 40) + 3], num_items).tolist()
        base = random.choice([0, 0, 7, 1 << 19], num_bins).tolist()
        allowed = [
            np.flatnonzero(random.random(num_bins) < 0.4).tolist() or [int(random.integers(num_bins))] for _ in work
        ]
        cost = (
            random.choice([1, 2048], num_bins) if random.random() < 0.5 else random.integers(1, 1 << 20, num_bins)
        ).tolist()
        floor = int(random.choice([0, 1 << 30]))
        home = [int(random.choice([-1, *bins])) for bins in allowed] if random.random() < 0.5 else None
        pool_of, pool_cost = None, []
        if random.random() < 0.6:
            pool_of = random.integers(0, num_pools, num_bins).tolist()
            pool_cost = random.choice([0, 1, 300, 4096], num_pools).tolist()
        readable = divide(work, base, allowed, cost, floor, home, pool_of, pool_cost)
        found = native.divide_work(work, base, allowed, cost, floor, home or (), pool_of or (), pool_cost)
        assert found == (readable.level, readable.shares)

    def test_work_that_nobody_may_do_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="expected a bin for every item with work"):
            native.divide_work([1], [0], [[]], [1])


class TestArguments:
    links = native.links((0, 0), (1, 1), (1, 1), (0,), 0, 0)
    sizes = np.full(1, 64)

    def draft(self, links: native.Links, **changes: Any) -> Any:
        given: dict[str, Any] = {
            "owners": np.zeros(1, np.int32),
            "holders": np.ones((1, 2), bool),
            "chunks": np.zeros(1, np.int64),
            "sizes": self.sizes,
            "partial_sizes": self.sizes,
            "algorithm": "direct",
        }
        return native.draft_transfers(links, **{**given, **changes}, gathers=True, divisible=True, shared_memory=False)

    def test_sound_ones_make_a_table(self) -> None:
        algorithm, expected, rows = self.draft(self.links)
        assert (algorithm, expected) == ("direct", 64)
        assert rows.view(TRANSFER).tolist() == [(0, 1, 0, 1, 0, 1, 0, 64, False)]

    @pytest.mark.parametrize(
        "changes",
        [
            {"owners": np.full(1, 2, np.int32)},
            {"owners": np.zeros(2, np.int32)},
            {"owners": np.zeros(1, np.int64)},
            {"holders": np.ones((1, 3), bool)},
            {"holders": np.ones((2, 2), bool)[::2, ::-1]},
            {"chunks": np.ones(1, np.int64)},
            {"chunks": np.full(1, -1)},
            {"sizes": np.full(2, 64)},
            {"partial_sizes": np.full(0, 64)},
            {"algorithm": "magic"},
        ],
    )
    def test_unsound_ones_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgument, match=r"^draft_transfers: "):
            self.draft(self.links, **changes)

    @pytest.mark.parametrize(
        "arguments",
        [
            ((0, 1), (1, 1), (1, 1), (0,), 0, 0),
            ((0, -1), (1, 1), (1, 1), (0,), 0, 0),
            ((0, 0), (1,), (1, 1), (0,), 0, 0),
            ((0, 0), (1, 1), (1, 0), (0,), 0, 0),
            ((0, 0), (1, 1), (1, 1), (0,), 0, 1 << 70),
        ],
    )
    def test_links_fit_ranks_and_63_bits(self, arguments: Any) -> None:
        with pytest.raises(InvalidArgument, match=r"^links: "):
            native.links(*arguments)

    @pytest.mark.parametrize(
        ("column", "value"), [("src", 2), ("dst", -1), ("pieces", 0), ("pieces", -1), ("span", -1)]
    )
    def test_transfers_fit_the_links(self, column: str, value: int) -> None:
        table = self.draft(self.links)[2].view(TRANSFER).copy()
        table[column] = value
        with pytest.raises(InvalidArgument, match=r"^play_transfers: "):
            native.play_transfers(self.links, table.view(np.uint8), self.sizes, gathers=True)

    def test_rows_have_bytes_and_are_forwarded_as_they_are_cut(self) -> None:
        table = np.zeros(2, TRANSFER)
        table["span"], table["pieces"], table["src"], table["dst"] = 1, (1, 2), (0, 1), (1, 0)
        with pytest.raises(InvalidArgument, match="expected a range to be forwarded in as many pieces"):
            native.play_transfers(self.links, table.view(np.uint8), np.full(2, 64), gathers=True)
        with pytest.raises(InvalidArgument, match="expected bytes of every row"):
            native.play_transfers(self.links, table.view(np.uint8), self.sizes, gathers=True)


def test_planning_leaves_the_interpreter_to_others() -> None:
    """With the GIL held, this thread could not note the time in the middle of a plan."""
    topology = Topology.flat(512)
    sizes = np.full(512, 1 << 20)
    place = Placement(np.zeros(512, int), np.ones((512, 512), bool))
    case = Case(True, place, np.arange(512), sizes, sizes, topology.node_of, costs_of(topology), True, False)
    span_s: list[float] = []

    def plan() -> None:
        span_s.append(time.perf_counter())
        compiled.draft(case, "dense")
        span_s.append(time.perf_counter())

    for _ in range(20):  # a busy machine may leave this thread no core during one plan, not during all
        span_s.clear()
        planner = threading.Thread(target=plan)
        planner.start()
        noted_s = []
        while planner.is_alive():
            noted_s.append(time.perf_counter())
            planner.join(0.0005)
        begin_s, end_s = span_s
        quarter_s = (end_s - begin_s) / 4
        if any(begin_s + quarter_s < now_s < end_s - quarter_s for now_s in noted_s):
            return
    pytest.fail("no other thread ran in the middle of 20 plans")
