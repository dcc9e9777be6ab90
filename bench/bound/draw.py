"""Random cases: who owns what, who wants it, how large it is, and the links it travels over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc

__all__ = ["FLAT_LINKS", "PATTERNS", "TWO_LEVEL_LINKS", "Case", "flat_case", "two_level_case", "without_latency"]

PATTERNS = ("even", "hot", "zipf")

_LEAST_BYTES, _MOST_BYTES = 64e6, 4e9
_MOST_RANKS, _MOST_NODES, _MOST_RANKS_PER_NODE = 128, 16, 8

_NVLINK, _FABRIC, _ETHERNET = sc.Link(200e9, 5e-6), sc.Link(25e9, 1e-5), sc.Link(50e6, 5e-5)

FLAT_LINKS: Mapping[str, sc.Link] = {"200GB/s,5us": _NVLINK, "25GB/s,10us": _FABRIC, "50MB/s,50us": _ETHERNET}


class _Levels(NamedTuple):
    up: sc.Link
    out: sc.Link
    node: sc.Link | None


TWO_LEVEL_LINKS: Mapping[str, _Levels] = {
    "rails": _Levels(_NVLINK, _FABRIC, None),  # a network card for each GPU
    "shared": _Levels(_NVLINK, _FABRIC, _FABRIC),  # one for a node of them
    "hosts": _Levels(_FABRIC, _ETHERNET, _ETHERNET),  # processes on hosts with a slow network
}


class Case(NamedTuple):
    """Arguments of a plan.

    Attributes:
        pattern: which of `PATTERNS`.
        node_of: ``[world_size]``.
        chunk_bytes: ``[num_chunks]``; those of chunks with replicas add up to between 64 MB and 4 GB.
    """

    pattern: str
    place: sc.Placement
    chunk_bytes: tuple[int, ...]
    node_of: tuple[int, ...]

    def flat(self, link: sc.Link) -> sc.Topology:
        """All ranks alike, whatever ``node_of`` says."""
        return sc.Topology.flat(len(self.node_of), link)

    def on_nodes(self, links: _Levels) -> sc.Topology:
        return sc.Topology(self.node_of, links.up, links.out, links.node)

    @property
    def moved_bytes(self) -> int:
        """Of chunks with replicas, each counted once."""
        return sum(self.chunk_bytes[chunk] for chunk in self.place.replicated())


def flat_case(seed: int, number: int) -> Case:
    """The ``number``-th case of ``seed``: 2 to 128 ranks, 8 to 256 chunks, patterns in turn."""
    random = np.random.default_rng([seed, 0, number])
    world_size = _log_uniform(random, 2, _MOST_RANKS)
    return _case(random, PATTERNS[number % len(PATTERNS)], (0,) * world_size, _log_uniform(random, 8, 256))


def two_level_case(seed: int, number: int) -> Case:
    """As `flat_case`, on 1 to 16 nodes of 2 to 8 ranks each, and with 2 chunks and more."""
    random = np.random.default_rng([seed, 1, number])
    num_nodes = _log_uniform(random, 1, _MOST_NODES)
    per_node = int(random.integers(2, _MOST_RANKS_PER_NODE + 1))
    node_of = tuple(rank // per_node for rank in range(num_nodes * per_node))
    return _case(random, PATTERNS[number % len(PATTERNS)], node_of, _log_uniform(random, 2, 256))


def without_latency(topology: sc.Topology) -> sc.Topology:
    """The same bandwidths."""

    def still(links: sc.Link | tuple[sc.Link, ...]) -> sc.Link | tuple[sc.Link, ...]:
        if isinstance(links, tuple):
            return tuple(sc.Link(link.bandwidth_bytes_per_s, 0.0) for link in links)
        return sc.Link(links.bandwidth_bytes_per_s, 0.0)

    node_link = topology.node_link
    return sc.Topology(
        topology.node_of,
        still(topology.scale_up),
        still(topology.scale_out),
        None if node_link is None else still(node_link),
    )


def _case(random: np.random.Generator, pattern: str, node_of: tuple[int, ...], num_chunks: int) -> Case:
    world_size = len(node_of)
    owners = np.arange(num_chunks) * world_size // num_chunks
    num_holders = np.full(num_chunks, _log_uniform(random, 2, world_size))
    if pattern == "hot":  # one owner has everything that others want
        owners[:] = random.integers(world_size)
    if pattern == "zipf":  # few chunks are wanted by many, most by nobody, and who owns what has nothing to do with it
        popularity = np.arange(1, num_chunks + 1) ** -random.uniform(0.8, 1.4)
        wanted = np.round(popularity * world_size * random.uniform(1, 4)).astype(np.int64)
        wanted[0] = max(wanted[0], 2)
        num_holders = random.permutation(np.clip(wanted, 1, world_size))
    mask = _holders(random, owners, num_holders, world_size)
    sizes = random.uniform(0.25, 1.75, num_chunks)
    total = np.exp(random.uniform(np.log(_LEAST_BYTES), np.log(_MOST_BYTES)))
    sizes *= total / sizes[mask.sum(axis=1) > 1].sum()
    return Case(pattern, sc.Placement(owners, mask), tuple(np.ceil(sizes).astype(np.int64).tolist()), node_of)


def _holders(
    random: np.random.Generator, owners: NDArray[np.int64], num_holders: NDArray[np.int64], world_size: int
) -> NDArray[np.bool_]:
    """``[num_chunks, world_size]``: the owner and random others, ``num_holders`` of them together."""
    mask = np.zeros((len(owners), world_size), bool)
    for chunk, (owner, count) in enumerate(zip(owners, num_holders, strict=True)):
        others = np.delete(np.arange(world_size), owner)
        mask[chunk, random.choice(others, count - 1, replace=False)] = True
        mask[chunk, owner] = True
    return mask


def _log_uniform(random: np.random.Generator, least: int, most: int) -> int:
    """An integer; both ends may come."""
    return min(int(np.exp(random.uniform(np.log(least), np.log(most + 1)))), most)
