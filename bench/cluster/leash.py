"""What keeps ranks on hosts from staying behind: their launcher's end, and limits on what may hang."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["end_with", "limited"]

_PR_SET_PDEATHSIG = 1


def end_with(launcher: int | None) -> None:
    """Ends this process with its parent ``launcher``, also when that is killed and can end nobody."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher:
        raise SystemExit("the launcher has ended")


@contextlib.contextmanager
def limited(what: str, limit_s: float) -> Iterator[None]:
    """Ends this process if what follows takes longer; Gloo may hang. Errors tell in what they happened."""
    timer = threading.Timer(limit_s, _give_up, (f"expected the end of {what} within {limit_s:g} s",))
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        error.add_note(f"in {what}")
        raise
    finally:
        timer.cancel()


def _give_up(problem: str) -> None:
    faulthandler.dump_traceback(all_threads=True)
    print(problem, file=sys.stderr, flush=True)
    os._exit(1)
