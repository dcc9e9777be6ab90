"""Plans a case and holds the plan against what it should reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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


def flat_outcomes(seed: int, num_cases: int) -> Iterator[Outcome]:
    for name, link in FLAT_LINKS.items():
        for pattern in range(len(PATTERNS)):
            for number in range(pattern, num_cases, len(PATTERNS)):
                case = flat_case(seed, number)
                for op in PLANNERS:
                    yield _flat_outcome(op, name, number, case, case.flat(link))


def _flat_outcome(op: str, links: str, number: int, case: Case, topology: sc.Topology) -> Outcome:
    relayed = PLANNERS[op](case.place, case.chunk_bytes, topology, "relay")
    bandwidth = topology.scale_up_of(0).bandwidth_bytes_per_s
    account_s = max(relayed.sent_bytes.max(), relayed.received_bytes.max()) / bandwidth
    optimum = _still(op, case, topology).bound_s
    return _outcome(op, links, number, case, topology, optimum, True, account_s / optimum, delivers(relayed))


def two_level_outcomes(seed: int, num_cases: int) -> Iterator[Outcome]:
    for name, links in TWO_LEVEL_LINKS.items():
        for pattern in range(len(PATTERNS)):
            for number in range(pattern, num_cases, len(PATTERNS)):
                case = two_level_case(seed, number)
                topology = case.on_nodes(links)
                optimum = None
                if num_variables(case.place, case.chunk_bytes) <= _MOST_VARIABLES:
                    optimum = optimum_s(case.place, case.chunk_bytes, topology, time_limit_s=_TIME_LIMIT_S)
                for op in PLANNERS:
                    reference = optimum or _still(op, case, topology).bound_s
                    yield _outcome(op, name, number, case, topology, reference, optimum is not None, None, True)


def _outcome(
    op: str,
    links: str,
    number: int,
    case: Case,
    topology: sc.Topology,
    reference_s: float,
    is_optimum: bool,
    division: float | None,
    right: bool,
) -> Outcome:
    plan = PLANNERS[op](case.place, case.chunk_bytes, topology)
    still = _still(op, case, topology)
    bounded = plan.predicted_s >= plan.bound_s * _SAME and plan.bound_s >= plan.universal_bound_s * _SAME
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
        reference_s=reference_s,
        is_optimum=is_optimum,
        bound_over_reference=still.bound_s / reference_s,
        universal_s=still.universal_bound_s,
        division=division,
        # The bound and the programme come from floats by different ways.
        right=right and bounded and still.bound_s <= reference_s * (1 + 1e-6) and delivers(plan),
    )


def _still(op: str, case: Case, topology: sc.Topology) -> sc.Plan:
    """A plan that was quick to make, for its bounds without latency."""
    return PLANNERS[op](case.place, case.chunk_bytes, without_latency(topology), "direct")
