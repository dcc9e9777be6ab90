"""``python -m bench bound``: what it draws, that it notices plans that do not deliver, and what it reports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.__main__ import main
from bench.bound.delivery import delivers
from bench.bound.draw import PATTERNS, TWO_LEVEL_LINKS, Case, flat_case, two_level_case, without_latency
from bench.bound.programme import num_variables, optimum_s
from sparsecoll import Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter

Table = Any
SUMMARY = (
    "division_over_optimum_max all_gather_over_optimum_p50 all_gather_over_optimum_p99 all_gather_over_universal_p99 "
    "reduce_scatter_over_optimum_p50 reduce_scatter_over_optimum_p99 reduce_scatter_over_universal_p99 "
    "two_level_over_bound_p50 two_level_over_bound_p99 two_level_over_universal_p99 num_cases num_two_level_cases"
)


def relayed(*, gathers: bool) -> Plan:
    """A plan with whole copies, cut chunks and forwarding: one owner, four receivers of one chunk, one of another."""
    place = Placement.of_owners([0, 0, 3], 5).replicate({0: range(5), 1: [2]})
    planner = plan_all_gather if gathers else plan_reduce_scatter
    plan = planner(place, [1 << 20, 1 << 16, 1 << 10], Topology.flat(5, Link(1e9, 1e-6)), "relay")
    assert len(plan.transfers) > 6
    return plan


def changed(plan: Plan, change: Callable[[Table], Table]) -> Plan:
    return dataclasses.replace(plan, transfers=change(plan.transfers.copy()))


def with_column(name: str, change: Callable[[Table], Any]) -> Callable[[Table], Table]:
    def apply(table: Table) -> Table:
        table[name] = change(table)
        return table

    return apply


@pytest.mark.parametrize("algorithm", ["direct", "relay", "dense", "auto"])
@pytest.mark.parametrize("number", range(6))
def test_plans_deliver(number: int, algorithm: str) -> None:
    random = np.random.default_rng(number)
    mask = random.random((9, 7)) < 0.5
    owners = random.integers(0, 7, 9)
    mask[np.arange(9), owners] = True
    sizes = random.choice([0, 1, 1000, 1 << 20], 9).tolist()
    for planner in (plan_all_gather, plan_reduce_scatter):
        assert delivers(planner(Placement(owners, mask), sizes, Topology.flat(7), algorithm))
        assert delivers(planner(Placement(owners, mask), sizes, Topology.flat(7), algorithm, chunks=[0, 3, 4]))


@pytest.mark.parametrize("number", range(4))
def test_hierarchical_plans_deliver(number: int) -> None:
    case = two_level_case(3, number)
    for planner in (plan_all_gather, plan_reduce_scatter):
        assert delivers(planner(case.place, case.chunk_bytes, case.on_nodes(TWO_LEVEL_LINKS["rails"]), "hierarchical"))


@pytest.mark.parametrize("gathers", [True, False])
def test_a_plan_that_leaves_something_out_does_not_deliver(gathers: bool) -> None:
    plan = relayed(gathers=gathers)
    assert delivers(plan)
    for row in range(len(plan.transfers)):
        assert not delivers(changed(plan, lambda table, row=row: np.delete(table, row)))
    assert not delivers(changed(plan, lambda table: table[:0]))


@pytest.mark.parametrize("gathers", [True, False])
def test_a_plan_that_brings_something_twice_does_not_deliver(gathers: bool) -> None:
    plan = relayed(gathers=gathers)
    for row in range(len(plan.transfers)):
        assert not delivers(changed(plan, lambda table, row=row: np.append(table, table[row])))


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        with_column("begin", lambda table: table["begin"] + 1),
        with_column("end", lambda table: table["end"] - 1),
        with_column("end", lambda table: table["end"] + 1),
        with_column("pieces", lambda table: 0),
        with_column("chunk", lambda table: 2),
        with_column("stage", lambda table: 0),
        with_column("stage", lambda table: table["stage"].max() - table["stage"]),
        with_column("src", lambda table: (table["src"] + 1) % 5),
        with_column("dst", lambda table: (table["dst"] + 1) % 5),
        with_column("partial", lambda table: ~table["partial"]),
    ],
    ids=["begin", "short", "long", "pieces", "chunk", "stage", "backwards", "src", "dst", "partial"],
)
def test_a_plan_that_is_changed_does_not_deliver(gathers: bool, change: Callable[[Table], Table]) -> None:
    assert not delivers(changed(relayed(gathers=gathers), change))


@pytest.mark.parametrize("draw", [flat_case, two_level_case])
def test_cases_are_what_they_say(draw: Callable[[int, int], Case]) -> None:
    cases = [draw(0, number) for number in range(90)]
    for number, case in enumerate(cases):
        again, other = draw(0, number), draw(1, number)
        assert (again.place, again.chunk_bytes, again.node_of) == (case.place, case.chunk_bytes, case.node_of)
        assert other.place != case.place
        assert case.pattern == PATTERNS[number % 3]
        assert 2 <= case.place.world_size <= 128 and len(case.place.replicated())
        assert 64e6 <= case.moved_bytes <= 4.001e9
        if case.pattern == "hot":
            assert len(set(case.place.owners.tolist())) == 1
    sizes = [case.place.world_size for case in cases]
    assert min(sizes) <= 3 and max(sizes) >= 100
    if draw is two_level_case:
        assert {1, 2, 16} <= {len(set(case.node_of)) for case in cases}
        assert all(min(map(case.node_of.count, case.node_of)) >= 2 for case in cases)


def test_latency_is_all_that_is_left_out() -> None:
    links = Link(1.0, 0.5), (Link(2.0, 0.5), Link(3.0, 0.5), Link(4.0, 0.25)), Link(5.0, 1.0)
    still = without_latency(Topology((0, 0, 1), *links))
    assert still == Topology((0, 0, 1), Link(1.0, 0), (Link(2.0, 0), Link(3.0, 0), Link(4.0, 0)), Link(5.0, 0))


def test_the_programme_knows_its_size_and_its_time() -> None:
    place = Placement.of_owners([0, 0, 1, 2], 4).replicate({0: range(4), 1: range(4), 2: [0, 1, 3]})
    assert num_variables(place, [1, 1, 1, 1]) == 3**3 + 2**3, "two chunks of a kind are one, the last stays"
    assert num_variables(place, [1, 0, 1, 1]) == 3**3 + 2**3
    assert num_variables(place, [0, 0, 1, 1]) == 2**3
    large = Placement.of_owners(range(10), 10).replicate({chunk: range(10) for chunk in range(10)})
    assert optimum_s(large, [1] * 10, Topology.flat(10), time_limit_s=1e-3) is None


def test_table_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    arguments = ["--cases", "3", "--two-level-cases", "3", "--seed", "31", "--json", str(file)]
    assert main(["bound", *arguments]) == 0
    record = json.loads(file.read_text())
    assert (record["case"], record["command"]) == ("bound", f"python -m bench bound {' '.join(arguments)}")
    assert record["passed"] and not record["wrong"]
    assert set(record["summary"]) == set(SUMMARY.split())
    assert (record["summary"]["num_cases"], record["summary"]["num_two_level_cases"]) == (3, 3)
    assert all(value >= 1 for value in record["summary"].values())
    assert record["summary"]["division_over_optimum_max"] < 1.01
    rows = {(row["links"], row["pattern"], row["op"]): row for row in record["results"]}
    assert len(rows) == len(record["results"]) == 6 * 3 * 2
    flat = [row for row in rows.values() if row["links"] not in TWO_LEVEL_LINKS]
    assert record["summary"]["all_gather_over_optimum_p99"] == max(r["p99"] for r in flat if r["op"] == "all_gather")
    lines = capsys.readouterr().out.splitlines()
    assert sum(not line.startswith("#") for line in lines) == len(rows)
    assert lines[-1].endswith("OK")


def test_wrong_plans_fail_the_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bench.bound.outcome.delivers", lambda plan: plan.op != "reduce_scatter")
    assert main(["bound", "--cases", "1", "--two-level-cases", "1", "--seed", "31"]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG") == 6 and out.splitlines()[-1].endswith("FAILED")


@pytest.mark.parametrize("arguments", [["--cases", "0"], ["--two-level-cases", "-1"], ["--nodes", "3"]])
def test_misuse(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bound", *arguments])
    assert ended.value.code == 2
