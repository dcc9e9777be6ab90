"""NumPy oracle: what every collective and the MoE layer must give, written for reading and not for speed.

It knows neither plans nor transports, so that agreement with it means something. Values of all ranks are lists
indexed by rank. Shapes: ``T`` tokens, ``D`` model width, ``I`` hidden width, ``E`` experts, ``K`` experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecoll.placement import Placement

__all__ = ["all_gather", "all_to_all", "moe_layer", "reduce_scatter"]

Array = NDArray[Any]


def all_gather(
    shards: Sequence[Sequence[Array]], place: Placement, chunks: Sequence[int] | None = None
) -> list[list[Array]]:
    """Rank r passes its owned chunks (of the subset) in order; rank r gets those that it holds."""
    subset = range(place.num_chunks) if chunks is None else chunks
    content: dict[int, Array] = {}
    for rank, shard in enumerate(shards):
        owned = [chunk for chunk in subset if place.owners[chunk] == rank]
        content.update(zip(owned, shard, strict=True))
    return [
        [content[chunk].copy() for chunk in subset if place.holders[chunk, rank]] for rank in range(place.world_size)
    ]


def reduce_scatter(
    held: Sequence[Sequence[Array]], place: Placement, chunks: Sequence[int] | None = None, op: str = "sum"
) -> list[list[Array]]:
    """Rank r passes the chunks that it holds; the owner gets their sum, or mean, in float64 (integers: int64)."""
    subset = range(place.num_chunks) if chunks is None else chunks
    totals: dict[int, Array] = {}
    for rank, rows in enumerate(held):
        mine = [chunk for chunk in subset if place.holders[chunk, rank]]
        for chunk, row in zip(mine, rows, strict=True):
            wide = row.astype(np.int64 if row.dtype.kind in "iu" else np.float64)
            totals[chunk] = totals[chunk] + wide if chunk in totals else wide
    if op == "mean":
        totals = {chunk: total / place.holders[chunk].sum() for chunk, total in totals.items()}
    return [[totals[chunk] for chunk in subset if place.owners[chunk] == rank] for rank in range(place.world_size)]


def all_to_all(xs: Sequence[Array], send_counts: Sequence[Sequence[int]]) -> list[Array]:
    """Rank s sends ``send_counts[s][d]`` rows to rank d, in order; rank d gets them by source."""
    parts = [np.split(x, np.cumsum(counts)[:-1]) for x, counts in zip(xs, send_counts, strict=True)]
    return [np.concatenate([parts[src][dst] for src in range(len(xs))]) for dst in range(len(xs))]


def moe_layer(
    x: Array,
    router_weight: Array,
    experts: Sequence[tuple[Array, Array]],
    top_k: int,
    *,
    activation: str = "swiglu",
    normalize_weights: bool = True,
) -> Array:
    """Token by token, expert by expert.

    Args:
        x: ``[T, D]``.
        router_weight: ``[E, D]``.
        experts: for each expert its input projection (``[2I, D]``, gate first, for swiglu; ``[I, D]`` for gelu) and its
            output projection ``[D, I]``.
    """
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = router_weight @ token
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        chosen = np.argsort(-probabilities, kind="stable")[:top_k]
        weights = probabilities[chosen]
        if normalize_weights:
            weights = weights / weights.sum()
        for expert, weight in zip(chosen, weights, strict=True):
            w_in, w_out = experts[expert]
            hidden = w_in @ token
            if activation == "swiglu":
                gate, up = np.split(hidden, 2)
                hidden = gate / (1 + np.exp(-gate)) * up
            else:
                hidden = 0.5 * hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2)))
            out[t] += weight * (w_out @ hidden)
    return out
