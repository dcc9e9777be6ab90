"""What is measured: one collective at one size, on one rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc
from bench.memory import Memory

__all__ = ["ColdCopy", "Facts", "Setting", "Trial", "num_sets"]

Array = Any  # NumPy's, or CuPy's on a GPU


@dataclass(frozen=True)
class Setting:
    """What a trial is made from; equal on all ranks.

    Attributes:
        size_bytes: asked for; `Facts.size_bytes` is what chunks and elements make of it.
        dtype: name in NumPy.
        op: ``sum``, ``mean`` or ``none``.
        traffic: bytes between ranks, ``[world_size, world_size]``, for the all-to-all.
        num_steps: how often each of the three things is run.
        cold_bytes: a rank that goes round this much memory finds none of it in the cache.
    """

    size_bytes: int
    dtype: str
    op: str
    num_chunks: int
    density: float
    skew: str
    algorithm: str
    seed: int
    traffic: NDArray[np.int64] | None
    num_steps: int
    cold_bytes: int

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Facts:
    """What is known of a trial before it runs; equal on all ranks.

    Attributes:
        size_bytes: what the dense collective handles.
        count: elements, nccl-tests' per-rank parameter of the call (the largest, where shares are uneven).
        useful_bytes: max over ranks of the bytes that had to arrive, or to be reduced.
        density: total useful over total dense bytes.
        bound_s: no schedule is faster on the group's topology.
        plan_digest: of the first step's plan.
    """

    size_bytes: int
    count: int
    useful_bytes: int
    density: float
    bound_s: float
    algorithm: str
    peak_staging_bytes: int | None = None
    plan_digest: str | None = None


class Trial(ABC):
    """One collective at one size, beside a library's and beside a plain copy.

    A step is one execution of each. Inputs change from step to step, so that they are read from memory; outputs stay,
    and the runner poisons them before each execution, so that they are warm.

    Attributes:
        case: name of the case.
        ops: reductions that ``-o`` offers.
        skews: what ``--skew`` offers, the default first.
        is_sparse: whether hot chunks are moved, rather than traffic between ranks.
        baseline: the library's collective by its name, or why there is none.
        outputs: of ``ours``, ``dense`` and ``copy``, where they exist before the call.
    """

    case: ClassVar[str]
    ops: ClassVar[tuple[str, ...]] = ()
    skews: ClassVar[tuple[str, ...]]
    is_sparse: ClassVar[bool]
    facts: Facts
    baseline: str
    has_baseline: bool = True
    outputs: dict[str, Array]

    @abstractmethod
    def __init__(self, group: sc.Group, setting: Setting) -> None:
        """Makes plans, inputs and outputs; called on all ranks."""

    @abstractmethod
    def run(self, step: int) -> None:
        """Our collective."""

    @abstractmethod
    def run_dense(self, step: int) -> None:
        """What a user would call instead."""

    @abstractmethod
    def run_copy(self, step: int) -> None:
        """Copies as many bytes as end up in this rank's output."""

    @abstractmethod
    def count_wrong(self, step: int) -> int:
        """Elements of our output that differ from what they must be after ``step``."""

    @abstractmethod
    def count_wrong_dense(self, step: int) -> int:
        """The same for the baseline, whose time would mean nothing otherwise."""


class ColdCopy:
    """Copies ``num_bytes`` into one warm destination from a source that moves on at each step."""

    def __init__(self, num_bytes: int, setting: Setting, memory: Memory) -> None:
        spans = 1 if num_bytes == 0 else max(2, -(-max(setting.cold_bytes, setting.size_bytes) // num_bytes))
        # Written, as pages that were never written all are the same zeros.
        self._xp = memory.xp
        self._spans = self._xp.full((spans, num_bytes), 1, np.uint8)
        self.destination = self._xp.empty(num_bytes, np.uint8)

    def run(self, step: int) -> None:
        self._xp.copyto(self.destination, self._spans[step % len(self._spans)])


def num_sets(input_bytes: int, setting: Setting) -> int:
    """How many input sets to go round so that every step finds its own out of the cache.

    At least two, so that what an earlier step left in memory is not taken for right. More than two for each step are
    never used: the steps of ours and of the baseline keep away from each other's.
    """
    return max(2, min(-(-setting.cold_bytes // max(1, input_bytes)), 2 * setting.num_steps))
