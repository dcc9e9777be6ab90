"""Megatron's router traces: ``router_trace_rank{r}.jsonl``, a record for each step, block and layer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc

__all__ = ["read_megatron", "write_megatron"]

_Layer = tuple[int, int, int]


def read_megatron(folder: Path) -> NDArray[np.uint8]:
    """Expert ids ``[num_steps, num_layers, num_tokens, top_k]``: tokens as ranks follow, layers as stages do.

    Raises:
        InvalidArgument: no files, or steps and layers that differ in their tokens.
        OSError, ValueError, KeyError: a file cannot be read.
    """
    parts: dict[int, dict[_Layer, list[list[list[int]]]]] = {}
    for path in sorted(folder.glob("router_trace_rank*.jsonl"), key=_rank):
        for line in path.read_text().splitlines():
            each = json.loads(line)
            layer = int(each["stage"]), int(each["block"]), int(each["layer"])
            parts.setdefault(int(each["step"]), {}).setdefault(layer, []).append(each["top_indices"])
    shapes = {np.concatenate(ranks).shape for layers in parts.values() for ranks in layers.values()}
    if len(shapes) != 1 or len({tuple(sorted(layers)) for layers in parts.values()}) != 1:
        raise sc.InvalidArgument(
            f"recorded: expected router_trace_rank*.jsonl in {folder}, with the same layers and number of tokens in "
            f"every step, got tokens and top-k of {sorted(shapes)}"
        )
    steps = [[np.concatenate(layers[layer]) for layer in sorted(layers)] for _, layers in sorted(parts.items())]
    ids = np.array(steps)
    if ids.min() < 0 or ids.max() > np.iinfo(np.uint8).max:
        raise sc.InvalidArgument(f"recorded: expected expert ids in 0..255, got {ids.min()} to {ids.max()}")
    return ids.astype(np.uint8)


def write_megatron(expert_ids: NDArray[np.uint8], folder: Path) -> None:
    """Writes ``[num_steps, num_layers, num_tokens, top_k]`` as the trace of one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    _, _, num_tokens, top_k = expert_ids.shape
    with (folder / "router_trace_rank0.jsonl").open("w") as file:
        for step, layers in enumerate(expert_ids):
            for layer, ids in enumerate(layers):
                where = {"step": step, "stage": 0, "block": 0, "layer": layer, "rank": 0}
                tokens = {"num_tokens": num_tokens, "topk": top_k, "top_indices": ids.tolist()}
                file.write(json.dumps(where | tokens) + "\n")


def _rank(path: Path) -> int:
    found = re.search(r"rank(\d+)", path.name)
    if found is None:
        raise sc.InvalidArgument(f"recorded: expected router_trace_rank{{r}}.jsonl, got {path.name}")
    return int(found[1])
