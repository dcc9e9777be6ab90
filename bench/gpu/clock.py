"""Device time of work on a stream: events around many calls, behind a pause in which the host runs ahead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

__all__ = ["Clock", "DeviceClock", "medians_s"]

Call = Callable[[int], object]
"""Something to be timed, on the data set of that number."""

_NUM_SAMPLES = 5
_SAMPLE_S = 5e-3
# The driver queues a thousand launches, and a call may have some sixty of them.
_FEWEST_CALLS, _MOST_CALLS = 3, 15
_LONGEST_PAUSE_S = 0.03


class Clock(Protocol):
    """Times what is put on a device."""

    def time_s(self, call: Call, numbers: Sequence[int], pause_s: float) -> tuple[float, float]:
        """What the device takes for all calls together, and what the host took to issue them.

        Args:
            pause_s: how long the device does nothing first, so that it never waits for the host afterwards.
        """
        ...


class DeviceClock:
    """The current stream of a GPU."""

    # A little above what a GPU's clock reaches, so that a pause is never shorter than asked for.
    _CYCLES_PER_S = 2.1e9

    def __init__(self) -> None:
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time_s(self, call: Call, numbers: Sequence[int], pause_s: float) -> tuple[float, float]:
        torch.cuda._sleep(int(pause_s * self._CYCLES_PER_S))
        began_s = time.perf_counter()
        self._begin.record()
        for number in numbers:
            call(number)
        self._end.record()
        host_s = time.perf_counter() - began_s
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3, host_s


class _Contestant:
    """One call, and where it is among the data sets."""

    def __init__(self, call: Call, first: int, num_sets: int, clock: Clock) -> None:
        self._call, self._at, self._num_sets, self._clock = call, first, num_sets, clock
        self._sample_s(1)  # loads kernels, takes memory
        self._host_s = 0.0
        once_s = self._sample_s(_FEWEST_CALLS)
        self._count = max(_FEWEST_CALLS, min(_MOST_CALLS, round(_SAMPLE_S / max(once_s, 1e-9))))
        self.sample_s()

    def sample_s(self) -> float:
        """The device's time of one call."""
        # Half as much again as the host took the last time; some calls wait for the device, whatever the pause.
        return self._sample_s(self._count, min(1.5 * self._host_s * self._count, _LONGEST_PAUSE_S))

    def _sample_s(self, count: int, pause_s: float = 0.0) -> float:
        numbers = [number % self._num_sets for number in range(self._at, self._at + count)]
        self._at += count
        device_s, host_s = self._clock.time_s(self._call, numbers, pause_s)
        self._host_s = host_s / count
        return device_s / count


def medians_s(calls: Mapping[str, Call], num_sets: int, clock: Clock) -> dict[str, float]:
    """Median time of one call of each contestant, measured in turn.

    Each goes on where it left off among the data sets, and far from where the others are, so that none finds its input
    in the cache because another one has just read it.
    """
    contestants = {
        name: _Contestant(call, num_sets * position // len(calls), num_sets, clock)
        for position, (name, call) in enumerate(calls.items())
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_NUM_SAMPLES):
        for name, contestant in contestants.items():
            samples[name].append(contestant.sample_s())
    return {name: statistics.median(values) for name, values in samples.items()}
