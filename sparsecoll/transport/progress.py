"""Keeps messages going that nobody waits for yet, for back ends that move bytes only while they are called.

[Note: progress] A thread polls what the owner has left in flight, until all of it has ended, and sleeps until more is
left. Whoever posts and waits at once does not wake it: small operations took up to twice as long on a busy machine.
While the owner waits for something, it polls by itself and the thread does not.

A poll lets go of the interpreter, and what it copies it copies beside Python. Where one copies little (MPICH without
CMA moves 16 kB) the next one follows at once, for at most half a millisecond. Whether it has copied can only be told
by how long it took, and a poll takes long as well that had to wait for the interpreter; hence the limit. Otherwise
the thread sleeps, from 0.1 ms to 1 ms, longer each time. At 1 ms that costs 2 % of a core.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Protocol

__all__ = ["Handle", "Progress"]

_SHORTEST_SLEEP_S = 1e-4
_LONGEST_SLEEP_S = 1e-3
_BURST_S = 5e-4
_QUIET_S = 2e-6


class Handle(Protocol):
    """A request of the back end; false when its owner has been told of its end."""

    def Get_status(self) -> bool:
        """Whether it has ended, which its owner has yet to be told; makes the back end go on if not."""

    def __bool__(self) -> bool: ...


class Progress:
    """A thread that starts when something is left for the first time. One thread at a time calls the methods.

    Attributes:
        num_polls: calls of the back end so far.

    Args:
        name: of the thread.
        beside: another one over the same back end, whose owner's waits make all messages go on.
    """

    def __init__(self, name: str, beside: Progress | None = None) -> None:
        self.num_polls = 0
        self._name, self._beside = name, beside
        self._thread: threading.Thread | None = None
        self._posted: deque[Handle] = deque()  # the owner's, as `_in_flight` is the thread's
        self._in_flight: deque[Handle] = deque()
        self._left: SimpleQueue[list[Handle] | None] = SimpleQueue()
        self._polling = threading.Lock()
        self._is_paused = self._is_closed = False

    def posted(self, handles: Iterable[Handle]) -> None:
        """Notes what may be left or waited for."""
        while self._posted and not self._posted[0]:
            self._posted.popleft()
        self._posted.extend(handles)

    def leave(self) -> None:
        """Keeps going until its end what has been posted so far, whatever else is waited for in between."""
        handles = [handle for handle in self._posted if handle]
        self._posted.clear()
        if not handles or self._is_closed:
            return
        self._left.put(handles)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()

    def pause(self) -> None:
        """Returns when no poll is running; none starts before `go_on`, so that requests may be ended and freed."""
        self._is_paused = True
        with self._polling:
            pass

    def go_on(self) -> None:
        self._is_paused = False

    @property
    def is_paused(self) -> bool:
        """Whether an owner polls."""
        return self._is_paused or (self._beside is not None and self._beside.is_paused)

    def close(self) -> None:
        """Ends the thread. Idempotent, and safe wherever Python collects garbage."""
        self._is_closed = True
        self._left.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        sleep_s = _SHORTEST_SLEEP_S
        while not self._is_closed:
            has_new = self._take_over()
            is_busy = self._poll()
            sleep_s = _SHORTEST_SLEEP_S if has_new or is_busy else min(2 * sleep_s, _LONGEST_SLEEP_S)
            if self._in_flight:
                time.sleep(sleep_s)

    def _take_over(self) -> bool:
        """Whether more has been left; returns when something is in flight, or at the end."""
        has_new = False
        while not self._in_flight or not self._left.empty():
            handles = self._left.get()
            if handles is None:
                break
            self._in_flight.extend(handles)
            has_new = True
        return has_new

    def _poll(self) -> bool:
        """Polls as long as something moves, within limits; whether it has stopped at these."""
        deadline_s = time.perf_counter() + _BURST_S
        while self._in_flight:
            with self._polling:
                if self.is_paused or self._is_closed:
                    return False
                begin_s = time.perf_counter()
                has_ended = self._look_at(self._in_flight[0])
                end_s = time.perf_counter()
            if has_ended:
                self._in_flight.popleft()
            elif end_s - begin_s < _QUIET_S:
                return False
            if end_s > deadline_s:
                return True
        return False

    def _look_at(self, handle: Handle) -> bool:
        """Whether it has ended."""
        if not handle:
            return True
        self.num_polls += 1
        try:
            return handle.Get_status()
        except RuntimeError:  # badly, as whoever waits for it will be told
            return True
