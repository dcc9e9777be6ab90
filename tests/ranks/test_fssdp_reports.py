"""What a wrapped model keeps and moves: shards, replicas, optimizer state, bytes on the wire, histories."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sparsecoll as sc
from sparsecoll.balance import Balance, Costs, Loads, NoReplicas
from tests.fssdp_checks import Case, Sharded, Toy, batch_of, check_bytes, owned_rows, train


class Recorder:
    """Predicts what was last, and remembers the histories that it was shown."""

    window = 3

    def __init__(self) -> None:
        self.shown: list[list[Loads]] = []

    def predict(self, history: Sequence[Loads]) -> Loads:
        self.shown.append([loads.copy() for loads in history])
        return history[-1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_byte_of_a_step_is_reported(world_size: int) -> None:
    sc.run_local(check_bytes, world_size)


def test_micro_batches_average_nothing_until_the_last() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        dense_bytes = []
        for micro in range(3):
            run.model.set_requires_gradient_sync(micro == 2)
            before = group.stats()
            run.loss(micro).backward()
            reported_bytes = sum(r.sparse_bytes + r.dispatch_bytes for r in run.model.load_report().values())
            dense_bytes.append(group.stats().since(before).sent_bytes - reported_bytes)
        assert dense_bytes[:2] == [0, 0] and dense_bytes[2] > 0

    sc.run_local(main, 3)


def test_ranks_on_two_nodes_report_their_bytes_too() -> None:
    sc.run_local(check_bytes, 4, topology=sc.Topology((0, 0, 1, 1)))


@pytest.mark.parametrize("world_size", [1, 3, 7])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rank_keeps_only_its_experts(world_size: int, optimizer: str) -> None:
    case = Case(num_experts=5, optimizer=optimizer)

    def main(group: sc.Group) -> None:
        shapes = {name: param.shape for name, param in Toy(case).named_parameters()}
        run = Sharded(case, group)
        train(run)
        num_owned = len(owned_rows(case, group))
        for name, param in run.model.named_parameters():
            expected = (num_owned, *shapes[name][1:]) if ".experts." in name else shapes[name]
            assert tuple(param.shape) == tuple(expected), name
            assert param.untyped_storage().nbytes() == param.nbytes, "the rest is given back"
            states = [v for v in run.optimizer.state[param].values() if v.ndim] if param.grad is not None else []
            assert len(states) == (0 if "spare" in name else 1 if optimizer == "sgd" else 2), name
            assert all(state.shape == param.shape for state in states), name

    sc.run_local(main, world_size)


def test_memory_report_counts_what_is_there() -> None:
    case = Case(num_experts=7, dtype=torch.float32)

    def main(group: sc.Group) -> None:
        run = Sharded(case, group)
        params_bytes = sum(param.nbytes for param in run.model.parameters())
        first = run.model.memory_report(run.optimizer)
        assert (first.param_bytes, first.replica_bytes, first.grad_bytes) == (params_bytes, 0, 0)
        assert first.peak_param_bytes == params_bytes and first.optimizer_bytes == 0
        train(run)
        row_bytes = sum(weight.nbytes for weight in Toy(case).first.experts.weights) // case.num_experts
        loss = run.loss(5)
        owned = owned_rows(case, group)
        hot = [len(set(layer.hot) - set(owned)) for layer in run.model.load_report().values()]
        assert _is_about(run.model.memory_report().replica_bytes, row_bytes * sum(hot)), (
            "of both layers, until backward"
        )
        loss.backward()
        del loss
        gc.collect()
        last = run.model.memory_report(run.optimizer)
        assert last.replica_bytes == 0
        peak_bytes = last.peak_param_bytes - params_bytes
        assert row_bytes * (sum(hot) + hot[1]) <= peak_bytes, "with gradients of one layer"
        assert peak_bytes <= row_bytes * 3 * 3 + 4 * 64, "in no step more than three experts in each"
        assert last.pool_bytes <= peak_bytes / 2, "what is kept for the next step"
        assert last.grad_bytes == sum(p.grad.nbytes for p in run.model.parameters() if p.grad is not None)
        assert last.optimizer_bytes == last.grad_bytes, "one momentum for each gradient"
        assert last.staging_bytes == sum(each.arenas.reserved_bytes for each in (group, group.twin()))

    sc.run_local(main, 3)


def _is_about(num_bytes: int, expected: int) -> bool:
    """Apart from the alignment of a few blocks."""
    return expected > 0 and expected <= num_bytes <= expected + 4 * 64


@pytest.mark.parametrize("mode", ["no_grad", "eval", "thrown away", "frozen"])
def test_replicas_are_freed_without_backward(mode: str) -> None:
    frozen = ("",) if mode == "frozen" else ()

    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        train(run)
        run.model.requires_grad_(not frozen)
        if mode == "eval":
            run.model.eval()
        with torch.set_grad_enabled(mode != "no_grad"):
            run.loss(9)
        assert run.model.load_report()["first"].hot
        gc.collect()
        assert run.model.memory_report().replica_bytes == 0

    sc.run_local(main, 2)


def test_predictor_sees_the_loads_of_training_only() -> None:
    """Oldest first, at most ``window``, equal on all ranks; evaluation leaves no trace."""

    def main(group: sc.Group) -> list[Loads]:
        recorder = Recorder()
        run = Sharded(Case(options=(("predictor", recorder),), tokens=(7, 0, 5)), group)
        loads = []
        for step in range(5):
            run.loss(step).backward()
            loads.append(run.model.load_report()["first"].tokens)
            run.model.eval()
            with torch.no_grad():
                run.loss(20 + step)
            run.model.train()
        recorder.shown.clear()
        run.loss(9)
        first, second = recorder.shown
        assert len(first) == len(second) == 3
        assert [each.sum(axis=0).tolist() for each in first] == loads[2:]
        for history in (first, second):
            assert all(each.shape == (3, 5) and each.sum(axis=1).tolist() == [14, 0, 10] for each in history)
        return first

    histories = sc.run_local(main, 3)
    for other in histories[1:]:
        np.testing.assert_array_equal(other, histories[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_adds_no_loads(use_reentrant: bool) -> None:
    def main(group: sc.Group) -> None:
        recorder = Recorder()
        run = Sharded(Case(options=(("predictor", recorder),)), group)
        forward = run.model.second.forward
        run.model.second.forward = lambda h: checkpoint(forward, h, use_reentrant=use_reentrant)
        for step in range(2):
            run.loss(step).backward()
        recorder.shown.clear()
        run.loss(2)
        assert [len(history) for history in recorder.shown] == [2, 2]

    sc.run_local(main, 2)


def test_replicas_come_before_their_layer_asks() -> None:
    """From the second iteration on, the second layer's gather is issued when the first layer has ended."""

    def main(group: sc.Group) -> None:
        recorder = Recorder()
        run = Sharded(Case(options=(("predictor", recorder),)), group)
        asked: list[int] = []
        run.model.second.register_forward_pre_hook(lambda *_: asked.append(len(recorder.shown)))
        for step in range(3):
            recorder.shown.clear()
            run.loss(step).backward()
        assert asked == [0, 2, 2]

    sc.run_local(main, 2)


def test_values_of_rank_0_win() -> None:
    """Parameters, experts and buffers, whatever the other ranks were seeded with."""

    def main(group: sc.Group) -> None:
        expected = Toy(Case(), seed=0).state_dict()
        model: Any = sc.FSSDP(Toy(Case(), seed=group.rank), group=group)
        assert float(model.scale) == 1.5
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key

    sc.run_local(main, 3)


def test_load_report_of_an_empty_batch() -> None:
    case = Case(tokens=(0,))

    def main(group: sc.Group) -> None:
        run = Sharded(case, group)
        train(run)
        for report in run.model.load_report().values():
            assert report.tokens == [0] * 5 and report.dead_experts == [0, 1, 2, 3, 4]
            assert report.imbalance_before == report.imbalance_after == 1.0
            assert report.percentiles == dict.fromkeys(("p50", "p75", "p90", "p95", "max"), 0.0)
            assert report.dispatch_bytes == report.sparse_bytes == 0

    sc.run_local(main, 2)


def test_load_report_names_and_percentiles() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(top_k=1, biases=((2, 50.0),), balancer=NoReplicas()), group)
        run.loss(0)
        assert list(run.model.load_report()) == ["first", "second"]
        report = run.model.load_report()["first"]
        num_tokens = sum(len(batch_of(run.case, 0, rank)) for rank in range(2))
        assert report.tokens == [0, 0, num_tokens, 0, 0] and report.dead_experts == [0, 1, 3, 4]
        assert report.percentiles == pytest.approx({"p50": 0.0, "p75": 0.0, "p90": 3.0, "p95": 4.0, "max": 5.0})
        assert report.imbalance_before == report.imbalance_after == 2.0

    sc.run_local(main, 2)


def test_report_of_an_iteration_without_replicas_after_one_with() -> None:
    class Once:
        exact = True

        def __init__(self) -> None:
            self.done = False

        def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Balance:
            return Balance(base if self.done else base.replicate({0: range(base.world_size)}))

    def main(group: sc.Group) -> None:
        balancer = Once()
        run = Sharded(Case(balancer=balancer), group)
        run.loss(0).backward()
        assert run.model.load_report()["first"].hot == (0,)
        balancer.done = True
        run.loss(1).backward()
        report = run.model.load_report()["first"]
        assert report.hot == () and report.sparse_bytes == 0

    sc.run_local(main, 2)
