"""What a user writes without this library: expert parallelism by hand, over the back end's own collectives."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

import sparsecoll as sc
from sparsecoll.moe import MoELayer

__all__ = ["HandWrittenLayer", "OverMpi", "OverTorch", "collectives_of", "sum_dense_gradients"]


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

    def sum(self, values: Tensor) -> None:
        """In place, over all ranks."""
        dist.all_reduce(values)


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

    def sum(self, values: Tensor) -> None:
        self.comm.Allreduce(self.mpi.IN_PLACE, values.numpy())


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
    """Expert parallelism as a user would write it; experts in contiguous shares.

    An all-to-all of counts, one of tokens, a loop over local experts, the all-to-all back.

    Attributes:
        router: a copy of the layer's own.
        gate_up, down: one parameter for each expert of this rank.
    """

    def __init__(self, layer: MoELayer, rank: int, world_size: int, over: OverTorch | OverMpi) -> None:
        super().__init__()
        self.over = over
        share = layer.experts.num_experts // world_size
        mine = slice(rank * share, (rank + 1) * share)
        self.num_experts, self.share, self.top_k = layer.experts.num_experts, share, layer.router.top_k
        self.router = copy.deepcopy(layer.router)
        gate_up, down = layer.experts.weights
        self.gate_up = nn.ParameterList(nn.Parameter(each.clone()) for each in gate_up.detach()[mine])
        self.down = nn.ParameterList(nn.Parameter(each.clone()) for each in down.detach()[mine])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return self._of_tokens(x.reshape(-1, x.shape[-1])).view(x.shape)

    def _of_tokens(self, x: Tensor) -> Tensor:
        experts, weights, _ = self.router(x)
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


def collectives_of(group: sc.Group) -> OverTorch | OverMpi:
    """Those of the back end that the group uses."""
    return OverMpi() if group.backend == "mpi" else OverTorch()


def sum_dense_gradients(model: nn.Module) -> None:
    """Sums over ranks all gradients but those of experts, in one piece as DDP would."""
    layers = [each for each in model.modules() if isinstance(each, HandWrittenLayer)]
    experts = {id(each) for layer in layers for each in (*layer.gate_up, *layer.down)}
    grads = [each.grad for each in model.parameters() if id(each) not in experts and each.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    layers[0].over.sum(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))
