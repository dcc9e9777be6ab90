"""What this machine lacks to run the tests of this folder; ``python -m tests.gpu.machine N`` asks for N GPUs."""

from __future__ import annotations

import sys
import warnings
from functools import cache

from sparsecoll.cuda.device import num_devices

__all__ = ["num_gpus", "reason_to_skip"]


def num_gpus() -> int:
    """GPUs that CuPy sees."""
    return num_devices()


@cache
def reason_to_skip(least: int = 1) -> str | None:
    """Why tests that need ``least`` GPUs cannot run here; None if they can."""
    try:
        import torch
    except ImportError:
        return "needs torch, which is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is missing, which the reason says
            from cupy.cuda import nccl
    except ImportError:
        return "needs CuPy, which is not installed"
    if num_devices() < least:
        return f"needs {'a GPU' if least == 1 else f'{least} GPUs'}, found {num_devices() or 'none'}"
    if not torch.cuda.is_available():
        return f"needs a torch that sees the GPU, got {torch.__version__}"
    if not nccl.available:
        return "needs NCCL, which CuPy does not find"
    return None


if __name__ == "__main__":
    reason = reason_to_skip(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    if reason is not None:
        sys.exit(f"this {reason}")
