"""Outcomes as tables, rows and the figures that a reader would quote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.bound.outcome import PLANNERS, Outcome

__all__ = ["described", "print_table", "rows", "summary", "worst"]

_NUM_WORST = 10


def print_table(outcomes: Iterable[Outcome], title: str) -> list[Outcome]:
    """Prints a row for each group of outcomes as soon as it is complete; gives all of them."""
    print(f"# {title}")
    print(
        f"# {'links':>12} {'pattern':>7} {'cases':>5} {'operation':>14} {'p50':>6} {'p99':>6} {'max':>6} "
        f"{'univ99':>6} {'division':>9}  algorithms"
    )
    done: list[Outcome] = []
    group: list[Outcome] = []
    for outcome in outcomes:
        if group and (outcome.links, outcome.pattern) != (group[0].links, group[0].pattern):
            _print_rows(group)
            group = []
        group.append(outcome)
        done.append(outcome)
    _print_rows(group)
    return done


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One for each model of links, pattern and operation."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault((each.links, each.pattern, each.op), []).append(each)
    return [_row(group) for group in groups.values()]


def summary(flat: Sequence[Outcome], nodes: Sequence[Outcome]) -> dict[str, float]:
    """Each quantile is over all patterns of one model of links, and the worst of all models."""
    figures: dict[str, float] = {"division_over_optimum_max": max(each.division for each in flat)}
    for name in PLANNERS:
        outcomes = [each for each in flat if each.op == name]
        for percent in (50, 99):
            figures[f"{name}_over_optimum_p{percent}"] = _worst_quantile(outcomes, percent, "over_reference")
        figures[f"{name}_over_universal_p99"] = _worst_quantile(outcomes, 99, "over_universal")
    for percent in (50, 99):
        figures[f"two_level_over_bound_p{percent}"] = _worst_quantile(nodes, percent, "over_reference")
    figures["two_level_over_universal_p99"] = _worst_quantile(nodes, 99, "over_universal")
    return figures


def worst(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Those furthest from what they should reach."""
    return [described(each) for each in sorted(outcomes, key=lambda each: -each.over_reference)[:_NUM_WORST]]


def described(outcome: Outcome) -> dict[str, Any]:
    """For the record."""
    return {**asdict(outcome), "over_reference": outcome.over_reference, "over_universal": outcome.over_universal}


def _print_rows(outcomes: Sequence[Outcome]) -> None:
    for row in rows(outcomes):
        chosen = " ".join(f"{name} {count}" for name, count in row["algorithms"].items())
        print(
            f"{row['links']:>14} {row['pattern']:>7} {row['num_cases']:>5} {row['op']:>14} {row['p50']:>6.3f} "
            f"{row['p99']:>6.3f} {row['max']:>6.3f} {row['over_universal_p99']:>6.3f} {row['division_max']:>9.6f}  "
            f"{chosen}{'' if row['right'] else ' WRONG'}",
            flush=True,
        )


def _row(group: Sequence[Outcome]) -> dict[str, Any]:
    ratios = [each.over_reference for each in group]
    return {
        "op": group[0].op,
        "links": group[0].links,
        "pattern": group[0].pattern,
        "num_cases": len(group),
        "num_optima": sum(each.is_optimum for each in group),
        "p50": _quantile(ratios, 0.5),
        "p99": _quantile(ratios, 0.99),
        "max": max(ratios),
        "over_universal_p50": _quantile([each.over_universal for each in group], 0.5),
        "over_universal_p99": _quantile([each.over_universal for each in group], 0.99),
        "division_max": max(each.division for each in group),
        "algorithms": dict(Counter(each.algorithm for each in group).most_common()),
        "right": all(each.right for each in group),
    }


def _worst_quantile(outcomes: Sequence[Outcome], percent: int, ratio: str) -> float:
    by_links: dict[tuple[str, str], list[float]] = {}
    for each in outcomes:
        by_links.setdefault((each.links, each.op), []).append(getattr(each, ratio))
    return max(_quantile(ratios, percent / 100) for ratios in by_links.values())


def _quantile(values: Sequence[float], fraction: float) -> float:
    """By nearest rank."""
    return float(np.quantile(values, fraction, method="inverted_cdf"))
