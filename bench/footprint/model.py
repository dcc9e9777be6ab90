"""A model that is next to nothing but experts, and routing that is skewed and drifts.

Legend: ``T`` tokens of a rank, ``K`` top-k, ``D`` model dim, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from bench.step.draws import zipf
from bench.step.replay import replay_routers
from sparsecoll.moe import MoELayer

__all__ = ["ExpertStack", "Sizes", "make_model", "routes_of", "tokens_of"]

_ZIPF = 1.2
_VOCABULARY = 16


@dataclass(frozen=True)
class Sizes:
    """Of the model and its batches.

    Attributes:
        tokens: of each rank.
        period: steps after which routing repeats itself; 0 for never.
        checkpointed: layers, the first ones, that are computed again in backward.
    """

    layers: int
    experts: int
    width: int
    hidden: int
    tokens: int
    top_k: int = 2
    period: int = 0
    checkpointed: int = 0


class ExpertStack(nn.Module):
    """MoE layers one after the other, each adding to its input, between an embedding and a head; bfloat16.

    Its parameters are not set.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        kind = {"dtype": torch.bfloat16}
        self.checkpointed = sizes.checkpointed
        self.embedding = skip_init(nn.Embedding, _VOCABULARY, sizes.width, **kind)
        shape = sizes.width, sizes.hidden, sizes.experts, sizes.top_k
        self.layers = nn.ModuleList(skip_init(MoELayer, *shape, **kind) for _ in range(sizes.layers))
        self.head = skip_init(nn.Linear, sizes.width, _VOCABULARY, bias=False, **kind)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss of int64 ``[T + 1]``, a scalar in float32."""
        x = self.embedding(ids[:-1])
        for number, layer in enumerate(self.layers):
            x = x + (checkpoint(layer, x, use_reentrant=False) if number < self.checkpointed else layer(x))
        return nn.functional.cross_entropy(self.head(x).float(), ids[1:])


def make_model(sizes: Sizes, *, is_first: bool) -> ExpertStack:
    """One whose routers replay.

    Args:
        is_first: whether parameters are drawn, the same at every call. Drawing them on all ranks would take longer than
            training; others get the first rank's.
    """
    model = ExpertStack(sizes)
    if is_first:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in model.parameters():
                param.normal_(0.0, param.shape[-1] ** -0.5, generator=generator)
    replay_routers(model)
    return model


def routes_of(sizes: Sizes, step: int, rank: int) -> list[Tensor]:
    """For each layer ``[T, K]``: by Zipf's law, and with every step each expert is as popular as its neighbour was."""
    step = step % sizes.period if sizes.period else step
    drawn = []
    for layer in range(sizes.layers):
        random = np.random.default_rng((step, layer, rank))
        ids = zipf(random, sizes.tokens, sizes.top_k, sizes.experts, exponent=_ZIPF)
        order = np.random.default_rng(layer).permutation(sizes.experts)
        drawn.append(torch.from_numpy(order[(ids + step) % sizes.experts]))
    return drawn


def tokens_of(sizes: Sizes, step: int, rank: int) -> Tensor:
    """int64 ``[T + 1]``."""
    random = np.random.default_rng((step, rank))
    return torch.from_numpy(random.integers(_VOCABULARY, size=sizes.tokens + 1))
