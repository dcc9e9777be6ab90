"""The tables of the case: a line for each result, and those of ``docs/balance.md``, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.balance.contest import Result

__all__ = ["HEADER", "line", "tables"]

HEADER = (
    f"# {'setting':<8}{'routing':<11}{'balancer':<21}{'before':>7}{'after':>7}{'worst':>7}{'copies':>7}{'MB':>9}"
    f"{'leave':>7}{'time':>7}{'seen':>6}{'us':>8}"
)

_DETAILED = ("gpu8", "recorded0")
_PREDICTED = "gpu8"

Row = Mapping[str, Any]


def line(result: Result) -> str:
    """Below `HEADER`."""
    way = _way(result.balancer, result.spread)
    return (
        f"  {result.setting:<8}{result.routing:<11}{way:<21}{result.before:>7.2f}{result.after:>7.2f}"
        f"{result.after_max:>7.2f}{result.copies:>7}{result.copied_bytes / 1e6:>9.1f}{result.left:>7.1%}"
        f"{result.over_ideal:>7.2f}{result.seen_over_ideal:>6.2f}{result.solver_us:>8.0f}"
        f"{'' if result.right else '  WRONG'}"
    )


def tables(record: Row) -> dict[str, str]:
    """By name: the ``time`` of all balancers on all routings, one routing in ``detail``, and ``predictors``.

    Args:
        record: of the case, as in its JSON file.
    """
    return {
        "time": _time(record["results"]),
        "detail": _detail(record["results"]),
        "predictors": _predictors(record["predictions"]),
    }


def _time(results: Sequence[Row]) -> str:
    ways = list(dict.fromkeys(_way(each["balancer"], each["spread"]) for each in results))
    cases: dict[tuple[str, str], list[Row]] = {}
    for each in results:
        cases.setdefault((each["setting"], each["routing"]), []).append(each)
    body = []
    for case, rows in cases.items():
        times = [round(each["over_ideal"], 2) for each in rows]
        texts = [f"**{each:.2f}**" if each == min(times) else f"{each:.2f}" for each in times]
        body.append([*case, *texts])
    return _markdown(["setting", "routing", *ways], body)


def _detail(results: Sequence[Row]) -> str:
    columns = ["balancer", "after", "worst", "copies", "MB", "leave", "time", "of it copies", "solver µs"]
    rows = [
        [
            _way(each["balancer"], each["spread"]),
            f"{each['after']:.2f}",
            f"{each['after_max']:.2f}",
            str(each["copies"]),
            f"{each['copied_bytes'] / 1e6:.0f}",
            f"{each['left']:.0%}",
            f"{each['over_ideal']:.2f}",
            f"{each['seen_over_ideal']:.2f}",
            f"{each['solver_us']:.0f}",
        ]
        for each in results
        if (each["setting"], each["routing"]) == _DETAILED
    ]
    return _markdown(columns, rows)


def _predictors(predictions: Sequence[Row]) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    aheads: dict[int, None] = {}
    for each in predictions:
        if each["setting"] == _PREDICTED:
            aheads[each["ahead"]] = None
            figures = [f"{each['by_expert']:.1%}", f"{each['by_rank']:.1%}", f"{each['over_ideal']:.3f}"]
            rows.setdefault((each["routing"], each["predictor"]), []).extend(figures)
    columns = [f"{what}, {ahead} ahead" for ahead in aheads for what in ("experts", "ranks too", "time")]
    return _markdown(["routing", "predictor", *columns], [[*names, *figures] for names, figures in rows.items()])


def _way(balancer: str, spread: str) -> str:
    return balancer if spread == "nearest" else f"{balancer} by {spread}"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
