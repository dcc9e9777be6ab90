"""The bench of balancers: what it records, that it notices what is wrong, and the page that quotes it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import sparsecoll as sc
from bench.balance import case, contest
from bench.balance.contest import WINDOW, compare_balancers, compare_predictors
from bench.balance.settings import SETTINGS, Setting, drawn, recorded
from bench.balance.tables import tables
from bench.balance.weighing import weigh
from bench.step.options import RECORDED
from bench.step.traces import Trace, load_trace
from sparsecoll.balance import BALANCERS, Balance, Balancer, Costs, Loads, find_balancer
from tests.unit.balancing import Problem, check_answer, check_purity, problems

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "balance.md").read_text()

# Two ranks with two experts each; a second computes one assignment, or sends one or copies an expert there and back.
TINY = Setting("tiny", 4, 4, Costs(sc.Topology.flat(2), 2, 1, 4.0, 1 / 3, hidden_s=0.25, spare_experts=2), ())


def _few_steps(path: Path, num_experts: int) -> Trace:
    trace = load_trace(path, num_experts)
    return dataclasses.replace(trace, expert_ids=trace.expert_ids[:20])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("balance") / "out" / "balance.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case, "load_trace", _few_steps)
        record = case.run(["--iters", "1", "--json", str(path)])
    assert json.loads(path.read_text()) == record
    return record


def test_records_every_balancer_on_every_routing(ran: dict[str, Any]) -> None:
    assert ran["passed"] and ran["case"] == "balance" and ran["command"].startswith("python -m bench balance --iters 1")
    found: dict[tuple[str, str], dict[tuple[str, str], Any]] = {}
    for row in ran["results"]:
        found.setdefault((row["setting"], row["routing"]), {})[row["balancer"], row["spread"]] = row
    drawn_ones = {(each.name, routing) for each in SETTINGS for routing in each.draws}
    replayed = {(name, f"recorded{layer}") for name in ("cpu2", "gpu8") for layer in range(2)}
    assert found.keys() == drawn_ones | replayed
    for (_, routing), rows in found.items():
        assert {name for name, _ in rows} == {*BALANCERS, "early_quota"}
        for row in rows.values():
            assert row["right"] and row["solver_us"] > 0
            assert 1 <= row["after"] <= row["after_max"] and row["forwards"] == (15 if "recorded" in routing else 1)
            assert 0 <= row["seen_over_ideal"] < row["over_ideal"] and 0 <= row["left"] < 1
        none = rows["none", "nearest"]
        assert (none["copies"], none["copied_bytes"], none["seen_over_ideal"]) == (0, 0, 0)
        assert none["after"] == none["before"]
        if routing == "balanced":
            assert none["over_ideal"] == pytest.approx(1) and none["before"] == 1
        else:
            assert rows["hecate", "nearest"]["over_ideal"] < none["over_ideal"], "replicas help where loads differ"
        for balancer, spread in rows:
            if spread == "quota":
                assert rows[balancer, "quota"]["after"] <= rows[balancer, "nearest"]["after"] + 1e-3
                assert rows[balancer, "quota"]["copied_bytes"] == rows[balancer, "nearest"]["copied_bytes"]


def test_summary_is_flat_and_of_the_rows(ran: dict[str, Any]) -> None:
    summary = ran["summary"]
    assert all(isinstance(value, float) for value in summary.values())
    worst = max(
        row["over_ideal"]
        for row in ran["results"]
        if (row["setting"], row["balancer"], row["spread"]) == ("gpu8", "eplb", "nearest")
    )
    assert summary["gpu8_eplb_over_ideal_max"] == worst
    assert 0 < summary["recorded0_mean_error_1"] < summary["recorded0_mean_error_10"] < 1


def test_the_truth_is_the_best_prediction(ran: dict[str, Any]) -> None:
    rows = ran["predictions"]
    assert len({(each["setting"], each["routing"], each["ahead"]) for each in rows}) == len(rows) / 4 == 8
    for each in rows:
        if each["predictor"] == "true":
            assert each["by_expert"] == each["by_rank"] == 0
        else:
            assert 0 < each["by_expert"] <= each["by_rank"] < 1
    times = {
        name: np.mean([each["over_ideal"] for each in rows if each["predictor"] == name])
        for name in ("true", "mean", "last", "decaying")
    }
    assert min(times, key=lambda name: times[name]) == "true"


def test_weighs_as_by_hand() -> None:
    loads = np.array([[6, 1, 1, 0], [4, 2, 1, 1]])
    plain = weigh(loads, Balance(TINY.base), TINY, exact=False)
    assert plain.right and plain.before == plain.after == 13 / 8
    assert (plain.copies, plain.copied, plain.left) == (0, 0, 7 / 16)
    assert plain.layer_s == pytest.approx(13 + 6) and plain.seen_s == 0
    # Rank 1 computes its own four of expert 0, and its copy takes half a second each way, half of which is hidden.
    copied = weigh(loads, Balance(TINY.base.replicate({0: [1]})), TINY, exact=False)
    assert copied.right and (copied.before, copied.after) == (13 / 8, 9 / 8)
    assert (copied.copies, copied.copied, copied.left) == (1, 1, 3 / 16)
    assert copied.layer_s == pytest.approx(9 + 2) and copied.seen_s == pytest.approx(0.5)
    late = weigh(loads, Balance(TINY.base.replicate({0: [1]})), TINY, exact=True)
    assert late.seen_s == pytest.approx(0.5 + 0.25), "only the gradients hide"
    shared = weigh(loads, Balance(TINY.base.replicate({0: [1]})), TINY, exact=False, spread="quota")
    assert shared.right and shared.after == 1 and shared.left == 4 / 16


def _quotas(place: sc.Placement, loads: Loads) -> Any:
    return np.where(place.holders & (place.owners[:, None] == np.arange(2)), loads.sum(axis=0)[:, None], 0)


def _one_token_lost(base: sc.Placement, loads: Loads) -> Balance:
    quotas = _quotas(base, loads)
    quotas[0, 0] -= 1
    return Balance(base, quotas)


def _less_than_nothing(base: sc.Placement, loads: Loads) -> Balance:
    place = base.replicate({0: [1]})
    quotas = _quotas(place, loads)
    quotas[0] = [quotas[0, 0] + 1, -1]
    return Balance(place, quotas)


def _to_no_holder(base: sc.Placement, loads: Loads) -> Balance:
    return Balance(base, _quotas(base, loads)[:, ::-1].copy())


def _too_many_replicas(base: sc.Placement, loads: Loads) -> Balance:
    return Balance(base.replicate({expert: [1] for expert in range(3)}))


def _another_owner(base: sc.Placement, loads: Loads) -> Balance:
    return Balance(sc.Placement(base.owners[::-1], np.ones_like(base.holders)))


def _other_ranks(base: sc.Placement, loads: Loads) -> Balance:
    return Balance(sc.Placement.of_owners(base.owners, 3))


@pytest.mark.parametrize(
    "spoil",
    [_one_token_lost, _less_than_nothing, _to_no_holder, _too_many_replicas, _another_owner, _other_ranks],
)
def test_an_unsound_answer_is_wrong(
    spoil: Callable[[sc.Placement, Loads], Balance], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoilt:
        exact = True

        def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Balance:
            return spoil(base, loads)

    setting = dataclasses.replace(TINY, num_experts=6)
    series = [np.arange(12).reshape(2, 6)] * (WINDOW + 1)
    monkeypatch.setattr(contest, "find_balancer", lambda name: Spoilt())
    results = list(compare_balancers(setting, "spoilt", series))
    assert {each.balancer for each in results if each.right} == {"early_quota"}
    wrong = [each for each in results if not each.right]
    assert all(each.copies == 0 and each.after == each.before for each in wrong), "it counts as none"


@pytest.mark.parametrize("exact", [True, False])
def test_only_exact_balancers_see_the_forward(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Loads] = []
    is_exact = exact

    class Spy:
        exact = is_exact

        def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Balance:
            seen.append(loads)
            return Balance(base, _quotas(base, loads))

    monkeypatch.setattr(contest, "find_balancer", lambda name: Spy())
    monkeypatch.setattr(contest, "BALANCERS", {"spy": Spy})
    series = [np.full((2, 4), 10**step) for step in range(WINDOW + 2)]
    results = [each for each in compare_balancers(TINY, "growing", series) if each.balancer == "spy"]
    assert [int(each[0, 0]) for each in seen] == ([100_000, 1_000_000] if exact else [2222, 22222])
    assert all(each.right and each.forwards == 2 for each in results), "quotas for predicted loads are not used"


def test_predictors_see_the_past_only() -> None:
    """The last of twenty forwards is like none before: one in ten misses it one ahead, and all do ten ahead."""
    series = [np.full((2, 4), 8)] * 19 + [np.array([[32, 0, 0, 0], [0, 0, 0, 32]])]
    found = list(compare_predictors(TINY, "jump", series))
    assert [each.predictor for each in found] == 2 * ["mean", "last", "decaying", "true"]
    for each in found:
        missed = 0.0 if each.predictor == "true" else {1: 0.1, 10: 1.0}[each.ahead]
        assert (each.by_expert, each.by_rank) == pytest.approx((0.5 * missed, 0.75 * missed))


def test_recorded_loads_are_those_of_the_trace() -> None:
    trace = load_trace(RECORDED, 32)
    for setting in SETTINGS[:2]:
        series = recorded(setting, trace, 1)
        assert len(series) == len(trace.expert_ids)
        assert all((loads.sum(axis=1) == 2 * setting.tokens).all() for loads in series)
        factor = setting.tokens * setting.base.world_size // trace.expert_ids.shape[2]
        counts = np.bincount(trace.expert_ids[7, 1].ravel(), minlength=32)
        np.testing.assert_array_equal(series[7].sum(axis=0), factor * counts)


def test_drawn_loads_follow_the_law_and_repeat() -> None:
    setting = SETTINGS[2]
    first, second = drawn(setting, "zipf12", 2, seed=3)
    assert (first.sum(axis=1) == 2 * setting.tokens).all() and not np.array_equal(first, second)
    law = np.arange(1, 257) ** -1.2
    np.testing.assert_allclose(first.sum(axis=0) / first.sum(), law / law.sum(), rtol=0.2)
    np.testing.assert_array_equal(drawn(setting, "zipf12", 1, seed=3)[0], first)
    assert not np.array_equal(drawn(setting, "zipf12", 1, seed=4)[0], first)


def test_the_page_quotes_the_record() -> None:
    record = json.loads((ROOT / "bench" / "results" / "balance.json").read_text())
    assert record["passed"] and record["commit"] and "dirty" not in record["commit"]
    assert record["commit"][:7] in PAGE and record["command"] in PAGE
    for name, table in tables(record).items():
        assert table in PAGE, f"{name}: the run prints the table that belongs here"
    for name in BALANCERS:
        assert f"**`{name}`**" in PAGE


def _example() -> Balancer:
    found = re.search(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {"__name__": __name__}
    exec(found[1], names)
    made: Balancer = names["Hottest"]()
    return made


EXAMPLE = _example()


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_the_example_of_the_page_is_a_balancer(problem: Problem) -> None:
    assert find_balancer(EXAMPLE) is EXAMPLE
    check_answer(EXAMPLE, problem)
    check_purity(EXAMPLE, problem)


def test_the_example_copies_the_hottest_experts_that_hide_and_fit() -> None:
    setting = SETTINGS[1]  # hides 5
    loads = drawn(setting, "zipf12", 1, seed=0)[0]
    assert EXAMPLE.balance(loads, setting.base, setting.costs).place.replicated().tolist() == [0, 1, 2, 3, 4]
    short = dataclasses.replace(setting.costs, spare_experts=2)
    assert EXAMPLE.balance(loads, setting.base, short).place.replicated().tolist() == [0, 1]
