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

    Attributes:
        node_of: ``[world_size]``, the node of each rank; nodes count from 0.
        scale_up: a rank's link to ranks of its own node.
        scale_out: a rank's link to ranks of other nodes.
    """

    node_of: tuple[int, ...]
    scale_up: Link = Link(bandwidth_bytes_per_s=8e9, latency_s=2e-6)
    scale_out: Link = Link(bandwidth_bytes_per_s=1.25e9, latency_s=2e-5)

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

    @classmethod
    def flat(cls, world_size: int) -> Topology:
        """All ranks on one node."""
        if world_size < 1:
            raise InvalidArgument(f"Topology.flat: expected world_size >= 1, got {world_size}")
        return cls((0,) * world_size)

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

    def link(self, src: int, dst: int) -> Link:
        """The link that bytes from ``src`` to ``dst`` cross."""
        return self.scale_up if self.node_of[src] == self.node_of[dst] else self.scale_out
