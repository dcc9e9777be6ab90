"""A mixture-of-experts layer, and its dispatcher for one process.

Legend: ``T`` tokens, ``K`` top-k, ``D`` model dim, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsecoll.errors import InvalidArgument
from sparsecoll.moe.activation import find_activation
from sparsecoll.moe.experts import Experts
from sparsecoll.moe.permute import combine, inverse_permutation, permute, sort_by_expert
from sparsecoll.moe.router import Router, Routing, load_balancing_loss

__all__ = ["DenseFFN", "Dispatcher", "LocalDispatcher", "MoELayer", "auxiliary_loss"]


class Dispatcher(Protocol):
    """Brings tokens to their experts and the weighted results back."""

    def __call__(
        self, tokens: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """``[T, D]`` to ``[T, D]``: the weighted results, plus those of ``meanwhile`` if it is given.

        Args:
            meanwhile: computes ``[T, D]`` from what this rank has; called once, while a dispatcher may be waiting for
                other ranks.
        """
        ...


class LocalDispatcher:
    """All experts are here: sort by expert, compute, combine.

    On a GPU the host waits for nothing where torch has a grouped product for the dtype (bfloat16), and otherwise once,
    to learn how many tokens each expert has.
    """

    def __call__(
        self, tokens: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        order, counts = sort_by_expert(routing.expert_ids, experts.num_experts)
        position = inverse_permutation(order).view_as(routing.expert_ids)
        top_k = routing.expert_ids.shape[1]
        x = permute(tokens, order.div(top_k, rounding_mode="floor"), position)
        y = combine(experts(x, counts), position, routing.weights, is_permutation=True)
        return y if meanwhile is None else y + meanwhile()


class DenseFFN(nn.Module):
    """An expert that every token visits."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "swiglu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = find_activation(activation)
        first, second = self.activation.weight_names
        width = self.activation.width * hidden_dim
        self.add_module(first, nn.Linear(dim, width, bias=False, device=device, dtype=dtype))
        self.add_module(second, nn.Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        first, second = (self.get_submodule(name) for name in self.activation.weight_names)
        y: Tensor = second(self.activation.forward(first(x)))
        return y


class MoELayer(nn.Module):
    """A feed-forward layer in which each token visits the ``top_k`` experts that the router picks for it.

    Attributes:
        router: `Router`, parameter ``weight`` ``[E, D]``.
        experts: `Experts`, parameters ``gate_up_proj`` ``[E, 2 I, D]`` (gate rows first) and ``down_proj``
            ``[E, D, I]`` for swiglu, ``up_proj`` ``[E, I, D]`` and ``down_proj`` for gelu.
        shared_expert: `DenseFFN`, or None.
        dispatcher: how tokens reach experts; a wrapper that shards the experts puts its own here.
        aux_loss: the scaled load-balancing loss of the last call, a scalar; None before it or with a coefficient of 0.
    """

    aux_loss: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        shared_hidden_dim: int = 0,
        aux_loss_coef: float = 0.0,
        normalize_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates a layer with the weights that `torch.nn.Linear` would draw for each expert.

        Args:
            dim: of a token.
            hidden_dim: of an expert.
            num_experts: over all ranks.
            top_k: experts of a token.
            activation: ``swiglu`` or ``gelu``.
            shared_hidden_dim: of an expert that all tokens visit beside their own; 0 for none.
            aux_loss_coef: scale of the load-balancing loss; 0 for none.
            normalize_weights: whether a token's ``top_k`` weights are made to sum to 1.

        Raises:
            InvalidArgument: a size below 1, ``top_k`` above ``num_experts``, or an unknown activation.
        """
        super().__init__()
        for name, size in {"dim": dim, "hidden_dim": hidden_dim, "num_experts": num_experts}.items():
            if size < 1:
                raise InvalidArgument(f"MoELayer: expected {name} >= 1, got {size}")
        if shared_hidden_dim < 0:
            raise InvalidArgument(f"MoELayer: expected shared_hidden_dim >= 0, got {shared_hidden_dim}")
        self.dim = dim
        self.aux_loss_coef = aux_loss_coef
        self.router = Router(dim, num_experts, top_k, normalize_weights=normalize_weights, device=device, dtype=dtype)
        self.experts = Experts(num_experts, dim, hidden_dim, activation=activation, device=device, dtype=dtype)
        self.shared_expert = (
            DenseFFN(dim, shared_hidden_dim, activation=activation, device=device, dtype=dtype)
            if shared_hidden_dim
            else None
        )
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.aux_loss = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``; no tokens at all are fine and keep the graph connected.

        Raises:
            InvalidArgument: a last dimension other than ``dim``, or another dtype than the weights'.
        """
        weight = self.router.weight
        if x.ndim < 1 or x.shape[-1] != self.dim or x.dtype != weight.dtype:
            raise InvalidArgument(f"MoELayer: expected {weight.dtype} [..., {self.dim}], got {x.dtype} {list(x.shape)}")
        tokens = x.reshape(-1, self.dim)
        routing: Routing = self.router(tokens)
        self.aux_loss = self.aux_loss_coef * load_balancing_loss(routing) if self.aux_loss_coef else None
        meanwhile = None if self.shared_expert is None else partial(self.shared_expert, tokens)
        return self.dispatcher(tokens, routing, self.experts, meanwhile).view(x.shape)

    def __getstate__(self) -> dict[str, Any]:
        # The loss of a call belongs to that call's graph, which neither copies nor pickles.
        return {**self.__dict__, "aux_loss": None}


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The sum of the ``aux_loss`` of a model's MoE layers, a scalar to add to the loss; 0 where there is none."""
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, MoELayer) and module.aux_loss is not None:
            total = total + module.aux_loss
    return total
