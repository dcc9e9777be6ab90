"""The one exchange that an MoE layer cannot do without: all ranks learn all loads, and that they agree.

[Note: on a GPU] Counts are on the device, and the host needs those of all ranks to know sizes. So each rank's header is
sent to the device, header and counts are gathered there, and all of it comes back in one small copy, issued at once:
the host waits for the copy when it asks for the result, and may issue other work before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.collectives.agreement import Description, agree, check_headers, header
from sparsecoll.collectives.buffers import buffer_of
from sparsecoll.group import Group
from sparsecoll.transport.base import Operation
from sparsecoll.transport.stream import Buffer, StreamTransport

__all__ = ["CountExchange", "Counts"]

_HEADER_BYTES = 64


class Counts(NamedTuple):
    """What all ranks have told.

    Attributes:
        loads: int64 ``[W, E]``.
        numbers: int64 ``[W, N]``.
    """

    loads: NDArray[np.int64]
    numbers: NDArray[np.int64]


class CountExchange:
    """An exchange under way. Between its start and `result` a caller can do what depends on no other rank.

    Args:
        name: of the operation.
        digest, describe, problem: as in `sparsecoll.collectives.agreement.agree`.
        counts: int64 ``[num_experts]`` tensor on the group's device; must not change until `result` has returned.
        numbers: others that all ranks are to learn, equally many on each and known to the host.
    """

    def __init__(
        self,
        group: Group,
        name: str,
        digest: bytes,
        describe: Callable[[], Description],
        counts: Any,
        numbers: Sequence[int],
        problem: Exception | None = None,
    ) -> None:
        self._group = group
        self._operation = group.operation(name)
        self._agreed = digest, describe, problem
        self._counts, self._numbers = counts.contiguous(), np.array(numbers, "<i8")
        self._on_device: _DeviceExchange | None = None
        if isinstance(group.transport, StreamTransport):
            transport = group.transport
            told_bytes = self._counts.nbytes + self._numbers.nbytes
            begin = header(self._operation, digest, problem, told_bytes).ljust(_HEADER_BYTES, b"\0")
            begin += self._numbers.tobytes()
            self._on_device = group.run(
                self._operation,
                lambda: _DeviceExchange(transport, self._operation, begin, self._counts, group.record_bytes),
            )

    def result(self) -> Counts:
        """What all ranks have told.

        Raises:
            InvalidArgument, CollectiveMismatch: as `agree` does; on all ranks.
            CollectiveTimeout, PeerFailure, TransportError: the group is unusable afterwards.
        """
        return self._group.run(self._operation, self._on_host if self._on_device is None else self._from_device)

    def _on_host(self) -> Counts:
        digest, describe, problem = self._agreed
        payload = self._numbers.tobytes() + np.array(self._counts.tolist(), "<i8").tobytes()
        payloads = agree(self._group, self._operation, digest, describe, problem=problem, payload=payload)
        return self._read(np.array([np.frombuffer(each, np.uint8) for each in payloads]))

    def _from_device(self) -> Counts:
        assert self._on_device is not None
        _, describe, problem = self._agreed
        records = self._on_device.result()
        check_headers(self._group, self._operation, [each.tobytes() for each in records], describe, problem)
        return self._read(records[:, _HEADER_BYTES:])

    def _read(self, payloads: NDArray[np.uint8]) -> Counts:
        begin, end = self._numbers.nbytes, self._numbers.nbytes + self._counts.nbytes
        numbers, loads = (
            np.ascontiguousarray(part).view("<i8") for part in (payloads[:, :begin], payloads[:, begin:end])
        )
        return Counts(loads.astype(np.int64), numbers.astype(np.int64))


class _DeviceExchange:
    """Records gathered on the device and copied to the host.

    Args:
        least_bytes: of a record. Equal on all ranks, so that ranks that are in different layers still meet, and can say
            so; a gather of unequal sizes might never end.
    """

    def __init__(
        self, transport: StreamTransport, operation: Operation, begin: bytes, counts: Any, least_bytes: int
    ) -> None:
        gpu, world_size = transport.gpu, transport.world_size
        record_bytes = max(len(begin) + counts.nbytes, least_bytes)
        sent, self._received = gpu.pinned(len(begin)), gpu.pinned(world_size * record_bytes)
        sent[:] = np.frombuffer(begin, np.uint8)
        with transport.issuing(operation, "torch") as (lane, issue):
            mine, all_of_them = gpu.allocate(record_bytes, lane), gpu.allocate(world_size * record_bytes, lane)
            issue.keep = counts, sent, self._received, mine, all_of_them
            gpu.copy(mine.address, sent.ctypes.data, len(begin), lane.stream)
            if counts.nbytes:
                gpu.copy(mine.address + len(begin), buffer_of(counts).address, counts.nbytes, lane.stream)
            source, destination = (Buffer(each.address, each.num_bytes) for each in (mine, all_of_them))
            transport.gather(source, destination, lane)
            gpu.copy(self._received.ctypes.data, destination.address, destination.nbytes, lane.stream)
        transport.counters.control_bytes += record_bytes * (world_size - 1)
        transport.counters.control_messages += world_size - 1
        self._issue, self._shape = issue, (world_size, record_bytes)

    def result(self) -> NDArray[np.uint8]:
        """``[world_size, record_bytes]``; blocks the host."""
        self._issue.wait()
        return self._received.reshape(self._shape)
