"""Ranks on nodes, and what their links carry. Pure data, equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

from sparsecoll.errors import InvalidArgument

__all__ = ["Link", "Topology"]


@dataclass(frozen=True)
class Link:
    """One direction of a rank's link: ``latency_s`` per message and ``bandwidth_bytes_per_s``."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not (self.bandwidth_bytes_per_s > 0 and self.latency_s >= 0):
            raise InvalidArgument(f"Link: expected a positive bandwidth and a latency of at least 0, got {self}")


@dataclass(frozen=True)
class Topology:
    """Where each rank lives and how fast it talks.

    Links are full duplex: each direction carries the whole bandwidth.

    Attributes:
        node_of: ``[world_size]``, the node of each rank; nodes count from 0.
        scale_up: a rank's link to ranks of its own node; one for all ranks, or ``[world_size]``.
        scale_out: a rank's link to ranks of other nodes (its rail); one for all ranks, or ``[world_size]``.
        node_link: what all ranks of a node share towards other nodes; one for all nodes, or ``[num_nodes]``. None where
            nothing is shared.
    """

    node_of: tuple[int, ...]
    scale_up: Link | tuple[Link, ...] = Link(bandwidth_bytes_per_s=8e9, latency_s=2e-6)
    scale_out: Link | tuple[Link, ...] = Link(bandwidth_bytes_per_s=1.25e9, latency_s=2e-5)
    node_link: Link | tuple[Link, ...] | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "node_of", tuple(index(node) for node in self.node_of))
        except TypeError:
            raise InvalidArgument(f"Topology: expected a node number for each rank, got {self.node_of}") from None
        if not self.node_of:
            raise InvalidArgument("Topology: expected at least one rank, got none")
        nodes = set(self.node_of)
        if nodes != set(range(len(nodes))):
            raise InvalidArgument(f"Topology: expected nodes numbered from 0 without gaps, got {sorted(nodes)}")
        for name, count in (("scale_up", self.world_size), ("scale_out", self.world_size), ("node_link", len(nodes))):
            links = getattr(self, name)
            if isinstance(links, Link) or (name == "node_link" and links is None):
                continue
            if not isinstance(links, (tuple, list)) or not all(isinstance(each, Link) for each in links):
                raise InvalidArgument(f"Topology: expected {name} to be a Link or {count} Links, got {links!r}")
            if len(links) != count:
                raise InvalidArgument(f"Topology: expected {name} to be a Link or {count} Links, got {len(links)}")
            # Equal links are one, so that topologies are equal by what they say.
            object.__setattr__(self, name, links[0] if len(set(links)) == 1 else tuple(links))

    @classmethod
    def flat(cls, world_size: int, link: Link | None = None) -> Topology:
        """All ranks on one node, each with ``link`` to the others."""
        if world_size < 1:
            raise InvalidArgument(f"Topology.flat: expected world_size >= 1, got {world_size}")
        return cls((0,) * world_size) if link is None else cls((0,) * world_size, scale_up=link)

    @classmethod
    def from_hosts(cls, hosts: Sequence[str]) -> Topology:
        """One node per distinct host name, numbered in order of first appearance."""
        numbers = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
        return cls(tuple(numbers[host] for host in hosts))

    @property
    def world_size(self) -> int:
        return len(self.node_of)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1

    def scale_up_of(self, rank: int) -> Link:
        """The link of ``rank`` to ranks of its own node."""
        return self.scale_up if isinstance(self.scale_up, Link) else self.scale_up[rank]

    def scale_out_of(self, rank: int) -> Link:
        """The link of ``rank`` to ranks of other nodes."""
        return self.scale_out if isinstance(self.scale_out, Link) else self.scale_out[rank]

    def node_link_of(self, node: int) -> Link | None:
        """What the ranks of ``node`` share towards other nodes."""
        return self.node_link[node] if isinstance(self.node_link, tuple) else self.node_link

    def link(self, src: int, dst: int) -> Link:
        """What a message from ``src`` to ``dst`` gets when nobody else sends: the slowest link on its way."""
        if self.node_of[src] == self.node_of[dst]:
            links = [self.scale_up_of(src), self.scale_up_of(dst)]
        else:
            shared = [self.node_link_of(self.node_of[rank]) for rank in (src, dst)]
            links = [self.scale_out_of(src), self.scale_out_of(dst), *(link for link in shared if link is not None)]
        return Link(min(link.bandwidth_bytes_per_s for link in links), max(link.latency_s for link in links))
