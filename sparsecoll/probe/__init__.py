"""Measures the links of a group into a Topology, with the group's own transport.

``python -m sparsecoll.probe`` does so under a launcher, shows a table and writes a file.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sparsecoll.collectives.agreement import agree, agreed_error, digest_of
from sparsecoll.errors import CollectiveMismatch, InvalidArgument
from sparsecoll.group import Group, resolve_group
from sparsecoll.probe.combine import combine, rank_links
from sparsecoll.probe.measure import Meter
from sparsecoll.probe.rounds import scale_out_rounds, scale_up_rounds, shared_rounds
from sparsecoll.probe.wires import HostWire, StreamWire, Wire
from sparsecoll.topology import Topology
from sparsecoll.transport.base import HostTransport, Operation, Transport
from sparsecoll.transport.stream import StreamTransport

__all__ = ["probe"]

_NAME = "probe"


def probe(group: Any = None, *, duration_s: float = 2.0, timeout_s: float | None = None) -> Topology:
    """Measures what the links of ``group`` carry.

    Pairs of ranks exchange small messages for the latency (half a round trip, the calls of this library included) and
    large ones, several in flight in both directions, for the bandwidth. Inside a node all pairs of a round talk at
    once, between nodes one rank of each node; then all ranks of a node talk to another node at once, and where they get
    clearly less together than each alone, their node has a link that they share. A rank's link is the best that it
    showed with any peer, as the worse end of a pair slows both.

    Which ranks share a node is taken from ``group.topology``. Other traffic on the links, and on a small machine other
    processes, show in what is measured.

    Collective: all ranks call it in the same order.
    Stream: the host waits for every measurement, on a GPU too.
    Memory: up to 64 MiB for each rank while it runs; on a GPU 512 MiB there.

    Args:
        group: as in `sparse_all_gather`.
        duration_s: about how long to measure, equal on all ranks; slow links and large worlds take somewhat longer.
        timeout_s: for all of it; by default the group's.

    Returns:
        An equal Topology on all ranks; the group goes on with its own (``init_group(topology=...)`` takes one, and
        ``group.topology`` may be set on all ranks).

    Raises:
        InvalidArgument, CollectiveMismatch: ``duration_s`` is not positive, or not equal on all ranks.
        CollectiveTimeout, PeerFailure, TransportError: as in `sparse_all_gather`.
    """
    resolved = resolve_group(group)
    operation = resolved.operation(_NAME, timeout_s)
    return resolved.run(operation, lambda: _probe(resolved, operation, duration_s))


def _probe(group: Group, operation: Operation, duration_s: float) -> Topology:
    problem = None
    if not (isinstance(duration_s, (int, float)) and 0 < duration_s < math.inf):
        problem = InvalidArgument(f"{_NAME}: expected duration_s > 0, got {duration_s} {group.place_of_error}")
    if group.checked and group.world_size > 1:
        agree(group, operation, digest_of(_NAME, duration_s), lambda: {"duration_s": duration_s}, problem=problem)
    if problem is not None:
        raise agreed_error(problem) if group.world_size == 1 else problem
    node_of = group.topology.node_of
    if group.world_size == 1:
        return Topology.flat(1)
    inside, between, together = scale_up_rounds(node_of), scale_out_rounds(node_of), shared_rounds(node_of)
    host, wire = _ways(group.transport, operation)
    meter = Meter(host, wire, operation, duration_s / (len(inside) + len(between) + len(together)))
    up, out = meter.pairs(inside), meter.pairs(between)
    shared = meter.nodes(together, node_of, rank_links(len(node_of), out)) if together else []
    flags = {name: getattr(group.topology, name) for name in ("shared_memory", "in_rounds")}
    topology = replace(combine(node_of, up, out, shared), **flags)
    _check_equal(group, operation, topology)
    return topology


def _ways(transport: Transport, operation: Operation) -> tuple[HostTransport, Wire]:
    """What ranks talk over, and what they measure."""
    if isinstance(transport, StreamTransport):
        return transport.control, StreamWire(transport, operation)
    assert isinstance(transport, HostTransport)
    return transport, HostWire(transport, operation)


def _check_equal(group: Group, operation: Operation, topology: Topology) -> None:
    """All ranks have computed the same from the same; a machine with other arithmetic would show here."""
    digests = [each.hex() for each in group.transport.exchange(bytes.fromhex(topology.digest), operation)]
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise agreed_error(
                CollectiveMismatch(
                    f"{operation}: expected equal topologies on all ranks, got {digests[0]} on rank 0 and {digest} on "
                    f"rank {rank} {group.place_of_error}"
                )
            )
