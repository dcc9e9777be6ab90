"""The contestants, and what each of them takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import sparsecoll as sc
from bench.busiest import Busiest
from bench.footprint.model import Sizes
from bench.footprint.training import Training, by_kind, rest_by_place

__all__ = ["Row", "run_contest"]

_EP, _DEFAULT, _REMAT = "ep", "default", "remat"
_TOLERANCE = 1e-3
"""Of losses after some steps in bfloat16; replicas change the order of summation."""
_LIMIT_S = 1800.0
_MOST_PLACES = 8


class _Rank(NamedTuple):
    """What a rank has found.

    Attributes:
        losses: by step.
        peak_bytes: the most that was alive.
        kinds: of those, by `bench.footprint.training.KINDS`.
        rest: of the last kind, by where they were allocated.
        param_bytes: of the parameters alone.
    """

    losses: list[float]
    peak_bytes: int
    kinds: dict[str, int]
    rest: dict[str, int]
    param_bytes: int
    is_counted_right: bool


@dataclass(frozen=True)
class Row:
    """A contestant, as seen on the rank that takes most.

    Attributes:
        over_ep: bytes over those of expert parallelism.
        over_params: bytes over those of the rank's parameters.
        loss_rel_diff: largest relative difference to the losses of expert parallelism.
        right: losses agree, and the counted bytes with the model's own report, on all ranks.
    """

    contestant: str
    rank: int
    peak_bytes: int
    over_ep: float
    over_params: float
    kinds: dict[str, int]
    rest: dict[str, int]
    loss_rel_diff: float
    right: bool


def run_contest(options: argparse.Namespace) -> Iterator[Row]:
    """Trains one contestant after the other, each with ranks of its own."""
    found: dict[str, list[_Rank]] = {}
    for name, arguments in _contestants(options.most).items():
        main = partial(_train, options=options, arguments=arguments)
        found[name] = sc.run_local(main, options.ranks, timeout_s=_LIMIT_S)
        yield _row(name, found)


def _contestants(most: int) -> dict[str, dict[str, Any]]:
    """Arguments of `sparsecoll.FSSDP`. With the balancer ``none`` it is expert parallelism: no expert ever moves."""
    return {
        _EP: {"balancer": "none"},
        _DEFAULT: {"balancer": Busiest(most)},
        _REMAT: {"balancer": Busiest(most), "rematerialize": True},
    }


def _train(group: sc.Group, options: argparse.Namespace, arguments: Mapping[str, Any]) -> _Rank:
    sizes = Sizes(options.layers, options.experts, options.width, options.hidden, options.tokens)
    training = Training(group, sizes, arguments)
    losses = [training.step() for _ in range(options.warmup_iters)]
    training.ledger.start_window()
    losses += [training.step() for _ in range(options.iters)]
    peak = training.ledger.peak
    return _Rank(
        losses,
        peak.num_bytes,
        by_kind(peak),
        dict(rest_by_place(peak).most_common(_MOST_PLACES)),
        training.model.memory_report().param_bytes,
        training.is_counted_right(),
    )


def _row(name: str, found: Mapping[str, Sequence[_Rank]]) -> Row:
    ranks = found[name]
    worst = max(range(len(ranks)), key=lambda rank: ranks[rank].peak_bytes)
    mine, losses = ranks[worst], found[_EP][0].losses
    difference = max(abs(a - b) / abs(a) for a, b in zip(losses, mine.losses, strict=True))
    is_right = difference <= _TOLERANCE and all(each.is_counted_right for each in ranks)
    if name == _REMAT:  # sums in the same order
        is_right = is_right and mine.losses == found[_DEFAULT][0].losses
    return Row(
        contestant=name,
        rank=worst,
        peak_bytes=mine.peak_bytes,
        over_ep=mine.peak_bytes / max(each.peak_bytes for each in found[_EP]),
        over_params=mine.peak_bytes / mine.param_bytes,
        kinds=mine.kinds,
        rest=mine.rest,
        loss_rel_diff=difference,
        right=is_right,
    )
