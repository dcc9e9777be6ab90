"""Plans a case and holds the plan against what it should reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import sparsecoll as sc
from bench.bound.delivery import delivers
from bench.bound.draw import FLAT_LINKS, PATTERNS, TWO_LEVEL_LINKS, Case, flat_case, two_level_case, without_latency
from bench.bound.programme import num_variables, optimum_s

__all__ = ["PLANNERS", "Outcome", "flat_outcomes", "two_level_outcomes"]

PLANNERS: Mapping[str, Callable[..., sc.Plan]] = {
    "all_gather": sc.plan_all_gather,
    "reduce_scatter": sc.plan_reduce_scatter,
}
_MOST_VARIABLES, _TIME_LIMIT_S = 1500, 10.0
# Floating-point times may differ in the last places.
_SAME = 1 - 1e-9


@dataclass(frozen=True)
class Outcome:
    """One plan of a case.

    Attributes:
        number: of the case, which with the seed makes it again.
        algorithm: that ``auto`` chose.
        reference_s: without latency: the optimum among holders where it is known, the bound elsewhere.
        is_optimum: which of both it is.
        bound_over_reference: of the bound without latency.
        universal_s: without latency.
        division: what the busiest port carries over the optimum, in a relayed plan; None on two levels.
        right: the plan delivers, and nothing is predicted below its bounds.
    """

    op: str
    links: str
    pattern: str
    number: int
    world_size: int
    num_nodes: int
    num_chunks: int
    moved_bytes: int
    num_transfers: int
    algorithm: str
    predicted_s: float
    reference_s: float
    is_optimum: bool
    bound_over_reference: float
    universal_s: float
    division: float | None
    right: bool

    @property
    def over_reference(self) -> float:
        return self.predicted_s / self.reference_s

    @property
    def over_universal(self) -> float:
        return self.predicted_s / self.universal_s


class _Reference(NamedTuple):
    """What a case should reach, without latency; the same for both collectives.

    Attributes:
        seconds: the optimum among holders where it is known, the bound elsewhere.
        is_optimum: which of both it is.
        bound_s, universal_s: as plans have them.
    """

    seconds: float
    is_optimum: bool
    bound_s: float
    universal_s: float


def flat_outcomes(seed: int, num_cases: int) -> Iterator[Outcome]:
    """Two for each case and model of links: the all-gather's and the reduce-scatter's."""
    for name, link in FLAT_LINKS.items():
        for number in _by_pattern(num_cases):
            case = flat_case(seed, number)
            topology = case.flat(link)
            bound_s, universal_s = _bounds(case, topology)
            reference = _Reference(bound_s, True, bound_s, universal_s)
            for op in PLANNERS:
                relayed = PLANNERS[op](case.place, case.chunk_bytes, topology, "relay")
                busiest_bytes = max(relayed.sent_bytes.max(), relayed.received_bytes.max())
                division = busiest_bytes / link.bandwidth_bytes_per_s / bound_s
                yield _outcome(op, name, number, case, topology, reference, division, delivers(relayed))


def two_level_outcomes(seed: int, num_cases: int) -> Iterator[Outcome]:
    """The same for cases on nodes."""
    for name, links in TWO_LEVEL_LINKS.items():
        for number in _by_pattern(num_cases):
            case = two_level_case(seed, number)
            topology = case.on_nodes(links)
            bound_s, universal_s = _bounds(case, topology)
            optimum = None
            if num_variables(case.place, case.chunk_bytes) <= _MOST_VARIABLES:
                optimum = optimum_s(case.place, case.chunk_bytes, topology, time_limit_s=_TIME_LIMIT_S)
            reference = _Reference(optimum or bound_s, optimum is not None, bound_s, universal_s)
            for op in PLANNERS:
                yield _outcome(op, name, number, case, topology, reference, None, True)


def _by_pattern(num_cases: int) -> Iterator[int]:
    """Numbers of all cases, those of a pattern together."""
    for pattern in range(len(PATTERNS)):
        yield from range(pattern, num_cases, len(PATTERNS))


def _bounds(case: Case, topology: sc.Topology) -> tuple[float, float]:
    """Both bounds, without latency; of a plan that is quick to make."""
    plan = sc.plan_all_gather(case.place, case.chunk_bytes, without_latency(topology), "direct")
    return plan.bound_s, plan.universal_bound_s


def _outcome(
    op: str,
    links: str,
    number: int,
    case: Case,
    topology: sc.Topology,
    reference: _Reference,
    division: float | None,
    relay_delivers: bool,
) -> Outcome:
    plan = PLANNERS[op](case.place, case.chunk_bytes, topology)
    bounded = plan.predicted_s >= plan.bound_s * _SAME and plan.bound_s >= plan.universal_bound_s * _SAME
    # The bound and the programme come from floats by different ways.
    below_optimum = reference.bound_s <= reference.seconds * (1 + 1e-6)
    return Outcome(
        op=op,
        links=links,
        pattern=case.pattern,
        number=number,
        world_size=topology.world_size,
        num_nodes=topology.num_nodes,
        num_chunks=len(case.place.replicated()),
        moved_bytes=case.moved_bytes,
        num_transfers=len(plan.transfers),
        algorithm=plan.algorithm,
        predicted_s=plan.predicted_s,
        reference_s=reference.seconds,
        is_optimum=reference.is_optimum,
        bound_over_reference=reference.bound_s / reference.seconds,
        universal_s=reference.universal_s,
        division=division,
        right=relay_delivers and bounded and below_optimum and delivers(plan),
    )
