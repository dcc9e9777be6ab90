"""Cuts a layer's experts down to what a rank stores, and makes its state dict whole again on demand."""

from __future__ import annotations

from sparsecoll.collectives import sparse_all_gather
from sparsecoll.fssdp.layer import ShardedLayer
from sparsecoll.fssdp.storage import storage
from sparsecoll.moe.experts import Row, rows_of

__all__ = ["shard_experts"]


def shard_experts(layer: ShardedLayer) -> None:
    """Keeps the stored rows of ``layer``, and of each with slices this rank's slice."""
    experts, stored = layer.layer.experts, layer.stored()
    for weight in experts.weights:
        rows = weight.data[stored]
        weight.data = (rows if layer.slices == 1 else rows.chunk(layer.slices, dim=1)[layer.group.rank]).clone()
        weight.grad = None
    experts.owned = stored
    experts.gather_rows = lambda: gather_experts(layer)
    experts.kept_slice = (0, 1) if layer.slices == 1 else (layer.group.rank, layer.slices)


def gather_experts(layer: ShardedLayer) -> dict[int, Row]:
    """All experts, whole, on every rank. Collective."""
    everywhere = layer.base.replicate(dict.fromkeys(range(layer.base.num_chunks), range(layer.base.world_size)))
    shard = tuple(weight.detach() for weight in layer.experts)
    if layer.slices == 1:
        return dict(enumerate(rows_of(sparse_all_gather(shard, everywhere, group=layer.group))))
    gathered = sparse_all_gather(shard, storage(everywhere, layer.slices), group=layer.group)
    whole = tuple(each.view(-1, each.shape[1] * layer.slices, *each.shape[2:]) for each in gathered)
    return dict(enumerate(rows_of(whole)))
