"""Ways to train one model on several ranks, under one interface."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import sparsecoll as sc
from bench.rivals import HandWrittenLayer, collectives_of, sum_dense_gradients
from bench.step.model import units_of
from bench.step.options import DDP, EP, FSDP2, IDEAL, SLICES
from sparsecoll.moe import MoELayer

__all__ = ["Contestant", "Fssdp", "enter"]


class Contestant:
    """A model, ready to be trained in one way, and its optimizer.

    Gradients are those of the mean over ranks of what each rank's loss was. The optimizer has a learning rate of 0: it
    does all its work and changes nothing, so that all steps of all contestants start from the same weights and can be
    compared.

    Args:
        optimizes: whether a step ends with one of AdamW.
    """

    def __init__(self, model: nn.Module, group: sc.Group, optimizes: bool) -> None:
        self.model = model
        self.group = group
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if optimizes else None

    def step(self, inputs: Tensor, upstream: Tensor | None) -> Tensor:
        """What is timed; returns the model's output.

        Args:
            upstream: the gradient of the output, or None for a loss.
        """
        self.model.zero_grad()
        out: Tensor = self.model(inputs)
        self.backward(out, torch.ones_like(out) if upstream is None else upstream)
        if self._optimizer is not None:
            self._optimizer.step()
        return out

    def backward(self, out: Tensor, upstream: Tensor) -> None:
        """Leaves all gradients in their places."""
        out.backward(upstream)

    def input_gradient(self, inputs: Tensor) -> Tensor | None:
        """Of this rank's own loss; None for inputs that have none."""
        return inputs.grad

    def exposed_s(self) -> float:
        """For which this rank waited for sparse collectives in the last step."""
        return 0.0

    def gradients(self) -> list[Tensor]:
        """Those of dense parameters, whole and in the model's order, then for each layer those of this rank's experts.

        Collective: all ranks call it.
        """
        layers = [module for module in self.model.modules() if isinstance(module, MoELayer)]
        experts = [weight for layer in layers for weight in layer.experts.weights]
        known = {id(weight) for weight in experts}
        dense = [param for param in self.model.parameters() if id(param) not in known]
        return [*(_gradient(each) for each in dense), *(self.own_rows(each) for each in experts)]

    def own_rows(self, weight: Tensor) -> Tensor:
        """``[share, ...]``: of the gradient of one weight of all experts, the rows that are this rank's."""
        share = len(weight) // self.group.world_size
        return _gradient(weight)[self.group.rank * share : (self.group.rank + 1) * share]


class Fssdp(Contestant):
    """This library.

    Args:
        options: of `sparsecoll.FSSDP`.
    """

    def __init__(self, model: nn.Module, group: sc.Group, optimizes: bool, **options: Any) -> None:
        self.wrapped = sc.FSSDP(model, group=group, **options)
        super().__init__(self.wrapped, group, optimizes)

    def exposed_s(self) -> float:
        report = self.wrapped.step_report()
        assert report is not None
        return report.exposed_s

    def own_rows(self, weight: Tensor) -> Tensor:
        return _gradient(weight)


class Slices(Fssdp):
    """This library, with every expert cut evenly over all ranks."""

    def __init__(self, model: nn.Module, group: sc.Group, optimizes: bool, **options: Any) -> None:
        super().__init__(model, group, optimizes, **{**options, "sharding": "slices", "calibrate": False})

    def own_rows(self, weight: Tensor) -> Tensor:
        slices, world_size = _gradient(weight), self.group.world_size
        share = len(slices) // world_size
        received = sc.all_to_all(slices, [share] * world_size, group=self.group)
        return received.unflatten(0, (world_size, share)).transpose(0, 1).flatten(1, 2)


class HandWritten(Contestant):
    """Expert parallelism by hand: `bench.rivals`."""

    def __init__(self, model: nn.Module, group: sc.Group, optimizes: bool) -> None:
        over = collectives_of(group)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, MoELayer):
                    setattr(parent, name, HandWrittenLayer(child, group.rank, group.world_size, over))
        super().__init__(model, group, optimizes)

    def backward(self, out: Tensor, upstream: Tensor) -> None:
        # A factor here makes means of all sums over ranks.
        out.backward(upstream / self.group.world_size)
        sum_dense_gradients(self.model)

    def input_gradient(self, inputs: Tensor) -> Tensor | None:
        return None if inputs.grad is None else inputs.grad * self.group.world_size

    def gradients(self) -> list[Tensor]:
        layers = [module for module in self.model.modules() if isinstance(module, HandWrittenLayer)]
        experts = [weights for layer in layers for weights in (layer.gate_up, layer.down)]
        known = {id(each) for weights in experts for each in weights}
        dense = [param for param in self.model.parameters() if id(param) not in known]
        stacks = [torch.stack([_gradient(each) for each in weights]) for weights in experts]
        return [*(_gradient(each) for each in dense), *stacks]


class Fsdp2(Contestant):
    """torch's ``fully_shard``: each layer is a unit, and what is left is one."""

    def __init__(self, model: nn.Module, group: sc.Group, optimizes: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # It asks for care with writing in place to what a unit returns, which nobody does here.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh("cpu", (group.world_size,))
        for unit in units_of(model):
            fully_shard(unit, mesh=mesh)
        super().__init__(fully_shard(model, mesh=mesh), group, optimizes)


class Ddp(Contestant):
    """torch's `DistributedDataParallel`: everything on every rank."""

    def __init__(self, model: nn.Module, group: sc.Group, optimizes: bool) -> None:
        super().__init__(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), group, optimizes)


def enter(name: str, model: nn.Module, group: sc.Group, optimizes: bool, fssdp: dict[str, Any]) -> Contestant:
    """A contestant by its name: of a rival, or of FSSDP's balancer; trains a copy of ``model``.

    Args:
        fssdp: further options of `sparsecoll.FSSDP`.
    """
    own = copy.deepcopy(model)
    if name in _RIVALS:
        return _RIVALS[name](own, group, optimizes)
    if name == SLICES:
        return Slices(own, group, optimizes, **fssdp)
    return Fssdp(own, group, optimizes, balancer=name, **fssdp)


_RIVALS = {EP: HandWritten, IDEAL: HandWritten, FSDP2: Fsdp2, DDP: Ddp}


def _gradient(param: Tensor) -> Tensor:
    """Whole, also where it is sharded by torch."""
    grad = param.grad
    assert grad is not None
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad
