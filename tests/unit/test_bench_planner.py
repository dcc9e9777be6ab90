"""The bench of the planner: what it records, and that it notices a plan that is not the readable planner's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import sparsecoll as sc
from bench import planner


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
    assert "equal to the readable planner's: OK" in capsys.readouterr().out


def test_another_plan_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def one_byte_off(plan: sc.Plan, algorithm: str, **_: Any) -> sc.Plan:
        transfers = plan.transfers.copy()
        transfers["stage"][-1] += 1
        return dataclasses.replace(plan, transfers=transfers)

    monkeypatch.setattr(sc.Plan, "redrafted", one_byte_off)
    record = planner.run(["--most-ranks", "64", "--iters", "1", "--warmup_iters", "1"])
    assert not record["passed"] and not any(row["right"] for row in record["results"])
    assert "WRONG" in capsys.readouterr().out
