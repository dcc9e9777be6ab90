"""The gradient rule: losses, gradients, norms and steps of a wrapped model are those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsecoll as sc
from sparsecoll.balance import NoReplicas
from sparsecoll.moe import experts
from tests.fssdp_checks import (
    BUSY_REPLICAS,
    Busiest,
    Case,
    Run,
    Scattered,
    Script,
    Sharded,
    accumulate,
    assert_notes_equal,
    capacity_of,
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
    "all experts everywhere": Case(balancer=Busiest(most=5)),
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
    case = Case(num_experts=7, top_k=3, balancer=Busiest(most=4))
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
    case = Case(dtype=dtype, activation=activation, dim=16, hidden_dim=8, biases=((1, 2.0), (3, 1.0)))
    sc.run_local(lambda group: check_one_step(group, case, tolerance), 3)


def check_one_step(group: sc.Group, case: Case, tolerance: float) -> None:
    """A step's gradients differ from one process's by rounding: by ``tolerance`` of their norm."""
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
                    assert got[name].dtype == case.dtype and error <= tolerance * (value.double().norm() + 1e-3), name


def train_once(run: Run) -> None:
    run.loss(0).backward()
    run.update()


# Sizes of which torch has grouped products, replicas from the first step on, and tokens for all but one expert.
STACKED = Case(
    dtype=torch.float32,
    dim=16,
    hidden_dim=8,
    num_experts=7,
    top_k=5,
    tokens=(17, 12, 23),
    biases=(),
    balancer=Scattered(),
)
# Here rounding is as large as some differences between scores, and must not decide the routing.
STACKED_16_BIT = replace(STACKED, dtype=torch.bfloat16, top_k=3, biases=((1, 2.0), (3, 1.0)))
STACKED_CASES = {
    "uneven owners": STACKED,
    "gelu": replace(STACKED, activation="gelu"),
    "more ranks than experts": replace(STACKED, num_experts=3, top_k=2, biases=((1, 1.0),)),
    "no replicas": replace(STACKED, balancer=NoReplicas()),
    "experts that nobody chose": replace(STACKED, top_k=3, biases=((1, -50.0), (2, -50.0), (6, -50.0))),
    "all tokens to one expert": replace(STACKED, top_k=1, biases=((2, 50.0),)),
    "first rank without tokens": replace(STACKED, tokens=(0, 5, 3)),
    "frozen inlet": replace(STACKED, frozen=("inlet", "first")),
    "fixed capacity": replace(STACKED, rows_per_expert=5, replicates=True),
    "bfloat16": STACKED_16_BIT,
    "bfloat16, fixed capacity": replace(STACKED_16_BIT, rows_per_expert=30, replicates=True),
}


def by_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks compute as on a GPU from here on."""
    monkeypatch.setattr(experts, "_goes_by_expert", lambda x: False)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("name", STACKED_CASES)
def test_grouped_products_equal_one_process_that_loops(
    name: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = STACKED_CASES[name]
    notes_of_one_process(case, train_once, world_size)  # kept for the ranks
    by_stack(monkeypatch)
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-5
    sc.run_local(lambda group: check_one_step(group, case, tolerance), world_size)


def test_grouped_products_train_as_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over steps with replicas elsewhere each time, and micro-batches."""
    notes_of_one_process(STACKED, accumulate, 3)
    by_stack(monkeypatch)

    def main(group: sc.Group) -> None:
        run = Sharded(STACKED, group)
        accumulate(run)
        assert_notes_equal(run, notes_of_one_process(STACKED, accumulate, 3), rtol=1e-3, atol=1e-4)

    sc.run_local(main, 3)


class ExpertProducts(TorchDispatchMode):
    """Counts grouped products, and those that a loop over experts writes into given memory."""

    def __init__(self) -> None:
        super().__init__()
        self.num_grouped = self.num_looped = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_grouped += func.overloadpacket.__name__ == "_grouped_mm"
        self.num_looped += func in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case",
    [
        replace(STACKED, balancer=NoReplicas()),
        STACKED,
        replace(STACKED, dtype=torch.bfloat16),
        replace(STACKED, rows_per_expert=5, replicates=True),
    ],
    ids=["no replicas", "replicas", "bfloat16", "fixed capacity"],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_one_grouped_product_for_each_buffer(case: Case, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in forward and four in backward for gathered experts, and as many for the owned ones."""
    by_stack(monkeypatch)
    base, capacity = sc.Placement.even(case.num_experts, world_size), capacity_of(case, world_size)
    places = [base] * 2
    if capacity is not None:
        places = list(capacity.placements({"first": base, "second": base}).values())

    def main(group: sc.Group) -> None:
        run = Sharded(case, group)
        with ExpertProducts() as products:
            run.loss(0).backward()
        num_buffers = 0
        for place in places:
            owned, held = (set(each(group.rank).tolist()) for each in (place.owned_by, place.held_by))
            num_buffers += bool(owned) + bool(held - owned)
        assert (products.num_grouped, products.num_looped) == (6 * num_buffers, 0)

    sc.run_local(main, world_size)
