"""A byte-level decoder-only transformer whose every feed-forward is a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsecoll.moe import MoELayer

NUM_BYTES = 256


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; by default about 6.7 million parameters, most of them in the experts."""

    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 16
    top_k: int = 2
    hidden: int = 256


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Turns pairs of ``x`` ``[..., length, dim]`` by angles that grow with the position (RoPE, arXiv:2104.09864)."""
    length, num_pairs = x.shape[-2], x.shape[-1] // 2
    angles = torch.outer(torch.arange(length), 1e-3 ** torch.linspace(0, 1, num_pairs))
    turned = torch.view_as_complex(x.unflatten(-1, (num_pairs, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


class CausalAttention(nn.Module):
    """Multi-head self-attention that looks only back."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [num_rows, num_heads, length, width / num_heads]
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then experts; each reads a normalized copy of the stream and adds to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = CausalAttention(config.width, config.num_heads)
        self.moe_norm = nn.RMSNorm(config.width)
        self.moe = MoELayer(config.width, config.hidden, config.num_experts, config.top_k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class MoELanguageModel(nn.Module):
    """Predicts the next byte. There is no auxiliary loss: the router is free to prefer some experts, and does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.bytes = nn.Embedding(NUM_BYTES, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, NUM_BYTES, bias=False)
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats per byte of ``rows``, int64 ``[num_rows, length + 1]``."""
        inputs, targets = rows[:, :-1], rows[:, 1:]
        x = self.bytes(inputs)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
