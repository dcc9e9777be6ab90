"""The linear programme of fluid schedules: the true optimum that bounds and plans are held against, for small cases.

A fluid schedule cuts chunks as finely as it likes, lets every piece take as many hops as it likes, and knows no
latency. For each chunk it sends a unit of flow from the owner to every receiver. Flows to different receivers share
what travels over an arc, as a copy is made where they part, so an arc carries as much of the chunk as the largest of
them. What all chunks put on a port has to pass it in the time that is minimised. ``docs/bounds.md`` says why this is
exact among holders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc

try:
    from scipy.optimize import linprog
    from scipy.sparse import coo_array
except ImportError as error:
    raise sc.BackendUnavailable(f"bench bound: expected scipy (pip install 'sparsecoll[solver]'): {error}") from None

__all__ = ["num_variables", "optimum_s"]


class _Kind(NamedTuple):
    """Chunks of one owner and one set of holders; fluid schedules treat them as one chunk."""

    owner: int
    holders: tuple[int, ...]
    num_bytes: int


class _Port(NamedTuple):
    """One direction of a rank's or a node's link."""

    side: str
    number: int
    sends: bool


def optimum_s(
    place: sc.Placement,
    chunk_bytes: Sequence[int],
    topology: sc.Topology,
    *,
    outsiders: bool = False,
    time_limit_s: float = 60.0,
) -> float | None:
    """Seconds of the best fluid all-gather, latency left out; the reduce-scatter is its mirror and takes as long.

    Args:
        place: owners and holders.
        chunk_bytes: ``[num_chunks]``.
        topology: links; every rank has a port of each kind and each direction, every node one where `node_link` is set.
        outsiders: whether ranks that do not hold a chunk may carry it. Flows to them may then be shared at places where
            no copy is made for a holder, and the optimum becomes a lower bound of what schedules reach.
        time_limit_s: of the solver.

    Returns:
        The optimum, or None where the solver did not finish in time.
    """
    kinds = _kinds(place, chunk_bytes)
    if not kinds:
        return 0.0
    ports = _ports(topology)
    total = sum(kind.num_bytes for kind in kinds)
    fastest = max(ports.values())
    rows = _Rows()
    port_rows = {port: rows.add_upper([(0, -rate / fastest)], 0.0) for port, rate in ports.items()}
    num_columns = 1  # the time, in units of moving all chunks over the fastest port
    for kind in kinds:
        carriers = tuple(range(place.world_size)) if outsiders else kind.holders
        arcs = [(src, dst) for src in carriers for dst in carriers if src != dst and dst != kind.owner]
        first = num_columns
        num_columns += len(arcs)
        for number, (src, dst) in enumerate(arcs):
            for port in _used(src, dst, topology, ports):
                rows.extend_upper(port_rows[port], first + number, kind.num_bytes / total)
        for receiver in kind.holders:
            if receiver == kind.owner:
                continue
            # A flow never needs to leave the rank that it is meant for.
            flow = {number: num_columns + at for at, number in enumerate(_usable(arcs, receiver))}
            num_columns += len(flow)
            for number, column in flow.items():
                rows.add_upper([(column, 1.0), (first + number, -1.0)], 0.0)
            for rank in carriers:
                entries = [(column, 1.0) for number, column in flow.items() if arcs[number][1] == rank]
                entries += [(column, -1.0) for number, column in flow.items() if arcs[number][0] == rank]
                rows.add_equal(entries, float(rank == receiver) - float(rank == kind.owner))
    objective = np.zeros(num_columns)
    objective[0] = 1.0
    upper, equal = rows.matrices(num_columns)
    found = linprog(objective, *upper, *equal, method="highs", options={"time_limit": time_limit_s})
    return float(found.fun) * total / fastest if found.status == 0 else None


def num_variables(place: sc.Placement, chunk_bytes: Sequence[int]) -> int:
    """About how many variables the programme among holders has; what it takes to solve grows somewhat faster."""
    return sum((len(kind.holders) - 1) ** 3 for kind in _kinds(place, chunk_bytes))


def _kinds(place: sc.Placement, chunk_bytes: Sequence[int]) -> list[_Kind]:
    totals: dict[tuple[int, tuple[int, ...]], int] = {}
    for owner, mask, size in zip(place.owners.tolist(), place.holders, chunk_bytes, strict=True):
        holders = tuple(np.flatnonzero(mask).tolist())
        if size and len(holders) > 1:
            totals[owner, holders] = totals.get((owner, holders), 0) + int(size)
    return [_Kind(owner, holders, num_bytes) for (owner, holders), num_bytes in totals.items()]


def _ports(topology: sc.Topology) -> dict[_Port, float]:
    """Every port that anything can use, and the bytes per second that it carries."""
    rates = {}
    for sends in (True, False):
        for rank, node in enumerate(topology.node_of):
            if topology.node_of.count(node) > 1:
                rates[_Port("up", rank, sends)] = topology.scale_up_of(rank).bandwidth_bytes_per_s
            if topology.num_nodes > 1:
                rates[_Port("out", rank, sends)] = topology.scale_out_of(rank).bandwidth_bytes_per_s
        for node in range(topology.num_nodes if topology.num_nodes > 1 else 0):
            link = topology.node_link_of(node)
            if link is not None:
                rates[_Port("node", node, sends)] = link.bandwidth_bytes_per_s
    return rates


def _used(src: int, dst: int, topology: sc.Topology, ports: dict[_Port, float]) -> Iterator[_Port]:
    """The ports that a byte passes between two ranks."""
    nodes = topology.node_of[src], topology.node_of[dst]
    side = "up" if nodes[0] == nodes[1] else "out"
    for rank, node, sends in ((src, nodes[0], True), (dst, nodes[1], False)):
        yield _Port(side, rank, sends)
        if side == "out" and _Port("node", node, sends) in ports:
            yield _Port("node", node, sends)


def _usable(arcs: Sequence[tuple[int, int]], receiver: int) -> list[int]:
    return [number for number, (src, _) in enumerate(arcs) if src != receiver]


class _Rows:
    """Sparse constraints, row by row."""

    def __init__(self) -> None:
        self._upper: list[tuple[int, int, float]] = []
        self._equal: list[tuple[int, int, float]] = []
        self._upper_limits: list[float] = []
        self._equal_limits: list[float] = []

    def add_upper(self, entries: Sequence[tuple[int, float]], limit: float) -> int:
        row = len(self._upper_limits)
        self._upper += [(row, column, value) for column, value in entries]
        self._upper_limits.append(limit)
        return row

    def extend_upper(self, row: int, column: int, value: float) -> None:
        self._upper.append((row, column, value))

    def add_equal(self, entries: Sequence[tuple[int, float]], value: float) -> None:
        row = len(self._equal_limits)
        self._equal += [(row, column, factor) for column, factor in entries]
        self._equal_limits.append(value)

    def matrices(self, num_columns: int) -> tuple[tuple[coo_array, NDArray[np.float64]], ...]:
        """Upper and equal rows, each as matrix and right-hand side."""
        sides = ((self._upper, self._upper_limits), (self._equal, self._equal_limits))
        return tuple(
            (_matrix(entries, (len(limits), num_columns)), np.array(limits, np.float64)) for entries, limits in sides
        )


def _matrix(entries: Sequence[tuple[int, int, float]], shape: tuple[int, int]) -> coo_array:
    rows, columns, values = zip(*entries, strict=True)
    return coo_array((values, (rows, columns)), shape=shape).tocsr()
