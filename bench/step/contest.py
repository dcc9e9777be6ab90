"""What one rank does: all contestants take turns, timed and compared."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import sparsecoll as sc
from bench.cluster.leash import limited
from bench.step.contestants import Contestant, Fssdp, enter
from bench.step.draws import Spot, draw
from bench.step.exposure import alone_s
from bench.step.model import make_model
from bench.step.options import EP, IDEAL, Options
from bench.step.replay import set_routes
from bench.step.rows import Row
from bench.step.traces import Trace

__all__ = ["measure", "settle"]


class _Batch(NamedTuple):
    """A rank's part of an iteration.

    Attributes:
        inputs: float32 ``[T, D]``, or ids ``[N, L + 1]``.
        upstream: gradient of the output, ``[T, D]``, or None for a loss.
        routes: ``[T, K]`` for each layer, by the name of a routing.
    """

    inputs: Tensor
    upstream: Tensor | None
    routes: dict[str, list[Tensor]]


class _Outcome(NamedTuple):
    """What a step has left on this rank, beside the gradients of parameters."""

    output: Tensor
    input_gradient: Tensor | None


def settle() -> None:
    """Makes times say something: one thread, and no garbage collector that happens to fall into a timed span."""
    torch.set_num_threads(1)
    gc.disable()


def measure(group: sc.Group, options: Options, trace: Trace | None, report: Callable[[list[Row]], None]) -> None:
    """Measures all rows; rank 0 hands those of one part and routing to ``report`` as they come."""
    for part in options.parts:
        model = make_model(part, options.sizes, options.seed)
        for routing in options.routings:
            # Made anew, so that no balancer remembers another routing.
            contestants = {
                name: enter(name, model, group, part == "step", options.fssdp)
                for name in options.contestants(group.backend)
            }
            rows = _contest(contestants, part, routing, group, options, trace)
            if group.rank == 0:
                report(rows)
            del contestants
            gc.collect()


def _contest(
    contestants: Mapping[str, Contestant],
    part: str,
    routing: str,
    group: sc.Group,
    options: Options,
    trace: Trace | None,
) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    exposed: dict[str, list[float]] = {name: [] for name in contestants}
    differences: dict[str, dict[str, float]] = {name: {} for name in contestants}
    for iteration in range(options.warmup + options.iterations):
        batch = _draw(part, routing, iteration, group, options, trace)
        gc.collect()
        names = [name for name in contestants if options.takes_turn(name, iteration)]
        outcomes = {}
        for name in names if iteration % 2 == 0 else reversed(names):
            set_routes(contestants[name].model, batch.routes["balanced" if name == IDEAL else routing])
            with limited(f"{part} {routing} {name}", options.timeout_s):
                seconds, outcomes[name] = _timed(group, contestants[name], batch)
            if iteration >= options.warmup:
                times[name].append(seconds)
                exposed[name].append(contestants[name].exposed_s())
        is_last = iteration == options.warmup + options.iterations - 1
        for name in (each for each in names if each not in (EP, IDEAL)):
            found = _compare(outcomes[name], outcomes[EP])
            if is_last:
                pairs = zip(contestants[name].gradients(), contestants[EP].gradients(), strict=True)
                found["gradients"] = max(_difference(ours, theirs) for ours, theirs in pairs)
            for key, value in found.items():
                differences[name][key] = max(differences[name].get(key, 0.0), value)
    rows = []
    for name, contestant in contestants.items():
        largest = {key: _largest(group, value) for key, value in sorted(differences[name].items())}
        row = Row(group.backend, part, routing, name, times[name], largest)
        rows.append(
            _with_reports(row, contestant, exposed[name], 1 + (options.fssdp["rematerialize"] is True))
            if isinstance(contestant, Fssdp)
            else row
        )
    return rows


def _with_reports(row: Row, contestant: Fssdp, exposed_s: list[float], num_gathers: int) -> Row:
    """A row with what FSSDP says of itself; all ranks call it."""
    group, loads = contestant.group, list(contestant.wrapped.load_report().values())
    return replace(
        row,
        imbalance=float(np.mean([load.imbalance_after for load in loads])),
        sparse_bytes=group.mean(sum(load.sparse_bytes for load in loads)),
        exposed_s=float(np.median([group.mean(each) for each in exposed_s])),
        alone_s=alone_s(contestant.wrapped, group, num_gathers),
    )


def _draw(part: str, routing: str, iteration: int, group: sc.Group, options: Options, trace: Trace | None) -> _Batch:
    sizes, rank = options.sizes, group.rank
    random = np.random.default_rng((options.seed, iteration, rank))
    if part == "block":
        inputs, upstream = (
            torch.from_numpy(random.standard_normal((sizes.tokens, sizes.width), np.float32)) for _ in range(2)
        )
    else:
        shape = (sizes.tokens // sizes.length, sizes.length + 1)
        inputs, upstream = torch.from_numpy(random.integers(sizes.vocabulary, size=shape)), None

    def routes(name: str) -> list[Tensor]:
        spots = [Spot(iteration, layer, rank) for layer in range(sizes.layers)]
        tokens, top_k, experts = sizes.tokens, sizes.top_k, sizes.experts
        return [torch.from_numpy(draw(name, tokens, top_k, experts, spot, options.seed, trace)) for spot in spots]

    return _Batch(inputs, upstream, {name: routes(name) for name in {routing, "balanced"}})


def _timed(group: sc.Group, contestant: Contestant, batch: _Batch) -> tuple[float, _Outcome]:
    """One step, and the seconds of the rank that took longest."""
    inputs = batch.inputs.clone().requires_grad_(batch.inputs.is_floating_point())
    group.barrier()
    begin_s = time.perf_counter()
    out = contestant.step(inputs, batch.upstream)
    elapsed_s = time.perf_counter() - begin_s
    return _largest(group, elapsed_s), _Outcome(out.detach(), contestant.input_gradient(inputs))


def _compare(found: _Outcome, expected: _Outcome) -> dict[str, float]:
    differences = {"outputs": _difference(found.output, expected.output)}
    if found.input_gradient is not None and expected.input_gradient is not None:
        differences["inputs"] = _difference(found.input_gradient, expected.input_gradient)
    return differences


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm."""
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def _largest(group: sc.Group, mine: float) -> float:
    return max(float(np.frombuffer(each)[0]) for each in group.exchange(np.array([mine]).tobytes()))
