"""What no schedule can beat.

Every rank sends and receives at most what its links carry together, both directions at once. Then each of
these is a lower bound, whoever relays: a receiver must take in what it lacks; a byte that anybody lacks must leave
its owner at least once; and every delivery is somebody's sending, so all of them share the ranks' egress. The
reduce-scatter is the mirror: replace sending by receiving, and the same numbers come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecoll.placement import Placement
from sparsecoll.topology import Topology

__all__ = ["bound_s"]


def bound_s(place: Placement, chunks: Sequence[int], chunk_bytes: Sequence[int], topology: Topology) -> float:
    """Seconds that gathering ``chunks`` to their holders (or reducing them back) takes at least."""
    index = np.asarray(chunks, np.int64)
    sizes = np.asarray(chunk_bytes, np.int64)[index]
    owners = place.owners[index]
    lacking = place.holders[index].copy()
    lacking[np.arange(len(index)), owners] = False
    if not (lacking & (sizes > 0)[:, None]).any():
        return 0.0
    receives = lacking.T.astype(np.int64) @ sizes
    sends_once = np.zeros(place.world_size, np.int64)
    np.add.at(sends_once, owners, sizes * lacking.any(axis=1))
    shared = receives.sum() / place.world_size
    links = [topology.scale_up] * (topology.num_nodes < topology.world_size)
    links += [topology.scale_out] * (topology.num_nodes > 1)
    bandwidth = sum(link.bandwidth_bytes_per_s for link in links)
    latency_s = min(link.latency_s for link in links)
    return float(max(receives.max(), sends_once.max(), shared) / bandwidth + latency_s)
