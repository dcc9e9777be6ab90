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
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecoll as sc
from sparsecoll.balance import Balancer, Busiest, NoReplicas
from sparsecoll.moe import MoELayer, auxiliary_loss

__all__ = [
    "ALL_REPLICAS",
    "Case",
    "OneProcess",
    "Run",
    "Script",
    "Sharded",
    "Toy",
    "accumulate",
    "assert_notes_equal",
    "batch_of",
    "check_bytes",
    "check_script",
    "check_state_dict",
    "notes_of_one_process",
    "owned_rows",
    "train",
]

ALL_REPLICAS = Busiest(most=3, min_gain=0)


@dataclass(frozen=True)
class Case:
    """A model, its data and its optimizer.

    Attributes:
        tokens: of each rank's batch, ``tokens[rank % len(tokens)]``.
        biases: pairs of expert and what is added to its router row; tokens are positive, so it decides the routing.
        spare_ranks: ranks that use the layer ``spare``.
        frozen: prefixes of the names of parameters without gradient.
        twice: whether a forward uses the first MoE layer twice.
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
    balancer: Balancer = ALL_REPLICAS
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float64
    dim: int = 6
    hidden_dim: int = 4


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

    def __init__(self, case: Case, group: sc.Group) -> None:
        super().__init__(case, sc.FSSDP(Toy(case, seed=group.rank), group=group, balancer=case.balancer))
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
        return _notes_of_one_process(replace(case, balancer=NoReplicas()), script, world_size)


def assert_notes_equal(run: Sharded, expected: list[tuple[str, Any]], *, rtol: float, atol: float) -> None:
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
                value = value[owned]
            text = f"{label} {name} (note {position}, rank {run.group.rank}/{run.group.world_size})"
            assert (got[name] is None) == (value is None), text
            if value is not None:
                torch.testing.assert_close(
                    got[name], value, rtol=rtol, atol=atol, msg=lambda message, text=text: f"{text}: {message}"
                )


def check_script(group: sc.Group, case: Case, script: Script = train) -> Sharded:
    """Runs ``script`` on a wrapped model and compares it with one process, in float64 to rounding."""
    run = Sharded(case, group)
    script(run)
    expected = notes_of_one_process(case, script, group.world_size)
    assert_notes_equal(run, expected, rtol=1e-9, atol=1e-11)
    return run
