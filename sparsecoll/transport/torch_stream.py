"""Device memory over the user's own torch.distributed process group, NCCL as a rule.

torch has streams, timeouts and a watchdog of its own for NCCL; what is issued here goes to the current stream's
communicator, grouped, and the lane waits for it. A round is one `batch_isend_irecv`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsecoll.cuda.device import Device, Lane
from sparsecoll.errors import SparsecollError, TransportError
from sparsecoll.transport.base import HostTransport
from sparsecoll.transport.stream import Buffer, Round, StreamTransport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TorchStreamTransport"]


class TorchStreamTransport(StreamTransport):
    """One rank of a process group that moves device memory; peers are ranks of that group. All ranks make theirs.

    Args:
        control: carries records between the same ranks; closed with this one.
        process_group: stays the user's.
    """

    backend = "torch"

    def __init__(self, control: HostTransport, process_group: ProcessGroup, gpu: Device) -> None:
        import torch
        import torch.distributed as dist

        super().__init__(control, gpu)
        self._dist: Any = dist
        self._group: Any = process_group
        # torch connects NCCL at a group's first operation, which therefore must be one that all ranks take part in.
        dist.all_reduce(torch.zeros(1, device=gpu.name), group=process_group)

    def issue(self, group: Round, buffers: Sequence[Buffer], lane: Lane) -> None:
        dist = self._dist
        views = [self.gpu.torch_view(each.address, each.nbytes) for each in buffers]
        operations = [
            dist.P2POp(call, views[buffer][offset : offset + num_bytes], group=self._group, group_peer=peer)
            for call, slots in ((dist.irecv, group.receives), (dist.isend, group.sends))
            for peer, buffer, offset, num_bytes in slots
        ]
        try:
            with self._on(lane):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
        except RuntimeError as error:
            raise self._refused(error) from error

    def gather(self, source: Buffer, destination: Buffer, lane: Lane) -> None:
        parts = self.gpu.torch_view(destination.address, destination.nbytes).chunk(self.world_size)
        try:
            with self._on(lane):
                view = self.gpu.torch_view(source.address, source.nbytes)
                self._dist.all_gather(list(parts), view, group=self._group)
        except RuntimeError as error:
            raise self._refused(error) from error

    def _on(self, lane: Lane) -> Any:
        import torch

        return torch.cuda.stream(lane.torch_stream) if self.device != "cpu" else contextlib.nullcontext()

    def _refused(self, error: Exception) -> SparsecollError:
        place = f"rank {self.rank}/{self.world_size} on {self.device}"
        return TransportError(f"torch: expected a group of messages to start, got {error} ({place})")

    def _problem(self) -> SparsecollError | None:
        return None  # torch looks after its communicators

    def _break_off(self) -> None:
        import torch

        with contextlib.suppress(AttributeError, RuntimeError):  # not every back end can
            self._group._get_backend(torch.device(self.device)).abort()

    def _release(self) -> None:
        self._group = None
