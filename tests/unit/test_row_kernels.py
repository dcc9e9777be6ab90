"""Sort, permute, combine and their gradients, on each kind of kernel: equal to plain indexing, holes included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecoll.cuda.kernels import Kernels
from sparsecoll.moe import MoELayer, combine, inverse_permutation, permute, sort_by_expert
from sparsecoll.moe.kernels import CudaKernels, NativeKernels, RowKernels, TorchKernels, kernels_of
from tests.emulation.kernels import EmulatedLauncher

KINDS: dict[str, Callable[[], RowKernels]] = {
    "native": NativeKernels,
    "torch": TorchKernels,
    "cuda": lambda: CudaKernels(Kernels(EmulatedLauncher()), lambda device: 0),
}
# Tokens, top-k, experts, rows and dim: holes among rows, more tokens than rows, nothing of one or the other.
SHAPES = [(13, 3, 5, 60, 7), (40, 2, 3, 25, 16), (0, 2, 3, 6, 4), (5, 2, 3, 0, 4), (4, 1, 2, 9, 1)]


@pytest.fixture(params=KINDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowKernels:
    """One kind of kernels, which serves the CPU for the time of a test."""
    kind = KINDS[request.param]()
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["sparsecoll.moe.permute"], "kernels_of", lambda x: kind)
    return kind


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody writes is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def positions(num_tokens: int, top_k: int, num_rows: int) -> Tensor:
    """A row for about half of the assignments, -1 for the others; different rows."""
    generator = torch.Generator().manual_seed(num_tokens + num_rows)
    named = torch.full((num_tokens * top_k,), -1)
    chosen = torch.randperm(num_tokens * top_k, generator=generator)[: min(num_rows, num_tokens * top_k) // 2]
    named[chosen] = torch.randperm(num_rows, generator=generator)[: len(chosen)]
    return named.view(num_tokens, top_k)


def index_of(position: Tensor, num_rows: int) -> Tensor:
    """The token of each row, -1 for none."""
    index = torch.full((num_rows,), -1)
    for token, rows in enumerate(position.tolist()):
        for row in rows:
            if row >= 0:
                index[row] = token
    return index


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "num_rows", "dim"), SHAPES)
def test_holes(
    kernels: RowKernels, dtype: torch.dtype, num_tokens: int, top_k: int, num_experts: int, num_rows: int, dim: int
) -> None:
    """Values and gradients are those of a dense matrix of ones and zeros. Small integers make all sums exact."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    position = positions(num_tokens, top_k, num_rows)
    index = index_of(position, num_rows)
    to_rows = (index[:, None] == torch.arange(num_tokens)).to(dtype)  # [N, T]
    chosen = (position[:, :, None] == torch.arange(num_rows)).to(dtype)  # [T, K, N]

    x, d_rows = draw(num_tokens, dim).requires_grad_(), draw(num_rows, dim)
    rows = permute(x, index, position)
    assert torch.equal(rows, to_rows @ x)
    (dx,) = torch.autograd.grad(rows, x, d_rows)
    assert torch.equal(dx, to_rows.t() @ d_rows)

    y, weights = draw(num_rows, dim).requires_grad_(), draw(num_tokens, top_k).requires_grad_()
    d_out = draw(num_tokens, dim)
    out = combine(y, position, weights)
    picked = torch.einsum("tkn,nd->tkd", chosen, y)
    assert torch.equal(out, torch.einsum("tk,tkd->td", weights, picked))
    dy, d_weights = torch.autograd.grad(out, (y, weights), d_out)
    assert torch.equal(dy, torch.einsum("tkn,tk,td->nd", chosen, weights, d_out)), "zeros where nobody named a row"
    assert torch.equal(d_weights, torch.einsum("td,tkd->tk", d_out, picked))
    (dy_alone,) = torch.autograd.grad(combine(y, position, weights.detach()), y, d_out)
    assert torch.equal(dy_alone, dy)


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(0, 2, 3), (13, 3, 5), (4, 1, 2), (3000, 2, 3000)])
def test_sort(kernels: RowKernels, num_tokens: int, top_k: int, num_experts: int) -> None:
    ids = torch.randint(num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(num_tokens))
    order, counts = sort_by_expert(ids, num_experts)
    assert torch.equal(order, ids.flatten().argsort(stable=True))
    assert torch.equal(counts, ids.flatten().bincount(minlength=num_experts))


def test_permutations(kernels: RowKernels) -> None:
    """Where every row is named, the promise that it is changes nothing; strides do not matter."""
    generator = torch.Generator().manual_seed(0)
    position = torch.randperm(24, generator=generator).view(8, 3)
    assert torch.equal(inverse_permutation(position.flatten())[position.flatten()], torch.arange(24))
    y = torch.randn(5, 24, generator=generator, dtype=torch.float64).t().requires_grad_()
    weights = torch.randn(3, 8, generator=generator, dtype=torch.float64).t().requires_grad_()
    d_out = torch.randn(5, 8, generator=generator, dtype=torch.float64).t()
    results = [
        torch.autograd.grad(combine(y, position, weights, is_permutation=promise), (y, weights), d_out)
        for promise in (True, False)
    ]
    for with_promise, without in zip(*results, strict=True):
        assert torch.equal(with_promise, without)
    torch.testing.assert_close(
        results[0][0], torch.zeros(24, 5).double().index_put((position,), weights[..., None] * d_out[:, None])
    )


def test_a_layer_is_the_same_on_all_kinds(kernels: RowKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = MoELayer(6, 4, 5, 2, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    x.requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
    monkeypatch.undo()
    expected = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        gradients, torch.autograd.grad(expected.square().sum(), (x, *layer.parameters())), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_who_serves_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(kernels_of(torch.zeros(1)), NativeKernels)
    assert isinstance(kernels_of(torch.zeros(1, device="meta")), TorchKernels)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda:3"))
    for found, kind in ((None, TorchKernels), (object(), CudaKernels)):
        monkeypatch.setattr("sparsecoll.moe.kernels.kernels_for", {3: found}.__getitem__)
        assert isinstance(kernels_of(on_gpu), kind)


def test_shapes_are_known_without_a_device() -> None:
    """On the meta device nothing can be read, so that a hidden wait would raise."""
    ids = torch.zeros(8, 2, dtype=torch.int64, device="meta")
    order, counts = sort_by_expert(ids, 3)
    assert (order.shape, counts.shape) == ((16,), (3,))
    x = torch.zeros(8, 4, device="meta", requires_grad=True)
    rows = permute(x, order // 2, inverse_permutation(order).view(8, 2))
    weights = torch.zeros(8, 2, device="meta", requires_grad=True)
    out = combine(rows, ids, weights)
    assert out.shape == (8, 4)
    out.sum().backward()
    assert x.grad is not None and weights.grad is not None
