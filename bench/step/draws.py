"""Which experts tokens go to: by Zipf's law, exactly balanced, or as recorded.

Legend: ``T`` tokens of a rank, ``K`` top-k, ``E`` experts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.step.traces import Trace

__all__ = ["ROUTINGS", "Spot", "balanced", "draw", "zipf"]

ExpertIds = NDArray[np.int64]


class Spot(NamedTuple):
    """Where in a run tokens are routed."""

    step: int
    layer: int
    rank: int


def draw(
    routing: str, num_tokens: int, top_k: int, num_experts: int, spot: Spot, seed: int, trace: Trace | None = None
) -> ExpertIds:
    """``[T, K]``, distinct in a row: always the same for the same arguments, and afresh for every spot.

    Args:
        routing: of `ROUTINGS`.
        trace: what ``recorded`` replays.
    """
    if routing == "recorded":
        assert trace is not None
        return trace.at(spot.step, spot.layer, spot.rank, num_tokens)
    random = np.random.default_rng((seed, ROUTINGS.index(routing), *spot))
    return _DRAWS[routing](random, num_tokens, top_k, num_experts)


def zipf(random: np.random.Generator, num_tokens: int, top_k: int, num_experts: int, *, exponent: float) -> ExpertIds:
    """``[T, K]``: expert e gets, on average, assignments in proportion to ``(e + 1) ** -exponent``.

    The hottest experts are neighbours, so that with contiguous shares they are all on the first ranks. A token lays the
    shares of all experts end to end, in an order of its own, and takes those on which ``top_k`` points fall that are
    evenly spaced (Madow's systematic sampling). Drawing one expert after the other instead, without replacement, would
    give loads that are flatter than the law.
    """
    shares = _shares((1.0 + np.arange(num_experts)) ** -exponent, top_k)
    order = random.random((num_tokens, num_experts)).argsort(axis=1)
    ends = shares[order].cumsum(axis=1)
    points = random.random((num_tokens, 1)) + np.arange(top_k)
    places = (ends[:, None, :] <= points[:, :, None]).sum(axis=2)
    # The last end is top_k up to rounding; a point may lie beyond it.
    return np.take_along_axis(order, places.clip(max=num_experts - 1), axis=1)


def balanced(random: np.random.Generator, num_tokens: int, top_k: int, num_experts: int) -> ExpertIds:
    """``[T, K]``: every expert gets the same number of assignments; where they do not divide, some get one more."""
    cycle = random.permutation(num_experts)
    ids = cycle[np.arange(num_tokens * top_k) % num_experts].reshape(num_tokens, top_k)
    return random.permutation(ids)


def _shares(weights: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """How often each expert is among a token's ``top_k``: in proportion to ``weights``, but at most always."""
    always = np.zeros(len(weights), bool)
    while True:
        left = top_k - always.sum()
        shares = np.where(always, 1.0, weights * left / max(weights[~always].sum(), np.finfo(float).tiny))
        beyond = ~always & (shares > 1 + 1e-12)
        if not beyond.any():
            return shares
        always |= beyond


_DRAWS = {"zipf08": partial(zipf, exponent=0.8), "zipf12": partial(zipf, exponent=1.2), "balanced": balanced}

ROUTINGS = (*_DRAWS, "recorded")
