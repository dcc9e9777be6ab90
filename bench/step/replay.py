"""A router that is told where tokens go, and still learns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecoll.moe import MoELayer, Router, Routing

__all__ = ["ReplayRouter", "replay_routers", "set_routes"]


class ReplayRouter(Router):
    """Scores experts as `Router` does, then takes those that it is told, with their true weights.

    Attributes:
        expert_ids: int64 ``[T, K]``, of the next forwards.
    """

    expert_ids: Tensor

    @classmethod
    def of(cls, router: Router) -> ReplayRouter:
        """One with the same parameter."""
        num_experts, dim = router.weight.shape
        replay = cls(dim, num_experts, router.top_k, normalize_weights=router.normalize_weights)
        replay.weight = router.weight
        return replay

    def forward(self, tokens: Tensor) -> Routing:
        """Routes ``tokens`` ``[T, D]``."""
        logits = F.linear(tokens, self.weight)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights = probabilities.gather(1, self.expert_ids)
        if self.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(self.expert_ids, weights, probabilities)


def replay_routers(model: nn.Module) -> None:
    """Puts one in the place of every router."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.router = ReplayRouter.of(layer.router)


def set_routes(model: nn.Module, routes: Sequence[Tensor]) -> None:
    """Tells each router of a model, in order, where tokens go: ``[T, K]`` for each layer."""
    routers = [module for module in model.modules() if isinstance(module, ReplayRouter)]
    for router, expert_ids in zip(routers, routes, strict=True):
        router.expert_ids = expert_ids
