"""The gradient rule: losses, gradients, norms and steps of a wrapped model are those of one process."""

from __future__ import annotations

import pytest
import torch

import sparsecoll as sc
from sparsecoll.balance import Busiest, NoReplicas
from tests.fssdp_checks import (
    BUSY_REPLICAS,
    Case,
    Run,
    Scattered,
    Script,
    Sharded,
    accumulate,
    assert_notes_equal,
    check_script,
    notes_of_one_process,
    owned_rows,
    train,
)

WORLD_SIZES = [1, 2, 3, 4, 7]

CASES = {
    "uneven experts, or fewer than ranks": Case(),
    "no replicas": Case(balancer=NoReplicas()),
    "replicas here and there": Case(balancer=Scattered(), num_experts=6, optimizer="adamw"),
    "replicas here and there, expert that nobody chose": Case(balancer=Scattered(), biases=((1, -50.0), (2, -50.0))),
    "all experts everywhere": Case(balancer=Busiest(most=5, min_gain=0, window=1)),
    "adamw, aux loss": Case(optimizer="adamw", aux_loss_coef=0.3),
    "gelu, shared expert": Case(activation="gelu", shared_hidden_dim=3, top_k=1),
    "swiglu, shared expert, aux loss": Case(shared_hidden_dim=5, aux_loss_coef=1.0, top_k=3, optimizer="adamw"),
    "first rank without tokens": Case(tokens=(0, 5, 3), aux_loss_coef=0.1),
    "last rank without tokens, no replicas": Case(tokens=(6, 5, 4, 3, 2, 1, 0), balancer=NoReplicas()),
    "expert that nobody chose": Case(biases=((0, -50.0), (4, -50.0))),
    "all tokens to one expert": Case(top_k=1, biases=((2, 50.0),)),
    "all tokens to one expert, no replicas": Case(top_k=1, biases=((4, 50.0),), balancer=NoReplicas()),
    "one expert": Case(num_experts=1, top_k=1, biases=()),
    "many experts": Case(num_experts=19, top_k=4, optimizer="adamw", tokens=(30, 1, 12)),
}


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, world_size) for i, name in enumerate(CASES) for world_size in (WORLD_SIZES if i < 4 else [2, 3, 7])],
)
def test_training_equals_one_process(name: str, world_size: int) -> None:
    sc.run_local(lambda group: check_script(group, CASES[name]) and None, world_size)


@pytest.mark.parametrize("node_of", [(0, 1, 2), (0, 0, 1, 1), (0, 1, 0, 1, 1)], ids=str)
def test_nodes_change_routes_and_not_results(node_of: tuple[int, ...]) -> None:
    case = Case(num_experts=7, top_k=3, balancer=Busiest(most=4, min_gain=0))
    sc.run_local(lambda group: check_script(group, case) and None, len(node_of), topology=sc.Topology(node_of))


def test_unchecked_group() -> None:
    sc.run_local(lambda group: check_script(group, Case()) and None, 3, checked=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizer_from_before_wrapping(optimizer: str) -> None:
    case = Case(optimizer=optimizer)

    def main(group: sc.Group) -> None:
        run = Sharded(case, group, optimizer_first=True)
        train(run)
        assert_notes_equal(run, notes_of_one_process(case, train, group.world_size))

    sc.run_local(main, 3)


def evaluate_between(run: Run) -> None:
    """Steps of training with evaluations, with and without gradients, before, between and after."""
    for step in range(3):
        run.model.eval()
        with torch.no_grad():
            run.loss(100 + step)
        run.loss(200 + step)
        run.model.train()
        run.optimizer.zero_grad()
        run.loss(step).backward()
        run.update()
    run.model.eval()
    with torch.inference_mode():
        run.loss(300)


def accumulate_with_averaging_each_time(run: Run) -> None:
    for step in range(2):
        run.optimizer.zero_grad()
        for micro in range(3):
            run.loss(3 * step + micro).backward()
        run.update()


def accumulate_into_zeros(run: Run) -> None:
    for step in range(3):
        run.optimizer.zero_grad(set_to_none=False)
        run.loss(step).backward()
        run.update()


def never_zero(run: Run) -> None:
    for step in range(3):
        run.loss(step).backward()
        run.update()


def two_forwards_then_one_backward(run: Run) -> None:
    for step in range(2):
        run.optimizer.zero_grad()
        (run.loss(2 * step) + 0.5 * run.loss(2 * step + 1)).backward()
        run.update()


def two_forwards_then_two_backwards(run: Run) -> None:
    """The second forward's backward comes first."""
    for step in range(2):
        run.optimizer.zero_grad()
        first, second = run.loss(2 * step), run.loss(2 * step + 1)
        second.backward()
        first.backward()
        run.update()


def backward_twice_through_one_graph(run: Run) -> None:
    for step in range(2):
        run.optimizer.zero_grad()
        loss = run.loss(step)
        loss.backward(retain_graph=True)
        loss.backward()
        run.update()


def forwards_that_are_thrown_away(run: Run) -> None:
    for step in range(3):
        run.optimizer.zero_grad()
        run.loss(50 + step)
        run.loss(step).backward()
        run.update()


SCRIPTS: list[Script] = [
    accumulate,
    accumulate_with_averaging_each_time,
    accumulate_into_zeros,
    never_zero,
    evaluate_between,
    two_forwards_then_one_backward,
    two_forwards_then_two_backwards,
    backward_twice_through_one_graph,
    forwards_that_are_thrown_away,
]


@pytest.mark.parametrize(
    ("balancer", "twice"), [(BUSY_REPLICAS, False), (Scattered(), True)], ids=["", "layer used twice"]
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_loop_equals_one_process(script: Script, balancer: Busiest | Scattered, twice: bool) -> None:
    case = Case(twice=twice, balancer=balancer, tokens=(6, 3), optimizer="adamw" if twice else "sgd", aux_loss_coef=0.1)
    sc.run_local(lambda group: check_script(group, case, script) and None, 3)


@pytest.mark.parametrize("script", [train, accumulate], ids=lambda script: script.__name__)
@pytest.mark.parametrize("spare_ranks", [(), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_dense_parameter_that_some_ranks_use(spare_ranks: tuple[int, ...], script: Script) -> None:
    sc.run_local(lambda group: check_script(group, Case(spare_ranks=spare_ranks), script) and None, 3)


@pytest.mark.parametrize(
    "frozen",
    [
        ("outlet",),
        ("inlet",),
        ("first.experts", "second.experts"),
        ("first.experts.down",),
        ("inlet", "first"),
        ("inlet", "first", "norm", "second.router", "second.experts"),
        ("inlet", "norm", "spare", "outlet", "first.router", "second.router"),
    ],
    ids=str,
)
@pytest.mark.parametrize("balancer", [NoReplicas(), BUSY_REPLICAS, Scattered()], ids=str)
def test_frozen_parameters(frozen: tuple[str, ...], balancer: NoReplicas | Busiest | Scattered) -> None:
    case = Case(frozen=frozen, balancer=balancer)
    sc.run_local(lambda group: check_script(group, case) and None, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float, activation: str) -> None:
    """A step's gradients differ from one process's by rounding: by ``tolerance`` of their norm."""
    case = Case(dtype=dtype, activation=activation, dim=16, hidden_dim=8, biases=((1, 2.0), (3, 1.0)))

    def main(group: sc.Group) -> None:
        run = Sharded(case, group)
        train_once(run)
        expected = notes_of_one_process(case, train_once, group.world_size)
        for (label, got), (_, wanted) in zip(run.notes, expected, strict=True):
            if label == "loss":
                assert got.isfinite() and abs(got - wanted[group.rank]) <= tolerance * abs(wanted[group.rank])
            if label in ("gradients", "parameters"):
                for name, value in wanted.items():
                    if value is not None:
                        rows = value[owned_rows(case, group)] if ".experts." in name else value
                        error = (got[name].double() - rows.double()).norm()
                        assert got[name].dtype == dtype and error <= tolerance * (value.double().norm() + 1e-3), name

    sc.run_local(main, 3)


def train_once(run: Run) -> None:
    run.loss(0).backward()
    run.update()
