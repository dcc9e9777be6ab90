"""The parts of the step bench that need no other ranks: routing, traces, replay, flags, figures, chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import sparsecoll as sc
from bench.step import case
from bench.step.chart import draw_chart
from bench.step.draws import ROUTINGS, Spot, draw
from bench.step.figures import best_balancers, summarize, summarize_hiding
from bench.step.options import RECORDED, parse
from bench.step.replay import ReplayRouter
from bench.step.report import record
from bench.step.rows import Row, write_rows
from bench.step.sizes import Sizes
from bench.step.traces import Trace, load_trace, save_trace
from sparsecoll.balance import BALANCERS
from sparsecoll.moe import Router

DRAWN = [name for name in ROUTINGS if name != "recorded"]


def loads(ids: Any, num_experts: int) -> Any:
    return np.bincount(ids.ravel(), minlength=num_experts)


@settings(deadline=None, max_examples=60)
@given(
    routing=st.sampled_from(DRAWN),
    num_tokens=st.integers(1, 50),
    num_experts=st.integers(1, 40),
    data=st.data(),
)
def test_draws_are_routings(routing: str, num_tokens: int, num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(8, num_experts)))
    ids = draw(routing, num_tokens, top_k, num_experts, Spot(3, 1, 0), 7)
    assert ids.shape == (num_tokens, top_k) and ids.dtype == np.int64
    assert ids.min() >= 0 and ids.max() < num_experts
    assert all(len(set(row)) == top_k for row in ids.tolist()), "a token visits an expert twice"


@pytest.mark.parametrize(("routing", "exponent"), [("zipf08", 0.8), ("zipf12", 1.2)])
def test_zipf_loads_follow_the_law_and_rank_0_has_the_hot_ones(routing: str, exponent: float) -> None:
    found = loads(draw(routing, 200_000, 2, 32, Spot(0, 0, 0), 0), 32) / 400_000
    law = np.arange(1, 33) ** -exponent
    law /= law.sum()
    np.testing.assert_allclose(found, law, rtol=0.04)
    assert 2 * found[:16].sum() == pytest.approx({0.8: 1.545, 1.2: 1.767}[exponent], abs=0.01)


def test_zipf_expert_that_would_be_chosen_more_than_always_is_chosen_always() -> None:
    found = loads(draw("zipf12", 20_000, 3, 4, Spot(0, 0, 0), 0), 4) / 20_000
    left = np.arange(2.0, 5) ** -1.2
    assert found[0] == 1
    np.testing.assert_allclose(found[1:], 2 * left / left.sum(), rtol=0.03)


@given(num_tokens=st.integers(0, 70), num_experts=st.integers(1, 33), seed=st.integers(0, 5))
def test_balanced_is_exact(num_tokens: int, num_experts: int, seed: int) -> None:
    counts = loads(draw("balanced", num_tokens, 1, num_experts, Spot(0, 0, 0), seed), num_experts)
    assert counts.max() - counts.min() <= (num_tokens % num_experts != 0)


def test_balanced_at_the_default_sizes() -> None:
    sizes = Sizes()
    ids = draw("balanced", sizes.tokens, sizes.top_k, sizes.experts, Spot(5, 1, 1), 0)
    assert set(loads(ids, sizes.experts)) == {128}


@pytest.mark.parametrize("routing", DRAWN)
def test_draws_repeat_and_differ_from_spot_to_spot(routing: str) -> None:
    def at(*spot: int, seed: int = 0) -> bytes:
        return draw(routing, 64, 2, 16, Spot(*spot), seed).tobytes()

    assert at(0, 0, 0) == at(0, 0, 0)
    assert len({at(0, 0, 0), at(1, 0, 0), at(0, 1, 0), at(0, 0, 1), at(0, 0, 0, seed=1)}) == 5


def trace_of(steps: int = 3, layers: int = 2, tokens: int = 6, top_k: int = 2, num_experts: int = 9) -> Trace:
    random = np.random.default_rng(0)
    ids = random.random((steps, layers, tokens, num_experts)).argsort(axis=-1)[..., :top_k].astype(np.uint8)
    return Trace(ids, num_experts, "a test")


def test_ranks_replay_consecutive_tokens_and_start_again() -> None:
    trace = trace_of()
    for step, layer in ((0, 0), (2, 1)):
        both = np.concatenate([trace.at(step, layer, rank, 3) for rank in range(2)])
        np.testing.assert_array_equal(both, trace.expert_ids[step, layer])
    np.testing.assert_array_equal(trace.at(1, 0, 1, 4), trace.expert_ids[1, 0][[4, 5, 0, 1]])
    np.testing.assert_array_equal(trace.at(4, 1, 0, 13)[[0, 6, 12]], trace.expert_ids[1, 1][[0, 0, 0]])
    ids = draw("recorded", 4, 2, 9, Spot(1, 0, 1), 0, trace)
    np.testing.assert_array_equal(ids, trace.at(1, 0, 1, 4))


@pytest.mark.parametrize("name", ["routing.npz", "folder"])
def test_traces_are_read_as_written(name: str, tmp_path: Path) -> None:
    trace, path = trace_of(), tmp_path / "new" / name
    save_trace(trace, path)
    found = load_trace(path, 9)
    np.testing.assert_array_equal(found.expert_ids, trace.expert_ids)
    assert found.num_experts == 9 and found.expert_ids.dtype == np.uint8


def test_megatron_traces_of_several_ranks(tmp_path: Path) -> None:
    """Tokens follow each other as ranks do (10 after 2), layers as stages do."""
    for rank in (10, 2):
        lines = [
            {
                "step": step,
                "stage": stage,
                "block": 0,
                "layer": layer,
                "rank": rank,
                "num_tokens": 1,
                "topk": 2,
                "top_indices": [[rank + step, stage]],
            }
            for step in (8, 7)
            for stage, layer in ((1, 1), (0, 2))
        ]
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_trace(tmp_path, 32).expert_ids
    assert found.tolist() == [[[[2 + step, stage], [10 + step, stage]] for stage in (0, 1)] for step in (7, 8)]


def _line(**changes: Any) -> str:
    fields = {"step": 0, "stage": 0, "block": 0, "layer": 0, "rank": 0, "num_tokens": 1, "topk": 2}
    return json.dumps({**fields, "top_indices": [[0, 1]], **changes})


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [_line(), _line(step=1, top_indices=[[0, 1], [2, 3]])],
        [_line(), _line(step=1, layer=1)],
        [_line(top_indices=[[0, 300]])],
        [_line(top_indices=[[0, 40]])],
        [_line(top_indices=[[3, 3]])],
        ["{}"],
        ["no JSON"],
    ],
)
def test_bad_megatron_traces_are_refused(lines: Sequence[str], tmp_path: Path) -> None:
    if lines:
        (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(lines))
    with pytest.raises(sc.InvalidArgument, match="expected"):
        load_trace(tmp_path, 32)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.zeros((1, 1, 1, 1), np.int64), "uint8"),
        (np.zeros((1, 1, 1), np.uint8), r"\[1, 1, 1\]"),
        (np.zeros((1, 1, 0, 1), np.uint8), r"\[1, 1, 0, 1\]"),
        (np.full((1, 1, 1, 1), 4, np.uint8), "below 4, got 4"),
        (np.full((1, 1, 1, 2), 3, np.uint8), "distinct"),
    ],
)
def test_bad_traces_are_refused(ids: Any, expected: str) -> None:
    with pytest.raises(sc.InvalidArgument, match=expected):
        Trace(ids, 4, "a test")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.npz").write_bytes(b"junk")
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    for name in ("missing.npz", "junk.npz", "other.npz"):
        with pytest.raises(sc.InvalidArgument, match=f"expected a routing trace in .*{name}"):
            load_trace(tmp_path / name, 32)


def test_traces_that_do_not_fit_are_refused() -> None:
    trace = trace_of()
    trace.check_fits(1, 9, 2)
    for layers, experts, top_k in ((3, 9, 2), (2, 8, 2), (2, 9, 1)):
        with pytest.raises(sc.InvalidArgument, match="got 2 layers with 9 experts and top-2"):
            trace.check_fits(layers, experts, top_k)


def test_the_recorded_routing_is_there_and_skewed() -> None:
    sizes = Sizes()
    trace = load_trace(RECORDED, sizes.experts)
    trace.check_fits(sizes.layers, sizes.experts, sizes.top_k)
    assert trace.expert_ids.shape[2] >= 2 * sizes.tokens and "no auxiliary loss" in trace.origin
    assert RECORDED.stat().st_size < 500_000
    for layer in range(sizes.layers):
        by_expert = loads(trace.expert_ids[:, layer], sizes.experts)
        assert by_expert.max() > 3 * by_expert.mean()


@pytest.mark.parametrize("normalize", [True, False])
def test_replaying_a_routers_own_choice_changes_nothing(normalize: bool) -> None:
    torch.manual_seed(0)
    router = Router(8, 6, 3, normalize_weights=normalize)
    replay = ReplayRouter.of(router)
    assert replay.weight is router.weight
    tokens, upstream = torch.randn(10, 8), torch.randn(10, 3)
    expected = router(tokens)
    (grad,) = torch.autograd.grad(expected.weights, router.weight, upstream)
    replay.expert_ids = expected.expert_ids
    found = replay(tokens)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(torch.autograd.grad(found.weights, replay.weight, upstream)[0], grad, atol=1e-6)


def test_replayed_experts_have_their_true_weights() -> None:
    torch.manual_seed(0)
    replay = ReplayRouter.of(Router(8, 6, 2, normalize_weights=False))
    replay.expert_ids = torch.tensor([[5, 0], [1, 2]])
    tokens = torch.randn(2, 8)
    found = replay(tokens)
    probabilities = (tokens @ replay.weight.T).softmax(-1)
    assert torch.equal(found.expert_ids, replay.expert_ids)
    assert torch.allclose(found.weights, torch.stack([probabilities[0, [5, 0]], probabilities[1, [1, 2]]]))


def test_flags() -> None:
    options = parse([])
    assert options.backends == ("torch", "mpi") and options.parts == ("block", "step")
    assert options.balancers == (*BALANCERS, "slices") and options.routings == ROUTINGS
    assert (options.sizes.layers, options.sizes.experts, options.sizes.top_k) == (2, 32, 2)
    assert (options.sizes.width, options.sizes.hidden, options.sizes.tokens) == (256, 512, 2048)
    assert options.contestants("torch") == ("ep", "ideal", *BALANCERS, "slices", "fsdp2", "ddp")
    assert options.contestants("mpi") == ("ep", "ideal", *BALANCERS, "slices")
    rank = parse(["--balancers", "none", "--launched", "77", "--json", "x"])
    assert (rank.arguments, rank.launcher, rank.balancers) == (("--balancers", "none"), 77, ("none",))
    assert not options.on_cluster and not options.chooses_length and options.sizes.length == 256


def test_flags_of_a_cluster() -> None:
    options = parse(["--cluster", "--hosts", "8", "--ranks", "3"])
    assert (options.ranks, options.rate_bits_per_s, options.backends, options.parts) == (
        8,
        10**9,
        ("torch",),
        ("step",),
    )
    assert options.on_cluster and options.chooses_length
    assert not parse(["--cluster", "--length", "512"]).chooses_length


@pytest.mark.parametrize(
    "arguments",
    [
        ["--balancers", "nobody"],
        ["--routings", "zipf09"],
        ["--backend", "local"],
        ["--experts", "31"],
        ["--tokens", "100"],
        ["--top-k", "33"],
        ["--ranks", "0"],
        ["--iters", "-1"],
        ["--rate", "fast", "--cluster"],
        ["--backend", "gloo,mpi", "--cluster"],
        ["--experts", "30", "--cluster"],
    ],
)
def test_bad_flags_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


@given(iterations=st.integers(1, 20), warmup=st.integers(0, 5), every=st.integers(1, 7))
def test_slow_rivals_take_some_turns_and_the_last(iterations: int, warmup: int, every: int) -> None:
    options = parse(["-n", str(iterations), "-w", str(warmup), "--every", str(every)])
    last = warmup + iterations - 1
    for name in options.contestants("torch"):
        turns = [iteration for iteration in range(last + 1) if options.takes_turn(name, iteration)]
        assert turns[-1] == last
        gaps = {b - a for a, b in pairwise(turns)}
        assert gaps <= ({every} if name in ("slices", "fsdp2", "ddp") else {1})


def rows_of(
    times_ms: dict[str, float], backend: str = "torch", part: str = "block", routing: str = "zipf08"
) -> list[Row]:
    return [
        Row(backend, part, routing, name, [time_ms / 1e3 + shift for shift in (-1e-4, 0.0, 5e-4)])
        for name, time_ms in times_ms.items()
    ]


GLOO = rows_of({"ep": 500, "ideal": 400, "quota": 410, "none": 505, "fsdp2": 1230, "ddp": 615})
MPI = rows_of({"ep": 300, "ideal": 200, "quota": 250, "none": 240}, "mpi", "step", "recorded")


def test_figures() -> None:
    found = summarize([*GLOO, *MPI])
    expected = {
        "zipf08_block_ep_over_fssdp": 500 / 410,
        "zipf08_block_fsdp2_over_fssdp": 3.0,
        "zipf08_block_ddp_over_fssdp": 1.5,
        "zipf08_block_fssdp_over_ideal": 1.025,
        "zipf08_block_ep_over_quota": 500 / 410,
        "zipf08_block_fsdp2_over_quota": 3.0,
        "zipf08_block_ddp_over_quota": 1.5,
        "zipf08_block_quota_over_ideal": 1.025,
        "zipf08_block_ep_over_none": 500 / 505,
        "zipf08_block_fsdp2_over_none": 1230 / 505,
        "zipf08_block_ddp_over_none": 615 / 505,
        "zipf08_block_none_over_ideal": 505 / 400,
        "mpi_recorded_step_ep_over_fssdp": 300 / 240,
        "mpi_recorded_step_fssdp_over_ideal": 240 / 200,
        "mpi_recorded_step_ep_over_quota": 300 / 250,
        "mpi_recorded_step_quota_over_ideal": 250 / 200,
        "mpi_recorded_step_ep_over_none": 300 / 240,
        "mpi_recorded_step_none_over_ideal": 240 / 200,
    }
    assert found == pytest.approx(expected)
    assert best_balancers([*GLOO, *MPI]) == {"zipf08_block": "quota", "mpi_recorded_step": "none"}


def test_hiding_is_the_best_balancers_where_it_hides_least() -> None:
    def row(contestant: str, routing: str, time_s: float, exposed_s: float, alone_s: float | None) -> Row:
        return Row("torch", "step", routing, contestant, [time_s], exposed_s=exposed_s, alone_s=alone_s)

    rows = [
        *rows_of({"ep": 9, "ideal": 9}, part="step"),
        *rows_of({"ep": 9, "ideal": 9}, part="step", routing="zipf12"),
        row("hecate", "zipf08", 1.0, 0.1, 1.0),
        row("none", "zipf08", 2.0, 0.9, 1.0),
        row("hecate", "zipf12", 1.0, 0.4, 2.0),
        row("none", "zipf12", 2.0, 0.0, 0.0),
    ]
    assert summarize_hiding(rows) == {"hidden_fraction": pytest.approx(0.8), "exposed_s": 0.4}
    assert summarize_hiding([*rows[:3], row("none", "zipf08", 0.5, 0.0, 0.0)]) == {}


def test_wrong_results_fail() -> None:
    options = parse(["--backend", "gloo"])
    assert record(options, GLOO, [], "now")["passed"]
    assert not record(options, [], [], "now")["passed"]
    assert not record(options, GLOO, ["mpi: 2 ranks ended with status 1"], "now")["passed"]
    for wrong in (1e-4, float("nan")):
        row = Row("torch", "block", "zipf08", "hecate", [0.1], {"outputs": 0.0, "gradients": wrong})
        assert not row.is_right
        assert not record(options, [*GLOO, row], [], "now")["passed"]


def test_rows_of_ranks_that_fail_later_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_ranks(backend: str, ranks: int, arguments: Sequence[str]) -> int:
        write_rows(GLOO[:2], Path(arguments[-1]))
        write_rows(GLOO[2:], Path(arguments[-1]))
        return 9

    monkeypatch.setattr(case, "run_ranks", run_ranks)
    found = case.run(["--backend", "gloo", "--routings", "zipf08", "--json", str(tmp_path / "record.json")])
    assert not found["passed"] and found["errors"] == ["torch: 2 ranks ended with status 9"]
    assert found["summary"] == summarize(GLOO) and len(found["results"]) == len(GLOO)


def test_ranks_that_end_without_rows_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(case, "run_ranks", lambda *_: 3)
    found = case.run(["--routings", "balanced", "--json", str(tmp_path / "record.json")])
    assert not found["passed"] and found["summary"] == {}
    assert found["errors"] == ["torch: 2 ranks ended with status 3", "mpi: 2 ranks ended with status 3"]
    assert json.loads((tmp_path / "record.json").read_text()) == found
    assert not (tmp_path / "record.png").exists(), "there is nothing to draw"


def test_chart_has_a_bar_from_zero_for_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    names = ("ep", "ideal", "quota", "none", "fsdp2", "ddp")
    balanced = rows_of(dict(zip(names, range(6, 0, -1), strict=True)), routing="balanced")
    draw_chart([*GLOO, *balanced], "title", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    bars = [patch for container in axes.containers for patch in container]
    assert sorted(round(bar.get_height()) for bar in bars) == [1, 2, 3, 4, 5, 6, 400, 410, 500, 505, 615, 1230]
    assert {bar.get_y() for bar in bars} == {0} and axes.get_ylim()[0] == 0
    assert "ms" in axes.get_ylabel() and axes.get_xlabel() == "routing"
    assert {text.get_text() for text in drawn[0].legends[0].get_texts()} >= {"EP", "ideal", "FSSDP quota", "FSDP2"}
