"""The non-linearities between an expert's two matrices, each with its fused backward.

Legend: ``N`` rows, ``I`` hidden dim; the pre-activation ``h`` has ``width * I`` columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecoll.errors import InvalidArgument

__all__ = ["ACTIVATIONS", "Activation", "ActivationGradient", "find_activation"]


class ActivationGradient(NamedTuple):
    """The gradient ``dh`` ``[N, width * I]``, and the activation ``[N, I]`` that was computed again on the way."""

    dh: Tensor
    activated: Tensor


class Activation(ABC):
    """One non-linearity.

    Attributes:
        name: what a layer's ``activation`` argument says.
        weight_names: an expert's two matrices, ``[width * I, D]`` and ``[D, I]``, as its parameters are called.
        width: how many rows of the first matrix make one hidden unit.
    """

    name: str
    weight_names: tuple[str, str]
    width: int

    @abstractmethod
    def forward(self, h: Tensor) -> Tensor:
        """``[N, width * I]`` to ``[N, I]``; autograd can follow it."""

    @abstractmethod
    def backward(self, d_activated: Tensor, h: Tensor) -> ActivationGradient:
        """Both from ``h`` alone; overwrites ``d_activated`` ``[N, I]``."""


class SwiGLU(Activation):
    """``silu(gate) * up``, the gate in the first half of ``h`` (Shazeer, GLU Variants Improve Transformer)."""

    name = "swiglu"
    weight_names = ("gate_up_proj", "down_proj")
    width = 2

    def forward(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def backward(self, d_activated: Tensor, h: Tensor) -> ActivationGradient:
        gate, up = h.chunk(2, dim=-1)
        dh = torch.empty_like(h)
        d_gate, d_up = dh.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(d_activated, activated, out=d_up)
        activated.mul_(up)
        torch.ops.aten.silu_backward.grad_input(d_activated.mul_(up), gate, grad_input=d_gate)
        return ActivationGradient(dh, activated)


class GELU(Activation):
    """The exact Gaussian error linear unit."""

    name = "gelu"
    weight_names = ("up_proj", "down_proj")
    width = 1

    def forward(self, h: Tensor) -> Tensor:
        return F.gelu(h)

    def backward(self, d_activated: Tensor, h: Tensor) -> ActivationGradient:
        dh = torch.ops.aten.gelu_backward.grad_input(d_activated, h, grad_input=d_activated)
        return ActivationGradient(dh, F.gelu(h))


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({kind.name: kind for kind in (SwiGLU(), GELU())})


def find_activation(name: str) -> Activation:
    """The activation called ``name``, or `InvalidArgument`."""
    if name not in ACTIVATIONS:
        raise InvalidArgument(f"find_activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
