"""A Plan as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsecoll.plan.costs import costs_of

if TYPE_CHECKING:
    from sparsecoll.plan.plan import Plan

__all__ = ["bytes_text", "explain", "summary", "time_text"]

_MOST_ROWS = 32
_MOST_CHARACTERS = 120
_MOST_LEVELS = 12


def explain(plan: Plan) -> str:
    """Totals, a line for each rank, and the trees along which each chunk travels."""
    arrow = "0 > 1: rank 0 sends to 1" if plan.op == "all_gather" else "0 < 1: rank 1 sends to 0, which adds its own"
    columns = ("rank", "owns", "holds", "sends"), ("sent", "received", "staging")
    lines = [
        f"{plan.op} by {plan.algorithm}, digest {plan.digest[:8]}",
        summary(plan),
        f"predicted {time_text(plan.predicted_s)}: {_against(plan)}",
        "",
        " ".join([*(f"{name:>6}" for name in columns[0]), *(f"{name:>12}" for name in columns[1])]) + "  busiest link",
        *_shortened(_rank_rows(plan), plan.place.world_size),
        *_node_rows(plan),
        "",
        f"{'chunk':>6} {'bytes':>12}  trees ({arrow})",
        *_shortened(_chunk_rows(plan), len(np.unique(plan.transfers["chunk"]))),
    ]
    return "\n".join(lines)


def summary(plan: Plan) -> str:
    """What travels between whom, in a line."""
    pieces, num_nodes = int(plan.transfers["pieces"].sum()), plan.topology.num_nodes
    size = sum(plan.chunk_bytes[chunk] for chunk in plan.chunks)
    return (
        f"{len(plan.chunks)} of {plan.place.num_chunks} chunks, {bytes_text(size)}; "
        f"{_count(plan.place.world_size, 'rank')} on {_count(num_nodes, 'node')}; "
        f"{_count(len(plan.transfers), 'transfer')} in {_count(pieces, 'piece')}, "
        f"{bytes_text(int(plan.sent_bytes.sum()))}"
    )


def bytes_text(count: int) -> str:
    """``1.05 MB``, decimal units."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"


def time_text(seconds: float) -> str:
    """``12.3 us``, three digits at least."""
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1.0)):
        if seconds * scale < 1000 or unit == "s":
            break
    value = seconds * scale
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def _against(plan: Plan) -> str:
    if not plan.bound_s:
        return "nothing has to travel"
    bounds = (("bound", plan.bound_s), ("universal bound", plan.universal_bound_s))
    return ", ".join(f"{plan.predicted_s / bound:.3f} times the {name} of {time_text(bound)}" for name, bound in bounds)


def _rank_rows(plan: Plan) -> Iterator[str]:
    chunks, world_size = np.asarray(plan.chunks, np.int64), plan.place.world_size
    owns = np.bincount(plan.place.owners[chunks], minlength=world_size)
    holds = plan.place.holders[chunks].sum(axis=0)
    loads = _rank_loads(plan)
    for rank in range(world_size):
        name, share = max(((name, load[rank]) for name, load in loads.items()), key=lambda each: each[1])
        yield (
            f"{rank:>6} {owns[rank]:>6} {holds[rank]:>6} {plan.sent_transfers[rank]:>6} "
            f"{bytes_text(plan.sent_bytes[rank]):>12} {bytes_text(plan.received_bytes[rank]):>12} "
            f"{bytes_text(plan.staging_bytes[rank]):>12}  {f'{name} {share:.0%}' if share else '-'}"
        )


def _node_rows(plan: Plan) -> list[str]:
    """What the ranks of a node share, where they share a link."""
    costs, node_of = costs_of(plan.topology), np.asarray(plan.topology.node_of)
    if len(costs.node) == 1 or not any(costs.node):
        return []
    crosses = node_of[plan.transfers["src"]] != node_of[plan.transfers["dst"]]
    loads = [_share(plan, node_of[plan.transfers[side]], crosses, costs.node) for side in ("src", "dst")]
    rows = [f"{node:>6}  out {out:>4.0%}, in {into:>4.0%}" for node, (out, into) in enumerate(zip(*loads, strict=True))]
    return ["", f"{'node':>6}  shared link", *_shortened(iter(rows), len(rows))]


def _rank_loads(plan: Plan) -> dict[str, NDArray[np.float64]]:
    """For each port of the ranks, ``[W]``, the share of the predicted time in which it is busy."""
    costs, node_of, table = costs_of(plan.topology), np.asarray(plan.topology.node_of), plan.transfers
    crosses = node_of[table["src"]] != node_of[table["dst"]]
    prefixes = ("scale-up ", "scale-out ") if crosses.any() and not crosses.all() else ("", "")
    return {
        f"{prefix}{name}": _share(plan, table[side], which, ticks)
        for prefix, which, ticks in zip(prefixes, (~crosses, crosses), (costs.up, costs.out), strict=True)
        if which.any() or not len(table)
        for name, side in (("out", "src"), ("in", "dst"))
    }


def _share(
    plan: Plan, link: NDArray[np.int32], which: NDArray[np.bool_], ticks: tuple[int, ...]
) -> NDArray[np.float64]:
    sizes = np.where(which, plan.transfer_bytes, 0).astype(np.float64)
    busy = np.bincount(link, sizes, minlength=len(ticks)) * np.asarray(ticks, np.float64)
    return busy / max(plan.timeline.finish, 1)


def _chunk_rows(plan: Plan) -> Iterator[str]:
    """A row for each chunk that travels."""
    table = plan.transfers
    order = np.argsort(table["chunk"], kind="stable")
    chunks, starts = np.unique(table["chunk"][order], return_index=True)
    if not len(chunks):
        yield "  none travels"
        return
    ends = [*starts[1:].tolist(), len(table)]
    for chunk, start, end in zip(chunks.tolist(), starts.tolist(), ends, strict=True):
        parts = _parts(table[order[start:end]], plan.chunk_bytes[chunk], gathers=plan.op == "all_gather")
        yield f"{chunk:>6} {bytes_text(plan.chunk_bytes[chunk]):>12}  {_joined(parts)}"


def _parts(rows: NDArray[np.void], size: int, *, gathers: bool) -> list[str]:
    """The tree of each range of a chunk, from its owner down, and in how many pieces it travels."""
    below: dict[tuple[int, int], dict[int, list[int]]] = {}
    pieces: dict[tuple[int, int], int] = {}
    for _, _, src, dst, _, count, begin, end, _ in rows.tolist():
        parent, child = (src, dst) if gathers else (dst, src)
        below.setdefault((begin, end), {}).setdefault(parent, []).append(child)
        pieces[begin, end] = max(pieces.get((begin, end), 0), count)
    texts = []
    for begin, end in sorted(below):
        children = below[begin, end]
        lower = {child for those in children.values() for child in those}
        trees = " ".join(_tree(root, children, ">" if gathers else "<") for root in children if root not in lower)
        where = "rest" if end == size else f"{bytes_text(begin)}..{bytes_text(end)}"
        cut = f" in {pieces[begin, end]} pieces" if pieces[begin, end] > 1 else ""
        texts.append(_clipped(trees) + (f" ({where}{cut})" if len(below) > 1 else cut))
    return texts


def _tree(rank: int, children: dict[int, list[int]], arrow: str, level: int = 0) -> str:
    """``0 > 1-3 (4 > 5 6)``: 0 has four receivers, of which the last one forwards to two."""
    if rank not in children:
        return str(rank)
    if level == _MOST_LEVELS:
        return f"{rank} {arrow} ..."
    leaves = sorted(child for child in children[rank] if child not in children)
    texts = [_tree(child, children, arrow, level + 1) for child in children[rank] if child in children]
    chain = not leaves and len(texts) == 1
    return f"{rank} {arrow} " + " ".join([*_runs(leaves), *(text if chain else f"({text})" for text in texts)])


def _runs(ranks: list[int]) -> list[str]:
    """``1-4 6 7`` for 1, 2, 3, 4, 6 and 7, ascending."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return [f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs]


def _clipped(text: str) -> str:
    most = _MOST_CHARACTERS * 2 // 3
    return text if len(text) <= most else text[:most].rpartition(" ")[0] + " ..."


def _joined(parts: list[str]) -> str:
    """As many as a line has room for, one at least."""
    line, shown = parts[0], 1
    while shown < len(parts) and len(line) + 2 + len(parts[shown]) <= _MOST_CHARACTERS:
        line, shown = f"{line}, {parts[shown]}", shown + 1
    return line if shown == len(parts) else f"{line}, and {_count(len(parts) - shown, 'more range')}"


def _shortened(rows: Iterator[str], count: int) -> list[str]:
    """The first of ``count`` rows; the others are not made."""
    shown = list(islice(rows, _MOST_ROWS))
    return shown if count <= _MOST_ROWS else [*shown, f"   ... and {count - _MOST_ROWS} more"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
