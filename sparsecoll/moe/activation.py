"""The non-linearities between an expert's two matrices, each with its fused backward.

On a CPU, native kernels take one pass over float32 and 16-bit floats where torch takes several.

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

from sparsecoll import native
from sparsecoll.errors import InvalidArgument

__all__ = ["ACTIVATIONS", "Activation", "ActivationGradient", "find_activation"]

_FUSED = frozenset({torch.float32, torch.bfloat16, torch.float16})


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
    def activate(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """`forward` where autograd does not look, into ``out`` ``[N, I]`` if there is one."""

    @abstractmethod
    def backward(self, d_activated: Tensor, h: Tensor, dh: Tensor | None = None) -> ActivationGradient:
        """Both from ``h`` alone, the gradient in ``dh`` if there is one; overwrites ``d_activated`` ``[N, I]``."""


class SwiGLU(Activation):
    """``silu(gate) * up``, the gate in the first half of ``h`` (Shazeer, GLU Variants Improve Transformer)."""

    name = "swiglu"
    weight_names = ("gate_up_proj", "down_proj")
    width = 2

    def forward(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def activate(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        out = h.new_empty(len(h), h.shape[1] // 2) if out is None else out
        if _is_fused(h, out):
            num_rows, dim = out.shape
            native.swiglu(out.data_ptr(), h.data_ptr(), num_rows, dim, _dtype_name(h), torch.get_num_threads())
            return out
        gate, up = h.chunk(2, dim=-1)
        return torch.ops.aten.silu.out(gate, out=out).mul_(up)

    def backward(self, d_activated: Tensor, h: Tensor, dh: Tensor | None = None) -> ActivationGradient:
        dh = torch.empty_like(h) if dh is None else dh
        if _is_fused(h, d_activated, dh):
            activated = d_activated
            num_rows, dim = activated.shape
            native.swiglu_backward(
                dh.data_ptr(),
                activated.data_ptr(),
                d_activated.data_ptr(),
                h.data_ptr(),
                num_rows,
                dim,
                _dtype_name(h),
                torch.get_num_threads(),
            )
            return ActivationGradient(dh, activated)
        gate, up = h.chunk(2, dim=-1)
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

    def activate(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        return F.gelu(h) if out is None else torch.ops.aten.gelu.out(h, out=out)

    def backward(self, d_activated: Tensor, h: Tensor, dh: Tensor | None = None) -> ActivationGradient:
        if _is_fused(h, d_activated, dh):
            dh = torch.empty_like(h) if dh is None else dh
            activated = d_activated
            native.gelu_backward(
                dh.data_ptr(),
                activated.data_ptr(),
                d_activated.data_ptr(),
                h.data_ptr(),
                h.numel(),
                _dtype_name(h),
                torch.get_num_threads(),
            )
            return ActivationGradient(dh, activated)
        dh = torch.ops.aten.gelu_backward.grad_input(d_activated, h, grad_input=d_activated if dh is None else dh)
        return ActivationGradient(dh, F.gelu(h))


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({kind.name: kind for kind in (SwiGLU(), GELU())})


def find_activation(name: str) -> Activation:
    """The activation called ``name``, or `InvalidArgument`."""
    if name not in ACTIVATIONS:
        raise InvalidArgument(f"find_activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def _is_fused(h: Tensor, *others: Tensor | None) -> bool:
    """Whether the native kernels take these tensors."""
    tensors = [h, *(other for other in others if other is not None)]
    return h.dtype in _FUSED and all(
        each.device.type == "cpu" and each.dtype == h.dtype and each.is_contiguous() for each in tensors
    )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
