"""The text of a Plan: what it says is what the plan does, in as many lines as a screen has."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecoll import Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan import TRANSFER

BASE = Placement.of_owners([0, 0, 1, 2], 3).replicate({0: [1, 2], 1: [1]})


def rows_of(text: str, title: str) -> dict[int, str]:
    """Number → rest of the line, of the table whose head begins with ``title``."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.strip().startswith(title))
    table: dict[int, str] = {}
    for line in lines:
        found = re.fullmatch(r" *(\d+) (.*)", line)
        if not found:
            break
        table[int(found[1])] = found[2]
    return table


def edges_of(tree: str) -> set[tuple[int, int]]:
    """Parent and child of each line of a tree such as ``0 > 1-3 (4 > 5 6)``."""
    edges: set[tuple[int, int]] = set()
    tokens = iter(re.findall(r"\d+-\d+|\d+|[<>()]", tree))

    def group(parent: int | None) -> int | None:
        """Reads up to the closing bracket; the last rank before an arrow is the parent of what follows."""
        last: int | None = None
        for token in tokens:
            if token in "<>":
                parent = last
            elif token == "(":
                group(parent)
            elif token == ")":
                return last
            else:
                first, _, end = token.partition("-")
                for last in range(int(first), int(end or first) + 1):
                    if parent is not None:
                        edges.add((parent, last))
        return last

    group(None)
    return edges


def hand_made(op: str, rows: list[tuple[int, ...]], world_size: int, size: int, nodes: int = 1) -> Plan:
    """A plan of one chunk of rank 0 that all hold, of rows as in `TRANSFER`."""
    place = Placement.of_owners([0], world_size).replicate({0: range(world_size)})
    topology = Topology(tuple(rank * nodes // world_size for rank in range(world_size)), Link(1e9, 0.0), Link(1e9, 0.0))
    return Plan(op, "relay", place, (0,), (size,), (size,), topology, np.array(rows, TRANSFER))


def test_totals_ranks_and_bounds() -> None:
    plan = plan_all_gather(BASE, 1500, Topology.flat(3, Link(1e6, 0.0)), "direct")
    lines = plan.explain().splitlines()
    assert lines[0] == f"all_gather by direct, digest {plan.digest[:8]}"
    assert lines[1] == "4 of 4 chunks, 6.00 kB; 3 ranks on 1 node; 3 transfers in 3 pieces, 4.50 kB"
    assert lines[2] == (
        "predicted 4.50 ms: 1.500 times the bound of 3.00 ms, 1.500 times the universal bound of 3.00 ms"
    ), "rank 0 sends three; two could send one on, but take in two"
    ranks = {rank: re.split("  +", row.strip()) for rank, row in rows_of(plan.explain(), "rank").items()}
    assert ranks == {
        0: ["2", "2", "3", "4.50 kB", "0 B", "0 B", "out 100%"],
        1: ["1", "3", "0", "0 B", "3.00 kB", "0 B", "in 67%"],
        2: ["1", "2", "0", "0 B", "1.50 kB", "0 B", "in 33%"],
    }
    assert {chunk: row.strip() for chunk, row in rows_of(plan.explain(), "chunk").items()} == {
        0: "1.50 kB  0 > 1 2",
        1: "1.50 kB  0 > 1",
    }


def test_a_chunk_shows_the_tree_of_each_of_its_ranges() -> None:
    rows = [
        (0, 1, 0, 4, 0, 3, 0, 640, False),
        (1, 1, 4, 1, 0, 3, 0, 640, False),
        (1, 1, 4, 2, 0, 3, 0, 640, False),
        (1, 1, 4, 3, 0, 3, 0, 640, False),
        *((0, 1, 0, rank, 0, 1, 640, 1000, False) for rank in range(1, 5)),
    ]
    plan = hand_made("all_gather", rows, 5, 1000)
    assert (
        rows_of(plan.explain(), "chunk")[0].strip() == "1.00 kB  0 > 4 > 1-3 (0 B..640 B in 3 pieces), 0 > 1-4 (rest)"
    )


def test_a_reduction_shows_where_sums_are_made() -> None:
    rows = [
        (0, 1, 2, 1, 0, 2, 0, 1000, False),
        (0, 1, 3, 1, 0, 2, 0, 1000, False),
        (1, 1, 1, 0, 0, 2, 0, 1000, True),
        (0, 1, 5, 4, 0, 2, 0, 1000, False),
        (1, 1, 4, 0, 0, 2, 0, 1000, True),
        (0, 1, 6, 0, 0, 2, 0, 1000, False),
    ]
    text = hand_made("reduce_scatter", rows, 7, 1000).explain()
    assert rows_of(text, "chunk")[0].strip() == "1.00 kB  0 < 6 (1 < 2 3) (4 < 5) in 2 pieces"
    assert "rank 1 sends to 0" in text


def test_the_busiest_link_is_named_by_its_kind_where_there_are_two() -> None:
    """Rank 0 sends one of 1 ms inside its node; 1 sends two of 1 ms each to another node, one after the other."""
    rows = [
        (0, 1, 0, 1, 0, 1, 0, 1_000_000, False),
        (1, 1, 1, 2, 0, 1, 0, 1_000_000, False),
        (1, 1, 1, 3, 0, 1, 0, 1_000_000, False),
    ]
    plan = hand_made("all_gather", rows, 4, 1_000_000, nodes=2)
    ranks = rows_of(plan.explain(), "rank")
    assert plan.predicted_s == pytest.approx(3e-3)
    assert [ranks[rank].rpartition("  ")[2] for rank in range(4)] == [
        "scale-up out 33%",
        "scale-out out 67%",
        "scale-out in 33%",
        "scale-out in 33%",
    ]


def test_links_that_nodes_share_have_rows_of_their_own() -> None:
    place = Placement.of_owners([0], 4).replicate({0: range(4)})
    topology = Topology((0, 0, 1, 1), Link(1e9, 0.0), Link(1e9, 0.0), Link(1e8, 0.0))
    text = plan_all_gather(place, 1_000_000, topology, "direct").explain()
    assert rows_of(text, "node") == {0: " out 100%, in   0%", 1: " out   0%, in 100%"}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    world_size, num_chunks = draw(st.integers(1, 9)), draw(st.integers(0, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = random.integers(0, world_size, num_chunks)
    mask = random.random((num_chunks, world_size)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask[np.arange(num_chunks), owners] = True
    sizes = random.choice([0, 100, 100_000, 3_000_000], num_chunks).tolist()
    per_node = draw(st.sampled_from([3, 9]))
    topology = Topology(tuple(rank // per_node for rank in range(world_size)))
    planner = draw(st.sampled_from([plan_all_gather, plan_reduce_scatter]))
    algorithm = draw(st.sampled_from(["auto", "direct", "relay", "hierarchical", "dense"]))
    return planner(Placement(owners, mask), sizes, topology, algorithm)


@settings(deadline=None)
@given(plan=plans())
def test_the_trees_are_the_transfers(plan: Plan) -> None:
    """Where all trees have room, their lines are the senders and receivers of the plan, and no others."""
    gathers = plan.op == "all_gather"
    expected: dict[int, set[tuple[int, int]]] = {}
    for _, _, src, dst, chunk, *_ in plan.transfers.tolist():
        expected.setdefault(chunk, set()).add((src, dst) if gathers else (dst, src))
    shown = rows_of(plan.explain(), "chunk")
    assert shown.keys() == expected.keys()
    for chunk, row in shown.items():
        parts = row.split("B  ", 1)[1].split(", ")
        trees = [re.sub(r" \((rest|[\d.]+ [kMG]?B\.\.).*| in \d+ pieces", "", part) for part in parts]
        found = set().union(*map(edges_of, trees))
        assert found <= expected[chunk]
        if "more range" not in row and not any(tree.endswith("...") for tree in trees):
            assert found == expected[chunk]


def large_plan(name: str) -> Plan:
    everything = Placement.even(256, 128).replicate(dict.fromkeys(range(256), range(128)))
    if name in ("direct", "dense"):
        return plan_all_gather(everything, 1 << 20, Topology.flat(128), name)
    hot = Placement.of_owners([0] * 100, 128).replicate(dict.fromkeys(range(100), range(0, 128, 4)))
    if name == "reduced on nodes":
        nodes = Topology(tuple(rank // 8 for rank in range(128)), node_link=Link(1e9, 1e-5))
        return plan_reduce_scatter(hot, 1 << 14, nodes)
    return plan_all_gather(hot, 1 << 14, Topology.flat(128), name)


@pytest.mark.parametrize("name", ["direct", "dense", "relay", "reduced on nodes"])
def test_a_large_plan_stays_short(name: str) -> None:
    plan = large_plan(name)
    plan.predicted_s, plan.bound_s  # noqa: B018 - they take their own time
    begin = time.process_time()
    lines = plan.explain().splitlines()
    assert time.process_time() - begin < 2, "linear in the number of transfers"
    assert len(lines) < 110 and max(map(len, lines)) < 200
    assert "   ... and 96 more" in lines, "ranks"
    assert lines[-1] == f"   ... and {plan.place.num_chunks - 32} more", "chunks"


def test_a_ring_longer_than_a_line_is_cut() -> None:
    place = Placement.even(128, 128).replicate({0: [1]})
    row = rows_of(plan_all_gather(place, 8, Topology.flat(128), "dense").explain(), "chunk")[3]
    assert row.strip().startswith("8 B  3 > 4 > 5 > ") and row.endswith("...")


@pytest.mark.parametrize(("num_chunks", "world_size"), [(0, 1), (3, 1), (4, 4)])
def test_a_plan_in_which_nothing_travels(num_chunks: int, world_size: int) -> None:
    text = plan_all_gather(Placement.even(num_chunks, world_size), 8, Topology.flat(world_size), "direct").explain()
    assert "predicted 0.00 us: nothing has to travel" in text
    assert text.splitlines()[-1].strip() == "none travels"
    assert all(row.endswith("-") for row in rows_of(text, "rank").values())


def test_a_plan_that_moves_what_nobody_asked_for() -> None:
    text = plan_all_gather(Placement.even(3, 3), 8, Topology.flat(3), "dense").explain()
    assert re.search(r"predicted 4\.\d\d us: nothing has to travel", text)
    assert rows_of(text, "chunk")[1].strip() == "8 B  1 > 2 > 0"
