"""The figures that a reader would quote, from measured rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.step.options import DDP, EP, FSDP2, IDEAL
from bench.step.rows import Row

__all__ = ["best_balancers", "summarize", "summarize_hiding", "times_of"]

_RIVALS = (EP, IDEAL, FSDP2, DDP)
_PREFIXES = {"torch": "", "mpi": "mpi_"}

Contest = tuple[str, str, str]
"""Back end, part and routing."""


def times_of(rows: Sequence[Row]) -> dict[Contest, dict[str, float]]:
    """Median seconds of each contestant, for each contest in the order of the rows."""
    found: dict[Contest, dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.backend, row.part, row.routing), {})[row.contestant] = row.time_s
    return found


def best_balancers(rows: Sequence[Row]) -> dict[str, str]:
    """The balancer with the shortest step, by the figure's prefix such as ``zipf12_step``."""
    return {_prefix(contest): _best(times) for contest, times in times_of(rows).items() if _balancers(times)}


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """Times of rivals over those of FSSDP, and of FSSDP over that of the ideal, for every part and routing.

    ``zipf08_step_ep_over_fssdp`` is of the best balancer, ``zipf08_step_ep_over_quota`` of that one. Figures over MPI
    begin with ``mpi_``.
    """
    summary: dict[str, float] = {}
    for contest, times in times_of(rows).items():
        balancers = _balancers(times)
        if not balancers:
            continue
        for name, ours_s in {"fssdp": times[_best(times)], **balancers}.items():
            for rival in (EP, FSDP2, DDP):
                if rival in times:
                    summary[f"{_prefix(contest)}_{rival}_over_{name}"] = times[rival] / ours_s
            summary[f"{_prefix(contest)}_{name}_over_ideal"] = ours_s / times[IDEAL]
    return summary


def summarize_hiding(rows: Sequence[Row]) -> dict[str, float]:
    """``hidden_fraction`` and ``exposed_s`` of the best balancer, where least is hidden.

    Fractions are of the time that a step's sparse collectives take alone; a step without any is left out.
    """
    best = best_balancers(rows)
    found = [row for row in rows if best.get(_prefix((row.backend, row.part, row.routing))) == row.contestant]
    hidden = [(row.hidden_fraction, row.exposed_s) for row in found if row.hidden_fraction is not None]
    if not hidden:
        return {}
    fraction, exposed_s = min(hidden)
    return {"hidden_fraction": fraction, "exposed_s": exposed_s}


def _prefix(contest: Contest) -> str:
    backend, part, routing = contest
    return f"{_PREFIXES[backend]}{routing}_{part}"


def _balancers(times: Mapping[str, float]) -> dict[str, float]:
    return {name: time_s for name, time_s in times.items() if name not in _RIVALS}


def _best(times: Mapping[str, float]) -> str:
    balancers = _balancers(times)
    return min(balancers, key=balancers.__getitem__)
