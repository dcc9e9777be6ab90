"""Matrix products of rows that are sorted by expert, with one matrix for each expert.

[Note: one product for each stack] Matrices come stacked, ``[n, A, B]``, and torch's grouped_mm takes a stack in one
call, whichever of its matrices have rows: one launch, however many experts there are, and the host need not know their
counts. It writes into no given output, so weight gradients take one more pass, which also scales them, and the results
of two stacks are joined afterwards.

Legend: ``N`` rows, ``n`` experts of a stack.
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
    """How many consecutive rows belong to each expert of a stack, as the host and as the device know it.

    Each side is derived from the other when it is first asked for: on a GPU, `ends` costs a small copy and no waiting,
    while `counts` makes the host wait for the device.

    Attributes:
        places: the experts of the stack that compute with it, ascending. The others have counts of 0, and nobody reads
            what is written into their gradients.
    """

    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        device: torch.device,
        ends: Tensor | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        """Knows either side, or both.

        Args:
            counts: ``[n]``, as host integers or as an int64 tensor on ``device``.
            device: of the rows.
            ends: what `ends` is to be, if the caller has it.
            places: see above; all experts by default.
        """
        self._given = counts
        self._device = device
        self.places = range(len(counts)) if places is None else places
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


def grouped_product(x: Tensor, stack: Tensor, groups: Groups) -> Tensor:
    """``out[i] = x[i] @ stack[e]`` for the rows i of each group e.

    Args:
        x: ``[N, A]``, contiguous.
        stack: ``[n, A, B]``, of any strides.
    """
    if not len(x):
        return x.new_empty(0, stack.shape[2])
    if _fits_grouped(stack):
        return F.grouped_mm(x, stack, offs=groups.ends)
    out = x.new_empty(len(x), stack.shape[2])
    for rows, matrix, result in zip(x.split(groups.counts), stack, out.split(groups.counts), strict=True):
        if len(rows):
            torch.mm(rows, matrix, out=result)
    return out


def grouped_weight_gradient(dy: Tensor, x: Tensor, groups: Groups, gradient: Tensor, scale: float = 1.0) -> None:
    """Writes ``scale * dy[group].T @ x[group]`` into each expert's gradient; zeros for an empty group.

    Args:
        dy: ``[N, B]``, contiguous.
        x: ``[N, A]``, contiguous.
        gradient: ``[n, B, A]``, contiguous.
    """
    if not len(x):
        gradient.zero_()
        return
    if _fits_grouped(gradient):
        torch.mul(F.grouped_mm(dy.t(), x, offs=groups.ends), scale, out=gradient)
        return
    for d_rows, rows, each in zip(dy.split(groups.counts), x.split(groups.counts), gradient, strict=True):
        if len(rows):
            torch.addmm(each, d_rows.t(), rows, beta=0, alpha=scale, out=each)
        else:
            each.zero_()


def _fits_grouped(stack: Tensor) -> bool:
    """Whether grouped_mm takes matrices of this dtype and these sizes."""
    return stack.dtype in _GROUPED_DTYPES.get(stack.device.type, ()) and all(
        size * stack.element_size() % _ALIGNMENT_BYTES == 0 for size in stack.shape[1:]
    )
