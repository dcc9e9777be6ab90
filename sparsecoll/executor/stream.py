"""Runs a recipe: puts its rounds and kernels on a lane, one after the other. It decides and waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsecoll.executor.recipe import Launch, Recipe, Zeros
from sparsecoll.transport.base import Operation
from sparsecoll.transport.stream import Buffer, Issue, StreamTransport

__all__ = ["run_recipe"]


def run_recipe(
    recipe: Recipe,
    transport: StreamTransport,
    buffers: Sequence[Buffer],
    operation: Operation,
    framework: str,
    tensors: Sequence[Any] = (),
    priority: int = 0,
) -> Issue:
    """Issues a rank's part of a collective.

    Args:
        buffers: as the recipe numbers them, without the staging buffer.
        framework: of the tensors; the input is ready in its current stream.
        tensors: what must not be reused before the end, where the caller may drop it earlier.
    """
    gpu = transport.gpu
    with transport.issuing(operation, framework, priority) as (lane, issue):
        # With the recipe, whose tables may be on their way to the device.
        issue.keep = recipe, gpu.protect(tensors, lane, framework)
        staging = lane.staging(recipe.staging_bytes) if recipe.staging_bytes else 0
        everything = (*buffers, Buffer(staging, recipe.staging_bytes))
        for step in recipe.steps:
            if isinstance(step, Launch):
                table = gpu.resident(step.table.words, lane)
                bases = [everything[number].address for number in step.buffers]
                if step.dtype is None:
                    gpu.kernels.pack(table, step.table.num_tiles, bases, "uint8", "uint8", lane.stream)
                else:
                    gpu.kernels.sum_replicas(table, step.table.num_tiles, bases, step.dtype, lane.stream)
            elif isinstance(step, Zeros):
                gpu.zero(staging + step.offset, step.num_bytes, lane.stream)
            else:
                transport.issue(step, everything, lane)
    # Counted here at once, as a sum over all messages would take longer than to issue them.
    counters = transport.counters
    counters.sent_bytes += recipe.sent_bytes
    counters.sent_messages += recipe.sent_messages
    counters.received_bytes += recipe.received_bytes
    counters.received_messages += recipe.received_messages
    return issue
