"""The end of backward: gradients of replicas come home, dense gradients are averaged, ``.grad`` is set.

[Note: when gradients are set] Expert gradients travel while the rest of backward computes, so autograd cannot be
given them when it asks. The expert function tells it that there are none, hands them to `Backward`, and a callback at
the very end of the engine's run waits for what is in flight and adds it to ``.grad``.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.profiler import record_function

from sparsecoll.collectives.agreement import agree, digest_of
from sparsecoll.fssdp.dense import mean_over_ranks
from sparsecoll.fssdp.layer import Forward, ShardedLayer, is_recomputing
from sparsecoll.fssdp.pool import Lease, Stack
from sparsecoll.fssdp.prefetch import PrefetchOrder
from sparsecoll.fssdp.replicas import Reduction, Replicas
from sparsecoll.group import Group
from sparsecoll.transport.base import Operation

__all__ = ["Backward"]


class _Gradients(NamedTuple):
    """Gradients of a layer's stored rows, complete on ``stream``; None on a CPU."""

    layer: ShardedLayer
    owned: Stack
    stream: torch.cuda.Stream | None


class Backward:
    """Owns what is in flight between the backward of the layers and the end of the engine's run.

    Attributes:
        averages_dense: whether dense gradients are averaged at the end; off while a user accumulates.
        at_end: called when all gradients are set.
    """

    def __init__(
        self, group: Group, dense: Sequence[nn.Parameter], order: PrefetchOrder, *, averages_missing: bool
    ) -> None:
        """Starts with nothing in flight.

        Args:
            averages_missing: every dense parameter that requires a gradient takes part in the average, with zeros where
                nobody has one. Otherwise ranks ask each other, and what no rank has stays None.
        """
        self.averages_dense = True
        self.at_end: Callable[[], None] = _nothing
        self._averages_missing = averages_missing
        self._group = group
        self._dense = list(dense)
        self._order = order
        self._reductions: deque[tuple[ShardedLayer, Reduction]] = deque()
        self._gradients: list[_Gradients] = []
        self._gathered_again: Replicas | None = None
        self._queued = False
        self._watched: set[int] = set()

    def watch(self) -> None:
        """Makes sure that the end of a backward is noticed also where no expert layer takes part in it.

        Called at each forward, for a user may unfreeze parameters at any time.
        """
        # Python cannot collect a circle that goes through a parameter's hooks.
        me = weakref.ref(self)

        def accumulated(_: Tensor) -> None:
            if (backward := me()) is not None:
                backward._queue()

        for number, param in enumerate(self._dense):
            if param.requires_grad and number not in self._watched:
                self._watched.add(number)
                param.register_post_accumulate_grad_hook(accumulated)

    def after_forward(self, layer: ShardedLayer, forward: Forward, *, has_graph: bool) -> None:
        """A layer's forward has ended: the next one's replicas can travel under the dense work before it."""
        if is_recomputing():
            return
        releases = has_graph and forward.rematerializes
        is_last = self._order.used(layer, forward.replicas if releases else None)
        if not has_graph or (releases and not is_last):
            forward.replicas.release()
        layer.shared.dense_begin = layer.meter.stamp()

    def before_experts(self, forward: Forward) -> None:
        """A layer's expert gradients are about to be computed: makes room for them.

        Reductions hide behind the dense backward between two layers. When that is over, those of the layer before are
        waited for where memory is short, and else those of the layer before that.
        """
        self._settle(0 if forward.rematerializes else 1)

    def after_experts(self, forward: Forward) -> None:
        """A layer's experts have no more use for their replicas; those of the next one, if released, are gathered."""
        self._queue()
        forward.replicas.release()
        following = self._order.before(forward.replicas)
        if following is not None and not following.are_present:
            self._gathered_again = following
            following.start()

    def reduce(self, layer: ShardedLayer, forward: Forward, owned: Stack, replicas: Sequence[Lease]) -> None:
        """Takes the gradients of one backward of a layer and starts bringing those of replicas home.

        Args:
            owned: of the stored rows.
            replicas: of the gathered rows, this rank's contributions.
        """
        # Exchanges in forward have made sure that all ranks have these very Plans.
        self._reductions.append((layer, forward.replicas.reduce(owned, replicas)))

    def _settle(self, num_left: int) -> None:
        """Waits for the oldest reductions."""
        while len(self._reductions) > num_left:
            layer, reduction = self._reductions.popleft()
            owned = reduction.finish()
            layer.load.reduced = reduction.moved
            stream = torch.cuda.current_stream(owned[0].device) if owned[0].is_cuda else None
            self._gradients.append(_Gradients(layer, owned, stream))

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _finish(self) -> None:
        self._queued = False
        self._settle(0)
        if self._gathered_again is not None:  # for a layer that had no backward after all
            self._gathered_again.release()
            self._gathered_again = None
        gradients, self._gradients = self._gradients, []
        for layer, owned, stream in gradients:
            if stream is not None:
                _hand_over(owned, stream)
            for weight, grad in zip(layer.experts, owned, strict=True):
                if weight.requires_grad:
                    _accumulate(weight, grad)
        if self.averages_dense and (self._group.world_size > 1 or self._averages_missing):
            self._average_dense()
        self.at_end()

    def _average_dense(self) -> None:
        """Means of the dense gradients that any rank has; a rank without one contributes zeros."""
        params = [param for param in self._dense if param.requires_grad]
        operation = self._group.operation("FSSDP gradients")
        with record_function("FSSDP::average_dense_gradients"):
            self._group.run(operation, lambda: self._run_average(params, operation))

    def _run_average(self, params: list[nn.Parameter], operation: Operation) -> None:
        chosen = params if self._averages_missing else self._with_gradients(params, operation)
        for param in chosen:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        mean_over_ranks([param.grad for param in chosen if param.grad is not None], self._group, operation)

    def _with_gradients(self, params: list[nn.Parameter], operation: Operation) -> list[nn.Parameter]:
        """Those that have a gradient on any rank."""
        mine = bytes(param.grad is not None for param in params)
        payloads = agree(
            self._group,
            operation,
            digest_of("FSSDP gradients", len(params)),
            lambda: {"dense_parameters": len(params)},
            payload=np.packbits(np.frombuffer(mine, np.uint8)).tobytes(),
        )
        present = np.bitwise_or.reduce([np.frombuffer(each, np.uint8) for each in payloads])
        return [param for param, bit in zip(params, np.unpackbits(present), strict=False) if bit]


def _hand_over(tensors: Sequence[Tensor], stream: torch.cuda.Stream) -> None:
    """Makes the current stream wait for what ``stream`` has written, and the memory for the current stream.

    Autograd runs backward on the streams of forward and the callback on the stream of the caller. It orders the two
    for gradients that it sets itself, which ours are not.
    """
    current = torch.cuda.current_stream(tensors[0].device)
    if current != stream:
        current.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(current)


def _accumulate(weight: nn.Parameter, grad: Tensor) -> None:
    if weight.grad is None:
        weight.grad = grad
    else:
        weight.grad += grad


def _nothing() -> None:
    pass
