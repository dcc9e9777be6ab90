"""How long balancers take: part of the planner's case.

Every call balances other loads: as many Zipf draws as calls, all drawn beforehand. Costs are those of a layer on GPUs
that share NVLink, whose dense compute hides some copies. Every answer is checked: owners stay, memory is respected,
quotas are the holders' and as many as the loads, and the layer is predicted to take no longer than without replicas.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import sparsecoll as sc
from sparsecoll.balance import Balance, Balancer, Costs, Loads, find_balancer, predicted_s

__all__ = ["BalancerResult", "time_balancers"]

_NUM_EXPERTS, _WORLD_SIZE = 256, 64
_ZIPF = 1.2
_TOKENS = 32768
_NAMES = ("quota", "hecate")
# An expert of 2048 x 1408 x 3 parameters in bfloat16, so that an assignment takes as many FLOP as it has bytes; tokens
# of 2048; 200 TFLOP/s and 350 GB/s.
_COSTS = Costs(
    topology=sc.Topology.flat(_WORLD_SIZE),
    expert_bytes=17_301_504,
    token_bytes=4096,
    bytes_per_s=3.5e11,
    token_s=17_301_504 / 2e14,
    hidden_s=5e-4,
    spare_experts=16,
)


@dataclass(frozen=True)
class BalancerResult:
    """One balancer; times are of single calls.

    Attributes:
        replicas: new ones in all; mean over the calls.
        saved: share of the layer's predicted time, copies not counted; over all calls.
    """

    balancer: str
    num_experts: int
    world_size: int
    replicas: float
    min_us: float
    median_us: float
    p95_us: float
    saved: float
    right: bool


def time_balancers(options: argparse.Namespace) -> Iterator[BalancerResult]:
    """Times one balancer after the other."""
    base = sc.Placement.even(_NUM_EXPERTS, _WORLD_SIZE)
    num_calls = options.warmup_iters + options.iters
    draws = [_draw_loads([options.seed, call]) for call in range(num_calls)]
    for name in _NAMES:
        balancer = find_balancer(name)
        answers, times_s = _time(balancer, draws, base)
        low, median, p95 = np.quantile(times_s[options.warmup_iters :], [0.0, 0.5, 0.95]) * 1e6
        plain_s = [predicted_s(loads, Balance(base), _COSTS) for loads in draws]
        layer_s = [predicted_s(loads, answer, _COSTS) for loads, answer in zip(draws, answers, strict=True)]
        replicas = [int(answer.place.holders.sum()) - _NUM_EXPERTS for answer in answers]
        is_right = all(_is_sound(*each, base) for each in zip(draws, answers, strict=True))
        yield BalancerResult(
            balancer=name,
            num_experts=_NUM_EXPERTS,
            world_size=_WORLD_SIZE,
            replicas=float(np.mean(replicas)),
            min_us=float(low),
            median_us=float(median),
            p95_us=float(p95),
            saved=1 - float(np.sum(layer_s) / np.sum(plain_s)),
            right=is_right and all(after <= before for after, before in zip(layer_s, plain_s, strict=True)),
        )


def _draw_loads(seed: Sequence[int]) -> Loads:
    """``[W, E]``; all ranks find the same experts popular."""
    random = np.random.default_rng(seed)
    popularity = random.permutation(np.arange(1, _NUM_EXPERTS + 1) ** -_ZIPF)
    return random.multinomial(_TOKENS, popularity / popularity.sum(), size=_WORLD_SIZE).astype(np.int64)


def _time(balancer: Balancer, draws: Sequence[Loads], base: sc.Placement) -> tuple[list[Balance], list[float]]:
    answers, times_s = [], []
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        for loads in draws:
            begin_s = time.perf_counter()
            answer = balancer.balance(loads, base, _COSTS)
            times_s.append(time.perf_counter() - begin_s)
            answers.append(answer)
    finally:
        if is_collecting:
            gc.enable()
    return answers, times_s


def _is_sound(loads: Loads, answer: Balance, base: sc.Placement) -> bool:
    place, quotas = answer.place, answer.quotas
    is_sound = np.array_equal(place.owners, base.owners) and bool((place.holders >= base.holders).all())
    is_sound &= int((place.holders & ~base.holders).sum(axis=0).max()) <= _COSTS.spare_experts
    if quotas is not None:
        is_sound &= bool((quotas >= 0).all()) and not quotas[~place.holders].any()
        is_sound &= np.array_equal(quotas.sum(axis=1), loads.sum(axis=0))
    return is_sound
