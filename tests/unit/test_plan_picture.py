"""The page of a Plan: its lanes are the links, its bars the pieces, its lines the bounds, and it needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecoll import InvalidArgument, Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan import TRANSFER
from sparsecoll.plan.bars import bars_of
from sparsecoll.plan.costs import costs_of
from sparsecoll.plan.lanes import Lane, Pieces, lanes_of
from sparsecoll.plan.picture import picture

HOT = Placement.of_owners([0] * 4, 6).replicate(dict.fromkeys(range(4), range(6)))
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Every element with its attributes, and the text of each; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"{self.open} stay open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in attrs]

    @property
    def data(self) -> Any:
        """What the script shows under the mouse."""
        return json.loads(re.findall(r"^const data = (.*);$", "".join(self.texts["script"]), re.MULTILINE)[0])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    per_node, num_nodes, num_chunks = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    world_size = per_node * num_nodes
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = random.integers(0, world_size, num_chunks)
    mask = random.random((num_chunks, world_size)) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    mask[np.arange(num_chunks), owners] = True
    up = [Link(float(rate), 1e-6) for rate in random.choice([2e8, 1e9], world_size)]
    shared = draw(st.sampled_from([None, Link(1e8, 1e-5), Link(3e9, 0.0)]))
    topology = Topology(
        tuple(rank // per_node for rank in range(world_size)),
        tuple(up),
        Link(3e8, draw(st.sampled_from([0, 5e-6]))),
        shared,
    )
    sizes = random.choice([0, 640, 100_000, 1_000_000], num_chunks).tolist()
    algorithm = draw(st.sampled_from(["auto", "direct", "relay", "hierarchical", "dense"]))
    if draw(st.booleans()):
        return plan_all_gather(Placement(owners, mask), sizes, topology, algorithm)
    double = [2 * size for size in sizes]
    return plan_reduce_scatter(Placement(owners, mask), sizes, topology, algorithm, partial_bytes=double)


@settings(deadline=None)
@given(plan=plans())
def test_lanes_carry_every_piece_one_at_a_time_for_as_long_as_the_link_needs(plan: Plan) -> None:
    pieces, lanes = lanes_of(plan)
    costs, node_of = costs_of(plan.topology), plan.topology.node_of
    crosses = [node_of[src] != node_of[dst] for src, dst in zip(pieces.src, pieces.dst, strict=True)]
    seen: dict[tuple[str, bool], list[int]] = {}
    for lane in lanes:
        ticks = {"scale-up": costs.up, "scale-out": costs.out, "node": costs.node}[lane.level][lane.number]
        ends = pieces.src if lane.outgoing else pieces.dst
        at = [node_of[ends[piece]] if lane.level == "node" else int(ends[piece]) for piece in lane.piece]
        assert set(at) <= {lane.number}
        assert {crosses[piece] for piece in lane.piece} <= {lane.level != "scale-up"}
        assert (lane.end - lane.begin == pieces.bytes[lane.piece] * ticks).all()
        assert (lane.begin[1:] >= lane.end[:-1]).all(), "one at a time"
        assert (lane.begin >= pieces.sent[lane.piece]).all() and (lane.end <= pieces.arrived[lane.piece]).all()
        seen.setdefault((lane.level, lane.outgoing), []).extend(lane.piece.tolist())
    inside = [piece for piece, far in enumerate(crosses) if not far]
    far = [piece for piece, far in enumerate(crosses) if far]
    expected = {"scale-up": inside, "scale-out": far, "node": far if plan.topology.node_link else []}
    for level, those in expected.items():
        for outgoing in (True, False):
            assert sorted(seen.get((level, outgoing), [])) == those, "each piece leaves and arrives once"
    assert pieces.bytes.sum() == plan.sent_bytes.sum()
    assert max(pieces.arrived, default=0) == plan.timeline.finish


def test_node_lanes_by_hand() -> None:
    """Two ranks of a node send 1 MB each at once over a link that is four times slower than their own."""
    place = Placement.of_owners([0, 1], 4).replicate({0: [2], 1: [3]})
    topology = Topology((0, 0, 1, 1), Link(1e9, 0.0), Link(1e9, 1e-3), Link(2.5e8, 1e-3))
    sizes = (1_000_000, 1_000_000)
    # Of two stages, as messages of one share their links.
    rows = np.array([(0, 1, 0, 2, 0, 1, 0, sizes[0], False), (1, 1, 1, 3, 1, 1, 0, sizes[1], False)], TRANSFER)
    _, lanes = lanes_of(Plan("all_gather", "direct", place, (0, 1), sizes, sizes, topology, rows))
    tick_s = costs_of(topology).tick_s
    found = {
        (lane.level, lane.number, lane.outgoing): [
            (begin * tick_s * 1e3, end * tick_s * 1e3) for begin, end in zip(lane.begin, lane.end, strict=True)
        ]
        for lane in lanes
        if len(lane.piece)
    }
    expected = {
        ("scale-out", 0, True): [(0, 1)],
        ("scale-out", 1, True): [(0, 1)],
        ("node", 0, True): [(0, 4), (4, 8)],
        ("node", 1, False): [(1, 5), (5, 9)],  # a latency later
        ("scale-out", 2, False): [(4, 5)],
        ("scale-out", 3, False): [(8, 9)],
    }
    assert found.keys() == expected.keys()
    for key, times in expected.items():
        assert found[key] == [pytest.approx(each) for each in times]


@pytest.mark.parametrize("op", [plan_all_gather, plan_reduce_scatter])
def test_the_page_shows_every_piece_where_it_leaves_and_where_it_arrives(op: Any) -> None:
    plan = op(HOT, 100_000, Topology.flat(6))
    page = Page(picture(plan))
    lanes = page.data["lanes"]
    assert len(lanes) == len(page.having("data-lane")) == 12
    out, into = lanes[0::2], lanes[1::2]
    for rank in range(6):
        assert sum(bar[6] for bar in out[rank]) == plan.sent_bytes[rank]
        assert sum(bar[6] for bar in into[rank]) == plan.received_bytes[rank]
        assert {bar[3] for bar in out[rank]} <= {rank} and {bar[4] for bar in into[rank]} <= {rank}
    assert sum(bar[7] for bars in lanes for bar in bars) == 2 * plan.played["pieces"].sum()
    assert max(bar[1] for bars in into for bar in bars) == pytest.approx(plan.predicted_s * 1e6, abs=1e-3)
    owned = out[0] if plan.op == "all_gather" else [bar for bars in out for bar in bars if not bar[5]]
    assert all(bar[5] == 0 for bar in owned) and any(bar[5] == 1 for bars in out for bar in bars), "relays forward"


def test_bars_stand_where_their_times_are() -> None:
    plan = plan_all_gather(HOT, 100_000, Topology.flat(6, Link(1e9, 1e-5)), "direct")
    page = Page(picture(plan))
    paths = [
        attrs["d"] or "" for tag, attrs in page.elements if tag == "path" and (attrs["class"] or "").startswith("c")
    ]
    moves = [tuple(map(float, move)) for path in paths for move in re.findall(r"M([\d.]+) [\d.]+h([\d.]+)", path)]
    scale = page.data["span_us"] / page.data["width"]
    found = sorted((x * scale, (x + width) * scale) for x, width in moves)
    expected = sorted((bar[0], bar[1]) for bars in page.data["lanes"] for bar in bars)
    assert len(found) == len(expected) == 2 * plan.played["pieces"].sum()
    assert np.allclose(found, expected, atol=0.7 * scale), "to less than a pixel"


def lines_of(plan: Plan) -> dict[str, float]:
    """Name → seconds of the lines across all lanes."""
    page = Page(picture(plan))
    (left,) = {float(re.findall(r"\((\d+)", attrs["transform"] or "")[0]) for attrs in page.having("data-lane")}
    scale = page.data["span_us"] * 1e-6 / page.data["width"]
    marks = {attrs["data-line"] or "": attrs["d"] or "" for attrs in page.having("data-line")}
    return {name: (float(re.findall(r"M([\d.]+)", path)[0]) - left) * scale for name, path in marks.items()}


def test_the_bounds_and_the_predicted_end_are_drawn() -> None:
    plan = plan_all_gather(HOT, 1 << 20, Topology.flat(6), "direct")
    lines = lines_of(plan)
    assert lines.keys() == {"predicted", "bound = universal bound"}
    assert lines["predicted"] == pytest.approx(plan.predicted_s, rel=1e-3)
    assert lines["bound = universal bound"] == pytest.approx(plan.bound_s, rel=1e-3)
    # Rank 1 could carry what 0 sends slowly, but does not hold it.
    slow, fast = Link(1e8, 0.0), Link(1e9, 0.0)
    topology = Topology((0, 0, 1, 1), Link(1e10, 0.0), (slow, fast, fast, fast))
    plan = plan_all_gather(Placement.of_owners([0], 4).replicate({0: [2]}), 1 << 20, topology)
    lines = lines_of(plan)
    assert plan.bound_s > 2 * plan.universal_bound_s
    assert lines["bound"] == pytest.approx(plan.bound_s, rel=1e-3)
    assert lines["universal bound"] == pytest.approx(plan.universal_bound_s, rel=1e-2)


def test_the_page_needs_nothing_else() -> None:
    text = picture(plan_all_gather(HOT, 1 << 20, Topology.flat(6)))
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not page.having("src") and not page.having("href")
    assert {tag for tag, _ in page.elements} >= {"svg", "style", "script", "h1", "details"}


def test_the_figures_are_those_of_the_plan() -> None:
    plan = plan_reduce_scatter(HOT, 1 << 20, Topology.flat(6, Link(1e9, 0.0)), "direct")
    page = Page(picture(plan))
    assert page.texts["h1"] == page.texts["title"] == ["reduce_scatter by direct"]
    assert "".join(page.texts["dt"]) == "predictedbounduniversal boundstaging"
    assert [text.strip() for text in page.texts["dd"]] == ["21.0 ms", "4.19 ms", "4.19 ms", "20.97 MB"]
    assert page.texts["small"][:2] == ["predicted is 5.000 times it"] * 2
    named = [attrs["data-chunk"] for attrs in page.having("data-chunk")]
    assert named == ["0", "1", "2", "3"]
    assert plan.explain() in "".join(page.texts["pre"]) and plan.topology.table() in "".join(page.texts["pre"])


def test_on_nodes_idle_links_are_left_out_and_ranks_stand_with_their_node() -> None:
    topology = Topology((0, 1, 0, 1), node_link=Link(1e9, 1e-5))
    place = Placement.of_owners([0], 4).replicate({0: range(4)})
    page = Page(picture(plan_all_gather(place, 1 << 20, topology, "hierarchical")))
    texts = [text for text in page.texts["text"] if not text.endswith("%")]
    heads = [text for text in texts if re.fullmatch(r"(rank|node) \d(, all)?", text)]
    assert heads == ["node 0", "rank 0", "rank 2", "node 0, all", "node 1", "rank 1", "rank 3", "node 1, all"]
    assert texts.count("scale-up out") == 4, "all have a neighbour"
    assert texts.count("scale-out out") == 2, "two talk to another node"
    assert "Idle links of ranks that use another one are left out." in "".join(page.texts["p"])


def lane_of(*times: tuple[int, int]) -> Lane:
    begin, end = np.array(times).T
    return Lane("scale-up", 0, True, np.arange(len(times)), begin, end)


def pieces_of(count: int, chunk: list[int] | None = None) -> Pieces:
    zeros = np.zeros(count, np.int64)
    chunks = zeros if chunk is None else np.array(chunk)
    sizes = np.arange(1, count + 1)
    return Pieces(zeros, zeros, chunks, zeros, zeros + 1, sizes, zeros > 0, zeros, zeros)


def test_narrow_neighbours_are_one_bar_and_wide_ones_and_gaps_stay() -> None:
    lane = lane_of((0, 1), (1, 2), (3, 4), (20, 21), (21, 31), (31, 32), (32, 33))
    (bars,), least = bars_of(pieces_of(7, [5, 6, 6, 7, 8, 9, 9]), [lane], 5, 100)
    assert least == 5
    assert [(bar.begin, bar.end, bar.chunk, bar.num_pieces, bar.bytes) for bar in bars] == [
        (0, 4, -1, 3, 6),
        (20, 21, 7, 1, 4),
        (21, 31, 8, 1, 5),
        (31, 33, 9, 2, 13),
    ]
    assert bars[0].most == (6, 0), "the chunk of most bytes gives its colour"
    assert (bars[0].src, bars[0].dst, bars[0].forwarded) == (0, 1, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=300), st.integers(1, 50))
def test_there_are_no_more_bars_than_asked_for_and_no_piece_is_lost(steps: list[tuple[int, int]], most: int) -> None:
    times, now = [], 0
    for gap, length in steps:
        times.append((now + gap, now + gap + length))
        now += gap + length
    lanes = [lane_of(*times), lane_of(*times[:1])]
    (bars, single), least = bars_of(pieces_of(len(times)), lanes, 1, most)
    assert len(bars) + len(single) <= max(most, 2)
    assert sum(bar.num_pieces for bar in bars) == len(times)
    assert sum(bar.bytes for bar in bars) == sum(range(1, len(times) + 1))
    assert (bars[0].begin, bars[-1].end) == (times[0][0], now)
    assert all(one.end <= other.begin for one, other in pairwise(bars))
    assert all(bar.num_pieces == 1 or bar.end - bar.begin < 3 * least for bar in bars)


def test_the_page_of_a_large_plan_stays_small_and_says_what_it_leaves_out() -> None:
    everything = Placement.even(128, 64).replicate(dict.fromkeys(range(128), range(64)))
    plan = plan_all_gather(everything, 1 << 20, Topology.flat(64), "direct")
    text = picture(plan)
    assert len(text) < 6e6
    lanes = Page(text).data["lanes"]
    num_bars, num_pieces = sum(map(len, lanes)), sum(bar[7] for bars in lanes for bar in bars)
    assert len(lanes) == 128 and num_pieces == 2 * plan.played["pieces"].sum() > 200_000
    assert num_bars <= 60_000
    assert f"{num_bars:,} bars stand for {num_pieces:,}." in text
    assert "<li>and 104 more</li>" in text


def test_colours_of_neighbouring_chunks_differ() -> None:
    place = Placement.even(24, 2).replicate(dict.fromkeys(range(24), range(2)))
    text = picture(plan_all_gather(place, 1000, Topology.flat(2)))
    colours = re.findall(r"^\.c\d+ \{ stroke: (.*); \}$", text, re.MULTILINE)
    assert len(colours) == len(set(colours)) == 24
    hues = [float(colour.rstrip(")").split()[2]) for colour in colours]
    assert all(60 < abs(one - other) < 300 for one, other in pairwise(hues))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_plan_in_which_nothing_travels(world_size: int) -> None:
    page = Page(picture(plan_all_gather(Placement.even(3, world_size), 8, Topology.flat(world_size), "direct")))
    assert "Nothing travels." in page.texts["p"] and page.data["lanes"] == []


def test_what_moves_without_need_has_no_bound() -> None:
    plan = plan_all_gather(Placement.even(3, 3), 1000, Topology.flat(3), "dense")
    assert lines_of(plan).keys() == {"predicted"}


def test_show_writes_the_page(tmp_path: Path) -> None:
    plan = plan_all_gather(HOT, 1000, Topology.flat(6))
    plan.show(tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == picture(plan)
    plan.show(str(tmp_path / "plan.html"))
    for path in (tmp_path / "none" / "plan.html", tmp_path, "a\0b"):
        with pytest.raises(InvalidArgument, match=r"Plan\.show: expected a writable path, got"):
            plan.show(path)
