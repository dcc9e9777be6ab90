"""Recording a routing: the example's model learns the example's text, without an auxiliary loss."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.step.sizes import Sizes
from bench.step.traces import Trace
from sparsecoll.moe import MoELayer, Routing

__all__ = ["record_routing"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

_NUM_TOKENS, _NUM_KEPT = 4096, 40
_LEARNING_RATE, _WARM_UP_STEPS = 3.5e-3, 20


def record_routing(sizes: Sizes, num_steps: int, seed: int) -> Trace:
    """Trains on one process for ``num_steps`` steps of 4,096 bytes, and keeps where those of the last 40 steps went.

    Nothing pushes loads to be equal: what skew there is, training has made.
    """
    sys.path.insert(0, str(EXAMPLES))
    from corpus import SEQUENCE_BYTES, Corpus
    from model import ModelConfig, MoELanguageModel

    corpus = Corpus.load()
    torch.manual_seed(seed)
    config = ModelConfig(sizes.width, sizes.layers, sizes.heads, sizes.experts, sizes.top_k, sizes.hidden)
    model = MoELanguageModel(config)
    kept: deque[list[np.ndarray]] = deque(maxlen=_NUM_KEPT)

    def keep(module: Any, inputs: Any, routing: Routing) -> None:
        kept[-1].append(routing.expert_ids.numpy().astype(np.uint8))

    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.router.register_forward_hook(keep)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(num_steps):
        for each in optimizer.param_groups:
            each["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / _WARM_UP_STEPS)
        kept.append([])
        loss = model(corpus.batch(seed, step, _NUM_TOKENS // SEQUENCE_BYTES, 0, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"# step {step + 1}/{num_steps}, loss {np.mean(losses[-20:]):.3f}", flush=True)
    origin = (
        f"examples/model.py with {sizes.layers} layers, width {sizes.width}, hidden {sizes.hidden}, trained on "
        f"{corpus.name} for {num_steps} steps of {_NUM_TOKENS} bytes from seed {seed}, no auxiliary loss; the last "
        f"{len(kept)} steps, mean loss {np.mean(losses[-len(kept) :]):.3f}"
    )
    return Trace(np.stack([np.stack(layers) for layers in kept]), sizes.experts, origin)
