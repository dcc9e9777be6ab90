"""Experts move to new owners with all that belongs to them, and training does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsecoll as sc
from sparsecoll.fssdp.reshard import move_experts, state_bytes
from tests.emulation.world import run_emulated
from tests.fssdp_checks import BUSY_REPLICAS, Case, Scattered, Sharded
from tests.reshard_checks import (
    STILL,
    Owners,
    Snapshot,
    assert_same,
    check_moves,
    even,
    layers_of,
    move,
    owners_of,
    snapshot,
)

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class MasterAdam(torch.optim.Optimizer):
    """Elementwise, with float32 masters and averages of parameters of any dtype, and scalars of both kinds."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01, passes_over_empty: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self.passes_over_empty = passes_over_empty

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or (self.passes_over_empty and not param.numel()):
                    continue
                state = self.state[param]
                if not state:
                    master = param.detach().float().clone()
                    state.update(master=master, num_steps=0, decay=torch.ones(()))
                    state.update(first=torch.zeros_like(master), second=torch.zeros_like(master))
                state["num_steps"] += 1
                grad = param.grad.float()
                state["first"].lerp_(grad, 0.1)
                state["second"].lerp_(grad * grad, 0.01)
                state["decay"] *= 0.99
                second = state["second"] / (1 - state["decay"])
                state["master"] -= group["lr"] * state["first"] / (second.sqrt() + 1e-8)
                param.copy_(state["master"])


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "no state": lambda params: torch.optim.SGD(params, lr=0.05),
    "master": MasterAdam,
    "master, but not of empty parameters": lambda params: MasterAdam(params, passes_over_empty=True),
}


def joined(parts: Iterable[Snapshot]) -> Snapshot:
    """All ranks' experts, each of which one rank has."""
    whole: Snapshot = {}
    for part in parts:
        assert not whole.keys() & part.keys()
        whole |= part
    return whole


def train_step(run: Sharded, step: int) -> None:
    run.optimizer.zero_grad()
    run.loss(step).backward()
    run.optimizer.step()


def trained(
    case: Case, make: Make, world_size: int, moves: Mapping[tuple[int, str], Sequence[Owners]]
) -> tuple[list[Snapshot], Snapshot]:
    """Four steps with ``moves`` after ``backward`` or ``step`` of some: what each rank notes, and what all end with."""

    def main(group: sc.Group) -> tuple[Snapshot, Snapshot]:
        run = Sharded(case, group)
        run.optimizer = make(run.model.parameters())
        losses = {}
        for step in range(4):
            run.optimizer.zero_grad()
            loss = run.loss(step)
            losses[f"loss {step}"] = loss.detach()
            loss.backward()
            if (step, "backward") in moves:
                move(run, moves[step, "backward"])
            run.optimizer.step()
            if (step, "step") in moves:
                move(run, moves[step, "step"])
        dense = {name: param.detach() for name, param in run.model.named_parameters() if ".experts." not in name}
        return {"losses": losses, "dense": dense}, snapshot(run)

    noted, parts = zip(*sc.run_local(main, world_size), strict=True)
    return list(noted), joined(parts)


def check_unnoticed(
    case: Case, make: Make, world_size: int, moves: Mapping[tuple[int, str], Sequence[Owners]], **tolerance: float
) -> Snapshot:
    """Losses, dense parameters and all that belongs to experts are as without ``moves``; returns the last."""
    noted, whole = trained(case, make, world_size, moves)
    wanted, expected = trained(case, make, world_size, {})
    for got, each in zip(noted, wanted, strict=True):
        assert_same(got, each, **tolerance)
    assert_same(whole, expected, **tolerance)
    return whole


def moves_of(case: Case, world_size: int) -> dict[tuple[int, str], list[Owners]]:
    times = [(0, "step"), (1, "backward"), (1, "step"), (2, "backward")]
    return {when: owners_of(case, world_size, seed) for seed, when in enumerate(times)}


@pytest.mark.parametrize(
    ("optimizer", "world_size"), [*((name, 3) for name in OPTIMIZERS), ("adamw", 2), ("adamw", 4), ("sgd", 4)]
)
def test_training_is_bit_for_bit_what_it_is_without_moving(optimizer: str, world_size: int) -> None:
    """Without replicas, no sum has another order; moves between steps, and between backward and step."""
    check_unnoticed(STILL, OPTIMIZERS[optimizer], world_size, moves_of(STILL, world_size))


@pytest.mark.parametrize("balancer", [BUSY_REPLICAS, Scattered()], ids=["busiest", "scattered"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_with_replicas_is_to_rounding_what_it_is_without_moving(optimizer: str, balancer: Any) -> None:
    case = replace(STILL, balancer=balancer)
    check_unnoticed(case, OPTIMIZERS[optimizer], 3, moves_of(case, 3), rtol=1e-6, atol=1e-8)


def test_bfloat16_parameters_with_float32_masters() -> None:
    """Of one row, tensors of both dtypes travel together."""
    case = replace(STILL, dtype=torch.bfloat16, dim=32, hidden_dim=32, biases=((1, 2.0), (3, 1.0)))
    whole = check_unnoticed(case, MasterAdam, 3, moves_of(case, 3))
    for belongings in whole.values():
        assert {belongings[key].dtype for key in ("data", "grad")} == {torch.bfloat16}
        assert {belongings[key].dtype for key in ("master", "first", "second")} == {torch.float32}


@st.composite
def journeys(draw: st.DrawFn) -> tuple[int, str, bool, list[list[Owners]]]:
    world_size = draw(st.integers(1, 4))
    ranks = st.lists(st.integers(0, world_size - 1), min_size=STILL.num_experts, max_size=STILL.num_experts)
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    return world_size, optimizer, draw(st.booleans()), draw(st.lists(st.tuples(ranks, ranks).map(list), max_size=4))


def stacks_of(run: Sharded, weight: nn.Parameter) -> list[Tensor]:
    """A parameter, and its gradient and state where they have more than one dimension."""
    state = run.optimizer.state.get(weight, {}).values()
    return [each for each in (weight, weight.grad, *state) if isinstance(each, Tensor) and each.ndim > 1]


@settings(max_examples=15, deadline=None)
@given(journeys())
def test_there_and_back_is_the_identity(journey: tuple[int, str, bool, list[list[Owners]]]) -> None:
    """Every tensor arrives bit for bit, with the experts in order, in the same parameters."""
    world_size, optimizer, with_gradients, stations = journey

    def main(group: sc.Group) -> list[Snapshot]:
        run = Sharded(STILL, group)
        run.optimizer = OPTIMIZERS[optimizer](run.model.parameters())
        train_step(run, 0)
        if with_gradients:
            run.loss(1).backward()
        else:
            run.optimizer.zero_grad()
        params = dict(run.model.named_parameters())
        seen = [snapshot(run)]
        for owners in [*stations, even(STILL, world_size)]:
            move(run, owners)
            for layer, each in zip(layers_of(run), owners, strict=True):
                assert layer.base.owners.tolist() == each
                mine = [expert for expert, rank in enumerate(each) if rank == group.rank]
                assert layer.layer.experts.owned == mine
                for weight in layer.experts:
                    stacks = stacks_of(run, weight)
                    assert {stack.shape for stack in stacks} == {(len(mine), *weight.shape[1:])}
                    assert any(stack is weight.grad for stack in stacks) == with_gradients
            seen.append(snapshot(run))
        assert all(param is params[name] for name, param in run.model.named_parameters())
        assert_same(seen[-1], seen[0])
        train_step(run, 2)
        return seen

    start, *others = (joined(parts) for parts in zip(*sc.run_local(main, world_size), strict=True))
    for whole in others:
        assert_same(whole, start)


@pytest.mark.parametrize("has_gradients", [False, True], ids=["", "with gradients"])
def test_only_experts_that_move_travel(has_gradients: bool) -> None:
    """Experts 0 and 4 of the first layer change hands, and none of the second."""
    owners = [[1, 0, 1, 1, 0, 2], [0, 0, 1, 1, 2, 2]]

    def main(group: sc.Group) -> tuple[float, float]:
        run = Sharded(STILL, group)
        run.optimizer = torch.optim.AdamW(run.model.parameters())
        train_step(run, 0)
        if not has_gradients:
            run.optimizer.zero_grad()
        assert [layer.base.owners.tolist() for layer in layers_of(run)] == even(STILL, 3)
        expert_bytes, second_bytes = state_bytes(layers_of(run), [run.optimizer])
        before = group.stats()
        move(run, owners)
        moved = group.stats().since(before)
        # Weights of [16, 8] and [8, 8] float64, two averages of each, and perhaps a gradient.
        assert expert_bytes == second_bytes == (16 + 8) * 8 * 8 * (3 + has_gradients)
        assert state_bytes(layers_of(run), []) == [(16 + 8) * 8 * 8 * (1 + has_gradients)] * 2

        before = group.stats()
        move(run, owners)
        again = group.stats().since(before)
        assert (again.sent_messages, again.received_messages) == (0, 0)
        return moved.sent_bytes / expert_bytes, moved.received_bytes / expert_bytes

    # 0 goes from rank 0 to 1, and 4 from rank 2 to 0.
    assert sc.run_local(main, 3) == [(1, 1), (0, 1), (1, 0)]


def test_several_optimizers_and_none() -> None:
    """Each keeps what it holds; parameters that none holds move alone."""

    def main(group: sc.Group) -> tuple[Snapshot, Snapshot]:
        run = Sharded(STILL, group)
        experts = [weight for layer in layers_of(run) for weight in layer.experts]
        dense = [param for param in run.model.parameters() if not any(param is weight for weight in experts)]
        run.optimizer = torch.optim.AdamW([experts[0], experts[3]])
        others = [torch.optim.SGD([experts[1]], lr=0.1, momentum=0.5), torch.optim.Adagrad(dense)]
        run.loss(0).backward()
        for optimizer in (run.optimizer, *others):
            optimizer.step()

        def whole() -> Snapshot:
            last = run.optimizer
            found = snapshot(run)
            for number, run.optimizer in enumerate(others):
                found |= {f"{number} {key}": value for key, value in snapshot(run).items()}
            run.optimizer = last
            return found

        before = whole()
        move(run, owners_of(STILL, 3, 1), others[1], others[0], run.optimizer)
        assert len(others[1].state) == len(dense)
        return before, whole()

    before, after = map(joined, zip(*sc.run_local(main, 3), strict=True))
    assert "exp_avg" in before["first 0 gate_up_proj"] and "momentum_buffer" in before["0 first 0 down_proj"]
    assert before["1 second 0 gate_up_proj"].keys() == {"data", "grad"}
    assert_same(after, before)


def test_a_rank_that_had_no_experts_takes_over_the_state() -> None:
    """Rank 1 has stepped once, owned nothing for two steps, and then gets all with the counts of the others."""

    def main(group: sc.Group) -> list[int]:
        run = Sharded(STILL, group)
        run.optimizer = MasterAdam(run.model.parameters(), passes_over_empty=True)
        counts = []
        for step, rank in enumerate([0, 0, 1, 0]):
            train_step(run, step)
            (weight, *_) = run.model.first.experts.weights
            counts.append(run.optimizer.state[weight]["num_steps"])
            move(run, [[rank] * STILL.num_experts] * 2)
        return counts

    assert sc.run_local(main, 2) == [[1, 2, 3, 3], [1, 1, 1, 4]]


def test_a_rank_that_had_no_experts_forgets_what_others_do_not_have() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        run.optimizer = torch.optim.AdamW(run.model.parameters())
        move(run, [[0] * STILL.num_experts] * 2)
        train_step(run, 0)
        if group.rank == 0:
            run.optimizer.zero_grad()
            run.optimizer.state.clear()
        move(run, even(STILL, 2))
        for layer in layers_of(run):
            for weight in layer.experts:
                assert len(weight) == 3 and weight.grad is None and not run.optimizer.state[weight]

    sc.run_local(main, 2)


@pytest.mark.parametrize("optimizer", ["nadam", "master, but not of empty parameters"])
def test_more_ranks_than_experts(optimizer: str) -> None:
    """Ranks that never had an expert, and perhaps no state, get some."""
    case = replace(STILL, num_experts=2)
    moves = {(0, "backward"): [[3, 0], [2, 2]], (1, "step"): [[1, 3], [3, 0]], (2, "step"): [[0, 3], [1, 2]]}
    check_unnoticed(case, OPTIMIZERS[optimizer], 4, moves)


def test_frozen_experts_move() -> None:
    case = replace(STILL, frozen=("first.experts", "second.experts.down"))
    check_unnoticed(case, OPTIMIZERS["adamw"], 3, moves_of(case, 3))


def test_state_may_have_come_in_any_order() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        run.optimizer = torch.optim.AdamW(run.model.parameters())
        train_step(run, 0)
        if group.rank == 1:
            for weight, state in run.optimizer.state.items():
                run.optimizer.state[weight] = dict(reversed(state.items()))
        before = snapshot(run)
        move(run, owners_of(STILL, 3, 0))
        move(run, even(STILL, 3))
        assert_same(snapshot(run), before)

    sc.run_local(main, 3)


def test_state_dict_is_whole_and_the_same() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        train_step(run, 0)
        before = run.model.state_dict()
        for owners in ([[2, 0, 1, 1, 0, 0], [1] * 6], [[0] * 6, [2, 1, 0, 2, 1, 0]]):
            move(run, owners)
            saved = run.model.state_dict()
            assert list(saved) == list(before)
            assert all(torch.equal(value, before[key]) for key, value in saved.items())
            run.model.load_state_dict(before)
            assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())

    sc.run_local(main, 3)


def test_a_graph_of_before_is_refused() -> None:
    """Its backward would compute with other experts than its forward."""

    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        loss = run.loss(0)
        move(run, [[0, 1, 0, 1, 0, 1]] * 2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    sc.run_local(main, 2)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_on_streams(world_size: int, checked: bool) -> None:
    run_emulated(check_moves, world_size, checked=checked, seed=world_size)


class Keeper(torch.optim.SGD):
    """Has something of its own in its state."""

    def __init__(self, params: Iterable[nn.Parameter], keeps: Callable[[Tensor], Any]) -> None:
        super().__init__(params, lr=0.1)
        self.keeps = keeps

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["kept"] = self.keeps(param)


def keeping(keeps: Callable[[Tensor], Any]) -> Make:
    return lambda params: Keeper(params, keeps)


UNSUITABLE: dict[str, tuple[Make, str]] = {
    "adafactor": (lambda params: torch.optim.Adafactor(params), r"Adafactor with col_var: Tensor \[\d, 1, 8\]"),
    "vector": (keeping(lambda param: param.new_zeros(len(param))), r"kept: Tensor \[\d\] on cpu"),
    "flat": (keeping(lambda param: param.detach().flatten()), r"kept: Tensor \[\d+\] on cpu"),
    "device": (keeping(lambda param: torch.empty_like(param, device="meta")), r"kept: Tensor \[.*\] on meta"),
    "list": (keeping(lambda param: [param.detach()]), "kept: list"),
    "parameter": (keeping(lambda param: nn.Parameter(param.detach())), r"kept: Parameter \[.*\] on cpu"),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_state_that_is_not_elementwise_is_refused_on_all_ranks(kind: str) -> None:
    make, text = UNSUITABLE[kind]

    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        run.optimizer = make(run.model.parameters())
        train_step(run, 0)
        check_refused(run, sc.InvalidArgument, f"FSSDP reshard.*: expected an elementwise optimizer.*{text}")
        move(run, owners_of(STILL, 3, 0), torch.optim.SGD(run.model.parameters(), lr=0.1))  # which keeps nothing

    sc.run_local(main, 3)


def check_refused(run: Sharded, error: type[Exception], match: str, bases: Any = None, optimizers: Any = None) -> None:
    """Refuses on this rank; nothing has moved, and the group can be used."""
    world_size = run.group.world_size
    before, owned = snapshot(run), run.model.second.experts.owned
    if bases is None:
        bases = [sc.Placement.of_owners(each, world_size) for each in owners_of(run.case, world_size, 3)]
    with pytest.raises(error, match=match):
        move_experts(layers_of(run), bases, [run.optimizer] if optimizers is None else optimizers, run.group)
    assert_same(snapshot(run), before)
    assert run.model.second.experts.owned == owned
    run.group.barrier()


EVEN = sc.Placement.even(STILL.num_experts, 3)
UNSOUND: dict[str, tuple[Any, str]] = {
    "one base": ([EVEN], "expected one base for each of 2 layers, got 1"),
    "no placement": ([EVEN, None], "expected a base of second with 6 experts on 3 ranks and no replicas, got None"),
    "replicas": ([EVEN.replicate({1: [2]}), EVEN], "expected a base of first .* got Placement.*replicas=1"),
    "world size": ([EVEN, sc.Placement.even(6, 2)], "expected a base of second .* got Placement.*world_size=2"),
    "experts": ([sc.Placement.even(5, 3), EVEN], "expected a base of first .* got Placement.*num_chunks=5"),
}


@pytest.mark.parametrize("kind", UNSOUND)
@pytest.mark.parametrize("bad_ranks", [(0, 1, 2), (1,)], ids=str)
def test_unsound_bases_are_refused_on_all_ranks(kind: str, bad_ranks: tuple[int, ...]) -> None:
    bases, text = UNSOUND[kind]

    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        train_step(run, 0)
        if group.rank in bad_ranks:
            check_refused(run, sc.InvalidArgument, text, bases)
        else:
            check_refused(run, sc.CollectiveMismatch, f"rank 1: InvalidArgument.*{text}")

    sc.run_local(main, 3)


def test_only_torch_optimizers() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        check_refused(run, sc.InvalidArgument, "expected torch optimizers, got str", optimizers=["adamw"])

    sc.run_local(main, 2)


def test_sliced_experts_are_refused() -> None:
    """Where every rank stores a part of every expert, owners have nothing to move."""

    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        run.model.first.experts.owned = range(STILL.num_experts)
        with pytest.raises(sc.InvalidArgument, match=r"to store whole experts of first, .*, got \[0, 1, 2, 3, 4, 5\]"):
            move(run, owners_of(STILL, 2, 0))

    sc.run_local(main, 2)


def other_owners(run: Sharded) -> Sequence[torch.optim.Optimizer]:
    return [run.optimizer]


def other_type(run: Sharded) -> Sequence[torch.optim.Optimizer]:
    return [torch.optim.Adam(run.model.parameters())]


def no_optimizer(run: Sharded) -> Sequence[torch.optim.Optimizer]:
    return []


def other_step(run: Sharded) -> Sequence[torch.optim.Optimizer]:
    run.optimizer.state[run.model.second.experts.weights[1]]["step"] += 1
    return [run.optimizer]


def other_dtype(run: Sharded) -> Sequence[torch.optim.Optimizer]:
    state = run.optimizer.state[run.model.first.experts.weights[0]]
    state["exp_avg"] = state["exp_avg"].float()
    return [run.optimizer]


def no_state(run: Sharded) -> Sequence[torch.optim.Optimizer]:
    run.optimizer.state.pop(run.model.first.experts.weights[0])
    return [run.optimizer]


def no_gradient(run: Sharded) -> Sequence[torch.optim.Optimizer]:
    run.model.first.experts.weights[1].grad = None
    return [run.optimizer]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (other_owners, r"expected equal new_owners\[1\] on all ranks"),
        (other_type, r"expected equal optimizers.*AdamW.* on rank 0 and .*Adam.* on rank 2"),
        (no_optimizer, "expected equal optimizers on all ranks"),
        (other_step, "of down_proj of second .* got step 1.0 on rank 0 and step 2.0 on rank 2"),
        (other_dtype, "of gate_up_proj of first .* exp_avg float64 on rank 0 and exp_avg float32 on rank 2"),
        (no_state, "of gate_up_proj of first .* exp_avg float64, .* on rank 0 and nothing else on rank 2"),
        (no_gradient, "of down_proj of first .* got grad float64 on rank 0 and nothing else on rank 2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_disagreement_is_refused_on_all_ranks(spoil: Callable[[Sharded], Any], text: str) -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(STILL, group)
        run.optimizer = torch.optim.AdamW(run.model.parameters())
        train_step(run, 0)
        optimizers, owners = [run.optimizer], owners_of(STILL, 3, 1)
        if group.rank == 2:
            optimizers = list(spoil(run))
            owners = owners_of(STILL, 3, 1)[:1] + owners_of(STILL, 3, 2)[1:] if spoil is other_owners else owners
        bases = [sc.Placement.of_owners(each, 3) for each in owners]
        check_refused(run, sc.CollectiveMismatch, f"FSSDP reshard.*: .*{text}", bases, optimizers)
        for layer in layers_of(run):  # once ranks agree again, it goes
            for weight in layer.experts:
                run.optimizer.state.pop(weight, None)
                weight.grad = None
        move(run, owners_of(STILL, 3, 1))
        train_step(run, 1)

    sc.run_local(main, 3)
