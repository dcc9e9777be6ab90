"""State dicts of wrapped models: one process's, whole or not at all, on any number of ranks."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import sparsecoll as sc
from tests.fssdp_checks import (
    Case,
    Sharded,
    Toy,
    batch_of,
    check_script,
    check_state_dict,
    train,
)

StateDict = dict[str, Any]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_state_dict_is_one_process_s(world_size: int) -> None:
    sc.run_local(check_state_dict, world_size)


def trained_on(world_size: int, state_dict: StateDict, steps: int) -> StateDict:
    """Loads into a wrapped model, trains with plain SGD on the same data in every world, and saves."""
    case = Case(num_experts=6, tokens=(12,))

    def main(group: sc.Group) -> StateDict:
        model: Any = sc.FSSDP(Toy(case, seed=50 + group.rank), group=group, balancer=case.balancer)
        model.load_state_dict(state_dict)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(batch_of(case, 0, 0)).backward()
            optimizer.step()
        return model.state_dict()

    saved = sc.run_local(main, world_size)
    for other in saved[1:]:
        assert all(torch.equal(value, other[key]) for key, value in saved[0].items())
    return saved[0]


def test_training_goes_on_in_worlds_of_other_sizes() -> None:
    """4, then 2, then 3 ranks, then one process, which did every step itself."""
    case = Case(num_experts=6, tokens=(12,))
    state_dict = Toy(case).state_dict()
    for world_size in (4, 2, 3):
        state_dict = trained_on(world_size, state_dict, steps=2)
    single = Toy(case)
    optimizer = torch.optim.SGD(single.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        single(batch_of(case, 0, 0)).backward()
        optimizer.step()
    for key, value in single.state_dict().items():
        torch.testing.assert_close(state_dict[key], value, rtol=1e-9, atol=1e-11)


def test_state_dict_survives_torch_save() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        train(run)
        state_dict = run.model.state_dict()
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert list(loaded) == list(state_dict)
        assert all(torch.equal(value, loaded[key]) for key, value in state_dict.items())

    sc.run_local(main, 3)


def test_state_dict_is_a_snapshot_of_experts() -> None:
    """Training on does not reach into it, nor does writing to it reach the model."""

    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        saved = run.model.state_dict()
        key = "first.experts.0.down_proj"
        before = saved[key].clone()
        train(run)
        assert torch.equal(saved[key], before)
        after = run.model.state_dict()[key]
        assert not torch.equal(after, before)
        after.zero_()
        assert run.model.state_dict()[key].any()

    sc.run_local(main, 2)


def test_sub_module_has_its_part_of_the_state_dict() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        whole, part = run.model.state_dict(), run.model.first.state_dict()
        assert list(part) == [key.removeprefix("first.") for key in whole if key.startswith("first.")]
        assert all(torch.equal(value, whole[f"first.{key}"]) for key, value in part.items())

    sc.run_local(main, 3)


def spoiled(state_dict: StateDict, kind: str) -> StateDict:
    key = "first.experts.4.down_proj"
    if kind == "missing expert":
        del state_dict[key]
    elif kind == "missing dense":
        del state_dict["outlet.weight"]
    elif kind == "misshapen":
        state_dict[key] = state_dict[key][:-1]
    elif kind == "no tensor":
        state_dict[key] = 3
    elif kind == "unexpected":
        state_dict["first.experts.5.down_proj"] = state_dict[key]
    return state_dict


@pytest.mark.parametrize("kind", ["missing expert", "missing dense", "misshapen", "no tensor", "unexpected"])
@pytest.mark.parametrize("bad_ranks", [(0, 1, 2), (2,)], ids=str)
def test_unsuitable_state_dict_raises_on_all_ranks(kind: str, bad_ranks: tuple[int, ...]) -> None:
    """On all, whichever rank owns the expert and whoever has the bad file; then the group goes on."""
    good = Toy(Case()).state_dict()

    def main(group: sc.Group) -> str:
        run = Sharded(Case(), group)
        given = spoiled(dict(good), kind) if group.rank in bad_ranks else dict(good)
        with pytest.raises((RuntimeError, sc.CollectiveMismatch)) as caught:
            run.model.load_state_dict(given)
        run.model.load_state_dict(good)
        return str(caught.value)

    messages = sc.run_local(main, 3)
    assert any("experts.4.down_proj" in m or "experts.5.down_proj" in m or "outlet.weight" in m for m in messages)
    for message in messages:
        assert "Error(s) in loading state_dict" in message or "failed on ranks" in message


def test_assign_is_refused() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        with pytest.raises(RuntimeError, match="expected assign=False"):
            run.model.load_state_dict(run.model.state_dict(), assign=True)

    sc.run_local(main, 2)


def test_load_without_strict_takes_what_is_there() -> None:
    def main(group: sc.Group) -> None:
        run = Sharded(Case(), group)
        good = Toy(Case(), seed=3).state_dict()
        partial = {key: value for key, value in good.items() if ".experts." not in key or ".experts.4." in key}
        before = run.model.state_dict()
        run.model.load_state_dict(partial, strict=False)
        for key, value in run.model.state_dict().items():
            assert torch.equal(value, good[key] if key in partial else before[key]), key

    sc.run_local(main, 3)


def test_load_between_steps() -> None:
    """The rows that the next replicas are copied from are the loaded ones."""

    def main(group: sc.Group) -> None:
        run = check_script(group, Case())
        other = Toy(Case(), seed=8)
        run.model.load_state_dict(other.state_dict())
        x = batch_of(run.case, 0, group.rank)
        torch.testing.assert_close(run.model(x).detach(), other(x).detach(), rtol=1e-9, atol=1e-11)

    sc.run_local(main, 3)
