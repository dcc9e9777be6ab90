"""One rank's side of the measurements.

[Note: what is timed] Both ranks of a pair do the same at the same time. After every batch they tell each other how long
it took and go by the longer time, as whoever starts late finds the first messages waiting. That also lets them choose
sizes and counts without further talk. A batch takes several milliseconds, beside which a start, and what a link lets
pass in a burst, count for little.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from sparsecoll.probe.combine import NodeSample, PairSample
from sparsecoll.probe.rounds import NodePair, Pair
from sparsecoll.probe.wires import Wire
from sparsecoll.topology import Link
from sparsecoll.transport.base import HostTransport, Message, Operation

__all__ = ["Meter"]

_PING_BYTES = 8
_SMALLEST_BATCH_BYTES = 1 << 14
_SHORTEST_BATCH_S, _LONGEST_BATCH_S = 5e-3, 5e-2
_FEWEST_BATCHES, _MOST_BATCHES = 3, 15
_FEWEST_PINGS, _MOST_PINGS = 10, 500
# Long enough that ranks which do not start at the very same time still disturb each other for most of it.
_SHARED_BATCH_S = 2e-2

_SAMPLE = struct.Struct("<dd")


class Meter:
    """Takes part in all rounds of one operation.

    Args:
        transport: carries what ranks tell each other.
        wire: is measured.
        round_s: about how long a round is to take.
    """

    def __init__(self, transport: HostTransport, wire: Wire, operation: Operation, round_s: float) -> None:
        self._transport = transport
        self._wire = wire
        self._operation = operation
        self._pings_s = round_s / 4
        self._batches_s = round_s / 2
        self._batch_s = min(max(self._batches_s / _MOST_BATCHES, _SHORTEST_BATCH_S), _LONGEST_BATCH_S)
        wire.reserve(_PING_BYTES)

    def pairs(self, rounds: Sequence[Sequence[Pair]]) -> list[PairSample]:
        """Measures the pairs of each round at once; every rank gets the samples of all."""
        rank = self._transport.rank
        samples = []
        for pairs in rounds:
            latency_s = bandwidth = 0.0
            for pair in pairs:
                if rank in pair:
                    peer = sum(pair) - rank
                    latency_s = self._latency_s(peer, leads=rank == pair[0])
                    bandwidth = self._bandwidth(peer)
            # Also ends the round: no pair of the next one disturbs a late pair of this one.
            records = self._transport.exchange(_SAMPLE.pack(latency_s, bandwidth), self._operation)
            samples += [PairSample(*pair, *_SAMPLE.unpack(records[pair[0]])) for pair in pairs]
        return samples

    def nodes(
        self, rounds: Sequence[Sequence[NodePair]], node_of: Sequence[int], links: Sequence[Link]
    ) -> list[NodeSample]:
        """Lets all ranks of two nodes talk at once; every rank gets the samples of all.

        Each pair moves what takes it equally long alone, so that all are busy until the end, shared link or not.

        Args:
            links: each rank's own to other nodes.
        """
        samples = []
        for node_pairs in rounds:
            alone = {
                pair: min(links[rank].bandwidth_bytes_per_s for rank in pair) for pairs in node_pairs for pair in pairs
            }
            batch_s = min(_SHARED_BATCH_S, self._wire.most_bytes / max(alone.values()))
            batch_bytes = {pair: max(1, int(bandwidth * batch_s)) for pair, bandwidth in alone.items()}
            times = self._times_together(batch_bytes, _clamped(int(self._batches_s / batch_s)))
            for pairs in node_pairs:
                seconds = median(max(each[rank] for pair in pairs for rank in pair) for each in times)
                total_bytes = sum(batch_bytes[pair] for pair in pairs)
                first, second = (node_of[rank] for rank in pairs[0])
                samples.append(NodeSample(first, second, sum(alone[pair] for pair in pairs), total_bytes / seconds))
        return samples

    def _times_together(self, batch_bytes: dict[Pair, int], count: int) -> list[list[float]]:
        """``count`` times the seconds of every rank for its batch, while all move theirs; 0 for a rank without."""
        rank = self._transport.rank
        mine = [(sum(pair) - rank, num_bytes) for pair, num_bytes in batch_bytes.items() if rank in pair]
        times = []
        self._exchange_seconds(0.0)  # from here on ranks start together
        for _ in range(1 + count):
            times.append(self._exchange_seconds(sum(self._move(peer, num_bytes) for peer, num_bytes in mine)))
        return times[1:]  # without the one that warms up

    def _exchange_seconds(self, seconds: float) -> list[float]:
        records = self._transport.exchange(_SAMPLE.pack(seconds, 0.0), self._operation)
        return [_SAMPLE.unpack(record)[0] for record in records]

    def _latency_s(self, peer: int, *, leads: bool) -> float:
        """Half the median round trip of the rank that leads."""
        trip_s = self._round_trip_s(peer, _FEWEST_PINGS, leads)
        count = min(max(int(self._pings_s / trip_s), _FEWEST_PINGS), _MOST_PINGS)
        told = self._swap(peer, count)
        return self._round_trip_s(peer, count if leads else int(told), leads) / 2

    def _round_trip_s(self, peer: int, count: int, leads: bool) -> float:
        times = []
        for _ in range(count):
            begin_s = time.perf_counter()
            if leads:
                self._wire.swap(peer, _PING_BYTES, _PING_BYTES)
            else:
                self._wire.swap(peer, 0, _PING_BYTES)
                self._wire.swap(peer, _PING_BYTES, 0)
            times.append(time.perf_counter() - begin_s)
        return median(times)

    def _bandwidth(self, peer: int) -> float:
        """Bytes per second in each direction, by the median of batches that take long enough."""
        self._swap(peer, 0.0)  # both are there
        num_bytes = _SMALLEST_BATCH_BYTES
        # Of two, as one may have waited for a core, and the first one touches new memory.
        while (seconds := min(self._batch(peer, num_bytes) for _ in range(2))) < self._batch_s:
            if num_bytes == self._wire.most_bytes:
                break
            # A link that slows down after a burst shows only when it is reached step by step.
            factor = min(max(1.2 * self._batch_s / seconds, 2.0), 8.0)
            num_bytes = min(int(num_bytes * factor), self._wire.most_bytes)
        count = _clamped(int(self._batches_s / seconds))
        return num_bytes / median(self._batch(peer, num_bytes) for _ in range(count))

    def _batch(self, peer: int, num_bytes: int) -> float:
        """Seconds until ``num_bytes`` have passed in both directions; see [Note: what is timed]."""
        seconds = self._move(peer, num_bytes)
        return max(seconds, self._swap(peer, seconds))

    def _move(self, peer: int, num_bytes: int) -> float:
        self._wire.reserve(num_bytes)
        begin_s = time.perf_counter()
        self._wire.swap(peer, num_bytes, num_bytes)
        return time.perf_counter() - begin_s

    def _swap(self, peer: int, value: float) -> float:
        """Gives ``value`` for the peer's."""
        mine, other = np.array([value], "<f8"), np.empty(1, "<f8")
        sends, receives = [Message(peer, mine.view(np.uint8))], [Message(peer, other.view(np.uint8))]
        self._transport.wait(self._transport.post(sends, receives, self._operation), self._operation)
        return float(other[0])


def _clamped(count: int) -> int:
    return min(max(count, _FEWEST_BATCHES), _MOST_BATCHES)
