"""The model of the case, in two parts: the bare MoE layers, and a language model around the same layers.

Legend: ``T`` tokens of a rank, ``D`` model dim, ``L`` length of a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.step.replay import replay_routers
from bench.step.sizes import Sizes
from sparsecoll.moe import MoELayer

__all__ = ["Block", "Blocks", "LanguageModel", "make_model", "units_of"]


class Blocks(nn.Module):
    """MoE layers one after the other, each adding to its input."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_moe(sizes) for _ in range(sizes.layers))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        for layer in self.layers:
            x = x + layer(x)
        return x


class Block(nn.Module):
    """Causal attention, then experts; each reads a normalized copy of the stream and adds to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attention_norm = nn.RMSNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.moe_norm = nn.RMSNorm(sizes.width)
        self.moe = _moe(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, L, D]`` to ``[N, L, D]``."""
        x = self.attend(x)
        return x + self.moe(self.moe_norm(x))

    def attend(self, x: Tensor) -> Tensor:
        """What precedes the experts."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(-2))


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head and loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss of int64 ``[N, L + 1]``."""
        x = self.embedding(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_model(part: str, sizes: Sizes, seed: int) -> nn.Module:
    """A part's model, the same at every call and on every rank; its routers replay."""
    torch.manual_seed(seed)
    model = Blocks(sizes) if part == "block" else LanguageModel(sizes)
    replay_routers(model)
    return model


def _moe(sizes: Sizes) -> MoELayer:
    return MoELayer(sizes.width, sizes.hidden, sizes.experts, sizes.top_k)


def units_of(model: nn.Module) -> list[nn.Module]:
    """What a user of FSDP2 would shard one by one: the layers."""
    return list(model.layers if isinstance(model, Blocks) else model.blocks)
