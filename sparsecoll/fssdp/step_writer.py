"""Where step records go: lines of JSON, or TensorBoard."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

from sparsecoll.errors import BackendUnavailable, InvalidArgument
from sparsecoll.fssdp.step import StepRecord

__all__ = ["JsonLinesWriter", "StepWriter", "TensorBoardWriter"]

W = TypeVar("W", bound="StepWriter")


class StepWriter(ABC):
    """Takes the records of one rank's steps. Whether every rank has one is the caller's choice."""

    @abstractmethod
    def write(self, record: StepRecord) -> None:
        """Writes one record; of two with the same ``step`` the later one counts."""

    @abstractmethod
    def close(self) -> None:
        """Ends writing. Idempotent."""

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLinesWriter(StepWriter):
    """Appends one line for each record to a file, and flushes it; `StepRecord.from_json` reads them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file, which may exist.

        Raises:
            InvalidArgument: it cannot be written; names the path.
        """
        try:
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            raise InvalidArgument(f"JsonLinesWriter: expected a writable path, got {path}: {error}") from error

    def write(self, record: StepRecord) -> None:
        self._file.write(record.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter(StepWriter):
    """Writes every figure as a scalar: ``fssdp/exposed_s``, ``fssdp/imbalance_after/<fqn>``."""

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        """Starts a file of events in ``log_dir``.

        Raises:
            BackendUnavailable: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            text = "TensorBoardWriter: expected the package tensorboard (pip install tensorboard), got"
            raise BackendUnavailable(f"{text} {error}") from error
        self._summary: Any = SummaryWriter(log_dir=os.fspath(log_dir))

    def write(self, record: StepRecord) -> None:
        for name, value in record.scalars():
            self._summary.add_scalar(f"fssdp/{name}", value, record.step)

    def close(self) -> None:
        self._summary.close()
