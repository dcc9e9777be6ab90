"""What a user can choose changes where experts are computed and when they travel, and never the result."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sparsecoll as sc
from sparsecoll.balance import Balancer, Costs, Hecate, Loads, NoReplicas, Quota
from sparsecoll.fssdp import state as fssdp_state
from tests.fssdp_checks import (
    BUSY_REPLICAS,
    Case,
    OneProcess,
    Run,
    Scattered,
    Script,
    Sharded,
    accumulate,
    batch_of,
    check_script,
    train,
)

Options = tuple[tuple[str, Any], ...]

# With 2 and 3 ranks experts and slices divide evenly.
CASE = Case(num_experts=6, dim=6, hidden_dim=6, tokens=(7, 0, 9))
OPTIONS: dict[str, Options] = {
    "rematerialize": (("rematerialize", True),),
    "auto": (("rematerialize", "auto"),),
    "calibrate": (("calibrate", True),),
    "quota": (("spread", "quota"),),
    "slices": (("sharding", "slices"),),
    "all": (("rematerialize", True), ("calibrate", True), ("spread", "quota"), ("predictor", "last")),
    "slices, all": (("sharding", "slices"), ("rematerialize", True), ("spread", "quota")),
}
BALANCERS = [BUSY_REPLICAS, Scattered(), Scattered(exact=True)]


def costs_for(world_size: int, *, copies_per_s: float = 1e9) -> dict[str, Costs]:
    """Computing is dear; an expert is copied so often in a second."""
    cost = Costs(sc.Topology.flat(world_size), 100, 1, 100 * copies_per_s, token_s=1e-3)
    return {"first": cost, "second": cost}


def case_of(balancer: Balancer, *options: tuple[str, Any]) -> Case:
    return Case(**{**vars(CASE), "balancer": balancer, "options": options})


def check(case: Case, script: Script, world_size: int) -> None:
    sc.run_local(lambda group: check_script(group, case, script) and None, world_size, timeout_s=30.0)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("balancer", BALANCERS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_equals_one_process(options: Options, balancer: Balancer, world_size: int) -> None:
    check(case_of(balancer, *options), accumulate if balancer.exact else train, world_size)


@pytest.mark.parametrize("balancer", [Hecate(), Quota(min_tokens=1)], ids=str)
def test_balancers_that_weigh_costs(balancer: Balancer) -> None:
    case = case_of(balancer, ("costs", costs_for(3)), ("calibrate", True), ("rematerialize", True))

    def main(group: sc.Group) -> None:
        run = check_script(group, case)
        assert any(report.hot for report in run.model.load_report().values())

    sc.run_local(main, 3)


def recompute(run: Run, *, use_reentrant: bool, script: Script) -> None:
    model: Any = run.model
    for layer in (model.first, model.second):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    script(run)


def two_forwards_first(run: Run, *, last_first: bool) -> None:
    """Forward of two micro-batches, then their backwards, in either order."""
    for step in range(2):
        run.optimizer.zero_grad()
        losses = [run.loss(2 * step + micro) for micro in range(2)]
        for number, loss in enumerate(reversed(losses) if last_first else losses):
            run.sync(number == 1)
            loss.backward()
        run.update()


def the_same_batch_twice(run: Run) -> None:
    """Two forwards that only their numbers tell apart, of which the first has no backward."""
    for step in range(2):
        run.optimizer.zero_grad()
        run.loss(step)
        run.loss(step).backward()
        run.update()


SCRIPTS = {
    "train": train,
    "two forwards, last first": functools.partial(two_forwards_first, last_first=True),
    "two forwards, first first": functools.partial(two_forwards_first, last_first=False),
    "the same batch twice": the_same_batch_twice,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("option", ["rematerialize", "calibrate", "quota", "slices", "all"])
def test_activation_checkpointing(option: str, use_reentrant: bool, script: Script) -> None:
    whole = functools.partial(recompute, use_reentrant=use_reentrant, script=script)
    balancer = Scattered(exact=option == "quota")
    check(case_of(balancer, *OPTIONS[option]), functools.partial(_named, whole, f"{script}"), 2)


def _named(script: Script, name: str, run: Run) -> None:
    script(run)


@pytest.mark.parametrize("last_first", [True, False])
def test_two_forwards_before_a_backward(last_first: bool) -> None:
    check(
        case_of(Scattered(), *OPTIONS["rematerialize"]),
        functools.partial(two_forwards_first, last_first=last_first),
        3,
    )


def backward_twice(run: Run) -> None:
    for step in range(2):
        run.optimizer.zero_grad()
        loss = run.loss(step)
        run.sync(False)
        loss.backward(retain_graph=True)
        run.sync(True)
        loss.backward()
        run.update()


@pytest.mark.parametrize("option", ["rematerialize", "calibrate", "slices"])
def test_a_retained_graph(option: str) -> None:
    check(case_of(Scattered(), *OPTIONS[option]), backward_twice, 2)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_graphs_that_only_one_rank_keeps(use_reentrant: bool | None) -> None:
    """What a rank's garbage collector has done decides nothing."""
    kept = []

    def script(run: Run) -> None:
        for step in range(3):
            loss = run.loss(50)
            if isinstance(run, Sharded) and run.group.rank == 0:
                kept.append(loss)
            del loss
            run.optimizer.zero_grad()
            run.loss(50 + step % 2).backward()
            run.update()

    whole = (
        script if use_reentrant is None else functools.partial(recompute, use_reentrant=use_reentrant, script=script)
    )
    check(case_of(Scattered(), ("rematerialize", True)), whole, 3)


def test_re_sharding_on_a_schedule_changes_nothing_but_owners() -> None:
    """All tokens go to the first rank's experts; nobody copies them, so owners have to share them."""
    case = Case(
        **{**vars(case_of(NoReplicas(), ("costs", costs_for(3)))), "biases": ((0, 3.0), (1, 3.0)), "optimizer": "adamw"}
    )

    def steps(run: Run) -> dict[str, torch.Tensor]:
        for step in range(6):
            run.optimizer.zero_grad()
            run.loss(step).backward()
            run.optimizer.step()
        return run.model.state_dict()

    expected = steps(OneProcess(case, 3))

    def main(group: sc.Group) -> None:
        run = Sharded(case, group)
        handle = run.model.reshard_on_schedule(run.optimizer, every=2)
        got = steps(run)
        owned = [list(layer.experts.owned) for layer in (run.model.first, run.model.second)]
        assert owned != [sc.Placement.even(6, 3).owned_by(group.rank).tolist()] * 2
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11)
        handle.remove()
        assert not run.model.reshard_experts(run.optimizer), "nothing is left to gain"

    sc.run_local(main, 3)


def test_re_sharding_that_does_not_pay() -> None:
    dear = costs_for(2, copies_per_s=1e-9)

    def main(group: sc.Group) -> None:
        run = Sharded(case_of(Hecate(), ("costs", dear)), group)
        assert not run.model.reshard_experts(run.optimizer), "no loads yet"
        train(run)
        before = group.stats()
        assert not run.model.reshard_experts(run.optimizer, iterations=1)
        assert group.stats().since(before).sent_bytes == 0
        for options in ((("sharding", "slices"),), (("sharding", "slices"), ("rematerialize", True))):
            with pytest.raises(sc.InvalidArgument, match="experts with owners"):
                Sharded(case_of(Hecate(), *options), group).model.reshard_experts()
        with pytest.raises(sc.InvalidArgument, match="every >= 1"):
            run.model.reshard_on_schedule(run.optimizer, every=0)

    sc.run_local(main, 2)


class Nothing:
    """Predicts that no tokens come."""

    window = 1

    def predict(self, history: Sequence[Loads]) -> Loads:
        return np.zeros_like(history[-1])


@pytest.mark.parametrize(("copies_per_s", "pays"), [(1e9, True), (1.0, False)])
def test_calibration_only_where_it_pays(copies_per_s: float, pays: bool) -> None:
    options = (("costs", costs_for(3, copies_per_s=copies_per_s)), ("predictor", Nothing()))

    def main(group: sc.Group) -> None:
        for calibrate in (False, True):
            case = case_of(Hecate(), *options, ("calibrate", calibrate))
            run = Sharded(Case(**{**vars(case), "biases": ((0, 3.0),), "tokens": (9, 8)}), group)
            train(run)
            report = run.model.load_report()["first"]
            assert bool(report.hot) == (calibrate and pays)
            assert (report.imbalance_after < report.imbalance_before) == (calibrate and pays)

    sc.run_local(main, 3)


def test_spread_by_quota_is_as_even_as_replicas_allow() -> None:
    case = Case(**{**vars(CASE), "tokens": (40, 0, 2), "balancer": Scattered()})

    def main(group: sc.Group) -> list[float]:
        found = []
        for spread in ("nearest", "quota"):
            run = Sharded(Case(**{**vars(case), "options": (("spread", spread),)}), group)
            train(run)
            found.append(run.model.load_report()["second"].imbalance_after)
        return found

    nearest, quota = sc.run_local(main, 3)[0]
    assert quota < nearest and quota < 1.5


def test_rematerialized_replicas_are_gone_between_forward_and_backward() -> None:
    def main(group: sc.Group) -> None:
        kept, dropped = (
            Sharded(case_of(BUSY_REPLICAS, ("rematerialize", each)), group).model for each in (False, True)
        )
        bytes_after = []
        for model in (kept, dropped):
            for step in range(3):
                before = group.stats()
                loss = model(batch_of(CASE, step, group.rank))
                after_forward = model.memory_report().replica_bytes
                loss.backward()
            reports = model.load_report()
            bytes_after.append((after_forward, model.memory_report().replica_bytes, group.stats().since(before)))
            assert all(report.hot for report in reports.values())
        (both, none, plain), (last_only, none_again, again) = bytes_after
        assert none == none_again == 0
        assert 0 < last_only < both, "of the last layer, whose backward comes first"
        # The first layer's are gathered a second time.
        gathered = dropped.last_plan("first").sent_bytes[group.rank]
        assert again.sent_bytes - plain.sent_bytes == gathered > 0

    sc.run_local(main, 2)


@pytest.mark.parametrize(("room", "releases"), [(1 << 40, False), (500, True)])
def test_rematerialization_follows_the_memory_left(room: int, releases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fssdp_state, "room_bytes", lambda *_: room)

    def main(group: sc.Group) -> None:
        model = Sharded(case_of(BUSY_REPLICAS, ("rematerialize", "auto")), group).model
        for step in range(3):
            loss = model(batch_of(CASE, step, group.rank))
            alive_bytes = model.memory_report().replica_bytes
            loss.backward()
        hot = [len(set(report.hot) - set(layer.experts.owned)) for report, layer in _layers(model)]
        row_bytes = sum(weight[0].nbytes for weight in model.first.experts.weights)
        assert (alive_bytes < row_bytes * sum(hot)) == releases

    sc.run_local(main, 2)


def _layers(model: Any) -> list[tuple[Any, Any]]:
    return [(model.load_report()[name], getattr(model, name)) for name in ("first", "second")]


def test_costs_are_measured_agreed_on_and_taken_along() -> None:
    def main(group: sc.Group) -> dict[str, Costs]:
        run = Sharded(case_of(NoReplicas()), group)
        train(run)
        costs: dict[str, Costs] = run.model.costs()
        for cost in costs.values():
            assert cost.token_s > 0 and cost.hidden_s > 0 and cost.bytes_per_s > 0 and cost.spare_experts > 0
        again = Sharded(case_of(NoReplicas(), ("costs", costs)), group)
        train(again)
        assert again.model.costs() == costs
        return costs

    first, *others = sc.run_local(main, 3, topology=sc.Topology((0, 0, 1)))
    assert all(each == first for each in others)


def test_copies_through_one_machines_memory_hide_behind_nothing() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(case_of(NoReplicas()), group)
        train(run)
        assert group.topology.shared_memory
        assert all(cost.token_s > 0 and cost.hidden_s == 0 for cost in run.model.costs().values())

    sc.run_local(main, 2)


def test_prefetch_orders_can_be_told() -> None:
    """A wrong order costs overlap and no more; the right one makes the first iteration's second gather early."""

    def main(group: sc.Group) -> None:
        for names in (["first", "second"], ["second", "first"], ["second"]):
            run = Sharded(case_of(Scattered(), ("rematerialize", True)), group)
            run.model.set_modules_to_forward_prefetch(names)
            run.model.set_modules_to_backward_prefetch([run.model.get_submodule(name) for name in reversed(names)])
            train(run)
            assert_same_as_one_process(run)
        with pytest.raises(sc.InvalidArgument, match="expected one of first, second, got third"):
            run.model.set_modules_to_forward_prefetch(["third"])

    def assert_same_as_one_process(run: Sharded) -> None:
        alone = OneProcess(run.case, run.group.world_size)
        train(alone)
        for name, value in run.model.state_dict().items():
            torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=1e-9, atol=1e-11)

    sc.run_local(main, 2)


def test_state_dict_of_slices() -> None:
    def main(group: sc.Group) -> None:
        case = case_of(Scattered(), *OPTIONS["slices"])
        run, alone = Sharded(case, group), OneProcess(case, group.world_size)
        train(run)
        train(alone)
        saved = run.model.state_dict()
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-11)
        other = Sharded(case, group)
        other.model.load_state_dict(saved)
        assert all(torch.equal(value, saved[name]) for name, value in other.model.state_dict().items())

    sc.run_local(main, 3)


def test_steps_are_reported_logged_and_traced(tmp_path: Path) -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(case_of(BUSY_REPLICAS), group)
        assert run.model.step_report() is None
        with pytest.raises(sc.InvalidArgument, match="none yet"):
            run.model.trace_step(tmp_path / "early.json")
        with sc.JsonLinesWriter(tmp_path / f"steps{group.rank}.jsonl") as writer:
            run.model.log_steps(writer)
            train(run)
            last = run.model.step_report()
            run.model.trace_step(tmp_path / "trace.json")
            run.model.log_steps(None)
        lines = (tmp_path / f"steps{group.rank}.jsonl").read_text().splitlines()
        records = [sc.StepRecord.from_json(line) for line in lines]
        assert [record.step for record in records] == [0, 1, 2]
        assert records[-1].gathered_bytes == last.gathered_bytes
        assert (records[-1].step_s, records[-1].exposed_s) == (last.step_s, last.exposed_s)
        assert last.step_s > last.exposed_s > 0 and last.hidden_s > 0 and last.hot == 6
        assert records[0].hot == 0 and last.memory.pool_bytes > 0

    sc.run_local(main, 2)
    events = json.loads((tmp_path / "trace.json").read_text())
    found = {event["name"] for event in events.get("traceEvents", events)}
    assert any("wait_for_sparse_all_gather" in name for name in found)
