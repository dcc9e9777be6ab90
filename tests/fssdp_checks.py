"""The wrapper FSSDP against one process that computes the mean of all ranks' losses.

A *script* is a training loop written once against `Run`. `OneProcess` runs it on an unwrapped model and all ranks'
batches, `Sharded` on a wrapped one and this rank's batch; both note what they see, and the notes must agree. Checks are
``check_<what>(group)``, called on all ranks.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsecoll as sc
from sparsecoll.balance import Balance, Balancer, Costs, Loads, NoReplicas
from sparsecoll.moe import Capacity, Experts, LocalDispatcher, MoELayer, Routing, auxiliary_loss

__all__ = [
    "BUSY_REPLICAS",
    "Busiest",
    "Case",
    "DroppingDispatcher",
    "OneProcess",
    "Run",
    "Scattered",
    "Script",
    "Sharded",
    "Toy",
    "accumulate",
    "assert_notes_equal",
    "batch_of",
    "capacity_of",
    "check_bytes",
    "check_capacity",
    "check_disagreement",
    "check_options",
    "check_parity",
    "check_script",
    "check_state_dict",
    "notes_of_one_process",
    "owned_rows",
    "recompute",
    "train",
]


@dataclass(frozen=True)
class Busiest:
    """The busiest experts on every rank, whether that gains anything or not."""

    most: int
    exact: bool = False

    def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Balance:
        by_expert = loads.sum(axis=0)
        chosen = [int(e) for e in np.argsort(-by_expert, kind="stable")[: self.most] if by_expert[e]]
        return Balance(base.replicate({e: range(base.world_size) for e in chosen}))


BUSY_REPLICAS = Busiest(most=3)


@dataclass(frozen=True)
class Scattered:
    """Replicas of most experts on some ranks each, elsewhere in every iteration, and quotas of their own if exact."""

    exact: bool = False

    def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Balance:
        turn, ranks = int(loads[:, 0].sum()), range(base.world_size)
        place = base.replicate({e: [r for r in ranks if (e + 2 * r + turn) % 3] for e in range(1, base.num_chunks)})
        quotas = np.zeros(place.holders.shape, np.int64)
        for expert, load in enumerate(loads.sum(axis=0)):
            held = np.flatnonzero(place.holders[expert])
            quotas[expert, held] = load // len(held)
            quotas[expert, held[turn % len(held)]] += load % len(held)
        return Balance(place, quotas if self.exact else None)


@dataclass(frozen=True)
class Case:
    """A model, its data and its optimizer.

    Attributes:
        tokens: of each rank's batch, ``tokens[rank % len(tokens)]``.
        biases: pairs of expert and what is added to its router row; tokens are positive, so it decides the routing.
        spare_ranks: ranks that use the layer ``spare``.
        frozen: prefixes of the names of parameters without gradient.
        twice: whether a forward uses the first MoE layer twice.
        rows_per_expert: fixed capacity, 0 for none.
        replicates: whether most experts have fixed replicas on some ranks each, with a fixed capacity.
        options: further arguments of `sparsecoll.FSSDP`.
    """

    num_experts: int = 5
    top_k: int = 2
    activation: str = "swiglu"
    shared_hidden_dim: int = 0
    aux_loss_coef: float = 0.0
    tokens: tuple[int, ...] = (7, 4, 9)
    biases: tuple[tuple[int, float], ...] = ((1, 1.0),)
    spare_ranks: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()
    twice: bool = False
    rows_per_expert: int = 0
    replicates: bool = False
    balancer: Balancer = BUSY_REPLICAS
    options: tuple[tuple[str, Any], ...] = ()
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float64
    dim: int = 6
    hidden_dim: int = 4


def capacity_of(case: Case, world_size: int) -> Capacity | None:
    if not case.rows_per_expert:
        return None
    ranks, experts = range(world_size), range(1, case.num_experts) if case.replicates else ()
    replicate = {
        name: {e: [r for r in ranks if (e + 2 * r + turn) % 3] for e in experts}
        for turn, name in enumerate(("first", "second"))
    }
    return Capacity(case.rows_per_expert, replicate)


class DroppingDispatcher(LocalDispatcher):
    """One process with a capacity, one assignment after the other: those beyond it have a weight of zero."""

    def __init__(self, rows_per_expert: int) -> None:
        self.rows_per_expert = rows_per_expert

    def __call__(
        self, tokens: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        kept = torch.zeros_like(routing.weights)
        taken = [0] * experts.num_experts
        for token, chosen in enumerate(routing.expert_ids.tolist()):
            for choice, expert in enumerate(chosen):
                kept[token, choice] = taken[expert] < self.rows_per_expert
                taken[expert] += 1
        return super().__call__(tokens, routing._replace(weights=routing.weights * kept), experts, meanwhile)


class Toy(nn.Module):
    """Two MoE layers with dense layers around them; its forward returns the loss."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__()
        self.twice = case.twice
        self.inlet = nn.Linear(case.dim, case.dim)
        self.first = self._moe(case)
        self.norm = nn.LayerNorm(case.dim)
        self.second = self._moe(case)
        self.spare = nn.Linear(case.dim, 1)
        self.outlet = nn.Linear(case.dim, 1)
        self.register_buffer("scale", torch.tensor([1.5 + seed]))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / param.shape[-1] ** 0.5)
            for expert, bias in case.biases:
                for layer in (self.first, self.second):
                    layer.router.weight[expert] += bias
        self.to(case.dtype)
        for name, param in self.named_parameters():
            param.requires_grad_(not name.startswith(case.frozen) if case.frozen else True)

    @staticmethod
    def _moe(case: Case) -> MoELayer:
        return MoELayer(
            case.dim,
            case.hidden_dim,
            case.num_experts,
            case.top_k,
            activation=case.activation,
            shared_hidden_dim=case.shared_hidden_dim,
            aux_loss_coef=case.aux_loss_coef,
        )

    def forward(self, x: Tensor, *, spare: bool = False) -> Tensor:
        h = F.softplus(self.inlet(x))
        for _ in range(1 + self.twice):
            h = F.softplus(self.norm(h + self.first(h)))
        h = h + self.second(h)
        out = self.outlet(h) * self.scale
        if spare:
            out = out + self.spare(h)
        return out.square().sum() / max(1, len(x)) + auxiliary_loss(self)


def batch_of(case: Case, step: int, rank: int) -> Tensor:
    """``[T, D]``, the same in every world."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    num_tokens = case.tokens[rank % len(case.tokens)]
    return torch.randn((num_tokens, case.dim), generator=generator, dtype=torch.float64).to(case.dtype)


class Run(ABC):
    """What a script trains, and what it has seen on the way.

    Attributes:
        notes: labels and values: losses, norms, and tensors by parameter name.
    """

    def __init__(self, case: Case, model: Toy) -> None:
        self.case, self.model = case, model
        params = model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(params, lr=0.1, momentum=0.9)
            if case.optimizer == "sgd"
            else torch.optim.AdamW(params, lr=0.01)
        )
        self.notes: list[tuple[str, Any]] = []

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """What to call ``backward`` on."""

    @abstractmethod
    def clip(self, max_norm: float) -> None: ...

    @abstractmethod
    def sync(self, enabled: bool) -> None: ...

    def update(self) -> None:
        """Notes gradients, clips them, and steps."""
        grads = {name: param.grad for name, param in self.model.named_parameters()}
        self.notes.append(("gradients", {k: None if v is None else v.detach().clone() for k, v in grads.items()}))
        self.clip(0.1)
        self.optimizer.step()
        params = {name: param.detach().clone() for name, param in self.model.named_parameters()}
        self.notes.append(("parameters", params))


class OneProcess(Run):
    """The unwrapped model, which sees the batches of all ranks."""

    def __init__(self, case: Case, world_size: int) -> None:
        super().__init__(case, Toy(case))
        self.world_size = world_size
        if case.rows_per_expert:
            self.model.first.dispatcher = self.model.second.dispatcher = DroppingDispatcher(case.rows_per_expert)

    def update(self) -> None:
        if self.case.rows_per_expert:  # nobody asks whether a rank has a gradient: what has none gets zeros
            for param in self.model.parameters():
                if param.requires_grad and param.grad is None:
                    param.grad = torch.zeros_like(param)
        super().update()

    def loss(self, step: int) -> Tensor:
        losses = [
            self.model(batch_of(self.case, step, rank), spare=rank in self.case.spare_ranks)
            for rank in range(self.world_size)
        ]
        self.notes.append(("loss", [loss.detach() for loss in losses]))
        return torch.stack(losses).sum() / self.world_size

    def clip(self, max_norm: float) -> None:
        self.notes.append(("norm", torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)))

    def sync(self, enabled: bool) -> None:
        """One process has nothing to synchronize."""


class Sharded(Run):
    """The wrapped model, which sees this rank's batch. Rank 0's seed is `OneProcess`'s, the others' differ."""

    model: Any

    def __init__(self, case: Case, group: sc.Group, *, optimizer_first: bool = False) -> None:
        toy = Toy(case, seed=group.rank)
        if optimizer_first:
            super().__init__(case, toy)
        capacity = capacity_of(case, group.world_size)
        sc.FSSDP(toy, group=group, balancer=case.balancer, capacity=capacity, **dict(case.options))
        if not optimizer_first:
            super().__init__(case, toy)
        self.group = group

    def loss(self, step: int) -> Tensor:
        rank = self.group.rank
        loss: Tensor = self.model(batch_of(self.case, step, rank), spare=rank in self.case.spare_ranks)
        self.notes.append(("loss", loss.detach()))
        return loss

    def clip(self, max_norm: float) -> None:
        self.notes.append(("norm", self.model.clip_grad_norm_(max_norm)))

    def sync(self, enabled: bool) -> None:
        self.model.set_requires_gradient_sync(enabled)


Script = Callable[[Run], None]


def train(run: Run) -> None:
    for step in range(3):
        run.optimizer.zero_grad()
        run.loss(step).backward()
        run.update()


def accumulate(run: Run) -> None:
    """Three micro-batches for each step, dense gradients averaged after the last."""
    for step in range(2):
        run.optimizer.zero_grad()
        for micro in range(3):
            run.sync(micro == 2)
            run.loss(3 * step + micro).backward()
        run.update()


def recompute(run: Run) -> None:
    """Under activation checkpointing, of either kind."""
    model: Any = run.model
    model.first.forward = partial(checkpoint, model.first.forward, use_reentrant=False)
    model.second.forward = partial(checkpoint, model.second.forward, use_reentrant=True)
    accumulate(run)


def owned_rows(case: Case, group: sc.Group) -> list[int]:
    return sc.Placement.even(case.num_experts, group.world_size).owned_by(group.rank).tolist()


_one_process_lock = threading.Lock()


@cache
def _notes_of_one_process(case: Case, script: Script, world_size: int) -> list[tuple[str, Any]]:
    run = OneProcess(case, world_size)
    script(run)
    return run.notes


def notes_of_one_process(case: Case, script: Script, world_size: int) -> list[tuple[str, Any]]:
    with _one_process_lock:  # threads as ranks share the answer instead of each computing it
        # Where copies go is no concern of one process.
        return _notes_of_one_process(
            replace(case, balancer=NoReplicas(), options=(), replicates=False), script, world_size
        )


def assert_notes_equal(
    run: Sharded, expected: list[tuple[str, Any]], *, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """Compares what a rank has seen with what one process has seen, expert parameters by the rows that it owns."""
    owned = owned_rows(run.case, run.group)
    assert [label for label, _ in run.notes] == [label for label, _ in expected]
    for position, ((label, got), (_, wanted)) in enumerate(zip(run.notes, expected, strict=True)):
        if label == "loss":
            got, wanted = {label: got}, {label: wanted[run.group.rank]}
        elif label == "norm":
            got, wanted = {label: got}, {label: wanted}
        assert list(got) == list(wanted), "names are unchanged and in order"
        for name, value in wanted.items():
            if value is not None and ".experts." in name:
                is_sliced = ("sharding", "slices") in run.case.options
                value = value.chunk(run.group.world_size, dim=1)[run.group.rank] if is_sliced else value[owned]
            text = f"{label} {name} (note {position}, rank {run.group.rank}/{run.group.world_size})"
            assert (got[name] is None) == (value is None), text
            if value is not None:
                torch.testing.assert_close(
                    got[name],
                    value,
                    rtol=rtol,
                    atol=atol,
                    equal_nan=True,
                    msg=lambda message, text=text: f"{text}: {message}",
                )


def check_script(group: sc.Group, case: Case, script: Script = train) -> Sharded:
    """Runs ``script`` on a wrapped model and compares it with one process, in float64 to rounding."""
    run = Sharded(case, group)
    script(run)
    expected = notes_of_one_process(case, script, group.world_size)
    assert_notes_equal(run, expected)
    return run


def check_parity(group: sc.Group) -> None:
    """Every kind of traffic in one model: replicas, a rank without tokens, an expert without any, aux loss."""
    case = Case(tokens=(9, 0, 4), biases=((1, 1.0), (3, -50.0)), aux_loss_coef=0.2, shared_hidden_dim=3)
    check_script(group, case)
    check_script(group, replace(case, optimizer="adamw", balancer=NoReplicas()), accumulate)


def check_capacity(group: sc.Group) -> None:
    """Room for all, and room for few; with fixed replicas; and after wrapping, no exchange between hosts."""
    case = Case(tokens=(9, 0, 4), rows_per_expert=9, replicates=True, aux_loss_coef=0.2, shared_hidden_dim=3)
    check_script(group, case)
    check_script(group, replace(case, rows_per_expert=2, optimizer="adamw"), accumulate)
    run = Sharded(case, group)
    before = group.stats()
    train(run)
    moved = group.stats().since(before)
    assert (moved.control_bytes, moved.control_messages) == (0, 0) and (moved.sent_bytes > 0) == (group.world_size > 1)


def check_options(group: sc.Group) -> None:
    """Gathers before and after the router, released replicas, quotas, recomputation; and slices of experts."""
    case = Case(num_experts=6, dim=6, hidden_dim=6, tokens=(9, 0, 4), aux_loss_coef=0.2, shared_hidden_dim=3)
    options = (("rematerialize", True), ("calibrate", True), ("spread", "quota"))
    check_script(group, replace(case, balancer=Scattered(), options=options), recompute)
    check_script(group, replace(case, balancer=Scattered(exact=True), options=options[:1]), accumulate)
    if group.world_size in (2, 3, 6):  # others cannot share the rows of a matrix evenly
        check_script(group, replace(case, options=(("sharding", "slices"), *options[::2])), accumulate)


def check_bytes(group: sc.Group) -> None:
    """Every byte of a step is in a report, and the reports say what plans and routing ask for."""
    for case in (Case(), Case(balancer=NoReplicas(), top_k=1), Case(balancer=Busiest(most=1))):
        run = Sharded(case, group)
        routed = _watch_routing(run.model)
        for step in range(3):
            run.optimizer.zero_grad()
            before = group.stats()
            run.loss(step).backward()
            moved = group.stats().since(before)
            reports = run.model.load_report()
            sent_bytes = _dense_sent_bytes(run)
            for name, report in reports.items():
                _check_report(run, name, routed[name])
                sent_bytes += report.sparse_bytes + report.dispatch_bytes
            assert moved.sent_bytes == sent_bytes
            assert any(report.hot for report in reports.values()) == (
                step > 0 and group.world_size > 1 and not isinstance(case.balancer, NoReplicas)
            )


def _watch_routing(model: Toy) -> dict[str, Tensor]:
    """The experts that the last forward of each MoE layer asked for, kept up to date."""
    routed: dict[str, Tensor] = {}
    for name, layer in (("first", model.first), ("second", model.second)):
        layer.router.register_forward_hook(
            lambda _module, _args, routing, name=name: routed.update({name: routing.expert_ids.cpu()})
        )
    return routed


def _dense_sent_bytes(run: Sharded) -> int:
    """What averaging the dense gradients costs a rank: a W-th of them to each other rank, twice."""
    world_size = run.group.world_size
    dense = [p.grad for n, p in run.model.named_parameters() if ".experts." not in n and p.grad is not None]
    share = -(-sum(grad.numel() for grad in dense) // world_size)
    return 2 * (world_size - 1) * share * run.case.dtype.itemsize


def _check_report(run: Sharded, name: str, expert_ids: Tensor) -> None:
    group, case, report = run.group, run.case, run.model.load_report()[name]
    rank, world_size = group.rank, group.world_size
    mine = torch.bincount(expert_ids.flatten(), minlength=case.num_experts)
    everyone = [torch.frombuffer(bytearray(each), dtype=torch.int64) for each in group.exchange(mine.numpy().tobytes())]
    loads = torch.stack(everyone)  # [W, E]
    assert report.tokens == loads.sum(0).tolist()
    assert report.dead_experts == [expert for expert in range(case.num_experts) if loads[:, expert].sum() == 0]

    owners = torch.tensor(sc.Placement.even(case.num_experts, world_size).owners, dtype=torch.int64)
    stays = torch.zeros(case.num_experts, dtype=torch.bool)
    stays[list(report.hot)] = True
    computed_at = torch.where(stays, torch.arange(world_size)[:, None], owners)  # [W, E], where a rank's tokens go
    by_rank = torch.zeros(world_size, dtype=torch.int64).scatter_add_(0, computed_at.flatten(), loads.flatten())
    at_owner = torch.zeros(world_size, dtype=torch.int64).scatter_add_(0, owners, loads.sum(0))
    assert report.imbalance_after == by_rank.max() / by_rank.double().mean()
    assert report.imbalance_before == at_owner.max() / at_owner.double().mean()
    away = computed_at != torch.arange(world_size)[:, None]
    leaving = int(loads[rank][away[rank]].sum())
    arriving = int(by_rank[rank] - loads[rank][~away[rank]].sum())
    row_bytes = case.dim * case.dtype.itemsize
    assert report.dispatch_bytes == 2 * (leaving + arriving) * row_bytes, "forward and backward, both ways"

    if not report.hot:
        assert report.sparse_bytes == 0
        return
    plan = run.model.last_plan(name)
    assert plan is run.model.last_plan(getattr(run.model, name))
    assert tuple(plan.place.replicated()) == report.hot
    back = sc.plan_reduce_scatter(plan.place, plan.chunk_bytes, group.topology, chunks=report.hot)
    for counters, each in ((report.gathered, plan), (report.reduced, back)):
        assert (counters.sent_bytes, counters.received_bytes) == (each.sent_bytes[rank], each.received_bytes[rank])
        copies_bytes = len(report.hot) * (world_size - 1) * plan.chunk_bytes[0]
        assert each.sent_bytes.sum() == copies_bytes < report.dense_bytes * world_size, "nothing but the hot experts"


def check_state_dict(group: sc.Group) -> None:
    """The state dict is one process's key by key, complete on every rank, and loads in both directions."""
    run, single = Sharded(Case(), group), OneProcess(Case(), group.world_size)
    train(run)
    train(single)
    saved, expected = run.model.state_dict(), single.model.state_dict()
    assert list(saved) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")

    plain, wrapped = Toy(run.case, seed=91), Sharded(run.case, group)
    assert str(plain.load_state_dict(saved)) == str(wrapped.model.load_state_dict(plain.state_dict()))
    for key, value in wrapped.model.state_dict().items():
        assert torch.equal(value, saved[key]), key
    loss = wrapped.loss(5).detach()
    torch.testing.assert_close(loss, plain(batch_of(run.case, 5, group.rank)).detach(), rtol=1e-9, atol=1e-11)


def check_disagreement(group: sc.Group) -> None:
    """A model or a mode that differs on the last rank raises on all; then training goes on."""
    on_last = group.rank == group.world_size - 1
    with pytest.raises(sc.CollectiveMismatch):
        sc.FSSDP(Toy(Case(hidden_dim=3 if on_last else 4)), group=group)
    run = Sharded(Case(), group)
    train(run)
    run.model.train(not on_last)
    with pytest.raises(sc.CollectiveMismatch, match=rf"training.* rank {group.world_size - 1}"):
        run.model(batch_of(run.case, 0, group.rank))
    run.model.train()
    run.loss(0).backward()
