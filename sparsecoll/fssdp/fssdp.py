"""The wrapper: shards a model's experts in place and keeps its manners."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sparsecoll.balance import Balancer, Costs, Predictor
from sparsecoll.collectives.agreement import agree, digest_of
from sparsecoll.errors import InvalidArgument
from sparsecoll.fssdp.backward import Backward
from sparsecoll.fssdp.dense import broadcast
from sparsecoll.fssdp.dispatch import FixedDispatcher, LoadDispatcher
from sparsecoll.fssdp.layer import ShardedLayer, Shared
from sparsecoll.fssdp.measure import bytes_per_s
from sparsecoll.fssdp.module import FSSDPModule
from sparsecoll.fssdp.policy import Policy, Rematerialize, Sharding, Spread
from sparsecoll.fssdp.pool import ReplicaPool
from sparsecoll.fssdp.prefetch import PrefetchOrder
from sparsecoll.fssdp.shard import shard_experts
from sparsecoll.fssdp.state import State
from sparsecoll.fssdp.timeline import Timeline
from sparsecoll.group import Group, resolve_group
from sparsecoll.moe import Capacity, MoELayer
from sparsecoll.placement import Placement

__all__ = ["FSSDP"]

_log = logging.getLogger("sparsecoll")


def FSSDP(
    module: nn.Module,
    *,
    group: Any = None,
    balancer: str | Balancer = "hecate",
    predictor: str | Predictor = "mean",
    calibrate: bool = False,
    spread: Spread = "nearest",
    rematerialize: Rematerialize = False,
    sharding: Sharding = "owners",
    costs: Mapping[str, Costs] | None = None,
    capacity: Capacity | None = None,
) -> FSSDPModule:
    """Applies fully sharded sparse data parallelism to ``module``, in place (Hecate, sections 3 and 4).

    Every `MoELayer` inside keeps only its share of the experts on each rank, parameters and (through any torch
    optimizer) optimizer state; parameter names stay, ``[num_experts, ...]`` becomes ``[num_owned, ...]``. Each
    iteration copies the experts that the balancer picks to where they help; tokens go to the nearest copy. All other
    parameters are replicated. Rank 0's values are taken on every rank.

    Gradients after ``backward()``, of experts and of dense parameters alike, are those of the mean over ranks of what
    each rank's loss was. Wrap before or after making the optimizer, but before its first step.

    With a ``capacity`` every rank sends a fixed number of rows to every expert, and replicas are where it says. Tokens
    may then miss experts, and what does not change between steps is agreed on here once: a step that only computes and
    averages makes no exchange between hosts, has the same shapes each time, and never waits for a GPU, so that a CUDA
    graph can capture it. In exchange it is the caller's part that all ranks run forward and backward in the same mode
    (training or not, gradients or not), with the same parameters requiring gradients; a dense parameter that requires
    one and has none gets zeros; and the layers' inputs always take part in the graph.

    Collective: all ranks call it, with models of equal structure.
    Stream: forward and backward run in order on the current stream, which must be that of the caller's own work on the
        model; collectives overlap with it on streams of their own, and their results are ready on it. Where the host
        waits for the device is listed in ``sparsecoll/fssdp/dispatch.py``. Gradients are set on the stream that is
        current where ``backward()`` is called.
    Memory: a rank keeps its own experts and, from forward to backward, copies of the hot ones.

    Args:
        module: holds at least one `MoELayer`, and is called as a whole for a forward. Its parameters and buffers are
            on the group's device.
        group: a Group, torch ProcessGroup, one-dimensional DeviceMesh or mpi4py communicator; None is the default.
        balancer: decides where experts get replicas: one of `sparsecoll.balance.BALANCERS` (``none`` is plain expert
            parallelism), or an object with `Balancer`'s interface. It is not asked where there is a ``capacity``, for
            nobody could tell it the loads.
        predictor: of the loads that a balancer is asked with before the router: ``mean`` of the last five iterations,
            ``last``, ``decaying``, or an object with `Predictor`'s interface.
        calibrate: ask the balancer again after the router, with true loads and the memory that is left, and gather
            replicas of further experts if they save more time than that takes (Hecate, section 4.2). Not with slices.
        spread: how the tokens of an expert are shared among its holders where the balancer leaves it open: ``nearest``
            (at their source, else evenly over the holders in its node, else at the owner; Hecate, section 4.4), or
            ``quota`` (so that the busiest rank has as little as the replicas allow, near holders first).
        rematerialize: release replicas after a layer's forward and gather them again for its backward, which hides
            behind the backward of the dense layers between; ``auto`` does so where not all replicas of a step fit into
            half of the free memory.
        sharding: ``owners`` store whole experts; with ``slices`` every expert is cut evenly over all ranks and all
            experts are gathered in each step, as in LAER-MoE's FSEP.
        costs: by the layer's name; what is not given is measured in training, so that Placements, and with them the
            order of summation, may differ from run to run. `FSSDPModule.costs` gives those in use.
        capacity: None for routes that follow the loads of each forward and drop nothing.

    Returns:
        The same module, whose class is now a subclass of its own and of `FSSDPModule`.

    Raises:
        InvalidArgument: no MoE layer, wrapped already, parameters elsewhere than on the group's device, or a capacity
            that does not fit the layers.
        CollectiveMismatch: models or capacities differ between ranks.
    """
    resolved = resolve_group(group)
    choices = balancer, predictor, calibrate, spread, rematerialize, sharding, costs
    agreed = _agree_on_structure(module, choices, capacity, resolved)
    order, layers = PrefetchOrder(), agreed.layers
    resolved.reserve_record(64 + 8 * (5 + max(each.experts.num_experts for each in layers.values())))
    with torch.no_grad():
        broadcast([*module.parameters(), *module.buffers()], resolved)
    device = torch.device(resolved.device)
    shared = Shared(
        group=resolved,
        copies=resolved.twin(),
        policy=agreed.policy,
        pool=ReplicaPool(device),
        timeline=Timeline.on_streams() if device.type == "cuda" else Timeline(),
        num_layers=len(layers),
        bytes_per_s=bytes_per_s(resolved, max(_expert_bytes(each) for each in layers.values())),
    )
    sharded = {name: ShardedLayer(name, each, agreed.bases[name], shared) for name, each in layers.items()}
    for layer in sharded.values():
        shard_experts(layer)
    experts = {id(weight) for layer in sharded.values() for weight in layer.experts}
    dense = [param for param in module.parameters() if id(param) not in experts]
    backward = Backward(resolved, dense, order, averages_missing=capacity is not None)
    for name, layer in sharded.items():
        layer.layer.dispatcher = (
            LoadDispatcher(layer, backward)
            if capacity is None
            else FixedDispatcher(layer, backward, agreed.policy.fixed[name], capacity.rows_per_expert)
        )
    state = State(module, shared, sharded, dense, backward, order)
    module.register_forward_pre_hook(lambda *_: state.before_forward())
    module.__class__ = type(f"FSSDP{type(module).__name__}", (FSSDPModule, type(module)), {})
    assert isinstance(module, FSSDPModule)
    module._fssdp = state
    if resolved.rank == 0:
        _log.info("FSSDP: %d MoE layers on %s: %s", len(sharded), resolved, ", ".join(sharded))
    return module


class _Agreed(NamedTuple):
    """What all ranks have found alike; by the layer's name, with owners and no replicas."""

    policy: Policy
    layers: dict[str, MoELayer]
    bases: dict[str, Placement]


def _agree_on_structure(
    module: nn.Module, choices: tuple[Any, ...], capacity: Capacity | None, group: Group
) -> _Agreed:
    """Finds the layers and what decides about them; a refusal on one rank, or any difference, raises on all."""
    layers = {name: each for name, each in module.named_modules() if isinstance(each, MoELayer)}
    bases = {name: Placement.even(each.experts.num_experts, group.world_size) for name, each in layers.items()}
    places = bases
    problem: Exception | None = None
    try:
        policy = Policy.of(*choices)
        _check(module, torch.device(group.device))
        _check_choices(policy, capacity, layers, group.world_size)
        if capacity is not None:
            places = capacity.placements(bases)
            policy = replace(policy, fixed=places)
    except InvalidArgument as error:
        problem = InvalidArgument(f"FSSDP: {error} {group.place_of_error}")
    structure = {
        "parameters": [
            [name, list(each.shape), str(each.dtype), each.requires_grad] for name, each in module.named_parameters()
        ],
        "buffers": [[name, list(each.shape), str(each.dtype)] for name, each in module.named_buffers()],
        "layers": [
            [name, each.experts.num_experts, each.router.top_k, each.experts.activation.name]
            for name, each in layers.items()
        ],
        "choices": [_named(each) for each in choices],
        "rows_per_expert": None if capacity is None else capacity.rows_per_expert,
        "replicas": [[name, [np.flatnonzero(row).tolist() for row in each.holders]] for name, each in places.items()],
    }
    operation = group.operation("FSSDP")
    group.run(
        operation, lambda: agree(group, operation, digest_of("FSSDP", structure), lambda: structure, problem=problem)
    )
    return _Agreed(policy, layers, bases)


def _named(choice: Any) -> str:
    """Of objects that are no dataclasses the type, for their names may have addresses in them."""
    if isinstance(choice, dict):
        return str({name: _named(each) for name, each in sorted(choice.items())})
    is_plain = choice is None or isinstance(choice, (str, bool)) or is_dataclass(choice)
    return repr(choice) if is_plain else str(type(choice))


def _check(module: nn.Module, device: torch.device) -> None:
    if isinstance(module, FSSDPModule):
        raise InvalidArgument(f"expected a module that is not wrapped yet, got {type(module).__name__}")
    layers = [each for each in module.modules() if isinstance(each, MoELayer)]
    if not layers:
        raise InvalidArgument(f"expected a module with a MoELayer in it, got {type(module).__name__}")
    if len({id(each.experts) for each in layers}) < len(layers):
        raise InvalidArgument("expected every MoELayer to have experts of its own, got layers that share them")
    if any(each.experts.gather_rows is not None for each in layers):
        raise InvalidArgument("expected experts that are not sharded yet, got some that are")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device != device:
            raise InvalidArgument(
                f"expected parameters and buffers on {device} (as the group), got {name} on {tensor.device}"
            )


def _check_choices(policy: Policy, capacity: Capacity | None, layers: Mapping[str, MoELayer], world_size: int) -> None:
    unknown = [name for name in policy.costs if name not in layers]
    if unknown:
        raise InvalidArgument(f"costs: expected names of MoE layers ({', '.join(layers)}), got {', '.join(unknown)}")
    if policy.sharding == "slices":
        if policy.calibrate:
            raise InvalidArgument("calibrate: expected False with slices, whose experts are all gathered, got True")
        for name, layer in layers.items():
            for weight in layer.experts.weights:
                if weight.shape[1] % world_size:
                    raise InvalidArgument(
                        f"sharding: expected matrices whose rows {world_size} ranks can share evenly, got "
                        f"{list(weight.shape[1:])} in {name}"
                    )
    if capacity is not None and policy.rematerialize == "auto":
        raise InvalidArgument("rematerialize: expected True or False with a capacity, got 'auto'")


def _expert_bytes(layer: MoELayer) -> int:
    return sum(each.nbytes // each.shape[0] for each in layer.experts.weights)
