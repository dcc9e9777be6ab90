"""Recorded routing: which experts the tokens of a real training run went to."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench.step.megatron import read_megatron, write_megatron

__all__ = ["Trace", "load_trace", "save_trace"]


@dataclass(frozen=True, eq=False)
class Trace:
    """Expert ids of some training steps.

    Attributes:
        expert_ids: uint8 ``[num_steps, num_layers, num_tokens, top_k]``, distinct in a row.
        num_experts: also those that nobody chose.
        origin: where it comes from, in words.
    """

    expert_ids: NDArray[np.uint8]
    num_experts: int
    origin: str

    def __post_init__(self) -> None:
        ids = self.expert_ids
        if ids.dtype != np.uint8 or ids.ndim != 4 or ids.size == 0:
            raise sc.InvalidArgument(
                "Trace: expected uint8 expert_ids [num_steps, num_layers, num_tokens, top_k], none of them 0, "
                f"got {ids.dtype} {list(ids.shape)}"
            )
        if ids.max() >= self.num_experts:
            raise sc.InvalidArgument(f"Trace: expected expert ids below {self.num_experts}, got {ids.max()}")
        ordered = np.sort(ids, axis=-1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise sc.InvalidArgument("Trace: expected distinct experts for each token, got one twice")

    def at(self, step: int, layer: int, rank: int, num_tokens: int) -> NDArray[np.int64]:
        """``[num_tokens, top_k]``: ranks take consecutive tokens; after the last token or step comes the first."""
        steps, _, tokens, _ = self.expert_ids.shape
        chosen = (rank * num_tokens + np.arange(num_tokens)) % tokens
        return self.expert_ids[step % steps, layer, chosen].astype(np.int64)

    def check_fits(self, num_layers: int, num_experts: int, top_k: int) -> None:
        """Raises InvalidArgument if it cannot be replayed through layers of these sizes."""
        _, layers, _, k = self.expert_ids.shape
        if (self.num_experts, k) != (num_experts, top_k) or layers < num_layers:
            raise sc.InvalidArgument(
                f"recorded: expected a trace of {num_layers} layers or more with {num_experts} experts, top-{top_k}, "
                f"got {layers} layers with {self.num_experts} experts and top-{k}"
            )


def save_trace(trace: Trace, path: Path) -> None:
    """Writes what `load_trace` reads: a compressed NumPy file, or for a path without suffix a folder of Megatron's."""
    if not path.suffix:
        write_megatron(trace.expert_ids, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, expert_ids=trace.expert_ids, num_experts=trace.num_experts, origin=trace.origin)


def load_trace(path: Path, num_experts: int) -> Trace:
    """Reads what `save_trace` wrote, or a folder of Megatron's ``router_trace_rank{r}.jsonl``.

    Args:
        num_experts: of each layer, for files that do not tell.

    Raises:
        InvalidArgument: no such file, or something else is in it.
    """
    try:
        if path.is_dir():
            return Trace(read_megatron(path), num_experts, f"router traces in {path.name}")
        with np.load(path, allow_pickle=False) as file:
            return Trace(file["expert_ids"], int(file["num_experts"]), str(file["origin"]))
    except sc.InvalidArgument:
        raise
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise sc.InvalidArgument(f"recorded: expected a routing trace in {path}, got {error!r}") from error
