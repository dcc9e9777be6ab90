"""Bytes from each rank to each other one: drawn with a skew, or read from nccl-tests' matrix file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc

__all__ = ["SKEWS", "draw_traffic", "read_traffic"]

SKEWS = ("uniform", "zipf", "hot_expert", "hot_rank", "silent_rank", "deaf_rank")

_CELL_BYTES = 16
_ZIPF_EXPONENT = 1.2
_HOT_EXPERT_SHARE = 0.25
_HOT_RANK_SHARE = 0.5


def draw_traffic(skew: str, size_bytes: int, num_experts: int, world_size: int, seed: int) -> NDArray[np.int64]:
    """What ranks send that route ``size_bytes`` of tokens each to experts spread evenly over ranks.

    Args:
        skew: ``uniform``: each rank gets the same. ``zipf``: the k-th most popular expert gets k^-1.2 of the most
            popular one's tokens. ``hot_expert``: one expert gets a quarter of all. ``hot_rank``: the experts of one
            rank together get half. ``silent_rank``, ``deaf_rank``: one rank sends, or gets, nothing.
        seed: draws which experts or ranks these are.

    Returns:
        ``[world_size, world_size]`` bytes, row to column, in multiples of 16.
    """
    random = np.random.default_rng(seed)
    chosen = int(random.integers(world_size))
    shares = np.full(world_size, 1.0)
    if skew in ("zipf", "hot_expert"):
        weights = np.full(num_experts, 1.0)
        if skew == "zipf":
            weights = random.permutation(np.arange(1.0, num_experts + 1) ** -_ZIPF_EXPONENT)
        elif num_experts > 1:
            weights[random.integers(num_experts)] = _odds(_HOT_EXPERT_SHARE) * (num_experts - 1)
        owners = sc.Placement.even(num_experts, world_size).owners
        shares = np.bincount(owners, weights, world_size)
    elif skew == "hot_rank" and world_size > 1:
        shares[chosen] = _odds(_HOT_RANK_SHARE) * (world_size - 1)
    elif skew == "deaf_rank":
        shares[chosen] = 0.0
    if not shares.any():
        raise sc.InvalidArgument(f"--skew: expected more than one rank for {skew}, got {world_size}")
    matrix = np.tile(shares / shares.sum() * size_bytes, (world_size, 1)).astype(np.int64)
    if skew == "silent_rank":
        matrix[chosen] = 0
    return _whole_cells(matrix)


def read_traffic(path: Path, world_size: int) -> NDArray[np.int64]:
    """Reads a square of non-negative numbers separated by white space; the first ``world_size`` rows and columns count.

    Raises:
        InvalidArgument: the file is missing, no such square, or too small.
    """
    try:
        rows = [[int(cell) for cell in line.split()] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise sc.InvalidArgument(f"--matrix: expected a file of whole numbers, got {error}") from error
    if any(len(row) != len(rows) for row in rows):
        raise sc.InvalidArgument(
            f"--matrix: expected as many columns as rows, got {sorted({len(row) for row in rows})} columns in "
            f"{len(rows)} rows of {path}"
        )
    if len(rows) < world_size:
        raise sc.InvalidArgument(f"--matrix: expected at least {world_size} rows (as ranks), got {len(rows)} in {path}")
    matrix = np.array(rows, np.int64)[:world_size, :world_size]
    if (matrix < 0).any():
        raise sc.InvalidArgument(f"--matrix: expected no negative number, got {matrix.min()} in {path}")
    return _whole_cells(matrix)


def _odds(share: float) -> float:
    return share / (1 - share)


def _whole_cells(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    return matrix // _CELL_BYTES * _CELL_BYTES
