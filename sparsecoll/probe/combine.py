"""From measurements of pairs to links of ranks and nodes. Pure, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from sparsecoll.topology import Link, Topology

__all__ = ["NodeSample", "PairSample", "combine", "rank_links", "snapped"]

# Closer to the median of their kind than this, values differ by noise; latencies of equal links do so by more, as they
# hang on when a process is scheduled.
_BANDWIDTH_NOISE, _LATENCY_NOISE = 0.2, 0.5
# Ranks of a node that get less than this part of what they get one by one share a link.
_SHARED = 0.8


class PairSample(NamedTuple):
    """What two ranks measured: half a round trip, and bytes per second in each direction while both send."""

    first: int
    second: int
    latency_s: float
    bandwidth_bytes_per_s: float


class NodeSample(NamedTuple):
    """What several ranks of two nodes got in each direction, in sum: one by one, and all at once."""

    first: int
    second: int
    alone_bytes_per_s: float
    together_bytes_per_s: float


def combine(
    node_of: Sequence[int], inside: Sequence[PairSample], between: Sequence[PairSample], shared: Sequence[NodeSample]
) -> Topology:
    """Puts links together; those that nobody measured, as there are none, keep the defaults of `Topology`."""
    links: dict[str, Any] = {}
    if inside:
        links["scale_up"] = rank_links(len(node_of), inside)
    if between:
        links["scale_out"] = rank_links(len(node_of), between)
        links["node_link"] = _node_links(node_of, links["scale_out"], shared)
    return Topology(tuple(node_of), **links)


def rank_links(world_size: int, samples: Iterable[PairSample]) -> list[Link]:
    """The best that each rank showed with any peer, as the worse end of a pair slows both.

    Ranks without a sample get the median of the others.
    """
    bandwidths: dict[int, float] = {}
    latencies: dict[int, float] = {}
    for sample in samples:
        for rank in (sample.first, sample.second):
            bandwidths[rank] = max(sample.bandwidth_bytes_per_s, bandwidths.get(rank, 0.0))
            latencies[rank] = min(sample.latency_s, latencies.get(rank, sample.latency_s))
    return [
        Link(bandwidth, latency_s)
        for bandwidth, latency_s in zip(
            snapped(bandwidths, world_size, _BANDWIDTH_NOISE),
            snapped(latencies, world_size, _LATENCY_NOISE),
            strict=True,
        )
    ]


def _node_links(node_of: Sequence[int], scale_out: Sequence[Link], shared: Iterable[NodeSample]) -> list[Link] | None:
    """None where no node's ranks hinder each other.

    Otherwise what each node's ranks got together, or the sum of their links, which binds nothing, where nobody knows.
    A node's best round counts, as in the others the other node may have been the slow one.
    """
    best: dict[int, NodeSample] = {}
    for sample in shared:
        for node in (sample.first, sample.second):
            if node not in best or sample.together_bytes_per_s > best[node].together_bytes_per_s:
                best[node] = sample
    if not any(sample.together_bytes_per_s < _SHARED * sample.alone_bytes_per_s for sample in best.values()):
        return None
    sums = [0.0] * (max(node_of) + 1)
    for node, link in zip(node_of, scale_out, strict=True):
        sums[node] += link.bandwidth_bytes_per_s
    together = {node: sample.together_bytes_per_s for node, sample in best.items()}
    measured = snapped(together, len(sums), _BANDWIDTH_NOISE)
    # A message pays the latency of its ranks' own links, and nothing on top.
    latency_s = min(link.latency_s for link in scale_out)
    return [Link(measured[node] if node in best else sums[node], latency_s) for node in range(len(sums))]


def snapped(values: Mapping[int, float], count: int, noise: float) -> list[float]:
    """``count`` values with three significant digits; the median for those within ``noise`` of it, or missing.

    So equal hardware gives equal links, and whoever reads them sees where it is not equal.
    """
    middle = median(values.values())
    found = (values.get(index, middle) for index in range(count))
    return [float(f"{middle if abs(value - middle) <= noise * middle else value:.3g}") for value in found]
