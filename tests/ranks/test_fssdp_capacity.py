"""Fixed capacity: gradients of one process that drops the same assignments, and steps that ask nobody anything."""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsecoll as sc
from sparsecoll.moe import Capacity, MoELayer, plan_routes
from sparsecoll.moe.kernels import NativeKernels, TorchKernels
from tests.fssdp_checks import (
    Case,
    Run,
    Script,
    Sharded,
    Toy,
    accumulate,
    batch_of,
    capacity_of,
    check_capacity,
    check_script,
    train,
)

CASES = {
    "room for all": Case(rows_per_expert=9),
    "room for all, replicas": Case(rows_per_expert=12, replicates=True, optimizer="adamw"),
    "room for few": Case(rows_per_expert=2),
    "room for few, replicas": Case(rows_per_expert=3, replicates=True, aux_loss_coef=0.3, shared_hidden_dim=3),
    "room for one, many experts": Case(rows_per_expert=1, num_experts=19, top_k=4, tokens=(30, 1, 12)),
    "first rank without tokens": Case(rows_per_expert=2, tokens=(0, 5, 3), replicates=True),
    "no tokens at all": Case(rows_per_expert=2, tokens=(0,)),
    "experts that nobody chose": Case(rows_per_expert=4, biases=((0, -50.0), (4, -50.0)), replicates=True),
    "all tokens to one expert": Case(rows_per_expert=4, top_k=1, biases=((2, 50.0),)),
    "one expert": Case(rows_per_expert=5, num_experts=1, top_k=1, biases=(), activation="gelu"),
    "top-k of all experts": Case(rows_per_expert=3, num_experts=4, top_k=4, replicates=True),
}


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, world_size) for i, name in enumerate(CASES) for world_size in ([1, 2, 3, 7] if i < 4 else [3])],
)
def test_training_equals_one_process(name: str, world_size: int) -> None:
    sc.run_local(lambda group: check_script(group, CASES[name]) and None, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_no_exchange_between_hosts(world_size: int) -> None:
    sc.run_local(check_capacity, world_size)


@pytest.mark.parametrize("node_of", [(0, 1, 2), (0, 0, 1, 1), (0, 1, 0, 1, 1)], ids=str)
def test_nodes_change_routes_and_not_results(node_of: tuple[int, ...]) -> None:
    case = Case(num_experts=7, top_k=3, rows_per_expert=3, replicates=True)
    sc.run_local(lambda group: check_script(group, case) and None, len(node_of), topology=sc.Topology(node_of))


def evaluate_between(run: Run) -> None:
    for step in range(2):
        run.model.eval()
        with torch.no_grad():
            run.loss(100 + step)
        run.loss(200 + step)
        run.model.train()
        run.optimizer.zero_grad()
        run.loss(step).backward()
        run.update()


def two_forwards_then_two_backwards(run: Run) -> None:
    first, second = run.loss(0), run.loss(1)
    second.backward()
    first.backward()
    run.update()


def recompute(run: Run, *, use_reentrant: bool) -> None:
    model: Any = run.model
    for layer in (model.first, model.second):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    train(run)


SCRIPTS: dict[str, Script] = {
    "accumulate": accumulate,
    "evaluate between": evaluate_between,
    "two forwards, two backwards": two_forwards_then_two_backwards,
    "checkpointing": functools.partial(recompute, use_reentrant=False),
    "reentrant checkpointing": functools.partial(recompute, use_reentrant=True),
}


@pytest.mark.parametrize("twice", [False, True], ids=["", "layer used twice"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_loop_equals_one_process(script: str, twice: bool) -> None:
    case = Case(rows_per_expert=3, replicates=True, twice=twice, tokens=(6, 3), aux_loss_coef=0.1)
    sc.run_local(lambda group: check_script(group, case, SCRIPTS[script]) and None, 3)


@pytest.mark.parametrize(
    "frozen",
    [("inlet",), ("first.experts", "second.experts"), ("inlet", "first", "norm", "second.router", "second.experts")],
    ids=str,
)
def test_frozen_parameters(frozen: tuple[str, ...]) -> None:
    case = Case(frozen=frozen, rows_per_expert=3, replicates=True)
    sc.run_local(lambda group: check_script(group, case) and None, 3)


@pytest.mark.parametrize("spare_ranks", [(), (1,)], ids=str)
def test_dense_parameter_that_some_ranks_use(spare_ranks: tuple[int, ...]) -> None:
    """Where no rank has a gradient, it is zeros."""
    sc.run_local(lambda group: check_script(group, Case(rows_per_expert=9, spare_ranks=spare_ranks)) and None, 3)


def test_rank_without_tokens_that_has_no_graph() -> None:
    def main(group: sc.Group) -> None:
        layers = nn.Sequential(nn.Linear(6, 6), MoELayer(6, 4, 5, 2))
        model: Any = sc.FSSDP(layers, group=group, capacity=Capacity(2))
        h = torch.zeros(0, 6) if group.rank == 1 else model[0](torch.ones(3, 6))
        model[1](h).sum().backward()
        assert all(param.grad is not None for param in model.parameters())

    sc.run_local(main, 3, timeout_s=20.0)


class NothingIsRead(TorchDispatchMode):
    """Raises where a thread's host code asks for a value, or for a shape that depends on values.

    On a GPU the host would wait for the device there.
    """

    _reading = frozenset({"_local_scalar_dense", "nonzero", "bincount", "_unique2", "masked_select", "equal"})
    _threads = threading.local()

    def __enter__(self) -> Any:
        self._threads.may_not_read = True
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        self._threads.may_not_read = False
        super().__exit__(*arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        assert name not in self._reading and not masks, f"{name} reads values"
        return func(*args, **(kwargs or {}))

    @classmethod
    def tolist(cls, tensor: Tensor) -> Any:
        """In place of the method, which is no operation of the dispatcher."""
        assert not getattr(cls._threads, "may_not_read", False), "tolist reads values"
        return tensor.detach().numpy().tolist()


@pytest.mark.parametrize("kernels", [NativeKernels(), TorchKernels()], ids=lambda kernels: type(kernels).__name__)
def test_a_step_reads_no_tensor(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and clipping; on a GPU they would run ahead of the device."""
    monkeypatch.setattr(sys.modules["sparsecoll.moe.permute"], "kernels_of", lambda x: kernels)
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: NothingIsRead.tolist(tensor))

    def main(group: sc.Group) -> None:
        run = Sharded(Case(rows_per_expert=3, replicates=True, shared_hidden_dim=3, tokens=(5, 0, 8)), group)
        batch = batch_of(run.case, 0, group.rank)
        with NothingIsRead():
            for _ in range(2):
                run.model(batch).backward()
                run.model.clip_grad_norm_(1e-3)
                report = run.model.load_report()["first"]
            for read in (lambda: report.dropped, lambda: float(run.model.scale)):
                with pytest.raises(AssertionError, match="reads values"):
                    read()

    sc.run_local(main, 3)


def test_what_is_reported() -> None:
    """Bytes and rows are the same whatever was routed; what was dropped is known when somebody asks."""
    case = Case(rows_per_expert=2, top_k=1, biases=((2, 50.0),), tokens=(7, 1, 4), replicates=True)

    def main(group: sc.Group) -> None:
        run = Sharded(case, group)
        reports = run.model.load_report()
        place = capacity_of(case, 3).placements(dict.fromkeys(("first", "second"), sc.Placement.even(5, 3)))["first"]
        assert reports["first"].hot == tuple(place.replicated()) and reports["first"].dropped == [0] * 5
        loads = np.full((3, 5), 2)
        rows = plan_routes(loads, place.holders, place.owners, group.topology.node_of).quotas.sum(axis=1)
        num_travelling = rows[group.rank].sum() + rows[:, group.rank].sum() - 2 * rows[group.rank, group.rank]
        seen = []
        for step in range(3):
            before = group.stats()
            run.loss(step).backward()
            moved = group.stats().since(before)
            report = run.model.load_report()["first"]
            assert report.tokens == [] and report.rows_per_expert == 2 and report.dead_experts == []
            assert report.dropped == [0, 0, max(0, case.tokens[group.rank] - 2), 0, 0]
            assert report.dispatch_bytes == 2 * num_travelling * case.dim * case.dtype.itemsize
            assert report.gathered.sent_bytes == run.model.last_plan("first").sent_bytes[group.rank]
            assert report.sparse_bytes > 0 or group.rank not in place.owners[place.replicated()]
            plan = run.model.last_plan("first")
            seen.append((moved, report.imbalance_before, report.imbalance_after, report.percentiles, plan.digest))
        assert seen[0] == seen[1] == seen[2]
        assert seen[0][1] == 6 / 5 and seen[0][2] >= 1.0, "ten rows of five experts on three ranks"

    sc.run_local(main, 3)


@pytest.mark.parametrize(
    ("mine", "text"),
    [(Capacity(3), "rows_per_expert"), (None, "rows_per_expert"), (Capacity(2, {"first": {0: [2]}}), "replicas")],
    ids=str,
)
def test_capacities_that_differ_between_ranks(mine: Capacity | None, text: str) -> None:
    def main(group: sc.Group) -> None:
        with pytest.raises(sc.CollectiveMismatch, match=text):
            sc.FSSDP(Toy(Case()), group=group, capacity=mine if group.rank == 1 else Capacity(2))

    sc.run_local(main, 3)


@pytest.mark.parametrize(
    ("replicate", "text"),
    [
        ({"third": {0: [1]}}, "first, second, got 'third'"),
        ({"first": {5: [1]}}, "got 5"),
        ({"first": {0: [3]}}, "got 3"),
    ],
    ids=str,
)
def test_replicas_that_cannot_be(replicate: dict[str, Any], text: str) -> None:
    def main(group: sc.Group) -> None:
        with pytest.raises(sc.InvalidArgument, match=rf"^FSSDP: .*{text}.* \(rank"):
            sc.FSSDP(Toy(Case()), group=group, capacity=Capacity(2, replicate))

    sc.run_local(main, 3)
