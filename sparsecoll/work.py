"""The handle of an operation in flight."""

from __future__ import annotations

import threading
from typing import Any

from sparsecoll.errors import CollectiveTimeout

__all__ = ["Work"]


class Work:
    """One operation in flight. It keeps the operation's buffers alive until it ends."""

    def __init__(self, description: str, buffers: Any = None) -> None:
        self.description = description
        self._ended = threading.Event()
        self._result: Any = None
        self._exception: BaseException | None = None
        self._buffers = buffers

    def finish(self, result: Any = None, exception: BaseException | None = None) -> None:
        """Marks the end; called once, by whoever runs the operation."""
        self._result, self._exception, self._buffers = result, exception, None
        self._ended.set()

    def done(self) -> bool:
        """Whether the operation has ended, well or badly."""
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the end and raises what the operation raised.

        Raises:
            CollectiveTimeout: ``timeout_s`` passed; the operation itself goes on and may be waited for again.
        """
        if not self._ended.wait(timeout_s):
            raise CollectiveTimeout(f"{self.description}: expected an end within {timeout_s} s, still in flight")
        if self._exception is not None:
            raise self._exception

    def exception(self) -> BaseException | None:
        """What the operation raised, or None; blocks until the end."""
        self._ended.wait()
        return self._exception

    def result(self, timeout_s: float | None = None) -> Any:
        """Waits, then gives what the blocking call would have returned."""
        self.wait(timeout_s)
        return self._result
