"""Matrix products of rows that are sorted by expert, one matrix for each expert.

[Note: one kernel or a loop] Experts' matrices come one by one, for a rank's own rows and its replicas live in
different buffers. Where they happen to be evenly spaced in one buffer they are one 3-D view, and torch's grouped_mm
takes them in one call, which spares some 4 us for each expert on a CPU (a quarter of the time with four tokens each,
nothing with hundreds) and a kernel launch on a GPU. It writes into no given output, so that on a CPU, where a copy of
all gradients costs more than their calls, weight gradients are a loop.

Legend: ``N`` rows, ``n`` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecoll.moe.upload import upload

__all__ = ["Counts", "Groups", "grouped_product", "grouped_weight_gradient"]

# In other dtypes grouped_mm refuses, or loops itself and waits for the GPU to learn the counts.
_GROUPED_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
_ALIGNMENT_BYTES = 16


class Groups:
    """How many consecutive rows belong to each expert, as the host and as the device know it.

    Each side is derived from the other when it is first asked for: on a GPU, `ends` costs a small copy and no waiting,
    while `counts` makes the host wait for the device.
    """

    def __init__(self, counts: Sequence[int] | Tensor, device: torch.device, ends: Tensor | None = None) -> None:
        """Knows either side, or both.

        Args:
            counts: ``[n]``, as host integers or as an int64 tensor on ``device``.
            device: of the rows.
            ends: what `ends` is to be, if the caller has it.
        """
        self._given = counts
        self._device = device
        if ends is not None:
            self.ends = ends

    @classmethod
    def of(cls, counts: Counts, device: torch.device) -> Groups:
        return counts if isinstance(counts, Groups) else cls(counts, device)

    @cached_property
    def counts(self) -> list[int]:
        """``[n]``."""
        return self._given.tolist() if isinstance(self._given, Tensor) else list(self._given)

    @cached_property
    def ends(self) -> Tensor:
        """int32 ``[n]``: where each group ends."""
        if isinstance(self._given, Tensor):
            return self._given.cumsum(0, dtype=torch.int32)
        (ends,) = upload([np.cumsum(self._given, dtype=np.int64)], self._device)
        return ends.to(torch.int32)


Counts = Sequence[int] | Tensor | Groups


def grouped_product(x: Tensor, matrices: Sequence[Tensor], groups: Groups) -> Tensor:
    """``out[i] = x[i] @ matrices[e]`` for the rows i of each group e.

    Args:
        x: ``[N, A]``, contiguous.
        matrices: n times ``[A, B]``, of any strides.
    """
    if not len(x):
        return x.new_empty(0, matrices[0].shape[1] if matrices else 0)
    stacked = _stacked(matrices) if _fits_grouped(x, matrices) else None
    if stacked is not None:
        return F.grouped_mm(x, stacked, offs=groups.ends)
    out = x.new_empty(len(x), matrices[0].shape[1] if matrices else 0)
    for rows, matrix, result in zip(x.split(groups.counts), matrices, out.split(groups.counts), strict=True):
        if len(rows):
            torch.mm(rows, matrix, out=result)
    return out


def grouped_weight_gradient(
    dy: Tensor, x: Tensor, groups: Groups, gradients: Sequence[Tensor], scale: float = 1.0
) -> None:
    """Writes ``scale * dy[group].T @ x[group]`` into each expert's gradient; zeros for an empty group.

    Args:
        dy: ``[N, B]``.
        x: ``[N, A]``.
        gradients: n times ``[B, A]``, contiguous.
    """
    if not len(x):
        for gradient in gradients:
            gradient.zero_()
        return
    stacked = _stacked(gradients) if dy.is_cuda and _fits_grouped(x, gradients) else None
    if stacked is not None:
        torch.mul(F.grouped_mm(dy.t(), x, offs=groups.ends), scale, out=stacked)
        return
    for d_rows, rows, gradient in zip(dy.split(groups.counts), x.split(groups.counts), gradients, strict=True):
        if len(rows):
            torch.addmm(gradient, d_rows.t(), rows, beta=0, alpha=scale, out=gradient)
        else:
            gradient.zero_()


def _fits_grouped(x: Tensor, matrices: Sequence[Tensor]) -> bool:
    """Whether grouped_mm takes this dtype and these sizes."""
    return x.dtype in _GROUPED_DTYPES.get(x.device.type, ()) and all(
        size * x.element_size() % _ALIGNMENT_BYTES == 0 for matrix in matrices[:1] for size in matrix.shape
    )


def _stacked(matrices: Sequence[Tensor]) -> Tensor | None:
    """The matrices as one 3-D view without a copy, or None where their places in memory forbid it."""
    if not matrices:
        return None
    first = matrices[0]
    storage = first.untyped_storage().data_ptr()
    if any(matrix.untyped_storage().data_ptr() != storage for matrix in matrices[1:]):
        return None
    offsets = [matrix.storage_offset() for matrix in matrices]
    spacing = offsets[1] - offsets[0] if len(offsets) > 1 else first.numel()
    if spacing < first.numel() or offsets != list(range(offsets[0], offsets[0] + spacing * len(offsets), spacing)):
        return None
    return first.as_strided((len(matrices), *first.shape), (spacing, *first.stride()))
