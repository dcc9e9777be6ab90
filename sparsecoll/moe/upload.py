"""Small integers that the host has worked out, on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["upload"]


def upload(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """The same as int64 tensors on ``device``; nobody waits for it.

    Stream: one copy on the current stream, from pinned memory that torch keeps until the copy has ended.
    Memory: on a CPU the tensors share the arrays'.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.empty(sum(map(len, arrays)), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=packed.numpy())
    return list(packed.to(device, non_blocking=True).split([len(array) for array in arrays]))
