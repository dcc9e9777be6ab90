"""How long sequences must be for attention to hide the gathers."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import sparsecoll as sc
from bench.step.model import Block
from bench.step.sizes import Sizes

__all__ = ["Choice", "choose_length"]

_FIRST_LENGTH, _LAST_LENGTH = 256, 16384
_MARGIN = 1.5  # what travels takes processor time from what computes
_TRIES = 3


class Choice(NamedTuple):
    """What was chosen, and why.

    Attributes:
        length: of a sequence.
        tokens: of a rank, whole sequences.
        attention_s: of one layer's forward before its experts, all ranks computing at once, on the fastest.
        gather_s: predicted for all experts of one rank on their way to all others.
    """

    length: int
    tokens: int
    attention_s: float
    gather_s: float

    def applied(self, sizes: Sizes) -> Sizes:
        """The sizes with it."""
        return replace(sizes, length=self.length, tokens=self.tokens)

    def __str__(self) -> str:
        return (
            f"length {self.length} (chosen), {self.tokens} tokens on each rank: attention's forward takes "
            f"{self.attention_s * 1e3:.0f} ms, at least {_MARGIN} times the {self.gather_s * 1e3:.0f} ms in which all "
            "experts of a rank are copied to all others"
        )


def choose_length(group: sc.Group, sizes: Sizes) -> Choice:
    """The smallest power of two with which attention takes long enough, and no fewer tokens than in ``sizes``.

    Collective: all ranks call it, and get the same.

    Raises:
        InvalidArgument: no length that is tried is enough.
    """
    gather_s = _gather_s(group, sizes)
    length = _FIRST_LENGTH
    while length <= _LAST_LENGTH:
        tokens = math.ceil(sizes.tokens / length) * length
        attention_s = _attention_s(group, replace(sizes, length=length, tokens=tokens))
        if attention_s >= _MARGIN * gather_s:
            return Choice(length, tokens, attention_s, gather_s)
        length *= 2
    raise sc.InvalidArgument(
        f"--cluster: expected attention over {_LAST_LENGTH} tokens or fewer to take {_MARGIN * gather_s:.2g} s in "
        f"forward, got {attention_s:.2g} s"
    )


def _gather_s(group: sc.Group, sizes: Sizes) -> float:
    place = sc.Placement.even(sizes.experts, group.world_size)
    hot = place.owned_by(0).tolist()
    everywhere = place.replicate({expert: range(group.world_size) for expert in hot})
    expert_bytes = 3 * sizes.width * sizes.hidden * torch.float32.itemsize
    return sc.plan_all_gather(everywhere, expert_bytes, group.topology, chunks=hot).predicted_s


@torch.no_grad()
def _attention_s(group: sc.Group, sizes: Sizes) -> float:
    block = Block(sizes)
    x = torch.randn(sizes.tokens // sizes.length, sizes.length, sizes.width)
    times = []
    for _ in range(1 + _TRIES):
        group.barrier()
        begin_s = time.perf_counter()
        block.attend(x)
        mine = np.array([time.perf_counter() - begin_s])
        times.append(min(float(np.frombuffer(each)[0]) for each in group.exchange(mine.tobytes())))
    return float(np.median(times[1:]))
