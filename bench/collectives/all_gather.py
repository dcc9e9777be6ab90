"""``python -m bench all_gather``: the hot chunks to everyone, beside an all-gather of all chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

import sparsecoll as sc
from bench.collectives.sparse import SparseTrial
from bench.library import Baseline, library_of
from bench.runner import run_case

__all__ = ["run"]

Array = NDArray[Any]


class AllGatherTrial(SparseTrial):
    """Every rank passes the rows that it owns and gets all hot ones."""

    case = "all_gather"

    def make_plan(self, algorithm: str, chunks: Sequence[int]) -> sc.Plan:
        return sc.plan_all_gather(self.place, self.chunk_bytes, self.group.topology, algorithm, chunks=chunks)

    def make_baseline(self) -> Baseline:
        if (library := library_of(self.group)) is not None:
            return library.all_gather(self.shares, self.group.rank)
        plan = self.make_plan("dense", self.all_chunks)

        def call(shard: Array, out: Array) -> None:
            sc.sparse_all_gather(shard, self.place, plan=plan, out=out, group=self.group)

        return Baseline("our own algorithm dense", call, len(self.owned), self.all_chunks, len(self.all_chunks))

    def input_chunks(self) -> Sequence[int]:
        return self.owned

    def output_chunks(self, chunks: Sequence[int]) -> list[int]:
        return list(chunks)

    def expected(self, chunk: int, number: int) -> Array:
        return self.values.row(int(self.place.owners[chunk]), chunk, number, self.num_elements)

    def run(self, step: int) -> None:
        plan, out = self.plans[step], self.outputs["ours"]
        sc.sparse_all_gather(self.input_at(step), self.place, chunks=plan.chunks, plan=plan, out=out, group=self.group)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measures and reports; see `bench.runner.run_case`."""
    return run_case(AllGatherTrial, arguments)
