"""Experts change owners: parameters, gradients and optimizer state move together, and training goes on as it was.

[Note: what belongs to an expert] An elementwise optimizer keeps tensors of a parameter's shape, whose rows belong to
the experts that the parameter's rows do, and scalars, such as a number of steps. Where the first are and what the
second are must be equal on all ranks that own experts of a layer. A rank that owns none is not asked, for its optimizer
may have passed over its empty parameters; it takes over what the others have.

Legend: ``n`` owned experts of a layer.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sparsecoll.collectives.agreement import agree, agreed_error, digest_of
from sparsecoll.collectives.call import Call
from sparsecoll.collectives.rows import dtype_name
from sparsecoll.errors import CollectiveMismatch, InvalidArgument
from sparsecoll.fssdp.layer import ShardedLayer
from sparsecoll.group import Group
from sparsecoll.moe.experts import rows_of
from sparsecoll.placement import Placement
from sparsecoll.transport.base import Operation

__all__ = ["move_experts", "state_bytes"]

Optimizers = Sequence[torch.optim.Optimizer]

_DIGEST = struct.Struct("<16sI")  # of what a rank would tell, and its length
_PARAMETER = -1
_PLAIN = bool | int | float | str | None


class _Belongings(NamedTuple):
    """What belongs to one parameter, as ranks tell each other; see [Note: what belongs to an expert].

    Keepers are numbers of optimizers, or ``_PARAMETER``, which keeps ``data`` and ``grad``.

    Attributes:
        stacks: keeper, name and dtype of each tensor ``[n, ...]``, the parameter first.
        scalars: keeper, name, dtype and whereabouts of a tensor or None for a plain value, and value.
    """

    stacks: list[list[Any]]
    scalars: list[list[Any]]


class _Spot(NamedTuple):
    """Where a tensor ``[n, ...]`` is kept."""

    weight: nn.Parameter
    keeper: int
    name: str

    def get(self, optimizers: Optimizers) -> Tensor:
        if self.keeper == _PARAMETER:
            return getattr(self.weight, self.name)
        return optimizers[self.keeper].state[self.weight][self.name]

    def put(self, tensor: Tensor, optimizers: Optimizers) -> None:
        if self.keeper == _PARAMETER:
            setattr(self.weight, self.name, tensor)
        else:
            optimizers[self.keeper].state[self.weight][self.name] = tensor


def move_experts(
    layers: Sequence[ShardedLayer], bases: Sequence[Placement], optimizers: Optimizers, group: Group
) -> None:
    """Gives every layer's experts the owners of its new base, with everything that belongs to them.

    Parameters stay the same objects, and the optimizers' state is changed in place, so both go on working. Only what
    changes its owner travels. Optimizers need not hold all layers' parameters; of a parameter that none holds, values
    and gradient move.

    Collective: all ranks call it with equal layers and bases, and optimizers of equal structure, outside of forward and
        backward, with no replicas under way. A graph of before cannot be gone back through, and says so.
    Stream: on a GPU, in order on the current stream, after an exchange between hosts and a wait for scalars that are
        there.
    Memory: one layer at a time is there twice, as it was and as it becomes. The old tensors are then free.

    Args:
        bases: for each layer, its new owners and no replicas.
        optimizers: elementwise ones, such as SGD and AdamW: any whose state for a parameter is tensors of its shape,
            on its device, and scalars.

    Raises:
        InvalidArgument: bases do not fit the layers, or state is not elementwise; nothing has moved.
        CollectiveMismatch: another rank's arguments are unsound, or ranks disagree; nothing has moved.
        CollectiveTimeout, PeerFailure, TransportError: a layer has moved as a whole or not at all; the group is
            unusable afterwards.
    """
    operation = group.operation("FSSDP reshard")
    agreed = group.run(operation, lambda: _agree(layers, bases, optimizers, group, operation))
    for layer, base, belongings in zip(layers, bases, agreed, strict=True):
        if base != layer.base:
            _move(layer, base, belongings, optimizers, group)


def state_bytes(layers: Sequence[ShardedLayer], optimizers: Optimizers) -> list[int]:
    """Bytes that `move_experts` would move now for one expert of each layer, gradients included if there are any.

    Without communication. A rank that owns no expert of a layer may know of less state than those that own some.
    """
    return [
        sum(
            math.prod(stack.shape[1:]) * stack.element_size()
            for weight in layer.experts
            for _, _, stack in _stacks(weight, optimizers)
        )
        for layer in layers
    ]


def _stacks(weight: nn.Parameter, optimizers: Optimizers) -> Iterator[tuple[int, str, Tensor]]:
    """Keeper, name and content of each tensor ``[n, ...]`` of a parameter."""
    yield _PARAMETER, "data", weight
    if weight.grad is not None:
        yield _PARAMETER, "grad", weight.grad
    for keeper, name, value in _state(weight, optimizers):
        if _is_stack(value, weight):
            yield keeper, name, value


def _state(weight: nn.Parameter, optimizers: Optimizers) -> Iterator[tuple[int, str, Any]]:
    """Keeper, name and value, in an order that does not depend on how the state came about."""
    for keeper, optimizer in enumerate(optimizers):
        state = optimizer.state.get(weight, {})
        for name in sorted(state):
            yield keeper, name, state[name]


def _is_stack(value: Any, weight: nn.Parameter) -> bool:
    # Of a subclass nobody knows what its rows are, nor who else has a Parameter.
    return type(value) is Tensor and value.shape == weight.shape and value.device == weight.device


def _belongings(weight: nn.Parameter, optimizers: Optimizers) -> _Belongings:
    """Raises `InvalidArgument` for state that is neither."""
    stacks = [[keeper, name, dtype_name(stack.dtype)] for keeper, name, stack in _stacks(weight, optimizers)]
    scalars = []
    for keeper, name, value in _state(weight, optimizers):
        if _is_stack(value, weight):
            continue
        kind, plain = None, value
        if isinstance(value, Tensor) and value.numel() == 1 and value.ndim < 2:
            kind, plain = [dtype_name(value.dtype), value.device.type, list(value.shape)], value.item()
        if not isinstance(plain, _PLAIN):
            found = type(value).__name__
            if isinstance(value, Tensor):
                found += f" {list(value.shape)} on {value.device}"
            raise InvalidArgument(
                f"expected an elementwise optimizer, whose state is scalars and Tensor {list(weight.shape)} on "
                f"{weight.device} (as the parameter), got {type(optimizers[keeper]).__name__} with {name}: {found}"
            )
        scalars.append([keeper, name, kind, plain])
    return _Belongings(stacks, scalars)


def _agree(
    layers: Sequence[ShardedLayer],
    bases: Sequence[Placement],
    optimizers: Optimizers,
    group: Group,
    operation: Operation,
) -> list[list[_Belongings]]:
    """What belongs to each parameter of each layer, on all ranks; a refusal or difference anywhere raises on all."""
    mine: list[list[_Belongings]] = []
    structure: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        _check(layers, bases, optimizers, group)
        structure = _describe(layers, bases, optimizers)
        mine = [[_belongings(weight, optimizers) for weight in layer.experts] for layer in layers]
    except InvalidArgument as error:
        problem = InvalidArgument(f"{operation}: {error} {group.place_of_error}")
    text = json.dumps(mine).encode()
    summaries = agree(
        group,
        operation,
        digest_of("FSSDP reshard", structure),
        lambda: structure,
        problem=problem,
        payload=_DIGEST.pack(digest_of(text), len(text)),
    )
    if all(each == summaries[0] for each in summaries):
        return mine
    longest = max(_DIGEST.unpack(each)[1] for each in summaries)
    texts = group.transport.exchange(text.ljust(longest), operation)
    told = [[[_Belongings(*each) for each in layer] for layer in json.loads(each)] for each in texts]
    return [_of_owners(layer, [each[number] for each in told], operation, group) for number, layer in enumerate(layers)]


def _check(layers: Sequence[ShardedLayer], bases: Sequence[Placement], optimizers: Optimizers, group: Group) -> None:
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidArgument(f"expected torch optimizers, got {type(optimizer).__name__}")
    if len(bases) != len(layers):
        raise InvalidArgument(f"expected one base for each of {len(layers)} layers, got {len(bases)}")
    for layer, base in zip(layers, bases, strict=True):
        stored, owned = list(layer.layer.experts.owned), layer.base.owned_by(group.rank).tolist()
        if stored != owned:
            raise InvalidArgument(f"expected ranks to store whole experts of {layer.fqn}, {owned}, got {stored}")
        fits = isinstance(base, Placement) and base.holders.shape == layer.base.holders.shape
        if not fits or len(base.replicated()):
            raise InvalidArgument(
                f"expected a base of {layer.fqn} with {layer.base.num_chunks} experts on {layer.base.world_size} ranks "
                f"and no replicas, got {base}"
            )


def _describe(layers: Sequence[ShardedLayer], bases: Sequence[Placement], optimizers: Optimizers) -> dict[str, Any]:
    """What must be equal on all ranks, whatever they own."""
    weights = [weight for layer in layers for weight in layer.experts]
    held = [{id(param) for each in optimizer.param_groups for param in each["params"]} for optimizer in optimizers]
    return {
        "layers": [layer.fqn for layer in layers],
        "weights": [[list(weight.shape[1:]), dtype_name(weight.dtype)] for weight in weights],
        "owners": [layer.base.owners.tolist() for layer in layers],
        "new_owners": [base.owners.tolist() for base in bases],
        "optimizers": [
            [type(optimizer).__name__, *(id(weight) in ids for weight in weights)]
            for optimizer, ids in zip(optimizers, held, strict=True)
        ],
    }


def _of_owners(
    layer: ShardedLayer, told: list[list[_Belongings]], operation: Operation, group: Group
) -> list[_Belongings]:
    """What the ranks that own experts of ``layer`` have told of each of its parameters, which must be equal.

    Args:
        told: by rank, then by parameter.
    """
    first, *others = np.unique(layer.base.owners).tolist()
    for rank in others:
        for name, one, other in zip(layer.layer.experts.weight_names, told[first], told[rank], strict=True):
            if one != other:
                raise agreed_error(
                    CollectiveMismatch(
                        f"{operation}: expected equal gradients and state (but for values) of {name} of {layer.fqn} "
                        f"on all ranks that own experts, got {_only_in(one, other)} on rank {first} and "
                        f"{_only_in(other, one)} on rank {rank} {group.place_of_error}"
                    )
                )
    return told[first]


def _only_in(one: _Belongings, other: _Belongings) -> str:
    entries, others = [*one.stacks, *one.scalars], [*other.stacks, *other.scalars]
    only = [f"{name} {rest[-1]}" for _, name, *rest in (entry for entry in entries if entry not in others)]
    return ", ".join(only) or "nothing else"


@torch.no_grad()
def _move(
    layer: ShardedLayer, base: Placement, belongings: Sequence[_Belongings], optimizers: Optimizers, group: Group
) -> None:
    """Moves one layer; rows go from the old tensors to their places in the new ones."""
    owned, wanted = layer.base.owned_by(group.rank).tolist(), base.owned_by(group.rank).tolist()
    if not owned:
        for weight, each in zip(layer.experts, belongings, strict=True):
            _take_over(weight, each, optimizers)
    spots = [
        _Spot(weight, keeper, name)
        for weight, each in zip(layer.experts, belongings, strict=True)
        for keeper, name, _ in each.stacks
    ]
    before = [spot.get(optimizers).contiguous() for spot in spots]
    after = [stack.new_empty((len(wanted), *stack.shape[1:])) for stack in before]
    old = dict(zip(owned, rows_of(before), strict=True))
    new = dict(zip(wanted, rows_of(after), strict=True))
    for expert in old.keys() & new.keys():
        for to, row in zip(new[expert], old[expert], strict=True):
            to.copy_(row)

    moved = tuple(np.flatnonzero(layer.base.owners != base.owners).tolist())
    place = layer.base.replicate({expert: [base.owners[expert]] for expert in moved})
    call = Call("sparse_all_gather", place, moved, None, "auto", mean=False, trusted=True)
    leaving = [old[expert] for expert in moved if expert in old]
    # An owner is among the holders, so what leaves also has a place to arrive at: where it is.
    arriving = [new.get(expert) or old[expert] for expert in moved if expert in new or expert in old]
    operation = group.operation(f"FSSDP reshard ({layer.fqn})")
    with record_function(f"FSSDP::reshard ({layer.fqn})"):
        group.run(operation, lambda: call.run(group, operation, leaving, arriving))

    for stack in before:
        if stack.is_cuda:  # it may have been allocated for another stream than the one that has read it
            stack.record_stream(torch.cuda.current_stream(stack.device))
    for weight in layer.experts:
        # Setting ``data`` goes unnoticed by autograd, which would compute an old graph's backward with new experts.
        weight[:0].zero_()
    for spot, stack in zip(spots, after, strict=True):
        spot.put(stack, optimizers)
    layer.base = base
    layer.layer.experts.owned = wanted


def _take_over(weight: nn.Parameter, belongings: _Belongings, optimizers: Optimizers) -> None:
    """Gives a parameter without rows the gradient and state that it has on other ranks."""
    weight.grad = None
    for optimizer in optimizers:
        optimizer.state.pop(weight, None)
    _, *others = belongings.stacks
    for keeper, name, dtype in others:
        empty = torch.empty_like(weight, dtype=getattr(torch, dtype), requires_grad=False)
        _Spot(weight, keeper, name).put(empty, optimizers)
    for keeper, name, kind, value in belongings.scalars:
        if kind is not None:
            dtype, device, shape = kind
            where = device if device == "cpu" else weight.device
            value = torch.full(shape, value, dtype=getattr(torch, dtype), device=where)
        optimizers[keeper].state[weight][name] = value
