"""``python -m bench expert_parallel``: what FSSDP without replicas costs beside a hand-written all-to-all MoE layer.

Two contestants compute the same layers from the same weights on the same tokens, forward and backward: a model
wrapped by ``FSSDP(model, balancer="none")``, and expert parallelism as a user would write it with the back end's own
collectives (an all-to-all of counts, torch's ``all_to_all_single`` or MPI's ``Alltoallv`` of tokens, a loop over local
experts, ``index_add_``). They take turns iteration by iteration, and gradients are compared in the same run.
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
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

import sparsecoll as sc
from bench.launch import run_ranks
from bench.machine import commit, describe
from bench.report import write_record
from sparsecoll.moe import MoELayer


class OverTorch:
    """torch.distributed's own collectives."""

    def counts(self, counts: Tensor) -> Tensor:
        """``[W * share]`` to every rank its part, and back theirs."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        return received

    def rows(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Differentiable."""
        return all_to_all_single_autograd(x, receive, send, dist.group.WORLD)

    def sum(self, grad: Tensor) -> None:
        dist.all_reduce(grad)


class OverMpi:
    """mpi4py's own collectives."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.mpi, self.comm = MPI, MPI.COMM_WORLD

    def counts(self, counts: Tensor) -> Tensor:
        received = torch.empty_like(counts)
        self.comm.Alltoall(counts.numpy(), received.numpy())
        return received

    def rows(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return _MpiRows.apply(x, send, receive, self)

    def sum(self, grad: Tensor) -> None:
        self.comm.Allreduce(self.mpi.IN_PLACE, grad.numpy())


class _MpiRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], over: OverMpi) -> Tensor:
        ctx.send, ctx.receive, ctx.over = send, receive, over
        return _alltoallv(x, send, receive, over)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _alltoallv(grad, ctx.receive, ctx.send, ctx.over), None, None, None


def _alltoallv(x: Tensor, send: list[int], receive: list[int], over: OverMpi) -> Tensor:
    out = x.new_empty(sum(receive), x.shape[1])
    width = x.shape[1]
    over.comm.Alltoallv(
        [x.contiguous().numpy(), [rows * width for rows in send], over.mpi.FLOAT],
        [out.numpy(), [rows * width for rows in receive], over.mpi.FLOAT],
    )
    return out


class HandWrittenLayer(nn.Module):
    """Expert parallelism as a user would write it; experts in contiguous shares."""

    def __init__(self, layer: MoELayer, rank: int, world_size: int, over: OverTorch | OverMpi) -> None:
        super().__init__()
        self.over = over
        share = layer.experts.num_experts // world_size
        mine = slice(rank * share, (rank + 1) * share)
        self.num_experts, self.share, self.top_k = layer.experts.num_experts, share, layer.router.top_k
        self.router = nn.Parameter(layer.router.weight.detach().clone())
        gate_up, down = layer.experts.weights
        self.gate_up = nn.ParameterList(nn.Parameter(each.clone()) for each in gate_up.detach()[mine])
        self.down = nn.ParameterList(nn.Parameter(each.clone()) for each in down.detach()[mine])

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        weights, experts = F.linear(x, self.router).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=self.num_experts)
        received = self.over.counts(counts)
        send = counts.view(-1, self.share).sum(1).tolist()
        receive = received.view(-1, self.share).sum(1).tolist()
        sent = x[order // self.top_k]
        arrived = self.over.rows(sent, send, receive)
        local = torch.arange(self.share).repeat(len(send)).repeat_interleave(received)
        by_expert = local.argsort(stable=True)
        parts = []
        for tokens, w_in, w_out in zip(
            arrived[by_expert].split(received.view(-1, self.share).sum(0).tolist()),
            self.gate_up,
            self.down,
            strict=True,
        ):
            gate, up = F.linear(tokens, w_in).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, w_out))
        computed = torch.cat(parts)[by_expert.argsort()]
        returned = self.over.rows(computed, receive, send)
        weighted = returned * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, order // self.top_k, weighted)


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
    over = OverMpi() if group.backend == "mpi" else OverTorch()
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
        for name, param in model.named_parameters():
            assert param.grad is not None
            if name.endswith("router"):
                next(each.over for each in model.layers).sum(param.grad)
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
