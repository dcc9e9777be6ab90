"""What a byte costs each link, in integers, so that every planner decides the same."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sparsecoll.topology import Link, Topology

__all__ = ["Costs", "costs_of"]

# Relative to the fastest link a cost is exact to one part in 2^12, and 2^48 bytes of the slowest still fit 62 bits.
_FASTEST = 1 << 11
_SLOWEST = 1 << 14 << 11


class Costs(NamedTuple):
    """Links as integers.

    Attributes:
        up: ``[W]``, ticks that a byte takes a rank's link to its own node.
        out: ``[W]``, the same for other nodes.
        node: ``[num_nodes]``, the same for what a node's ranks share; 0 where they share nothing.
        up_latency, out_latency: ticks until a message arrives, the longest of all links of their kind; 0 where nobody
            can use them.
        tick_s: seconds of a tick.
    """

    up: tuple[int, ...]
    out: tuple[int, ...]
    node: tuple[int, ...]
    up_latency: int
    out_latency: int
    tick_s: float


@lru_cache(maxsize=64)
def costs_of(topology: Topology) -> Costs:
    """The links of a topology, slowed down to 1/2^14 of the fastest where they are slower than that."""
    ranks = range(topology.world_size)
    up = [topology.scale_up_of(rank) for rank in ranks]
    out = [topology.scale_out_of(rank) for rank in ranks]
    node = [topology.node_link_of(each) for each in range(topology.num_nodes)]
    has_up, has_out = topology.num_nodes < len(up), topology.num_nodes > 1
    shared = [link for link in node if link is not None]
    used = (up if has_up else []) + (out + shared if has_out else [])
    fastest = max((link.bandwidth_bytes_per_s for link in used), default=1.0)
    tick_s = 1.0 / (fastest * _FASTEST)

    def cost(link: Link | None) -> int:
        if link is None:
            return 0
        return min(max(round(_FASTEST * (fastest / link.bandwidth_bytes_per_s)), 1), _SLOWEST)

    def latency(links: list[Link]) -> int:
        return round(max(link.latency_s for link in links) / tick_s)

    return Costs(
        tuple(map(cost, up)),
        tuple(map(cost, out)),
        tuple(map(cost, node)),
        latency(up) if has_up else 0,
        latency(out + shared) if has_out else 0,
        tick_s,
    )
