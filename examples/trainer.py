"""One model under training: what a user's own training loop looks like with sparsecoll."""

from __future__ import annotations

import math
import time

import torch
from corpus import Corpus
from history import History
from model import ModelConfig, MoELanguageModel

import sparsecoll as sc

LEARNING_RATE = 3.5e-3
WARM_UP_STEPS = 20
NUM_HELDOUT_BATCHES = 16


def rate(step: int, num_steps: int) -> float:
    """The learning rate's factor at ``step``: up in a line, then down to 0 along half a cosine."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * step / num_steps)) / 2


class Trainer:
    """One model, its optimizer, and what its steps measured."""

    def __init__(self, name: str, group: sc.Group, seed: int, num_steps: int, **options: str) -> None:
        torch.manual_seed(seed)
        self.group = group
        self.model = sc.FSSDP(MoELanguageModel(ModelConfig()), group=group, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate(step, num_steps))
        self.history = History(name)

    def step(self, rows: torch.Tensor) -> None:
        """Learns from this rank's ``rows``, and notes what that took."""
        started_s = time.perf_counter()
        loss = self.model(rows)
        loss.backward()
        self.model.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        mean_loss = self.group.mean(loss.item())  # also waits for the slowest rank, whose time is the step's
        step_s = time.perf_counter() - started_s

        layers = list(self.model.load_report().values())
        sparse_bytes = self.group.mean(sum(layer.sparse_bytes for layer in layers))
        dense_bytes = self.group.mean(sum(layer.dense_bytes for layer in layers))
        self.history.record(mean_loss, step_s, layers, sparse_bytes, dense_bytes)

    @torch.no_grad()
    def heldout_loss(self, corpus: Corpus, num_rows: int) -> float:
        """Mean over ranks and over batches spread evenly through the held-out text."""
        batches = corpus.heldout_batches(NUM_HELDOUT_BATCHES, num_rows, self.group.rank, self.group.world_size)
        return self.group.mean(sum(self.model(rows).item() for rows in batches) / NUM_HELDOUT_BATCHES)
