"""What a wrapped model can do beside what it could before."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsecoll.balance import Costs
from sparsecoll.errors import CollectiveMismatch, InvalidArgument
from sparsecoll.fssdp.clip import clip_gradients
from sparsecoll.fssdp.reports import LayerLoad, MemoryReport, memory_report
from sparsecoll.fssdp.state import State
from sparsecoll.fssdp.step import StepRecord
from sparsecoll.fssdp.step_writer import StepWriter
from sparsecoll.moe import MoELayer
from sparsecoll.plan import Plan

__all__ = ["FSSDPModule"]


class FSSDPModule(nn.Module):
    """What `FSSDP` adds to a module's class."""

    _fssdp: State

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Whether the next backwards average dense gradients over ranks; turn off for all but the last micro-batch.

        Gradients of experts always travel to their owners, for no other rank could keep them.
        """
        self._fssdp.backward.averages_dense = requires_gradient_sync

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scales all gradients so that their norm, over all ranks, is at most ``max_norm``.

        Equals `torch.nn.utils.clip_grad_norm_` of one process: each expert counts once, at its owner, and each dense
        parameter once.

        Collective: all ranks call it.
        Stream: on a GPU, in order on the current stream; the host waits only with ``error_if_nonfinite``.

        Returns:
            The norm before clipping, equal on all ranks; a scalar on the device of the gradients.

        Raises:
            InvalidArgument: ``norm_type`` is not positive.
            RuntimeError: the norm is not finite and ``error_if_nonfinite``; on all ranks.
        """
        state = self._fssdp
        experts = [w.grad for layer in state.layers.values() for w in layer.experts if w.grad is not None]
        dense = [param.grad for param in state.dense if param.grad is not None]
        device = next(self.parameters()).device
        return clip_gradients(experts, dense, max_norm, norm_type, error_if_nonfinite, state.group, device)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Each rank takes its own experts from a complete state dict, and everything else.

        Collective: all ranks call it; if it fails on one, it raises on all.
        """
        group = self._fssdp.group
        result, problem = None, None
        try:
            result = super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            problem = error
        failed = [rank for rank, each in enumerate(group.exchange(bytes([problem is not None]))) if each[0]]
        if problem is not None:
            raise problem
        if failed:
            raise CollectiveMismatch(f"load_state_dict: failed on ranks {failed} {group.place_of_error}")
        return result

    def load_report(self) -> dict[str, LayerLoad]:
        """Measurements of each layer's last iteration on this rank, by the layer's name."""
        return {name: layer.load for name, layer in self._fssdp.layers.items()}

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
        """Bytes in this rank's memory, with those of ``optimizer``'s state if it is given."""
        return memory_report(self, self._fssdp.shared.pool, optimizer, self._fssdp.group.staging_bytes)

    def last_plan(self, layer: str | MoELayer) -> Plan | None:
        """The plan of a layer's last sparse all-gather, or None if it had no replicas yet.

        Raises:
            InvalidArgument: no such layer.
        """
        return self._fssdp.layer_of("last_plan", layer).last_plan

    def costs(self) -> dict[str, Costs]:
        """What balancers are told of each layer, by its name: measured and agreed on, equal on all ranks.

        To decide alike in another run, pass them to `FSSDP` there.
        """
        return {name: layer.costs for name, layer in self._fssdp.layers.items()}

    def set_modules_to_forward_prefetch(self, modules: Sequence[str | MoELayer]) -> None:
        """Sets the order in which forward uses the MoE layers; each one's replicas are gathered when the one before it
        has ended. Without, or with an empty one, the order of the last iteration is taken.

        Equal on all ranks; one that is not what forward does costs overlap, and is still right.
        """
        self._fssdp.order.tell(self._fssdp.layers_of("set_modules_to_forward_prefetch", modules))

    def set_modules_to_backward_prefetch(self, modules: Sequence[str | MoELayer]) -> None:
        """Sets the order in which backward uses the MoE layers, for those that gather their replicas again.

        Without, or with an empty one, it is the order of the forward, turned round.
        """
        self._fssdp.order.tell_backward(self._fssdp.layers_of("set_modules_to_backward_prefetch", modules))

    @torch.no_grad()
    def reshard_experts(self, *optimizers: torch.optim.Optimizer, iterations: int = 100) -> bool:
        """Moves experts, with gradients and all state of the given optimizers, to owners with less to do, if that pays
        (Hecate, section 4.3; see `sparsecoll.balance.shard_experts`).

        It pays if the time that the present loads let expect to be saved over the next ``iterations`` exceeds that of
        moving. Training goes on as without it, up to the order of summation.

        Collective: all ranks call it, between a step of the optimizer and the next forward.
        Memory: one layer at a time is there twice.

        Args:
            optimizers: elementwise ones (SGD, Adam, AdamW, ...): state of a parameter has its shape or is scalar.

        Returns:
            Whether anything has moved; equal on all ranks.

        Raises:
            InvalidArgument: another kind of optimizer, or experts that are cut into slices; nothing has moved.
            CollectiveMismatch: ranks disagree; nothing has moved.
        """
        return self._fssdp.reshard(optimizers, iterations)

    def reshard_on_schedule(self, *optimizers: torch.optim.Optimizer, every: int = 100) -> RemovableHandle:
        """Calls `reshard_experts` after every so many steps of the first optimizer.

        Returns:
            A handle, whose ``remove()`` ends it.
        """
        if not optimizers or every < 1:
            raise InvalidArgument(
                f"reshard_on_schedule: expected an optimizer and every >= 1, got {len(optimizers)} and {every}"
            )
        steps = count(1)

        def after_step(*_: Any) -> None:
            if next(steps) % every == 0:
                self.reshard_experts(*optimizers, iterations=every)

        return optimizers[0].register_step_post_hook(after_step)

    def step_report(self) -> StepRecord | None:
        """What this rank has measured of the last forward and backward; None before the first has ended.

        On a GPU it waits until the device has come to its end.
        """
        events = self._fssdp.last_events()
        return None if events is None else StepRecord.from_step(events, self.load_report(), self.memory_report())

    def log_steps(self, writer: StepWriter | None) -> None:
        """Gives each `step_report` of this rank to ``writer``, a step late; None stops, after the last one."""
        self._fssdp.log(writer)

    def trace_step(self, path: str | os.PathLike[str]) -> None:
        """Writes the last step of all ranks as a Chrome trace, for ui.perfetto.dev.

        Collective: all ranks call it; rank 0 writes.

        Raises:
            InvalidArgument: no step has ended yet, or the file cannot be written; on all ranks.
        """
        self._fssdp.trace(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise InvalidArgument("FSSDP: expected to be wrapped after copying; a wrapped module cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidArgument("FSSDP: expected state_dict() to be saved; a wrapped module cannot be pickled")
