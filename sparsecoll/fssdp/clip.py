"""The norm of all gradients, of which each rank has its experts' and all have the dense ones; and clipping to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecoll.errors import InvalidArgument
from sparsecoll.fssdp.dense import gather_from_ranks
from sparsecoll.group import Group

__all__ = ["clip_gradients"]


def clip_gradients(
    experts: Sequence[Tensor],
    dense: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    group: Group,
    device: torch.device,
) -> Tensor:
    """Scales all gradients in place so that their norm over all ranks is at most ``max_norm``; returns the norm before.

    Args:
        experts: gradients that no other rank has.
        dense: those that every rank has alike.

    Raises:
        InvalidArgument: ``norm_type`` is not positive.
        RuntimeError: the norm is not finite and ``error_if_nonfinite``; on all ranks.
    """
    if not norm_type > 0:
        raise InvalidArgument(f"clip_grad_norm_: expected norm_type > 0, got {norm_type}")
    # Every rank adds up the same numbers in the same order, so that all get the same bits.
    shares = gather_from_ranks(_power_sum(experts, norm_type, device), group)
    shares = torch.cat([shares, _power_sum(dense, norm_type, device).view(1)])
    total = shares.max() if math.isinf(norm_type) else shares.sum() ** (1 / norm_type)
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(f"clip_grad_norm_: expected a finite norm of order {norm_type}, got {total}")
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # a NaN stays, as in torch
    for grad in (*experts, *dense):
        # Not a scalar tensor, for that would be rounded to 16 bits first.
        factor = scale.to(torch.promote_types(grad.dtype, torch.float32)).view([1] * grad.ndim)
        torch.mul(grad, factor, out=grad)
    grads = (*experts, *dense)
    return total.to(grads[0].dtype if grads else torch.get_default_dtype())


def _power_sum(grads: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Sum of the ``norm_type``-th powers of all elements, or their largest for the infinity norm: float64, scalar."""
    norms = [torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64) for grad in grads if grad.numel()]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    stacked = torch.stack(norms)
    return stacked.max() if math.isinf(norm_type) else (stacked**norm_type).sum()
