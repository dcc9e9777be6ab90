"""The parts of ``python -m bench cluster`` that need no network: rates, scenes, buffers, rows and their summary."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import sparsecoll as sc
from bench.cluster.buffers import Buffers
from bench.cluster.contestants import Contestant
from bench.cluster.options import parse
from bench.cluster.placements import NUM_RANDOM, Scene, cross_bytes, hot_scene, random_scenes
from bench.cluster.rate import FRAME_BYTES, SEGMENT_BYTES, parse_rate, payload_bytes_per_s
from bench.cluster.report import record, summarize
from bench.cluster.rows import Row


@pytest.mark.parametrize(
    ("text", "rate"),
    [("400mbit", 400e6), ("1gbit", 1e9), ("2.5Gbit", 2.5e9), ("800kbit", 800e3), ("9600bit", 9600)],
)
def test_rates_as_tc_writes_them(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "400", "400mbps", "mbit", "-1mbit", "0mbit", "4e8bit", "400 mbit"])
def test_refuses_other_rates(text: str) -> None:
    with pytest.raises(sc.InvalidArgument, match="--rate: expected bits per second"):
        parse_rate(text)


def test_refuses_flags_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--rate", "fast"], ["--hosts", "1"], ["--ranks-per-host", "0"], ["-T", "0"]):
        with pytest.raises(SystemExit, match="2"):
            parse(arguments)
        assert arguments[0] in capsys.readouterr().err


def test_headers_are_not_payload() -> None:
    assert (SEGMENT_BYTES, FRAME_BYTES) == (1448, 1514)
    assert payload_bytes_per_s(400_000_000) == pytest.approx(47.82e6, rel=1e-4)


def test_bound_of_one_hot_owner() -> None:
    """8 MB leave one host at 400 Mbit/s."""
    options = parse(["--hosts", "4", "--rate", "400mbit"])
    hot = options.scenes[0]
    for make_plan in (sc.plan_all_gather, sc.plan_reduce_scatter):
        plan = make_plan(hot.place, hot.chunk_bytes, options.topology, "direct")
        assert plan.bound_s == pytest.approx(0.1673, abs=1e-3)


def test_ranks_of_a_host_share_its_link() -> None:
    topology = parse(["--hosts", "3", "--ranks-per-host", "2"]).topology
    assert topology.node_of == (0, 0, 1, 1, 2, 2)
    assert topology.node_link_of(1) == topology.scale_out_of(2) and topology.node_link_of(1) is not None
    assert parse(["--hosts", "3"]).topology.node_link_of(1) is None


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_random_scenes(world_size: int) -> None:
    scenes = random_scenes(world_size, 8, 1000, seed=3)
    assert [scene.number for scene in scenes] == list(range(NUM_RANDOM))
    assert len({scene.place for scene in scenes}) == NUM_RANDOM
    for scene, again in zip(scenes, random_scenes(world_size, 8, 1000, seed=3), strict=True):
        assert (scene.place, scene.chunk_bytes) == (again.place, again.chunk_bytes)
        assert scene.place.num_chunks == 12 and scene.place.world_size == world_size
        assert len(set(scene.chunk_bytes)) > 1
        assert all(500 <= size <= 1500 and size % 4 == 0 for size in scene.chunk_bytes)
        assert len(scene.place.replicated()) > 0
    assert scenes[0].place != random_scenes(world_size, 8, 1000, seed=4)[0].place


def test_cross_bytes_counts_each_other_host_once() -> None:
    holders = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)
    scene = Scene("random", 0, sc.Placement([0, 2, 3], holders), (4, 40, 400))
    assert cross_bytes(scene, [0, 0, 1, 1, 2, 2]) == 4 + 0 + 2 * 400
    assert cross_bytes(scene, range(6)) == 3 * 4 + 40 + 4 * 400
    assert cross_bytes(scene, [0] * 6) == 0


@pytest.mark.parametrize("collective", ["ag", "rs"])
def test_buffers_know_what_is_right(collective: str) -> None:
    (scene, *_) = random_scenes(3, 4, 400, seed=0)
    ranks = [Buffers(scene, collective, rank) for rank in range(3)]
    for buffers in ranks:
        buffers.fill(1)
        assert buffers.count_wrong(1) == sum(row.size for row in buffers.destination.values())
    _run_by_hand(scene, collective, ranks)
    for buffers in ranks:
        assert buffers.count_wrong(1) == 0
        # An output of an earlier run is wrong nearly everywhere.
        assert buffers.count_wrong(2) >= 0.99 * sum(row.size for row in buffers.destination.values())
        for row in itertools.islice(buffers.destination.values(), 1):
            row[2] += 1
            assert buffers.count_wrong(1) == 1


def _run_by_hand(scene: Scene, collective: str, ranks: list[Buffers]) -> None:
    for chunk, owner in enumerate(scene.place.owners.tolist()):
        holders = np.flatnonzero(scene.place.holders[chunk]).tolist()
        if collective == "rs":
            ranks[owner].destination[chunk][:] = sum(ranks[holder].source[chunk] for holder in holders)
        else:
            for holder in holders:
                ranks[holder].destination[chunk][:] = ranks[owner].source[chunk]


class _Someone(Contestant):
    name = "someone"

    def run(self) -> None:
        raise AssertionError("not called")


def test_rows_take_the_slowest_rank_of_timed_iterations() -> None:
    seen = np.zeros((3, 2, 5))
    seen[:, :, 0] = [[9, 9], [1, 3], [2, 1]]
    seen[:, :, 1] = [[0, 1], [0, 0], [2, 0]]
    seen[:, :, 4] = [[700, 700], [10, 20], [15, 16]]
    row = Row.of(hot_scene(2, 3, 100), "ag", _Someone(), 2.0, (0, 1), seen)
    assert row.times_s == (3.0, 2.0) and row.time_s == 2.5 and row.over_bound == 1.25
    assert row.num_wrong == 3
    assert row.wire_bytes == 31
    assert (row.size_bytes, row.useful_bytes, row.must_cross_bytes) == (300, 300, 300)
    assert row.sent_bytes is row.cross_bytes is row.plan_digest is None
    assert row.record()["out_of_place"]["time"] == 2.5e6
    once = Row.of(hot_scene(2, 3, 100), "ag", _Someone(), 2.0, (0, 1), seen[:1])
    assert once.times_s == (9.0,) and once.num_wrong == 1


def test_summary_takes_the_worst_placement() -> None:
    base = Row.of(hot_scene(2, 3, 100), "ag", _Someone(), 2.0, (0, 1), np.ones((2, 2, 5)))
    rows = [
        replace(base, algorithm=algorithm, pattern="random", number=number, times_s=times_s, cross_bytes=7)
        for number, algorithm, times_s in [
            (0, "auto", (2.0, 2.2, 9.0)),
            (0, "direct", (4.0,)),
            (0, "broadcast", (3.0,)),
            (1, "auto", (3.0,)),
            (1, "direct", (8.0,)),
            (1, "broadcast", (3.0,)),
        ]
    ]
    rows += [
        replace(base, algorithm=algorithm, collective="rs", times_s=times_s)
        for algorithm, times_s in [("auto", (2.0,)), ("direct", (5.0,)), ("reduce", (3.0,))]
    ]
    assert summarize(rows, ranks_per_host=1) == {
        "random_ag_over_bound": 1.5,
        "random_ag_direct_over_ours": 12.0 / 5.2,
        "random_ag_broadcast_over_ours": 6.0 / 5.2,
        "hot_rs_over_bound": 1.0,
        "hot_rs_direct_over_ours": 2.5,
        "hot_rs_broadcast_over_ours": 1.5,
    }
    crossing = summarize(rows, ranks_per_host=2)
    assert crossing["random_ag_cross_bytes"] == 14
    assert crossing["random_ag_must_cross_bytes"] == 2 * base.must_cross_bytes


@pytest.mark.parametrize(("num_wrong", "errors", "passed"), [(0, [], True), (1, [], False), (0, ["died"], False)])
def test_wrong_results_and_failed_ranks_do_not_pass(num_wrong: int, errors: list[str], passed: bool) -> None:
    base = Row.of(hot_scene(2, 3, 100), "ag", _Someone(), 2.0, (0, 1), np.ones((2, 2, 5)))
    names = ("auto", "direct", "broadcast")
    rows = [replace(base, algorithm=name, sent_bytes=(1, 0), received_bytes=(0, 1), num_wrong=0) for name in names]
    rows[-1] = replace(rows[-1], num_wrong=num_wrong)
    found = record(parse([]), rows, errors, 0, "")
    assert found["passed"] is passed
    assert found["out_of_bounds"] == {"count": num_wrong, "okay": num_wrong == 0}
    assert not record(parse([]), [], [], 0, "")["passed"]
