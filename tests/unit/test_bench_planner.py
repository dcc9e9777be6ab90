"""The bench of planner and balancers: what it records, and that it notices what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsecoll as sc
from bench import balancers, planner
from sparsecoll.balance import Balance, find_balancer


def test_records_every_case_and_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = planner.run(["--most-ranks", "64", "--iters", "2", "--json", str(tmp_path / "out" / "planner.json")])
    assert record["passed"] and json.loads((tmp_path / "out" / "planner.json").read_text()) == record
    rows = {row["case"]: row for row in record["results"]}
    assert {row["world_size"] for row in rows.values()} == {64} and len(rows) == len(record["results"]) == 12
    hot = rows["256x64"]
    assert (hot["num_chunks"], hot["num_hot"], hot["deliveries"]) == (256, 32, 32 * 63)
    assert rows["256x64 all held"]["deliveries"] == 256 * 63
    for row in rows.values():
        assert 0 < row["min_us"] <= row["median_us"] <= row["p95_us"]
        assert row["ns_per_delivery"] == pytest.approx(row["median_us"] * 1000 / row["deliveries"])
        assert row["transfers"] >= row["deliveries"]
    assert record["summary"]["plan_us_256x64"] == hot["median_us"]
    assert record["summary"]["plan_us_256x64_all_held"] == rows["256x64 all held"]["median_us"]
    assert record["summary"].keys() >= {"growth_exponent_max", "ns_per_delivery_max"}
    assert "plan_ms_512x1024" not in record["summary"], "it was left out"
    by_name = {row["balancer"]: row for row in record["balancers"]}
    assert by_name.keys() == {"quota", "hecate"}
    for name, row in by_name.items():
        assert row["right"] and row["replicas"] > 0 and 0 < row["saved"] < 1
        assert 0 < row["min_us"] <= row["median_us"] <= row["p95_us"]
        assert record["summary"][f"balance_{name}_us_256x64"] == row["median_us"]
    assert record["summary"]["balance_us_256x64"] == min(row["median_us"] for row in by_name.values())
    out = capsys.readouterr().out
    assert "equal to the readable planner's: OK" in out and "answers of balancers sound: OK" in out


def test_another_plan_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def one_byte_off(plan: sc.Plan, algorithm: str, **_: Any) -> sc.Plan:
        transfers = plan.transfers.copy()
        transfers["stage"][-1] += 1
        return dataclasses.replace(plan, transfers=transfers)

    monkeypatch.setattr(sc.Plan, "redrafted", one_byte_off)
    record = planner.run(["--most-ranks", "64", "--iters", "1", "--warmup_iters", "1"])
    assert not record["passed"] and not any(row["right"] for row in record["results"])
    assert "WRONG" in capsys.readouterr().out


def _one_token_lost(answer: Balance) -> Balance:
    assert answer.quotas is not None
    quotas = answer.quotas.copy()
    quotas[quotas.argmax() // quotas.shape[1], quotas.argmax() % quotas.shape[1]] -= 1
    return Balance(answer.place, quotas)


def _too_many_replicas(answer: Balance) -> Balance:
    return Balance(answer.place.replicate({expert: [63] for expert in range(20)}), answer.quotas)


def _another_owner(answer: Balance) -> Balance:
    return Balance(sc.Placement(np.roll(answer.place.owners, 4), np.ones_like(answer.place.holders)))


@pytest.mark.parametrize("spoil", [_one_token_lost, _too_many_replicas, _another_owner])
def test_another_answer_is_wrong(spoil: Callable[[Balance], Balance], monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoilt:
        exact = True

        def balance(self, *arguments: Any) -> Balance:
            return spoil(find_balancer("quota").balance(*arguments))

    monkeypatch.setattr(balancers, "find_balancer", lambda name: Spoilt())
    options = argparse.Namespace(iters=1, warmup_iters=1, seed=0)
    assert not any(result.right for result in balancers.time_balancers(options))
