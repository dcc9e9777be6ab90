"""Signals that would end this process before it has cleaned up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

__all__ = ["terminable", "undisturbed"]

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes signals that end a process exceptions, as Ctrl-C is one, so that what was started is ended too."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    with _handled(_ENDING, end):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores them, and Ctrl-C, also in processes that are started here: cleaning up takes part of a second."""
    with _handled((*_ENDING, signal.SIGINT), signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
