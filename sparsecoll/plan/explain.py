"""A Plan as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sparsecoll.plan.plan import Plan

__all__ = ["explain"]

_MOST_ROWS = 32


def explain(plan: Plan) -> str:
    """Totals, a line for each rank, and a line for each chunk that travels."""
    total = int(plan.sent_bytes.sum())
    num_stages = int(plan.transfers["stage"].max()) + 1 if len(plan.transfers) else 0
    lines = [
        f"{plan.op} by {plan.algorithm}, digest {plan.digest[:8]}",
        f"{len(plan.chunks)} of {plan.place.num_chunks} chunks, {plan.place.world_size} ranks, "
        f"{len(plan.transfers)} transfers in {num_stages} stages, {_bytes(total)}",
        f"predicted {plan.predicted_s * 1e6:.1f} us, lower bound {plan.bound_s * 1e6:.1f} us",
        "",
        f"{'rank':>6} {'owns':>6} {'holds':>6} {'sends':>6} {'sent':>12} {'received':>12} {'staging':>12}",
    ]
    chunks = np.asarray(plan.chunks, np.int64)
    owns = np.bincount(plan.place.owners[chunks], minlength=plan.place.world_size)
    holds = plan.place.holders[chunks].sum(axis=0)
    rows = [
        f"{rank:>6} {owns[rank]:>6} {holds[rank]:>6} {plan.sent_transfers[rank]:>6} "
        f"{_bytes(plan.sent_bytes[rank]):>12} {_bytes(plan.received_bytes[rank]):>12} "
        f"{_bytes(plan.staging_bytes[rank]):>12}"
        for rank in range(plan.place.world_size)
    ]
    lines += [*_shortened(rows), "", f"{'chunk':>6} {'bytes':>12}  transfers (stage: from > to)"]
    return "\n".join(lines + _shortened(_chunk_rows(plan)))


def _chunk_rows(plan: Plan) -> list[str]:
    paths: dict[int, list[str]] = {}
    for stage, src, dst, chunk, partial in plan.transfers.tolist():
        paths.setdefault(chunk, []).append(f"{stage}: {src} > {dst}{' (sum)' if partial else ''}")
    rows = []
    for chunk in sorted(paths):
        shown = ", ".join(paths[chunk][:6]) + (f", and {len(paths[chunk]) - 6} more" if len(paths[chunk]) > 6 else "")
        rows.append(f"{chunk:>6} {_bytes(plan.chunk_bytes[chunk]):>12}  {shown}")
    return rows or ["  none travels"]


def _shortened(rows: list[str]) -> list[str]:
    return rows if len(rows) <= _MOST_ROWS else [*rows[:_MOST_ROWS], f"   ... and {len(rows) - _MOST_ROWS} more"]


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
