"""CUDA graphs: what has run once is captured, and replayed with other values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparsecoll as sc
from sparsecoll.moe import Capacity, MoELayer
from tests.gpu.stream_checks import holders_of_owned, place_of, rows_of, unchecked

__all__ = ["CHECKS", "check_collectives", "check_training_step"]

_NUM_REPLAYS = 4
_TOKENS, _DIM = 48, 64


def captured(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Runs ``body`` three times on a side stream, as torch asks for, and captures it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads, the transport's watcher among them, go on asking CUDA about events.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        body()
    return graph


def check_collectives(group: sc.Group) -> None:
    """All three in one graph, the sums of the second back in the input of the third."""
    place, counts = place_of(group.world_size), [1] * group.world_size
    mine = torch.arange(place.num_chunks * 300, dtype=torch.float32, device=group.device).view(-1, 300)
    owned_values, held_values = rows_of(mine, place.owned_by(group.rank)), rows_of(mine, place.held_by(group.rank))
    for algorithm in ("direct", "relay"):
        shard = owned_values.clone()
        results: dict[str, Tensor] = {}

        def body(shard: Tensor = shard, results: dict[str, Tensor] = results, algorithm: str = algorithm) -> None:
            held = sc.sparse_all_gather(shard, place, group=group, algorithm=algorithm)
            work = sc.sparse_reduce_scatter(held, place, group=group, algorithm=algorithm, async_op=True)
            rows = held.sum(dim=1)[:1].expand(group.world_size, 3).contiguous() + group.rank
            moved = sc.all_to_all(rows, counts, counts, group=group)
            results.update(held=held, owned=work.result(), rows=rows, moved=moved)

        with unchecked(group):
            graph = captured(body)
            for step in range(_NUM_REPLAYS):
                shard.copy_(owned_values + step)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(results["held"], held_values + step), (algorithm, step)
                assert torch.equal(results["owned"], (owned_values + step) * holders_of_owned(place, group))
                expected = sc.all_to_all(results["rows"], counts, counts, group=group)
                assert torch.equal(results["moved"], expected)
        del graph


class Model(nn.Module):
    """Two MoE layers between dense ones."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        more = {"device": device, "dtype": dtype}
        self.inlet = nn.Linear(_DIM, _DIM, **more)
        self.first = MoELayer(_DIM, 32, 8, 2, shared_hidden_dim=16, **more)
        self.second = MoELayer(_DIM, 32, 8, 2, **more)
        self.outlet = nn.Linear(_DIM, 1, **more)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inlet(x).relu()
        h = h + self.first(h)
        h = h + self.second(h)
        return self.outlet(h).float().square().mean()


class Training:
    """A wrapped model with fixed capacity and fixed replicas, and one step of training on a batch in a fixed place."""

    def __init__(self, group: sc.Group, dtype: torch.dtype) -> None:
        everyone, generator = range(group.world_size), torch.Generator().manual_seed(0)
        model = Model(dtype, group.device)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / param.shape[-1] ** 0.5)
        capacity = Capacity(_TOKENS, {"first": {0: everyone, 3: everyone}, "second": {5: [0]}})
        self.model = sc.FSSDP(model, group=group, capacity=capacity)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.batch = torch.zeros(_TOKENS, _DIM, dtype=dtype, device=group.device)
        self.loss = torch.zeros((), device=group.device)

    def step(self) -> None:
        # Gradients stay where they are: a graph has their addresses.
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.model(self.batch)
        loss.backward()
        self.model.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def load(self, number: int, rank: int) -> None:
        """Another batch, the same on the same rank in every training."""
        generator = torch.Generator().manual_seed(100 * number + rank)
        self.batch.copy_(torch.randn(self.batch.shape, generator=generator))


def check_training_step(group: sc.Group) -> None:
    """A captured step, replayed on other batches, trains as the step itself does."""
    for dtype in (torch.float32, torch.bfloat16):
        eager, graphed = Training(group, dtype), Training(group, dtype)
        graph = captured(graphed.step)  # three steps on zeros, as a capture runs nothing
        for _ in range(3):
            eager.step()
        for number in range(_NUM_REPLAYS):
            for training in (eager, graphed):
                training.load(number, group.rank)
            eager.step()
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(graphed.loss, eager.loss, rtol=1e-3, atol=1e-5)
        for (name, got), wanted in zip(graphed.model.named_parameters(), eager.model.parameters(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert float(eager.loss) > 0
        del graph


CHECKS = [f"{__name__}:{name}" for name in list(globals()) if name.startswith("check_")]
