"""``python -m bench reduce_scatter``: sums of the hot chunks to their owners, beside a reduce-scatter of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench.collectives.sparse import SparseTrial
from bench.library import Baseline, library_of
from bench.runner import run_case

__all__ = ["run"]

Array = NDArray[Any]


class ReduceScatterTrial(SparseTrial):
    """Every rank passes rows of all chunks, of which only hot ones are read, and gets the sums of those it owns."""

    case = "reduce_scatter"
    ops = ("sum", "mean")

    def make_plan(self, algorithm: str, chunks: Sequence[int]) -> sc.Plan:
        partial_bytes = self.num_elements * np.dtype(_sum_dtype(self.setting.dtype)).itemsize
        return sc.plan_reduce_scatter(
            self.place,
            self.chunk_bytes,
            self.group.topology,
            algorithm,
            chunks=chunks,
            partial_bytes=partial_bytes,
        )

    def make_baseline(self) -> Baseline:
        if (library := library_of(self.group)) is not None:
            return library.reduce_scatter(self.shares, self.group.rank, self.setting.op == "mean")
        plan = self.make_plan("dense", self.all_chunks)

        def call(held: Array, out: Array) -> None:
            sc.sparse_reduce_scatter(held, self.place, op=self.setting.op, plan=plan, out=out, group=self.group)

        num_owned = len(self.owned)
        return Baseline("our own algorithm dense", call, len(self.all_chunks), range(num_owned), num_owned)

    def input_chunks(self) -> Sequence[int]:
        return self.all_chunks

    def output_chunks(self, chunks: Sequence[int]) -> list[int]:
        return [chunk for chunk in chunks if self.place.owners[chunk] == self.group.rank]

    def expected(self, chunk: int, number: int) -> Array:
        rows = [self.values.row(rank, chunk, number, self.num_elements) for rank in range(self.group.world_size)]
        total = np.sum(rows, axis=0, dtype=_sum_dtype(self.setting.dtype))
        if self.setting.op == "mean":
            total = total / self.group.world_size
        return total.astype(self.setting.dtype)

    def run(self, step: int) -> None:
        plan, out = self.plans[step], self.outputs["ours"]
        sc.sparse_reduce_scatter(
            self.input_at(step),
            self.place,
            chunks=plan.chunks,
            op=self.setting.op,
            plan=plan,
            out=out,
            group=self.group,
        )


def _sum_dtype(dtype: str) -> str:
    """What the library sums in."""
    return "float32" if dtype == "float16" else dtype


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measures and reports; see `bench.runner.run_case`."""
    return run_case(ReduceScatterTrial, arguments)
