"""What a wrapped model knows: its layers, what they share, and the steps that it has seen."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from sparsecoll.balance import best_sharding, migration_bytes
from sparsecoll.errors import InvalidArgument
from sparsecoll.fssdp.backward import Backward
from sparsecoll.fssdp.layer import ShardedLayer, Shared, is_recomputing
from sparsecoll.fssdp.measure import room_bytes
from sparsecoll.fssdp.prefetch import PrefetchOrder
from sparsecoll.fssdp.reports import memory_report
from sparsecoll.fssdp.reshard import move_experts, state_bytes
from sparsecoll.fssdp.step import StepRecord
from sparsecoll.fssdp.step_trace import write_chrome_trace
from sparsecoll.fssdp.step_writer import StepWriter
from sparsecoll.fssdp.timeline import RecordedStep, StepEvents
from sparsecoll.moe import MoELayer

__all__ = ["State"]

_LENGTH = struct.Struct("<q")
_MOST_TEXT = 512


class State:
    """Of a wrapped module; not a sub-module, so that it adds no names."""

    def __init__(
        self,
        module: nn.Module,
        shared: Shared,
        layers: dict[str, ShardedLayer],
        dense: list[nn.Parameter],
        backward: Backward,
        order: PrefetchOrder,
    ) -> None:
        self._module = module
        self.shared = shared
        self.group = shared.group
        self.layers = layers
        self.dense = dense
        self.backward = backward
        self.order = order
        self._writer: StepWriter | None = None
        self._last: RecordedStep | None = None
        backward.at_end = self._end_step

    def before_forward(self) -> None:
        """A forward of the whole model starts, or one that activation checkpointing runs again."""
        if is_recomputing():
            return
        self.backward.watch()
        self._write_last()
        shared, node_of = self.shared, self.group.topology.node_of
        if not shared.policy.fixed:
            room = room_bytes(torch.device(self.group.device), node_of.count(node_of[self.group.rank]))
            shared.room_bytes = room + shared.pool.free_bytes
        self.order.end()
        shared.timeline.begin_step()
        self.order.begin()
        shared.dense_begin = next(iter(self.layers.values())).meter.stamp()

    def layer_of(self, where: str, layer: str | MoELayer) -> ShardedLayer:
        """By name or module.

        Raises:
            InvalidArgument: no such layer.
        """
        for name, sharded in self.layers.items():
            if (isinstance(layer, str) and layer == name) or layer is sharded.layer:
                return sharded
        raise InvalidArgument(f"{where}: expected one of {', '.join(self.layers)}, got {layer}")

    def layers_of(self, where: str, layers: Sequence[str | MoELayer]) -> list[ShardedLayer]:
        return [self.layer_of(where, each) for each in layers]

    # Owners

    def reshard(self, optimizers: Sequence[torch.optim.Optimizer], iterations: int) -> bool:
        """Moves experts if that pays; collective, see `FSSDPModule.reshard_experts`."""
        if self.shared.policy.sharding == "slices" or self.shared.policy.fixed:
            raise InvalidArgument("reshard_experts: expected experts with owners and no capacity, which fixes them")
        layers = list(self.layers.values())
        told = self.group.exchange(np.array(state_bytes(layers, optimizers), "<i8").tobytes(), "FSSDP state bytes")
        sizes = np.max([np.frombuffer(each, "<i8") for each in told], axis=0).tolist()
        if not all(layer.history for layer in layers):
            return False
        loads = [self.shared.policy.predictor.predict(list(layer.history)) for layer in layers]
        current, costs = [layer.base for layer in layers], [layer.costs for layer in layers]
        found = best_sharding(loads, current, costs, self.shared.policy.balancer)
        moving_s = migration_bytes(current, found.owners, sizes) / min(cost.bytes_per_s for cost in costs)
        if found.gain_s * iterations <= moving_s:
            return False
        self.order.end()
        move_experts(layers, found.owners, optimizers, self.group)
        return True

    # Steps

    def last_events(self) -> StepEvents | None:
        """Of the last step whose backward has ended."""
        return None if self._last is None else self._last.read()

    def log(self, writer: StepWriter | None) -> None:
        """The record of a step is written when the next one begins, so that nobody waits for a device."""
        self._write_last()
        self._writer = writer

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Collective; rank 0 writes the last step of all ranks."""
        mine = pickle.dumps(self.last_events())
        lengths = [_LENGTH.unpack(each)[0] for each in self.group.exchange(_LENGTH.pack(len(mine)), "FSSDP trace")]
        told = self.group.exchange(mine.ljust(max(lengths)), "FSSDP trace")
        steps = {rank: pickle.loads(each) for rank, each in enumerate(told)}
        problem = b""
        if any(step is None for step in steps.values()):
            raise InvalidArgument("trace_step: expected a step whose backward has ended, got none yet")
        if self.group.rank == 0:
            try:
                write_chrome_trace(steps, path)
            except InvalidArgument as error:
                problem = str(error).encode()[:_MOST_TEXT]
        problem = self.group.exchange(problem.ljust(_MOST_TEXT), "FSSDP trace")[0].rstrip()
        if problem:
            raise InvalidArgument(problem.decode(errors="replace"))

    def _end_step(self) -> None:
        self._last = self.shared.timeline.end_step()

    def _write_last(self) -> None:
        if self._writer is not None and self._last is not None:
            loads = {name: layer.load for name, layer in self.layers.items()}
            memory = memory_report(self._module, self.shared.pool, None, self.group.staging_bytes)
            self._writer.write(StepRecord.from_step(self._last.read(), loads, memory))
        self._last = None
