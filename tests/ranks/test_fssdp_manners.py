"""How a wrapped model behaves beside training: names, clipping, errors on all ranks, the same bits every time."""

from __future__ import annotations

import copy
import functools
import gc
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsecoll as sc
from sparsecoll.balance import Balance, Costs, Loads, NoReplicas
from sparsecoll.moe import MoELayer
from tests.fssdp_checks import BUSY_REPLICAS, Busiest, Case, Run, Scattered, Sharded, Toy, check_script, train


class Small(nn.Module):
    """One MoE layer behind a linear one; the parts of it that tests vary are arguments."""

    def __init__(
        self,
        *,
        name: str = "moe",
        shape: tuple[int, int] = (2, 3),
        extra: int = 0,
        num_buffers: int = 0,
        dtype: torch.dtype = torch.float32,
        **sizes: Any,
    ) -> None:
        super().__init__()
        self.inlet = nn.Linear(6, 6, dtype=dtype)
        self.add_module(name, MoELayer(6, 4, **{"num_experts": 5, "top_k": 2, "dtype": dtype, **sizes}))
        self.free = nn.Parameter(torch.zeros(shape))
        self.rest = nn.ModuleList(nn.Linear(6, 6) for _ in range(extra))
        for index in range(num_buffers):
            self.register_buffer(f"buffer{index}", torch.ones(3))


def raised_by(
    main: Callable[[sc.Group], Any], world_size: int = 3, timeout_s: float = 20.0, **options: Any
) -> list[Any]:
    """What each rank raised, or None; a rank leaves when it has raised."""

    def guarded(group: sc.Group) -> Exception | None:
        try:
            main(group)
        except Exception as error:
            return error
        return None

    started_s = time.monotonic()
    raised = sc.run_local(guarded, world_size, timeout_s=timeout_s, **options)
    assert time.monotonic() - started_s < timeout_s / 2, "nobody waited for a timeout"
    return raised


def test_module_stays_itself() -> None:
    def main(group: sc.Group) -> None:
        model: Any = Toy(Case())
        names = [name for name, _ in model.named_parameters()], list(model.state_dict()), list(model.named_modules())
        params = dict(model.named_parameters())
        wrapped = sc.FSSDP(model, group=group)
        assert wrapped is model and isinstance(wrapped, Toy) and isinstance(wrapped, sc.FSSDPModule)
        assert ([name for name, _ in model.named_parameters()], list(model.state_dict())) == names[:2]
        assert [name for name, _ in model.named_modules()] == [name for name, _ in names[2]]
        assert all(param is params[name] for name, param in model.named_parameters())

    sc.run_local(main, 2)


def test_moe_layer_alone_and_default_group() -> None:
    def main(group: sc.Group) -> None:
        model = sc.FSSDP(MoELayer(6, 4, 5, 2), balancer="none")
        model(torch.ones(2, 3, 6)).sum().backward()
        assert list(model.load_report()) == [""] and model.last_plan("") is None

    sc.run_local(main, 2)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_torch_s(norm_type: float, max_norm: float) -> None:
    def clip(run: Run) -> None:
        run.loss(0).backward()
        if isinstance(run, Sharded):
            norm = run.model.clip_grad_norm_(max_norm, norm_type)
        else:
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm, norm_type)
        run.notes.append(("norm", norm))
        run.update()

    sc.run_local(lambda group: check_script(group, Case(), clip) and None, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["outlet.bias", "first.experts.down_proj"])
def test_clipping_of_a_norm_that_is_not_finite(value: float, where: str) -> None:
    def clip(run: Run) -> None:
        run.loss(0).backward()
        grad = run.model.get_parameter(where).grad
        assert grad is not None
        grad[:1] = value  # the first owned expert of every rank; of one process, each of them
        if isinstance(run, Sharded):
            norm = run.model.clip_grad_norm_(1.0)
            with pytest.raises(RuntimeError, match="finite"):
                run.model.clip_grad_norm_(1.0, error_if_nonfinite=True)
        else:
            if ".experts." in where:
                grad[sc.Placement.even(5, 3).owners.searchsorted([0, 1, 2])] = value
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.notes.append(("norm", norm))
        grads = {name: param.grad for name, param in run.model.named_parameters()}
        run.notes.append(("gradients", grads))

    def main(group: sc.Group) -> None:
        check_script(group, Case(), clip)

    sc.run_local(main, 3)


@pytest.mark.parametrize("balancer", [BUSY_REPLICAS, Scattered(), NoReplicas()], ids=str)
def test_runs_with_one_seed_agree_bit_for_bit(balancer: Any) -> None:
    case = Case(num_experts=7, top_k=3, balancer=balancer, dtype=torch.float32, optimizer="adamw", tokens=(33, 0, 57))

    def main(group: sc.Group) -> Any:
        run = Sharded(case, group)
        train(run)
        return [{name: value.tolist() for name, value in run.model.state_dict().items()}, run.notes[-4][1].tolist()]

    first, second = sc.run_local(main, 3), sc.run_local(main, 3)
    assert first == second
    assert first[0][0] == first[1][0] == first[2][0]


def test_a_model_that_nobody_knows_is_freed() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        train(run)
        known = [weakref.ref(each) for each in (run.model, *run.model.parameters())]
        del run
        for rank in range(group.world_size):  # of two threads that collect at once, one does nothing
            group.barrier()
            if group.rank == rank:
                gc.collect()
        group.barrier()
        assert not any(each() is not None for each in known)

    sc.run_local(main, 2)


def test_layers_used_as_modules_of_their_own() -> None:
    """Without the root's forward there is no prefetch, and the results are the same."""

    def main(group: sc.Group) -> None:
        model: Any = sc.FSSDP(Toy(Case()), group=group, balancer=BUSY_REPLICAS)
        x = torch.ones(4, 6, dtype=torch.float64) * (1 + group.rank)
        for _ in range(2):
            model.first(x).sum().backward()
        single = Toy(Case())
        torch.testing.assert_close(model.first(x), single.first(x), rtol=1e-9, atol=1e-11)

    sc.run_local(main, 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("balancer", [BUSY_REPLICAS, Scattered()], ids=str)
def test_activation_checkpointing(use_reentrant: bool, balancer: Busiest | Scattered) -> None:
    """Recomputation routes and places as the forward did."""

    def recompute(run: Run) -> None:
        model: Any = run.model
        for layer in (model.first, model.second):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
        train(run)

    sc.run_local(lambda group: check_script(group, Case(balancer=balancer), recompute) and None, 3)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_shared_expert_computes_while_others_are_late(checked: bool) -> None:
    """Rank 0 does not leave its router before rank 1 has been through its shared expert."""
    is_through = threading.Event()

    def main(group: sc.Group) -> None:
        def wait(*_: Any) -> None:
            assert is_through.wait(10.0), "rank 1 waits too"

        layer: Any = sc.FSSDP(MoELayer(6, 4, 5, 2, shared_hidden_dim=3), group=group)
        if group.rank == 0:
            layer.router.register_forward_hook(wait)
        else:
            layer.shared_expert.register_forward_hook(lambda *_: is_through.set())
        layer(torch.ones(4, 6)).sum().backward()

    sc.run_local(main, 2, checked=checked)


def test_rank_without_tokens_that_has_no_graph() -> None:
    """Zeros made on the spot instead of an embedding's output: its backward still takes part."""

    def main(group: sc.Group) -> None:
        model: Any = sc.FSSDP(nn.Sequential(nn.Linear(6, 6), MoELayer(6, 4, 5, 2)), group=group)
        h = torch.zeros(0, 6) if group.rank == 1 else model[0](torch.ones(3, 6))
        model[1](h).sum().backward()
        assert all(param.grad is not None for param in model.parameters())

    sc.run_local(main, 3, timeout_s=20.0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda group: sc.FSSDP(nn.Linear(3, 3), group=group), "MoELayer"),
        (lambda group: sc.FSSDP(sc.FSSDP(Small(), group=group), group=group), "wrapped"),
        (lambda group: sc.FSSDP(Small(), group=group, balancer="fair"), "hecate"),
        (lambda group: sc.FSSDP(Small(), group=group, balancer=object()), "exact and balance"),
        (lambda group: sc.FSSDP(Small(), group=group, predictor="oracle"), "decaying, last, mean"),
        (lambda group: sc.FSSDP(Small(), group=group, predictor=object()), "predict and window"),
        (lambda group: sc.FSSDP(Small(), group=group, rematerialize="often"), "True, False, 'auto'"),
        (lambda group: sc.FSSDP(Small(), group=group, sharding="rows"), "'owners', 'slices'"),
        (lambda group: sc.FSSDP(Small(), group=group, spread="far"), "'nearest', 'quota'"),
        (lambda group: sc.FSSDP(Small(), group=group, costs={"moe": 3}), "Costs"),
        (lambda group: sc.FSSDP(Small(), group=group, sharding="slices", calibrate=True), "calibrate"),
        (lambda group: sc.FSSDP(Small().to("meta"), group=group), "meta"),
        (lambda group: sc.FSSDP(Small(), group=group).last_plan("other"), "moe"),
        (lambda group: copy.deepcopy(sc.FSSDP(Small(), group=group)), "copied"),
    ],
    ids=[
        "no MoE layer",
        "wrapped twice",
        "unknown balancer",
        "no balancer",
        "unknown predictor",
        "no predictor",
        "rematerialize",
        "sharding",
        "spread",
        "costs",
        "calibration of slices",
        "meta",
        "no such layer",
        "deepcopy",
    ],
)
def test_wrong_use_is_an_invalid_argument_on_all_ranks(make: Callable[[sc.Group], Any], text: str) -> None:
    for error in raised_by(make):
        assert isinstance(error, sc.InvalidArgument) and text in str(error)


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({}, {"extra": 1}),
        ({"extra": 2}, {"extra": 1}),
        ({}, {"num_buffers": 1}),
        ({}, {"shape": (3, 2)}),
        ({}, {"shape": (2, 4)}),
        ({}, {"dtype": torch.float64}),
        ({}, {"num_experts": 6}),
        ({}, {"num_experts": 99}),
        ({}, {"activation": "gelu"}),
        ({}, {"name": "other"}),
        ({"top_k": 1}, {"top_k": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_models_that_differ_between_ranks(options: dict[str, Any], other: dict[str, Any], checked: bool) -> None:
    def main(group: sc.Group) -> None:
        sc.FSSDP(Small(**(other if group.rank == 1 else options)), group=group)

    for error in raised_by(main, checked=checked):
        assert isinstance(error, sc.CollectiveMismatch), error


def test_a_model_that_one_rank_cannot_wrap() -> None:
    def main(group: sc.Group) -> None:
        sc.FSSDP(nn.Linear(3, 3) if group.rank == 1 else Small(), group=group)

    raised = raised_by(main)
    assert isinstance(raised[1], sc.InvalidArgument)
    for error in (raised[0], raised[2]):
        assert isinstance(error, sc.CollectiveMismatch) and "rank 1" in str(error)


class Obedient:
    """Returns what a test wants it to."""

    def __init__(self, place: Callable[[sc.Placement], Any], exact: bool) -> None:
        self._place, self.exact = place, exact

    def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Any:
        place = self._place(base)
        return Balance(place) if isinstance(place, sc.Placement) else place


@pytest.mark.parametrize("exact", [False, True], ids=["before the router", "after the router"])
@pytest.mark.parametrize(
    "place",
    [
        lambda base: None,
        lambda base: sc.Placement.of_owners((base.owners + 1) % 3, 3),
        lambda base: sc.Placement.of_owners((base.owners + 1) % 3, 3).replicate({0: range(3)}),
        lambda base: sc.Placement.even(base.num_chunks + 1, 3),
        lambda base: sc.Placement.even(base.num_chunks, 2),
        lambda base: 1 / 0,
    ],
    ids=["None", "moves owners", "moves owners, with replicas", "another expert", "other ranks", "raises"],
)
def test_balancer_that_breaks_the_rules(place: Callable[[sc.Placement], Any], exact: bool) -> None:
    def main(group: sc.Group) -> None:
        train(Sharded(Case(num_experts=6, balancer=Obedient(place, exact)), group))

    for error in raised_by(main):
        assert isinstance(error, sc.InvalidArgument) and "balancer" in str(error), repr(error)


@pytest.mark.parametrize("exact", [False, True], ids=["before the router", "after the router"])
@pytest.mark.parametrize(
    "choice", [({0: [2]}, {1: [2]}), ({0: [2]}, {}), ({}, {0: [2]}), ({0: [0, 1, 2]}, {0: [0, 1]})], ids=str
)
def test_balancers_that_disagree(choice: tuple[dict[int, list[int]], dict[int, list[int]]], exact: bool) -> None:
    def main(group: sc.Group) -> None:
        replicas = choice[group.rank == 1]
        train(Sharded(Case(balancer=Obedient(lambda base: base.replicate(replicas), exact)), group))

    for error in raised_by(main):
        assert isinstance(error, sc.CollectiveMismatch), repr(error)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_rank_in_another_mode_is_named(mode: str, checked: bool) -> None:
    """The group stays usable afterwards."""

    def main(group: sc.Group) -> str:
        run = Sharded(Case(), group)
        train(run)
        if mode == "eval":
            run.model.train(group.rank != 1)
        with torch.set_grad_enabled(mode == "eval" or group.rank != 1), pytest.raises(sc.CollectiveMismatch) as caught:
            run.loss(5)
        run.model.train()
        run.loss(6).backward()
        return str(caught.value)

    for message in sc.run_local(main, 3, checked=checked):
        assert "first" in message and "rank 1" in message and ("training" if mode == "eval" else "grad") in message


@pytest.mark.parametrize("place", ["first", "norm", "second", "outlet"])
@pytest.mark.parametrize("balancer", [BUSY_REPLICAS, NoReplicas()], ids=str)
def test_rank_that_raises_in_forward(place: str, balancer: Busiest | NoReplicas) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of rank 1")

    def main(group: sc.Group) -> None:
        run = Sharded(Case(balancer=balancer), group)
        train(run)
        if group.rank == 1:
            getattr(run.model, place).register_forward_pre_hook(fail)
        run.loss(5).backward()

    raised = raised_by(main)
    assert isinstance(raised[1], ZeroDivisionError)
    for error in (raised[0], raised[2]):
        assert isinstance(error, sc.PeerFailure) and ("rank 1" in str(error) or "aborted" in str(error)), error


def test_rank_that_raises_in_backward() -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of rank 1")

    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        train(run)
        if group.rank == 1:
            run.model.norm.weight.register_hook(fail)
        run.loss(5).backward()

    raised = raised_by(main)
    assert isinstance(raised[1], ZeroDivisionError)
    for error in (raised[0], raised[2]):
        assert isinstance(error, sc.PeerFailure), error


def test_rank_that_skips_backward_is_waited_for_and_named() -> None:
    everyone_is_through = threading.Barrier(3)

    def main(group: sc.Group) -> Exception | None:
        loss = Sharded(Case(), group).loss(0)
        group.timeout_s = 0.5
        raised = None
        if group.rank != 1:
            try:
                loss.backward()
            except sc.SparsecollError as error:
                raised = error
        everyone_is_through.wait(15.0)
        return raised

    raised = sc.run_local(main, 3, timeout_s=20.0)
    assert raised[1] is None
    assert any(isinstance(error, sc.CollectiveTimeout) for error in raised)
    for error in (raised[0], raised[2]):
        assert isinstance(error, (sc.CollectiveTimeout, sc.PeerFailure)) and "rank" in str(error)


def test_step_between_forward_and_backward_is_noticed() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        train(run)
        loss = run.loss(5)
        run.optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    sc.run_local(main, 3)


def test_a_failed_iteration_leaves_no_gradients_of_its_own() -> None:
    """After an error that all ranks share, the next backward is one process's again."""

    def stumble(run: Run) -> None:
        run.loss(0).backward()
        run.update()
        if isinstance(run, Sharded):
            run.model.train(run.group.rank != 0)
            with pytest.raises(sc.CollectiveMismatch):
                run.model(torch.ones(2, 6, dtype=torch.float64))
            run.model.train()
        run.optimizer.zero_grad()
        run.loss(1).backward()
        run.update()

    sc.run_local(lambda group: check_script(group, Case(), stumble) and None, 3)


def test_closed_group() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        group.close()
        with pytest.raises(sc.InvalidArgument, match="closed"):
            run.loss(0)

    sc.run_local(main, 2)
