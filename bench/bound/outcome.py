"""Plans a case and holds the plan against what it should reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
        division: bytes alone: the time of the plan's busiest port over the reference. On one level of a relayed plan,
            whatever ``auto`` chose.
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
    division: float
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
        bound_s, universal_s: without latency.
        least_s: the bound with latency.
    """

    seconds: float
    is_optimum: bool
    bound_s: float
    universal_s: float
    least_s: float


def flat_outcomes(seed: int, num_cases: int) -> Iterator[Outcome]:
    """Two for each case and model of links: the all-gather's and the reduce-scatter's."""
    for name, link in FLAT_LINKS.items():
        for number in _by_pattern(num_cases):
            case = flat_case(seed, number)
            topology = case.flat(link)
            reference = _reference(case, topology)._replace(is_optimum=True)
            for op in PLANNERS:
                plan = PLANNERS[op](case.place, case.chunk_bytes, topology)
                relayed = PLANNERS[op](case.place, case.chunk_bytes, topology, "relay")
                yield _outcome(plan, relayed, name, number, case, reference)


def two_level_outcomes(seed: int, num_cases: int) -> Iterator[Outcome]:
    """The same for cases on nodes."""
    for name, links in TWO_LEVEL_LINKS.items():
        for number in _by_pattern(num_cases):
            case = two_level_case(seed, number)
            topology = case.on_nodes(links)
            reference = _reference(case, topology)
            if num_variables(case.place, case.chunk_bytes) <= _MOST_VARIABLES:
                optimum = optimum_s(case.place, case.chunk_bytes, topology, time_limit_s=_TIME_LIMIT_S)
                if optimum is not None:
                    reference = reference._replace(seconds=optimum, is_optimum=True)
            for op in PLANNERS:
                plan = PLANNERS[op](case.place, case.chunk_bytes, topology)
                yield _outcome(plan, plan, name, number, case, reference)


def _by_pattern(num_cases: int) -> Iterator[int]:
    """Numbers of all cases, those of a pattern together."""
    for pattern in range(len(PATTERNS)):
        yield from range(pattern, num_cases, len(PATTERNS))


def _reference(case: Case, topology: sc.Topology) -> _Reference:
    """The bounds of plans that are quick to make; those of the reduce-scatter are the same."""
    plan, still = (
        sc.plan_all_gather(case.place, case.chunk_bytes, links, "direct")
        for links in (topology, without_latency(topology))
    )
    return _Reference(still.bound_s, False, still.bound_s, still.universal_bound_s, plan.bound_s)


def _outcome(plan: sc.Plan, divided: sc.Plan, links: str, number: int, case: Case, reference: _Reference) -> Outcome:
    bounded = plan.predicted_s >= reference.least_s * _SAME and reference.bound_s >= reference.universal_s * _SAME
    # The bound and the programme come from floats by different ways.
    below_optimum = reference.bound_s <= reference.seconds * (1 + 1e-6)
    return Outcome(
        op=plan.op,
        links=links,
        pattern=case.pattern,
        number=number,
        world_size=case.place.world_size,
        num_nodes=plan.topology.num_nodes,
        num_chunks=len(case.place.replicated()),
        moved_bytes=case.moved_bytes,
        num_transfers=len(plan.transfers),
        algorithm=plan.algorithm,
        predicted_s=plan.predicted_s,
        reference_s=reference.seconds,
        is_optimum=reference.is_optimum,
        bound_over_reference=reference.bound_s / reference.seconds,
        universal_s=reference.universal_s,
        division=_busiest_s(divided) / reference.seconds,
        right=bounded and below_optimum and delivers(plan) and (divided is plan or delivers(divided)),
    )


def _busiest_s(plan: sc.Plan) -> float:
    """The longest time that a port needs for its bytes."""
    topology, num_bytes = plan.topology, plan.transfer_bytes
    ranks, nodes = range(topology.world_size), range(topology.num_nodes)
    node_of = np.asarray(topology.node_of)
    up = np.array([topology.scale_up_of(rank).bandwidth_bytes_per_s for rank in ranks])
    out = np.array([topology.scale_out_of(rank).bandwidth_bytes_per_s for rank in ranks])
    shared = [topology.node_link_of(node) for node in nodes]
    node = np.array([np.inf if link is None else link.bandwidth_bytes_per_s for link in shared])
    crosses = node_of[plan.transfers["src"]] != node_of[plan.transfers["dst"]]
    busiest = 0.0
    for side in ("src", "dst"):
        rank = plan.transfers[side]
        for port, which, rates in ((rank, ~crosses, up), (rank, crosses, out), (node_of[rank], crosses, node)):
            busiest = max(busiest, (np.bincount(port[which], num_bytes[which], len(rates)) / rates).max())
    return float(busiest)
