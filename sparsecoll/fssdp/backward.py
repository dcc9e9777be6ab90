"""The end of backward: gradients of replicas come home, dense gradients are averaged, ``.grad`` is set.

[Note: when gradients are set] Expert gradients travel while the rest of backward computes, so autograd cannot be
given them when it asks. The expert function tells it that there are none, hands them to `Backward`, and a callback at
the very end of the engine's run waits for what is in flight and adds it to ``.grad``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.profiler import record_function

from sparsecoll.collectives.agreement import agree, digest_of
from sparsecoll.collectives.call import Call
from sparsecoll.collectives.pending import Pending
from sparsecoll.fssdp.dense import mean_over_ranks
from sparsecoll.fssdp.layer import Materialized, ShardedLayer, is_recomputing
from sparsecoll.fssdp.prefetch import PrefetchOrder
from sparsecoll.group import Group
from sparsecoll.transport.base import Counters, Operation

__all__ = ["Backward"]


class _Reduction(NamedTuple):
    """Gradients under way.

    Attributes:
        stream: on which ``owned`` were written; None on a CPU.
    """

    layer: ShardedLayer
    owned: tuple[Tensor, ...]
    pending: Pending | None
    stream: torch.cuda.Stream | None


class Backward:
    """Owns what is in flight between the backward of the layers and the end of the engine's run.

    Attributes:
        averages_dense: whether dense gradients are averaged at the end; off while a user accumulates.
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
        self._averages_missing = averages_missing
        self._group = group
        self._dense = list(dense)
        self._order = order
        self._reductions: list[_Reduction] = []
        self._queued = False
        self._watched: set[int] = set()

    def watch(self) -> None:
        """Makes sure that the end of a backward is noticed also where no expert layer takes part in it.

        Called at each forward, for a user may unfreeze parameters at any time.
        """
        for number, param in enumerate(self._dense):
            if param.requires_grad and number not in self._watched:
                self._watched.add(number)
                param.register_post_accumulate_grad_hook(lambda _: self._queue())

    def after_layer(self, layer: ShardedLayer) -> None:
        """A layer's forward has ended: the next one's replicas can travel under the dense work before it."""
        if not is_recomputing():
            self._order.used(layer)

    def reduce(
        self,
        layer: ShardedLayer,
        materialized: Materialized,
        owned: tuple[Tensor, ...],
        replicas: tuple[Tensor, ...],
    ) -> None:
        """Takes the gradients of one backward of a layer and starts bringing those of replicas to their owners.

        Args:
            owned: ``[num_owned, ...]``, written except for hot experts.
            replicas: ``[num_held_hot, ...]``, this rank's contributions to hot experts.
        """
        self._queue()
        pending = None
        if materialized.hot:
            with record_function(f"FSSDP::sparse_reduce_scatter ({layer.fqn})"):
                # The exchange of counts in forward has made sure that all ranks have this very Placement.
                call = Call(
                    "sparse_reduce_scatter",
                    materialized.place,
                    materialized.hot,
                    materialized.plan,
                    "auto",
                    mean=False,
                    trusted=True,
                )
                pending = Pending(call, replicas, owned, self._group)
        else:
            layer.load.reduced = Counters()
        stream = torch.cuda.current_stream(owned[0].device) if owned[0].is_cuda else None
        self._reductions.append(_Reduction(layer, owned, pending, stream))

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _finish(self) -> None:
        self._queued = False
        reductions, self._reductions = self._reductions, []
        for layer, owned, pending, stream in reductions:
            if stream is not None:
                _hand_over(owned, stream)
            if pending is not None:
                with record_function(f"FSSDP::wait_for_sparse_reduce_scatter ({layer.fqn})"):
                    pending.result()
                layer.load.reduced = pending.moved
            for weight, grad in zip(layer.experts, owned, strict=True):
                if weight.requires_grad:
                    _accumulate(weight, grad)
        if self.averages_dense and (self._group.world_size > 1 or self._averages_missing):
            self._average_dense()

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
