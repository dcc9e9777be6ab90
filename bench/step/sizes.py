"""How large the model and its batches are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a rank's batch.

    Attributes:
        layers: each with experts; in the whole model, with attention before them.
        width: of a token.
        hidden: of an expert.
        tokens: of a rank in a step.
        length: of a sequence.
    """

    layers: int = 2
    experts: int = 32
    top_k: int = 2
    width: int = 256
    hidden: int = 512
    tokens: int = 2048
    length: int = 256
    heads: int = 4
    vocabulary: int = 256
