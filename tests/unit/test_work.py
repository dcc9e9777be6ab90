"""The handle of an operation in flight."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from sparsecoll import CollectiveTimeout, InvalidArgument, Work


def test_in_flight_until_finished() -> None:
    work = Work("barrier #1")
    assert not work.done()
    work.finish(5)
    assert work.done() and work.result() == 5 and work.exception() is None
    work.wait()
    assert work.result(timeout_s=0.0) == 5, "asking twice gives the same"


def test_raises_what_the_operation_raised_every_time() -> None:
    error = InvalidArgument("barrier: expected x, got y")
    work = Work("barrier #1")
    work.finish(exception=error)
    assert work.done() and work.exception() is error
    for ask in (work.wait, work.result, work.wait):
        with pytest.raises(InvalidArgument) as caught:
            ask()
        assert caught.value is error


def test_a_wait_that_times_out_leaves_the_operation_alone() -> None:
    work = Work("sparse_all_gather #7")
    begin = time.monotonic()
    with pytest.raises(CollectiveTimeout, match=r"sparse_all_gather #7: .*within 0\.05 s"):
        work.wait(timeout_s=0.05)
    assert time.monotonic() - begin >= 0.05
    with pytest.raises(CollectiveTimeout):
        work.result(timeout_s=0.0)
    assert not work.done()
    work.finish("late")
    assert work.result(timeout_s=1.0) == "late"


def test_wakes_every_thread_that_waits() -> None:
    work = Work("barrier #1")
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(work.result(timeout_s=10.0))) for _ in range(4)]
    threads.append(threading.Thread(target=lambda: results.append(work.exception())))
    for thread in threads:
        thread.start()
    work.finish(3)
    for thread in threads:
        thread.join(10.0)
    assert sorted(map(str, results)) == ["3", "3", "3", "3", "None"]


def test_keeps_buffers_until_the_end_and_no_longer() -> None:
    buffer = np.zeros(8)
    watch = weakref.ref(buffer)
    work = Work("barrier #1", (buffer,))
    del buffer
    gc.collect()
    assert watch() is not None
    work.finish()
    gc.collect()
    assert watch() is None
