"""Every balancer and every predictor on a routing, forward after forward, so that predictors see the past only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.balance.settings import Setting
from bench.balance.weighing import Spread, Weight, weigh
from sparsecoll.balance import BALANCERS, Balance, Balancer, Loads, Quota, find_balancer, find_predictor

__all__ = ["PREDICTORS", "WINDOW", "Prediction", "Result", "compare_balancers", "compare_predictors"]

PREDICTORS = ("mean", "last", "decaying")
WINDOW = 5
"""Forwards before the first that is judged: what FSSDP's own predictor looks at."""

_TRUE = "true"
_AHEAD = (1, 10)
_LONGEST_WINDOW = 10
_ONE_SPREAD = ("none", "least_loaded", "quota")  # nothing to share, or quotas of their own
_EARLY = "early_quota"


@dataclass(frozen=True)
class Result:
    """One balancer on one routing: means over the forwards, unless it says otherwise.

    Attributes:
        before, after: assignments on the busiest rank over the mean, with owners alone and with the answer.
        after_max, copies: the most of any forward; copies are those that one rank receives.
        copied_bytes: in forward, on all ranks together; as many gradients return.
        left: share of assignments that leave the rank of their token.
        over_ideal: the layer's time and what is seen of copies, over the ideal.
        seen_over_ideal: the second part of that.
        solver_us: median time of a call.
        right: in all forwards.
    """

    setting: str
    routing: str
    balancer: str
    spread: str
    forwards: int
    before: float
    after: float
    after_max: float
    copies: int
    copied_bytes: float
    left: float
    over_ideal: float
    seen_over_ideal: float
    solver_us: float
    right: bool


@dataclass(frozen=True)
class Prediction:
    """One predictor on one routing.

    Attributes:
        predictor: ``true`` knows what is to come.
        ahead: forwards from the last one seen to the one that is predicted.
        by_expert: share of assignments that are predicted for another expert than they go to.
        by_rank: the same where they must come from the right rank too.
        over_ideal: of Hecate's answer to the prediction, as in `Result`, tokens at the nearest holder.
    """

    setting: str
    routing: str
    predictor: str
    ahead: int
    by_expert: float
    by_rank: float
    over_ideal: float


def compare_balancers(setting: Setting, routing: str, series: Sequence[Loads]) -> Iterator[Result]:
    """Asks exact balancers with the true loads ``[W, E]`` of each forward, and the others with the mean of the last.

    Beside those that have a name there is ``early_quota``, which is Quota before the router.
    """
    predictor = find_predictor("mean")
    true = series[WINDOW:]
    predicted = [predictor.predict(series[at : at + WINDOW]) for at in range(len(true))]
    for name in (*BALANCERS, _EARLY):
        balancer = Quota(exact=False) if name == _EARLY else find_balancer(name)
        answers, times_s = _ask(balancer, true if balancer.exact else predicted, setting)
        spreads: Sequence[Spread] = ("nearest",) if name in _ONE_SPREAD else ("nearest", "quota")
        for spread in spreads:
            weights = [
                weigh(loads, answer, setting, exact=balancer.exact, spread=spread)
                for loads, answer in zip(true, answers, strict=True)
            ]
            yield _result(setting, routing, name, spread, weights, times_s)


def _ask(balancer: Balancer, asked: Sequence[Loads], setting: Setting) -> tuple[list[Balance], list[float]]:
    answers, times_s = [], []
    for loads in asked:
        begin_s = time.perf_counter()
        answer = balancer.balance(loads, setting.base, setting.costs)
        times_s.append(time.perf_counter() - begin_s)
        answers.append(answer if balancer.exact else Balance(answer.place))
    return answers, times_s


def _result(
    setting: Setting, routing: str, name: str, spread: Spread, weights: Sequence[Weight], times_s: Sequence[float]
) -> Result:
    def mean(name: str) -> float:
        return float(np.mean([getattr(each, name) for each in weights]))

    seen_over_ideal = mean("seen_s") / setting.ideal_s
    return Result(
        setting=setting.name,
        routing=routing,
        balancer=name,
        spread=spread,
        forwards=len(weights),
        before=mean("before"),
        after=mean("after"),
        after_max=max(each.after for each in weights),
        copies=max(each.copies for each in weights),
        copied_bytes=mean("copied") * setting.costs.expert_bytes,
        left=mean("left"),
        over_ideal=mean("layer_s") / setting.ideal_s + seen_over_ideal,
        seen_over_ideal=seen_over_ideal,
        solver_us=statistics.median(times_s) * 1e6,
        right=all(each.right for each in weights),
    )


def compare_predictors(setting: Setting, routing: str, series: Sequence[Loads]) -> Iterator[Prediction]:
    """Judges all predictors on the same forwards, one and ten ahead."""
    for ahead in _AHEAD:
        for name in (*PREDICTORS, _TRUE):
            yield _predict(setting, routing, series, name, ahead)


def _predict(setting: Setting, routing: str, series: Sequence[Loads], name: str, ahead: int) -> Prediction:
    hecate = find_balancer("hecate")
    by_expert, by_rank, times_s = [], [], []
    for seen in range(_LONGEST_WINDOW, len(series) - ahead + 1):
        true = series[seen + ahead - 1]
        loads = true if name == _TRUE else _predicted(name, series[:seen])
        by_expert.append(_missed(loads.sum(axis=0), true.sum(axis=0)))
        by_rank.append(_missed(loads, true))
        weight = weigh(true, hecate.balance(loads, setting.base, setting.costs), setting, exact=False)
        times_s.append(weight.layer_s + weight.seen_s)
    return Prediction(
        setting=setting.name,
        routing=routing,
        predictor=name,
        ahead=ahead,
        by_expert=statistics.fmean(by_expert),
        by_rank=statistics.fmean(by_rank),
        over_ideal=statistics.fmean(times_s) / setting.ideal_s,
    )


def _predicted(name: str, past: Sequence[Loads]) -> Loads:
    predictor = find_predictor(name)
    return predictor.predict(past[-predictor.window :])


def _missed(predicted: Loads, true: Loads) -> float:
    return float(np.abs(predicted - true).sum() / (2 * true.sum()))
