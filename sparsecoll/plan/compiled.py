"""The native planner (``csrc/``) behind the interface of the readable one: same input, same bytes.

`draft` stands for `sparsecoll.plan.algorithms.draft` and `simulate` for `sparsecoll.plan.simulate.simulate`, which say
what is done and why, and which tests hold these against.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sparsecoll import native
from sparsecoll.plan.algorithms import Case, Draft
from sparsecoll.plan.costs import Costs
from sparsecoll.plan.simulate import Timeline
from sparsecoll.plan.transfer import TRANSFER, Table

__all__ = ["draft", "simulate"]


def draft(case: Case, algorithm: str) -> Draft:
    """Plans by one algorithm, or by the best of all with ``auto``; the table is read-only."""
    place = case.place
    name, expected, rows = native.draft_transfers(
        _links(case.node_of, case.costs),
        place.owners,
        place.holders,
        case.chunks,
        case.sizes,
        case.partial_sizes,
        gathers=case.gathers,
        divisible=case.divisible,
        shared_memory=case.shared_memory,
        algorithm=algorithm,
    )
    return Draft(name, expected, rows.view(TRANSFER))


def simulate(
    table: Table, row_bytes: NDArray[np.int64], node_of: Sequence[int], costs: Costs, *, gathers: bool
) -> Timeline:
    """Plays a table of transfers through; ``row_bytes`` are the bytes on the wire of each row."""
    rows = np.ascontiguousarray(table).view(np.uint8)
    links = _links(tuple(node_of), costs)
    return Timeline(*native.play_transfers(links, rows, np.ascontiguousarray(row_bytes, np.int64), gathers=gathers))


@lru_cache(maxsize=64)
def _links(node_of: tuple[int, ...], costs: Costs) -> native.Links:
    return native.links(node_of, costs.up, costs.out, costs.node, costs.up_latency, costs.out_latency)
