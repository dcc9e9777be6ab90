"""Which experts each token asks for, and the loss that asks the router to be fair.

Legend: ``T`` tokens, ``K`` top-k, ``E`` experts, ``D`` model dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecoll.errors import InvalidArgument

__all__ = ["Router", "Routing", "load_balancing_loss"]


class Routing(NamedTuple):
    """The router's answer for one batch of tokens.

    Attributes:
        expert_ids: int64 ``[T, K]``, distinct in a row, the most probable first.
        weights: ``[T, K]``, how much each of them counts in the combination.
        probabilities: ``[T, E]``, over all experts.
    """

    expert_ids: Tensor
    weights: Tensor
    probabilities: Tensor


class Router(nn.Module):
    """Owns the ``[E, D]`` matrix that scores experts.

    Probabilities and weights are float32, or float64 for float64 tokens: a 16-bit softmax over many experts ties too
    often.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        normalize_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise InvalidArgument(f"Router: expected top_k in 1..{num_experts} (num_experts), got {top_k}")
        self.top_k = top_k
        self.normalize_weights = normalize_weights
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, tokens: Tensor) -> Routing:
        """Routes ``tokens`` ``[T, D]``."""
        logits = F.linear(tokens, self.weight)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, expert_ids = probabilities.topk(self.top_k, dim=-1)
        if self.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(expert_ids, weights, probabilities)

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"{dim}, num_experts={num_experts}, top_k={self.top_k}, normalize_weights={self.normalize_weights}"


def load_balancing_loss(routing: Routing) -> Tensor:
    """``E * sum_e f_e * P_e``: 1 when both are uniform, ``E`` when one expert gets everything.

    ``f_e`` is the fraction of assignments that go to expert e, through which no gradient flows, and ``P_e`` its mean
    probability (Fedus et al., Switch Transformer, equations 4 to 6, with assignments in place of tokens for top-k).
    Without tokens the loss is a zero that is still part of the graph.
    """
    expert_ids, probabilities = routing.expert_ids.flatten(), routing.probabilities
    num_tokens, num_experts = probabilities.shape
    # Not bincount: on a GPU it waits for the device to learn the size of its result.
    load = probabilities.new_zeros(num_experts).scatter_add_(
        0, expert_ids, probabilities.new_ones(()).expand(expert_ids.shape)
    )
    scale = num_experts / (max(1, expert_ids.numel()) * max(1, num_tokens))
    return scale * torch.dot(load, probabilities.sum(0))
