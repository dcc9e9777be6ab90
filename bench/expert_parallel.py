"""``python -m bench expert_parallel``: what FSSDP without replicas costs beside a hand-written all-to-all MoE layer.

Two contestants compute the same layers from the same weights on the same tokens, forward and backward: a model
wrapped by ``FSSDP(model, balancer="none")``, and expert parallelism as a user would write it with the back end's own
collectives (`bench.rivals`: torch's ``all_to_all_single`` or MPI's ``Alltoallv`` of tokens, a loop over local experts).
They take turns iteration by iteration, and gradients are compared in the same run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsecoll as sc
from bench.launch import run_ranks
from bench.machine import commit, describe
from bench.report import write_record
from bench.rivals import HandWrittenLayer, collectives_of, sum_dense_gradients
from sparsecoll.moe import MoELayer


class _Residual(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def measure(group: sc.Group, options: argparse.Namespace) -> dict[str, Any]:
    """Times both on this group."""
    torch.manual_seed(0)
    layers = [MoELayer(options.width, options.hidden, options.experts, options.top_k) for _ in range(options.layers)]
    over = collectives_of(group)
    by_hand = _Residual([HandWrittenLayer(layer, group.rank, group.world_size, over) for layer in layers])
    ours = sc.FSSDP(_Residual(layers), group=group, balancer="none")
    generator = torch.Generator().manual_seed(group.rank + 1)
    times: dict[str, list[float]] = {"ours": [], "by_hand": []}
    worst = 0.0
    for iteration in range(options.warmup_iters + options.iters):
        x = torch.randn(options.tokens, options.width, generator=generator)
        upstream = torch.randn(options.tokens, options.width, generator=generator)
        results = {}
        contestants: list[tuple[str, nn.Module]] = [("ours", ours), ("by_hand", by_hand)]
        for name, model in contestants if iteration % 2 == 0 else reversed(contestants):
            inputs = x.clone().requires_grad_()
            seconds = _timed(group, partial(_step, model, inputs, upstream, group))
            if iteration >= options.warmup_iters:
                times[name].append(seconds)
            results[name] = inputs.grad
        difference = (results["ours"] - results["by_hand"]).norm() / results["by_hand"].norm()
        worst = max(worst, group.mean(float(difference)))
    medians = {name: float(np.median(series)) for name, series in times.items()}
    return {
        "step_s_ours": medians["ours"],
        "step_s_by_hand": medians["by_hand"],
        "by_hand_over_ours": medians["by_hand"] / medians["ours"],
        "input_gradient_rel_diff": worst,
    }


def _step(model: nn.Module, inputs: Tensor, upstream: Tensor, group: sc.Group) -> None:
    model.zero_grad()
    model(inputs).backward(upstream)
    if isinstance(model, _Residual) and not isinstance(model, sc.FSSDPModule):
        # What FSSDP's gradient rule gives as well: means over ranks of the dense gradients, 1 / W on the experts'.
        sum_dense_gradients(model)
        for param in model.parameters():
            assert param.grad is not None
            param.grad /= group.world_size


def _timed(group: sc.Group, step: Callable[[], None]) -> float:
    group.barrier()
    start = time.perf_counter()
    step()
    mine = time.perf_counter() - start
    return max(float(np.frombuffer(each)[0]) for each in group.exchange(np.array([mine]).tobytes()))


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Starts the ranks, or is one of them."""
    options = _parser().parse_args(list(arguments))
    if options.launched:
        torch.set_num_threads(1)
        with sc.init_group() as group:
            summary = measure(group, options)
            if group.rank == 0:
                write_record(summary, options.json)
        return {"passed": True}
    with tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as folder:
        output = Path(folder, "record.json")
        own = ["expert_parallel", *arguments, "--launched", "--json", str(output)]
        status = run_ranks(options.backend, options.ranks, own)
        summary = json.loads(output.read_text()) if output.exists() else {}
    passed = status == 0 and summary.get("input_gradient_rel_diff", 1.0) < 1e-5
    record = {
        "case": "expert_parallel",
        "command": " ".join(["python -m bench expert_parallel", *arguments]),
        "passed": passed,
        "summary": summary,
        "config": {key: value for key, value in vars(options).items() if key not in ("json", "launched")},
        "machine": describe(),
        "commit": commit(),
    }
    for key, value in summary.items():
        print(f"# {key} {value:.4g}")
    print(f"# {'OK' if passed else 'FAILED'}")
    if options.json is not None:
        write_record(record, options.json)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench expert_parallel", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--backend", choices=["mpi", "torch"], default="mpi")
    add("--ranks", type=int, default=2)
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=16)
    add("--top-k", type=int, default=2)
    add("--width", type=int, default=128)
    add("--hidden", type=int, default=256)
    add("--tokens", type=int, default=1024, help="on each rank")
    add("-n", "--iters", type=int, default=30, help="timed iterations")
    add("-w", "--warmup_iters", type=int, default=5, help="untimed iterations before them")
    add("-J", "--json", type=Path, metavar="FILE", help="record in JSON")
    add("--launched", action="store_true", help=argparse.SUPPRESS)
    return parser
