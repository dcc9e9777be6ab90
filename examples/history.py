"""What a training run leaves behind: numbers of every step, and the summary of two runs."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Two runs that add the same numbers in another order are equal at first. Later a token whose experts score almost
# alike goes another way in one of them, and they part like runs from neighbouring seeds, to the same loss on average.
NUM_EQUAL_STEPS, EQUAL_TOLERANCE = 10, 1e-4
END_TOLERANCE = 2e-2


@dataclass
class History:
    """One entry per step.

    Attributes:
        name: of the run, as the report shows it.
        losses: mean over ranks, nats per byte.
        step_s: from reading the batch to the slowest rank's updated weights.
        load: ``[step][layer][expert]``, tokens of all ranks.
        imbalance: tokens of the busiest rank over the mean, in the layer where that is worst.
        sparse_bytes: sent by the sparse collectives of all layers, mean over ranks.
        dense_bytes: what dense collectives would have sent instead.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    load: list[list[list[int]]] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    sparse_bytes: list[float] = field(default_factory=list)
    dense_bytes: list[float] = field(default_factory=list)

    def record(self, loss: float, step_s: float, layers: Sequence[Any], sparse: float, dense: float) -> None:
        """Adds a step; ``layers`` are the values of ``model.load_report()``, ``sparse`` and ``dense`` bytes."""
        self.losses.append(loss)
        self.step_s.append(step_s)
        self.load.append([list(layer.tokens) for layer in layers])
        self.imbalance.append(max(layer.imbalance_after for layer in layers))
        self.sparse_bytes.append(sparse)
        self.dense_bytes.append(dense)


def losses_agree(left: History, right: History) -> bool:
    """Whether two runs on the same seed and batches learned the same: at first step by step, at the end on average."""
    pairs = zip(left.losses[:NUM_EQUAL_STEPS], right.losses[:NUM_EQUAL_STEPS], strict=True)
    tenth = max(1, len(left.losses) // 10)
    end = abs(statistics.mean(left.losses[-tenth:]) / statistics.mean(right.losses[-tenth:]) - 1)
    return all(abs(a / b - 1) <= EQUAL_TOLERANCE for a, b in pairs) and end <= END_TOLERANCE


def summarize(fssdp: History, ep: History, heldout_loss: float, bigram_entropy: float, memory: Any) -> dict[str, float]:
    """The figures that a reader would quote: losses in nats per byte, median seconds, mean bytes of a step."""
    step_s_fssdp, step_s_ep = statistics.median(fssdp.step_s), statistics.median(ep.step_s)
    return {
        "first_loss": fssdp.losses[0],
        "last_loss": fssdp.losses[-1],
        "heldout_loss": heldout_loss,
        "bigram_entropy": bigram_entropy,
        "step_s_fssdp": step_s_fssdp,
        "step_s_ep": step_s_ep,
        "ep_over_fssdp": step_s_ep / step_s_fssdp,
        "sparse_bytes": statistics.mean(fssdp.sparse_bytes),
        "dense_bytes": statistics.mean(fssdp.dense_bytes),
        "peak_param_bytes": memory.peak_param_bytes,
        "peak_optimizer_bytes": memory.optimizer_bytes,  # constant after the first step
    }


def describe_machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def find_commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` after changes; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
