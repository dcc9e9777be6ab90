"""A rank's memory, counted by allocation: every storage that a tensor of this thread brings, until it dies.

[Note: what is counted] An operation that allocates returns a tensor with a storage not seen before; it counts with all
of its bytes until its last tensor is gone, on whichever thread. Staging memory of the group, which is NumPy's, is asked
for at every allocation. What an operation takes and frees inside itself is not seen, nor are the integers that Python
and NumPy keep of plans and routes.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Alive", "Entry", "Ledger"]

_TORCH = str(Path(torch.__file__).parent)
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(eq=False)
class Entry:
    """One storage that is alive.

    Attributes:
        kind: what it is for; empty until somebody says so.
        code, line: where it was allocated, outside of torch.
    """

    num_bytes: int
    code: CodeType
    line: int
    storage: ref[torch.UntypedStorage]
    kind: str = ""

    @property
    def place(self) -> str:
        """``file:line function``, the file from the checkout's root on."""
        file = Path(self.code.co_filename)
        name = file.relative_to(_ROOT) if file.is_relative_to(_ROOT) else file.name
        return f"{name}:{self.line} {self.code.co_name}"


class Alive(NamedTuple):
    """What is alive at some moment.

    Attributes:
        num_bytes: of all of it.
        staging_bytes: of that, staging memory of the group.
        entries: the storages.
    """

    num_bytes: int
    staging_bytes: int
    entries: tuple[Entry, ...]


class Ledger(TorchDispatchMode):
    """Counts while it is entered, as a context of the thread to be counted; deaths also count later.

    Attributes:
        peak: the most since the last `start_window`.
    """

    def __init__(self, staging_bytes: Callable[[], int]) -> None:
        super().__init__()
        self._staging_bytes = staging_bytes
        self._alive: dict[int, Entry] = {}  # by the storage's id
        self._tensor_bytes = 0
        self._dead: deque[int] = deque()  # any thread may add, this one takes out
        self.peak = Alive(0, 0, ())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and keeping a compiler away at each operation takes longer than counting.
        return False

    def now(self) -> Alive:
        """What is alive."""
        self._bury()
        staging_bytes = self._staging_bytes()
        return Alive(self._tensor_bytes + staging_bytes, staging_bytes, tuple(self._alive.values()))

    def start_window(self) -> None:
        """Begins to look for a peak."""
        self.peak = self.now()

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors are for, also of a peak that has been."""
        self._bury()
        for tensor in tensors:
            entry = self._alive.get(id(tensor.untyped_storage()))
            if entry is not None:
                entry.kind = kind

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        self._bury()  # whoever had this id before
        if key in self._alive or not storage.nbytes():
            return
        code, line = _caller()
        self._alive[key] = Entry(storage.nbytes(), code, line, ref(storage, lambda _: self._dead.append(key)))
        self._tensor_bytes += storage.nbytes()
        self._look()

    def _look(self) -> None:
        if self._tensor_bytes + self._staging_bytes() > self.peak.num_bytes:
            self.peak = self.now()

    def _bury(self) -> None:
        while self._dead:
            self._tensor_bytes -= self._alive.pop(self._dead.popleft()).num_bytes


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from _tensors(each)


def _caller() -> tuple[CodeType, int]:
    frame = sys._getframe(3)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame.f_code, frame.f_lineno
