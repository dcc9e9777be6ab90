"""Memory for materialized rows and their gradients, used again from layer to layer and step to step."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ReplicaPool", "Stack"]

_ALIGNMENT = 64

Stack = tuple[Tensor, ...]
"""Rows of several experts, one tensor for each weight name."""


class ReplicaPool:
    """Lends stacks and takes them back.

    On a CPU, where fresh memory costs a fault for each page, it keeps one block, or up to a quarter of the most that
    was ever lent at once: between a backward and the next forward gradients and optimizer find room where replicas
    were. On a GPU torch's own allocator is the pool, and keeps what is given back.

    Attributes:
        lent_bytes: lent now.
        peak_bytes: the most that was lent at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []
        self._lock = threading.RLock()  # Python may collect a lease anywhere, here too
        self.lent_bytes = 0
        self.peak_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Kept, and lent to nobody."""
        return sum(each.nbytes for each in self._free)

    def take(self, count: int, like: Sequence[Tensor]) -> Lease:
        """Rows for ``count`` experts, of the row shapes and dtypes of the tensors ``like``; not initialized."""
        sizes = [count * math.prod(each.shape[1:]) * each.element_size() for each in like]
        offsets, total = [], 0
        for size in sizes:
            offsets.append(total)
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        memory = self._find(total)
        with self._lock:
            self.lent_bytes += memory.nbytes
            self.peak_bytes = max(self.peak_bytes, self.lent_bytes)
        stack = tuple(
            memory[offset : offset + size].view(each.dtype).view(count, *each.shape[1:])
            for offset, size, each in zip(offsets, sizes, like, strict=True)
        )
        return Lease(self, memory, stack)

    def _find(self, num_bytes: int) -> Tensor:
        """The smallest free block that is large enough, or a new one in place of the largest that is not."""
        with self._lock:
            fitting = [each for each in self._free if each.nbytes >= num_bytes]
            chosen = min(fitting or self._free[:1], key=lambda each: each.nbytes, default=None)
            if chosen is not None:
                self._free = [each for each in self._free if each is not chosen]
        if fitting:
            assert chosen is not None
            return chosen
        del chosen  # before the new one is there
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _give_back(self, memory: Tensor) -> None:
        with self._lock:
            self.lent_bytes -= memory.nbytes
            if memory.is_cuda or not memory.nbytes:
                return
            if not self._free or self.free_bytes + memory.nbytes <= self.peak_bytes // 4:
                self._free = sorted([*self._free, memory], key=lambda each: -each.nbytes)


class Lease:
    """A stack that is lent; it goes back when it is returned, or when nobody knows the lease any more.

    Attributes:
        stack: not to be used after the return.
    """

    __slots__ = ("_memory", "_pool", "stack")

    def __init__(self, pool: ReplicaPool, memory: Tensor | None, stack: Stack) -> None:
        self._pool, self._memory, self.stack = pool, memory, stack

    def give_back(self) -> None:
        """At most once has an effect. On a GPU the memory is used again in the order of the current stream."""
        memory, self._memory, self.stack = self._memory, None, ()
        if memory is not None:
            self._pool._give_back(memory)

    def __del__(self) -> None:
        self.give_back()
