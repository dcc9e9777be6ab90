"""Collectives over many dense tensors at once, built from the sparse ones with a Placement that all ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sparsecoll.collectives import sparse_all_gather
from sparsecoll.collectives.call import Call
from sparsecoll.group import Group
from sparsecoll.placement import Placement
from sparsecoll.transport.base import Operation

__all__ = ["broadcast", "gather_from_ranks", "mean_over_ranks"]


def mean_over_ranks(tensors: Sequence[Tensor], group: Group, operation: Operation) -> None:
    """Replaces each tensor by its mean over all ranks, in place; bitwise equal on all of them.

    A reduce-scatter and an all-gather of 1 / W each: 2 (W - 1) / W times the bytes, as a ring all-reduce sends. The
    flat copy is padded by at most W - 1 elements. Runs as a part of ``operation``, in which ranks have agreed on
    which tensors these are.

    Stream: on a GPU, in order on the current stream; the host does not wait.
    """
    if group.world_size == 1:
        return
    place = _one_chunk_each(group.world_size)
    reduce = Call("sparse_reduce_scatter", place, None, None, "auto", mean=True, trusted=True)
    gather = Call("sparse_all_gather", place, None, None, "auto", mean=False, trusted=True)
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        sizes = [tensor.numel() for tensor in same]
        padding = -sum(sizes) % group.world_size
        flat = torch.cat([*(tensor.reshape(-1) for tensor in same), same[0].new_zeros(padding)])
        chunks = flat.view(group.world_size, -1)
        mine = reduce.run(group, operation, chunks, None)
        gather.run(group, operation, mine, chunks)
        for tensor, mean in zip(same, flat.split([*sizes, padding]), strict=False):
            tensor.copy_(mean.view_as(tensor))


def gather_from_ranks(value: Tensor, group: Group) -> Tensor:
    """The scalars of all ranks, ``[W]``, on the device of this rank's ``value``.

    Collective: all ranks call it, with scalars of one dtype.
    Stream: on a GPU, in order on the current stream; the host does not wait.
    """
    operation = group.operation("FSSDP scalars")
    gather = Call("sparse_all_gather", _one_chunk_each(group.world_size), None, None, "auto", mean=False, trusted=True)
    gathered: Tensor = group.run(operation, lambda: gather.run(group, operation, value.view(1, 1), None))
    return gathered.view(-1)


def broadcast(tensors: Sequence[Tensor], group: Group) -> None:
    """Replaces each tensor on every rank by rank 0's, in place."""
    everyone = Placement.of_owners([0], group.world_size).replicate({0: range(group.world_size)})
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(1, -1)
        shard = flat if group.rank == 0 else flat[:0]
        tensor.copy_(sparse_all_gather(shard, everyone, group=group).view_as(tensor))


@cache
def _one_chunk_each(world_size: int) -> Placement:
    """As many chunks as ranks, one owned by each, all held by all."""
    return Placement.even(world_size, world_size).replicate(dict.fromkeys(range(world_size), range(world_size)))
