"""Fixed capacity: how many rows an expert may get is known before anything is routed, so that all shapes are.

Legend: ``T`` tokens, ``K`` top-k, ``E`` experts, ``C`` rows for each expert, ``A = T * K`` assignments. Indices are
int64; negative ones mean none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Capacity", "Slots", "assign_slots"]


@dataclass(frozen=True)
class Capacity:
    """The policy of layers with fixed shapes.

    Attributes:
        rows_per_expert: rows that a rank sends to one expert, in each forward of a layer: always that many, zeros where
            fewer of its assignments chose the expert. Of more, the first in token order stay and the others are
            dropped: they contribute nothing to their tokens, and get no gradient (Lepikhin et al., GShard, section 3.1;
            Fedus et al., Switch Transformer, section 2.2).
        replicate: by the name of a layer, expert → ranks that hold a copy of it in every iteration.
    """

    rows_per_expert: int
    replicate: Mapping[str, Mapping[int, Iterable[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.rows_per_expert
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise InvalidArgument(f"Capacity: expected an integer rows_per_expert >= 1, got {rows!r}")

    def placements(self, bases: Mapping[str, Placement]) -> dict[str, Placement]:
        """The Placement of each layer in every iteration, from the owners alone.

        Raises:
            InvalidArgument: ``replicate`` names another layer, expert or rank.
        """
        for name in self.replicate:
            if name not in bases:
                raise InvalidArgument(f"Capacity: expected replicate to name {', '.join(bases)}, got {name!r}")
        return {name: base.replicate(self.replicate.get(name, {})) for name, base in bases.items()}


class Slots(NamedTuple):
    """Which assignment is where; slot ``e * C + i`` is the i-th row of expert e.

    Attributes:
        assignment: ``[E * C]``, the assignment in each slot.
        slot: ``[T, K]``, the slot of each assignment.
    """

    assignment: Tensor
    slot: Tensor


def assign_slots(expert_ids: Tensor, order: Tensor, counts: Tensor, rows_per_expert: int) -> Slots:
    """Gives each expert's first ``C`` assignments a slot.

    Stream: device operations on the current stream; nothing is read from the device.

    Args:
        expert_ids: ``[T, K]``.
        order, counts: ``[A]`` and ``[E]``, of `sort_by_expert`.
    """
    expert = expert_ids.flatten()[order]
    starts = counts.cumsum(0) - counts
    row = torch.arange(len(order), device=order.device) - starts[expert]
    num_slots = len(counts) * rows_per_expert
    # One slot more takes what is dropped: a mask would make the host wait to learn how much is not.
    slot = torch.where(row < rows_per_expert, expert * rows_per_expert + row, num_slots)
    assignment = order.new_full((num_slots + 1,), -1).scatter_(0, slot, order)[:num_slots]
    by_assignment = torch.empty_like(slot).scatter_(0, order, torch.where(slot < num_slots, slot, -1))
    return Slots(assignment, by_assignment.view_as(expert_ids))
