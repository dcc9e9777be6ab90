"""Sparse collectives between rows of stacked tensors, at places that the caller names.

What the public collectives do with rows in chunk order, for a caller that knows where it wants each chunk: rows travel
between parameters, replicas and gradients as they lie, and an owner's rows are neither moved nor copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from sparsecoll.collectives.buffers import buffer_of
from sparsecoll.collectives.call import CallSteps
from sparsecoll.collectives.rows import contiguous, dtype_name, itemsize_of, view_of
from sparsecoll.executor import (
    Recipe,
    Segments,
    Spot,
    Spots,
    all_gather_steps,
    gather_recipe,
    reduce_recipe,
    reduce_scatter_steps,
    run_recipe,
)
from sparsecoll.group import Group
from sparsecoll.plan import Plan
from sparsecoll.transport.base import HostTransport, Operation
from sparsecoll.transport.stream import StreamTransport

__all__ = ["Rows", "StackCall"]

Where = tuple[tuple[int, int, int], ...]
"""Triples of chunk, stack and row."""


class Rows(NamedTuple):
    """Where chunks lie.

    Attributes:
        stacks: tensors ``[n, ...]`` of equal dtypes and row sizes from stack to stack, one for each segment of a chunk;
            contiguous.
        where: chunk, stack and row of each chunk that takes part here, ascending.
    """

    stacks: Sequence[Sequence[Any]]
    where: Where


@dataclass(frozen=True)
class StackCall:
    """A sparse collective that all ranks have agreed on; runs as `sparsecoll.collectives.call.Call` does.

    Attributes:
        name: of the operation.
        plan: what moves.
        dtypes: name of each segment's element type.
        sizes: bytes of each segment.
    """

    name: str
    plan: Plan
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, name: str, plan: Plan, stack: Sequence[Any]) -> StackCall:
        """For chunks like the rows of ``stack``, which may have none."""
        dtypes = tuple(dtype_name(tensor.dtype) for tensor in stack)
        sizes = tuple(
            itemsize_of(dtype) * _elements(tensor.shape[1:]) for dtype, tensor in zip(dtypes, stack, strict=True)
        )
        return cls(name, plan, dtypes, sizes)

    def steps(
        self, group: Group, operation: Operation, source: Rows, destination: Rows, *, detached: bool = False
    ) -> CallSteps:
        """Moves ``source`` to ``destination``.

        Args:
            source: of an all-gather, the chunks that this rank owns; of a reduce-scatter, its contributions.
            destination: of an all-gather, those that it is to get, its own only where they are to be copied; of a
                reduce-scatter, those that it owns, at their place in ``source`` or elsewhere.
            detached: the caller may drop its tensors between the two halves.
        """
        if isinstance(group.transport, StreamTransport):
            return (yield from self._steps_on_stream(group.transport, operation, source, destination, detached))
        return (yield from self._steps_on_host(group, operation, source, destination))

    def _steps_on_host(self, group: Group, operation: Operation, source: Rows, destination: Rows) -> CallSteps:
        assert isinstance(group.transport, HostTransport)
        sizes = dict.fromkeys(self.plan.chunks, self.sizes)
        arguments = (self.plan, group.transport, self._segments(source), self._segments(destination), sizes)
        arena = group.arenas.borrow()
        if self.plan.op == "all_gather":
            yield from all_gather_steps(*arguments, operation, arena)
        else:
            yield from reduce_scatter_steps(*arguments, self.dtypes, False, operation, arena)
        group.arenas.give_back(arena)

    def _steps_on_stream(
        self, transport: StreamTransport, operation: Operation, source: Rows, destination: Rows, detached: bool
    ) -> CallSteps:
        stacks = [stack for rows in (source, destination) for stack in rows.stacks]
        tensors = [contiguous(self.name, each, True) for stack in stacks for each in stack]
        recipe = _recipe(self, transport.rank, source.where, len(source.stacks), destination.where, len(tensors))
        buffers = [buffer_of(each) for each in tensors]
        issue = run_recipe(recipe, transport, buffers, operation, "torch", tensors if detached else ())
        yield issue
        issue.join()

    def _segments(self, rows: Rows) -> dict[int, Segments]:
        tables = [
            [
                view_of(self.name, each, True).reshape(each.shape[0], size)
                for each, size in zip(stack, self.sizes, strict=True)
            ]
            for stack in rows.stacks
        ]
        return {chunk: tuple(table[row] for table in tables[stack]) for chunk, stack, row in rows.where}


@lru_cache(maxsize=512)
def _recipe(
    call: StackCall, rank: int, source: Where, num_source_stacks: int, destination: Where, staging: int
) -> Recipe:
    """This rank's part, remembered, for training repeats its calls."""
    plan, sizes = call.plan, dict.fromkeys(call.plan.chunks, call.sizes)
    spots, to = _spots(call, source, 0), _spots(call, destination, num_source_stacks * len(call.sizes))
    if plan.op == "all_gather":
        return gather_recipe(plan, rank, spots, to, sizes, staging)
    return reduce_recipe(plan, rank, spots, to, sizes, call.dtypes, False, staging)


def _spots(call: StackCall, where: Where, first: int) -> Spots:
    width = len(call.sizes)
    return {
        chunk: tuple(Spot(first + stack * width + j, row * size, size) for j, size in enumerate(call.sizes))
        for chunk, stack, row in where
    }


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total
