"""The bars: how long a step takes each contestant, under each routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.step.figures import times_of
from bench.step.options import DDP, EP, FSDP2, IDEAL
from bench.step.report import label
from bench.step.rows import Row

__all__ = ["draw_chart"]

# Okabe and Ito's palette, which does not depend on seeing red and green.
_COLORS = {EP: "#D55E00", IDEAL: "#000000", "none": "#009E73", FSDP2: "#999999", DDP: "#CCCCCC"}
_BLUES = ("#00466E", "#0072B2", "#3D95CC", "#56B4E9", "#8FD0F2")
_QUIET = "#666666"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _QUIET,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "legend.frameon": False,
}
_PARTS = {"block": "MoE layers", "step": "Whole step with AdamW"}
_BACKENDS = {"torch": "Gloo", "mpi": "MPI"}
_BAR = 0.9  # what the bars of a routing take of its place


def draw_chart(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes the picture to ``path``: a panel for each back end and part, all bars from zero."""
    contests = times_of(rows)
    backends = list(dict.fromkeys(row.backend for row in rows))
    parts = list(dict.fromkeys(row.part for row in rows))
    names = sorted(dict.fromkeys(row.contestant for row in rows), key=_place)
    balancers = [name for name in names if name not in _COLORS]
    colors = _COLORS | {name: _BLUES[i % len(_BLUES)] for i, name in enumerate(balancers)}
    with matplotlib.rc_context(_STYLE):
        size = (1.5 + 6 * len(parts), 1.5 + 3.4 * len(backends))
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        panels = figure.subplots(len(backends), len(parts), squeeze=False)
        for i, backend in enumerate(backends):
            for j, part in enumerate(parts):
                times = {key[2]: each for key, each in contests.items() if key[:2] == (backend, part)}
                _draw_panel(panels[i, j], times, names, colors)
                panels[i, j].set_title(f"{_PARTS[part]}, {_BACKENDS[backend]}")
        handles = {
            name: each for panel in panels.flat for each, name in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(6, len(handles)))
        figure.suptitle(fill(title, 95 * len(parts)), x=0.01, ha="left", fontsize=9, color=_QUIET)
        figure.savefig(path)


def _draw_panel(
    axes: Any, times: Mapping[str, Mapping[str, float]], names: Sequence[str], colors: Mapping[str, str]
) -> None:
    present = [name for name in names if any(name in each for each in times.values())]
    width = _BAR / len(present)
    for i, name in enumerate(present):
        places = [group - _BAR / 2 + (i + 0.5) * width for group in range(len(times))]
        heights = [each[name] * 1e3 for each in times.values()]
        axes.bar(places, heights, 0.92 * width, color=colors[name], label=label(name))
    for group, each in enumerate(times.values()):
        ideal = each[IDEAL] * 1e3
        axes.hlines(
            ideal, group - _BAR / 2, group + _BAR / 2, color=colors[IDEAL], linewidth=0.8, linestyle=(0, (4, 2))
        )
    axes.set_xticks(range(len(times)), list(times))
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel="routing", ylabel="ms per step (median, slowest rank)", ylim=(0, None))


def _place(name: str) -> int:
    """EP and the ideal on the left, then FSSDP, then torch's own."""
    order = {EP: 0, IDEAL: 1, FSDP2: 3, DDP: 4}
    return order.get(name, 2)
