"""What the sparse all-gather and its mirror have in common: chunks, which of them are hot, plans, bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench import hot
from bench.library import Baseline
from bench.memory import memory_of
from bench.trial import ColdCopy, Facts, Setting, Trial, num_sets
from bench.values import Values

__all__ = ["SparseTrial"]

Array = NDArray[Any]


class SparseTrial(Trial):
    """An array cut in equal chunks, spread evenly over owners; every rank holds the hot ones, and only those move.

    Our collective is called with ``chunks=hot`` and a plan made before; the baseline moves all chunks. Both go round
    the same input sets, half the way apart, or one would warm up the other's input.

    Attributes:
        owned: chunks that this rank owns.
        shares: number of chunks that each rank owns.
        num_elements: of a chunk.
        num_sets: input sets, equal on all ranks.
    """

    skews = hot.SKEWS
    is_sparse = True

    def __init__(self, group: sc.Group, setting: Setting) -> None:
        self.group, self.setting, self.memory = group, setting, memory_of(group)
        num_chunks, world_size = setting.num_chunks, group.world_size
        self.num_elements = setting.size_bytes // (num_chunks * setting.itemsize)
        if self.num_elements == 0:
            raise sc.InvalidArgument(
                f"{self.case}: expected a size of at least {num_chunks * setting.itemsize} bytes ({num_chunks} chunks "
                f"of one {setting.dtype}), got {setting.size_bytes}; use fewer --chunks"
            )
        self.chunk_bytes = self.num_elements * setting.itemsize
        self.all_chunks = tuple(range(num_chunks))
        self.place = sc.Placement.even(num_chunks, world_size).replicate(
            dict.fromkeys(self.all_chunks, range(world_size))
        )
        self.owned = self.place.owned_by(group.rank).tolist()
        self.shares = np.bincount(self.place.owners, minlength=world_size).tolist()
        chunks_at = hot.HotChunks(self.place, setting.density, setting.skew, setting.seed)
        steps = [chunks_at.at(step) for step in range(setting.num_steps)]
        plans = {chunks: self.make_plan(setting.algorithm, chunks) for chunks in set(steps)}
        self.plans = [plans[chunks] for chunks in steps]
        self.values = Values(setting.dtype, world_size, self.num_elements)
        self.facts = self._facts()
        self.dense = self.make_baseline()
        self.baseline = self.dense.name
        self._fill()

    @abstractmethod
    def make_plan(self, algorithm: str, chunks: Sequence[int]) -> sc.Plan:
        """Our plan for ``chunks``."""

    @abstractmethod
    def make_baseline(self) -> Baseline:
        """The dense collective of all chunks."""

    @abstractmethod
    def input_chunks(self) -> Sequence[int]:
        """What this rank passes to the dense collective."""

    @abstractmethod
    def output_chunks(self, chunks: Sequence[int]) -> list[int]:
        """What this rank gets of ``chunks``."""

    @abstractmethod
    def expected(self, chunk: int, number: int) -> Array:
        """The row that it gets of ``chunk``, from input set ``number`` of all ranks."""

    def _fill(self) -> None:
        num_rows, chunks, dtype = self.dense.num_source_rows, self.input_chunks(), self.setting.dtype
        largest = max(num_rows, max(self.shares)) * self.chunk_bytes
        self.num_sets = num_sets(largest, self.setting)
        inputs = np.ones((self.num_sets, num_rows, self.num_elements), dtype)
        for number in range(self.num_sets):
            for row, chunk in enumerate(chunks):
                inputs[number, row] = self.values.row(self.group.rank, chunk, number, self.num_elements)
        self._inputs = self.memory.xp.asarray(inputs)
        # The copy's source comes last, so that writing it drives the inputs out of the cache.
        num_out = len(self.output_chunks(self.plans[0].chunks))
        self._copy = ColdCopy(num_out * self.chunk_bytes, self.setting, self.memory)
        empty = self.memory.xp.empty
        self.outputs = {
            "ours": empty((num_out, self.num_elements), dtype),
            "dense": empty((self.dense.num_rows, self.num_elements), dtype),
            "copy": self._copy.destination,
        }

    def input_at(self, step: int) -> Any:
        """The rows that this rank passes to ours."""
        return self._inputs[self._number(step), : len(self.input_chunks())]

    def run_dense(self, step: int) -> None:
        self.dense.call(self._inputs[self._dense_number(step)], self.outputs["dense"])

    def run_copy(self, step: int) -> None:
        self._copy.run(step)

    def count_wrong(self, step: int) -> int:
        chunks = self.output_chunks(self.plans[step].chunks)
        return self._count("ours", range(len(chunks)), chunks, self._number(step))

    def count_wrong_dense(self, step: int) -> int:
        return self._count("dense", self.dense.rows, self.output_chunks(self.all_chunks), self._dense_number(step))

    def _count(self, name: str, rows: Sequence[int], chunks: Sequence[int], number: int) -> int:
        output = self.memory.to_host(self.outputs[name])
        return sum(
            int(np.count_nonzero(output[row] != self.expected(chunk, number)))
            for row, chunk in zip(rows, chunks, strict=True)
        )

    def _number(self, step: int) -> int:
        return step % self.num_sets

    def _dense_number(self, step: int) -> int:
        return (step + self.num_sets // 2) % self.num_sets

    def _facts(self) -> Facts:
        plan, place = self.plans[0], self.place
        chunks = np.array(plan.chunks)
        owners, num_lacking = place.owners[chunks], place.holders[chunks].sum(axis=1) - 1
        if plan.op == "all_gather":
            useful = place.holders[chunks].sum(axis=0) - np.bincount(owners, minlength=place.world_size)
        else:
            useful = np.bincount(owners, num_lacking, place.world_size).astype(np.int64)
        num_dense = int(place.holders.sum()) - place.num_chunks
        return Facts(
            size_bytes=self.chunk_bytes * place.num_chunks,
            count=self.num_elements * max(self.shares),
            useful_bytes=int(useful.max()) * self.chunk_bytes,
            density=int(num_lacking.sum()) / num_dense if num_dense else len(chunks) / place.num_chunks,
            bound_s=plan.bound_s,
            algorithm=plan.algorithm,
            peak_staging_bytes=int(plan.staging_bytes.max()),
            plan_digest=plan.digest,
        )
