"""Training on one rank, with a `Ledger` that counts what it allocates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import sparsecoll as sc
from bench.footprint.ledger import Alive, Entry, Ledger
from bench.footprint.model import Sizes, make_model, routes_of, tokens_of
from bench.footprint.optimizer import MasterAdamW
from bench.step.replay import set_routes

__all__ = ["KINDS", "Training", "by_kind", "rest_by_place"]

KINDS = ("parameters", "gradients", "optimizer", "replicas", "staging", "rest")

_POOL = "sparsecoll/fssdp/pool.py"
_LEARNING_RATE = 1e-3


class Training:
    """A wrapped model with its optimizer.

    Attributes:
        most_hot: the most experts of a layer that had replicas in a step.
    """

    def __init__(self, group: sc.Group, sizes: Sizes, options: Mapping[str, Any]) -> None:
        self._group, self._sizes = group, sizes
        self._num_steps = 0
        self.most_hot = 0
        self.ledger = Ledger(lambda: group.staging_bytes)
        with self.ledger:
            self.model = sc.FSSDP(make_model(sizes, is_first=group.rank == 0), group=group, **options)
            self.optimizer = MasterAdamW(self.model.parameters(), lr=_LEARNING_RATE)
        self.ledger.mark("parameters", self.model.parameters())

    def step(self) -> float:
        """One step; the mean over ranks of the loss."""
        number, rank = self._num_steps, self._group.rank
        with self.ledger:
            set_routes(self.model, routes_of(self._sizes, number, rank))
            self.optimizer.zero_grad()
            loss = self.model(tokens_of(self._sizes, number, rank))
            loss.backward()
            self.ledger.mark("gradients", (p.grad for p in self.model.parameters() if p.grad is not None))
            self.optimizer.step()
        if number == 0:
            values = (value for state in self.optimizer.state.values() for value in state.values())
            self.ledger.mark("optimizer", (value for value in values if isinstance(value, Tensor)))
        self._num_steps += 1
        self.most_hot = max(self.most_hot, *(len(load.hot) for load in self.model.load_report().values()))
        return self._group.mean(loss.item())

    def is_counted_right(self) -> bool:
        """Whether the ledger and the model's own report say the same of what is alive."""
        report, now = self.model.memory_report(self.optimizer), by_kind(self.ledger.now())
        told = report.param_bytes, report.grad_bytes, report.optimizer_bytes, report.pool_bytes, report.staging_bytes
        return told == tuple(now[kind] for kind in KINDS[:-1])


def by_kind(alive: Alive) -> dict[str, int]:
    """Bytes of each of `KINDS`."""
    found = dict.fromkeys(KINDS, 0) | {"staging": alive.staging_bytes}
    for entry in alive.entries:
        found[_kind(entry)] += entry.num_bytes
    return found


def rest_by_place(alive: Alive) -> Counter[str]:
    """Bytes of the last kind, by where they were allocated."""
    found: Counter[str] = Counter()
    for entry in alive.entries:
        if _kind(entry) == KINDS[-1]:
            found[entry.place] += entry.num_bytes
    return found


def _kind(entry: Entry) -> str:
    if entry.kind:
        return entry.kind
    return "replicas" if entry.place.startswith(_POOL) else KINDS[-1]
