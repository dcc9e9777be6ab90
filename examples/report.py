"""One picture of a training run, in four panels: did it learn, was it skewed, what moved, how long did a step take."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from history import History
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

FSSDP_COLOR, EP_COLOR, QUIET = "#0072B2", "#D55E00", "#666666"  # from Okabe and Ito's colour-blind-safe palette
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}


def draw_report(path: Path, fssdp: History, ep: History, heldout_loss: float, bigram_entropy: float) -> None:
    """Writes the picture to ``path``."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 8), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.15))
        ((loss, load), (moved, time)) = figure.subplots(2, 2)
        _draw_loss(loss, fssdp, ep, heldout_loss, bigram_entropy)
        _draw_load(load, fssdp)
        _draw_moved(moved, fssdp)
        _draw_time(time, fssdp, ep)
        figure.savefig(path)


def _draw_loss(axes: Axes, fssdp: History, ep: History, heldout_loss: float, bigram_entropy: float) -> None:
    steps = range(1, len(fssdp.losses) + 1)
    axes.set_title("Loss of two runs from one seed")
    axes.plot(steps, fssdp.losses, color=FSSDP_COLOR, linewidth=2.5, label=fssdp.name)
    axes.plot(steps, ep.losses, color=EP_COLOR, linewidth=1, linestyle=(0, (4, 3)), label=ep.name)
    axes.plot(steps[-1], heldout_loss, "ko", label=f"{fssdp.name} on held-out text: {heldout_loss:.2f}", clip_on=False)
    axes.axhline(bigram_entropy, color=QUIET, linewidth=1, linestyle=":")
    text = f"a byte bigram, at best: {bigram_entropy:.2f} "
    axes.text(steps[-1], bigram_entropy + 0.05, text, ha="right", va="bottom", color=QUIET)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", xlim=(1, steps[-1]))
    axes.legend(loc="upper right")


def _draw_load(axes: Axes, run: History) -> None:
    load = np.array(run.load, dtype=float)  # [num_steps, num_layers, num_experts]
    num_steps, num_layers, num_experts = load.shape
    relative = load / np.maximum(load.mean(axis=2, keepdims=True), 1)
    busiest = statistics.median(relative.max(axis=(1, 2)))
    axes.set_title(f"Load: the busiest expert has {busiest:.1f} times the mean")
    rows = relative.reshape(num_steps, -1).T
    extent = (0.5, num_steps + 0.5, num_layers * num_experts, 0)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, extent=extent)
    for layer in range(1, num_layers):
        axes.axhline(layer * num_experts, color="white", linewidth=2)
    centers = [(layer + 0.5) * num_experts for layer in range(num_layers)]
    axes.set_yticks(centers, [f"layer {layer}" for layer in range(num_layers)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"step (a row for each of the {num_experts} experts)")
    axes.figure.colorbar(image, ax=axes, label="tokens, times the mean", pad=0.02).outline.set_visible(False)


def _draw_moved(axes: Axes, run: History) -> None:
    steps = range(1, len(run.sparse_bytes) + 1)
    sparse, dense = np.array(run.sparse_bytes) / 1e6, np.array(run.dense_bytes) / 1e6
    axes.set_title(f"Bytes: sparse collectives send {sparse.sum() / max(1e-9, dense.sum()):.0%} of dense")
    axes.plot(steps, dense, color=QUIET, linewidth=2, label="dense: all experts to all ranks")
    axes.fill_between(steps, sparse, color=FSSDP_COLOR, step="mid", label="sparse: what FSSDP sent")
    axes.set(xlabel="step", ylabel="sent per rank (MB)", xlim=(1, steps[-1]))
    axes.set_ylim(0, 1.3 * max(1, dense.max(), sparse.max()))
    axes.legend(loc="upper right")


def _draw_time(axes: Axes, fssdp: History, ep: History) -> None:
    times = [np.array(run.step_s) * 1e3 for run in (fssdp, ep)]
    medians = [np.median(each) for each in times]
    axes.set_title(f"Time: expert parallelism takes {medians[1] / medians[0]:.2f} times as long")
    last = max(np.percentile(each, 97) for each in times)
    bins = np.linspace(min(each.min() for each in times), last, 36)
    for run, color, each, median in zip((fssdp, ep), (FSSDP_COLOR, EP_COLOR), times, medians, strict=True):
        axes.hist(each, bins.tolist(), color=color, alpha=0.45, label=f"{run.name}: median {median:.0f} ms")
        axes.axvline(median, ymax=0.75, color=color, linewidth=2)
    beyond = sum(int((each > last).sum()) for each in times)
    axes.set(xlabel=f"time of a step (ms); {beyond} slower ones lie beyond the edge", ylabel="steps")
    axes.margins(y=1 / 3)  # room for the legend above bars and medians
    axes.legend(loc="upper right")
