"""The native activations against formulas in float64, and the layer's, which choose between them and torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecoll import native
from sparsecoll.errors import InvalidArgument
from sparsecoll.moe import find_activation

HALVES = ["bfloat16", "float16"]
FUSED = ["float32", *HALVES]
KINDS = ["swiglu", "gelu"]
# Relative to what is rounded on the way; measured are 4 of float32's last places at most.
TOLERANCE = 5 * 2.0**-23
# Sigmoids and tails below 1e-38 count as zero; here they are multiplied by less than 1e5.
NOTHING = 1e-33
# Around the sizes of vectors.
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 257]


class Exact(NamedTuple):
    """A value in float64, and the sum of the magnitudes of its terms, to which rounding is relative."""

    value: Tensor
    scale: Tensor


def exact_forward(h: Tensor, kind: str) -> Exact:
    h = h.double()
    if kind == "gelu":
        value = h * torch.special.erfc(-h / 2**0.5) / 2
    else:
        gate, up = h.chunk(2, dim=-1)
        value = gate * torch.sigmoid(gate) * up
    return Exact(value, value.abs())


def exact_backward(d: Tensor, h: Tensor, kind: str) -> Exact:
    d, h = d.double(), h.double()
    if kind == "gelu":
        probability, density = torch.special.erfc(-h / 2**0.5) / 2, (-h * h / 2).exp() / math.sqrt(2 * math.pi)
        return Exact(d * (probability + h * density), d.abs() * (probability + h.abs() * density))
    gate, up = h.chunk(2, dim=-1)
    chance, complement = torch.sigmoid(gate), torch.sigmoid(-gate)
    d_gate = d * up * chance * (1 + gate * complement)
    d_gate_scale = (d * up).abs() * chance * (1 + gate.abs() * complement)
    d_up = d * gate * chance
    return Exact(torch.cat([d_gate, d_up], -1), torch.cat([d_gate_scale, d_up.abs()], -1))


def assert_near(value: Tensor, exact: Exact) -> None:
    """Within `TOLERANCE`, and half a last place of a 16-bit float, or of its subnormals."""
    limits = torch.finfo(value.dtype)
    allowed = TOLERANCE * exact.scale + NOTHING
    if value.dtype != torch.float32:
        allowed = allowed + limits.eps / 2 * exact.value.abs() + limits.tiny * limits.eps / 2
    excess = (value.double() - exact.value).abs() / allowed
    inside = exact.value.abs() < limits.max
    assert excess[inside].le(1).all(), f"{float(excess[inside].max())} times what is allowed"


def activate(h: Tensor, kind: str, num_threads: int = 1) -> Tensor:
    """By the forward kernel, and of gelu, which has none, by that of backward."""
    num_rows, dim = len(h), h.shape[1] // (2 if kind == "swiglu" else 1)
    out = torch.full((num_rows, dim), torch.nan, dtype=h.dtype)
    if kind == "swiglu":
        native.swiglu(out.data_ptr(), h.data_ptr(), num_rows, dim, name_of(h), num_threads)
    else:
        backward_at(torch.full_like(h, torch.nan), out, torch.zeros_like(h), h, kind, num_threads)
    return out


def activate_backward(d: Tensor, h: Tensor, kind: str, num_threads: int = 1) -> tuple[Tensor, Tensor]:
    """The gradient and the activation, which takes the place of the incoming gradient's copy."""
    dh, activated = torch.full_like(h, torch.nan), d.clone()
    backward_at(dh, activated, activated, h, kind, num_threads)
    return dh, activated


def backward_at(dh: Tensor, activated: Tensor, d: Tensor, h: Tensor, kind: str, num_threads: int = 1) -> None:
    addresses = dh.data_ptr(), activated.data_ptr(), d.data_ptr(), h.data_ptr()
    if kind == "swiglu":
        native.swiglu_backward(*addresses, *d.shape, name_of(h), num_threads)
    else:
        native.gelu_backward(*addresses, h.numel(), name_of(h), num_threads)


def name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def draw(kind: str, num_rows: int, dim: int, dtype: str, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A pre-activation and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 if kind == "swiglu" else 1
    h = spread * torch.randn(num_rows, width * dim, generator=generator)
    return h.to(getattr(torch, dtype)), torch.randn(num_rows, dim, generator=generator).to(getattr(torch, dtype))


def check(h: Tensor, d: Tensor, kind: str, num_threads: int = 1) -> None:
    kept = h.clone()
    out = activate(h, kind, num_threads)
    assert_near(out, exact_forward(h, kind))
    dh, activated = activate_backward(d, h, kind, num_threads)
    assert_near(dh, exact_backward(d, h, kind))
    assert torch.equal(activated, out), "the same bits again"
    assert torch.equal(h, kept)


class TestValues:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bound", [1e-3, 1.0, 6.0, 20.0, 88.0, 1e4, 1e30])
    def test_over_a_range(self, kind: str, bound: float) -> None:
        x = torch.linspace(-bound, bound, 100_001).view(1, -1)
        d = torch.full_like(x, 0.7)
        check(torch.cat([x, torch.full_like(x, -1.3)], 1) if kind == "swiglu" else x, d, kind)

    @pytest.mark.parametrize("kind", KINDS)
    def test_neighbours_of_where_the_formulas_change(self, kind: str) -> None:
        """All floats next to 0, to powers of two, to half-way points of the reduced argument, to the cut-offs."""
        places = [
            0.0,
            *(2.0**e for e in range(-126, 7)),
            *((n + 0.5) * math.log(2) for n in range(126)),
            13.2,
            14.0,
            87.3,
        ]
        near = np.array(places, np.float32).view(np.int32)[:, None] + np.arange(-20, 21, dtype=np.int32)
        magnitudes = torch.from_numpy(near[near >= 0].view(np.float32))
        x = torch.cat([magnitudes, -magnitudes]).view(1, -1)
        check(torch.cat([x, torch.ones_like(x)], 1) if kind == "swiglu" else x, torch.ones_like(x), kind)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", HALVES)
    def test_every_16_bit_float(self, kind: str, dtype: str) -> None:
        x = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(getattr(torch, dtype))
        x = x[x.isfinite()].view(1, -1)
        check(torch.cat([x, torch.ones_like(x)], 1) if kind == "swiglu" else x, torch.ones_like(x), kind)

    @pytest.mark.parametrize("dtype", FUSED)
    def test_special_values_of_swiglu_are_torch_s(self, dtype: str) -> None:
        gates = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, -100.0, 100.0, 3e4, -3e4, 1.0])
        gate, up = (
            torch.cartesian_prod(gates, torch.tensor([1.0, -2.0, 0.0, math.inf, math.nan]))
            .t()
            .to(getattr(torch, dtype))
        )
        h, d = torch.cat([gate, up]).view(1, -1), torch.ones(1, len(gate), dtype=gate.dtype)
        torch.testing.assert_close(activate(h, "swiglu")[0], F.silu(gate) * up, equal_nan=True)
        d_gate, d_up = activate_backward(d, h, "swiglu")[0][0].chunk(2)
        slope = torch.ops.aten.silu_backward(torch.ones_like(gate.float()), gate.float())
        torch.testing.assert_close(d_gate, (up * slope).to(gate.dtype), equal_nan=True)
        torch.testing.assert_close(d_up, F.silu(gate), equal_nan=True)

    @pytest.mark.parametrize("dtype", FUSED)
    def test_special_values_of_gelu(self, dtype: str) -> None:
        """As the formulas give them, one product after the other."""
        x = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -0.0, 3e4, -3e4, 50.0, -50.0]])
        expected = torch.tensor([[math.inf, math.nan, math.nan, 0.0, -0.0, 3e4, 0.0, 50.0, 0.0]])
        slopes = torch.tensor([[math.nan, math.nan, math.nan, 0.5, 0.5, 1.0, 0.0, 1.0, 0.0]])
        x, expected, slopes = (each.to(getattr(torch, dtype)) for each in (x, expected, slopes))
        torch.testing.assert_close(activate(x, "gelu"), expected, equal_nan=True)
        dx, activated = activate_backward(torch.full_like(x, -2), x, "gelu")
        torch.testing.assert_close(dx, -2 * slopes, equal_nan=True)
        torch.testing.assert_close(activated, expected, equal_nan=True)

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_gradient_comes_from_nothing(self, kind: str) -> None:
        h, d = draw(kind, 3, 40, "float32")
        dh, _ = activate_backward(torch.zeros_like(d), h, kind)
        assert not dh.any()


class TestMemory:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", FUSED)
    def test_sizes_around_those_of_vectors(self, kind: str, dtype: str) -> None:
        for dim in LENGTHS:
            check(*draw(kind, 3, dim, dtype, seed=dim), kind)

    @pytest.mark.parametrize("kind", KINDS)
    @given(
        dtype=st.sampled_from(FUSED),
        num_rows=st.integers(0, 9),
        dim=st.integers(0, 70),
        spread=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
        num_threads=st.sampled_from([1, 2, 3]),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(
        self, kind: str, dtype: str, num_rows: int, dim: int, spread: float, num_threads: int, seed: int
    ) -> None:
        check(*draw(kind, num_rows, dim, dtype, spread, seed), kind, num_threads)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", FUSED)
    def test_addresses_need_no_alignment_and_neighbours_stay(self, kind: str, dtype: str) -> None:
        h, d = draw(kind, 5, 37, dtype)
        expected, expected_out = activate_backward(d, h, kind)

        def shifted(tensor: Tensor) -> tuple[Tensor, Tensor]:
            """Memory, and the tensor in it at an odd address."""
            memory = torch.full((tensor.nbytes + 16,), 0xA5, dtype=torch.uint8)
            view = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=3)
            return memory, view.view(tensor.shape).copy_(tensor)

        def assert_holds(memory: Tensor, tensor: Tensor) -> None:
            assert torch.equal(memory[3:-13], tensor.flatten().view(torch.uint8))
            assert (memory[:3] == 0xA5).all() and (memory[-13:] == 0xA5).all()

        (source, h_there), (incoming, d_there) = shifted(h), shifted(d)
        (out, out_there), (dh, dh_there) = shifted(torch.zeros_like(d)), shifted(torch.zeros_like(h))
        if kind == "swiglu":
            native.swiglu(out_there.data_ptr(), h_there.data_ptr(), *d.shape, dtype)
            assert_holds(out, expected_out)
            out_there.zero_()
        backward_at(dh_there, out_there, d_there, h_there, kind)
        for memory, tensor in ((out, expected_out), (dh, expected), (source, h), (incoming, d)):
            assert_holds(memory, tensor)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", FUSED)
    def test_threads_do_not_show(self, kind: str, dtype: str) -> None:
        h, d = draw(kind, 101, 333, dtype)
        expected = activate(h, kind), *activate_backward(d, h, kind)
        for num_threads in (2, 3, 8):
            got = activate(h, kind, num_threads), *activate_backward(d, h, kind, num_threads)
            assert all(map(torch.equal, got, expected))

    def test_broken_rules_raise(self) -> None:
        kernels = {
            "swiglu": (native.swiglu, ["destination", "source"], ["num_rows", "dim"]),
            "swiglu_backward": (
                native.swiglu_backward,
                ["d_source", "activated", "d_activated", "source"],
                ["num_rows", "dim"],
            ),
            "gelu_backward": (
                native.gelu_backward,
                ["d_source", "activated", "d_activated", "source"],
                ["num_elements"],
            ),
        }
        for operation, (kernel, addresses, sizes) in kernels.items():
            good = {**dict.fromkeys(addresses, 1), **dict.fromkeys(sizes, 1), "dtype": "float32", "num_threads": 1}
            cases = [
                ("dtype", "float64", "dtype to be one of bfloat16, float16, float32, got float64"),
                ("num_threads", 0, "num_threads >= 1, got 0"),
                *((name, -1, f"{name} >= 0, got -1") for name in sizes),
                *((name, 0, f"an address for {name}, got 0") for name in addresses),
            ]
            for name, value, message in cases:
                with pytest.raises(InvalidArgument, match=f"^{operation}: expected {message}"):
                    kernel(**{**good, name: value})


@pytest.mark.parametrize("kind", KINDS)
class TestLayers:
    """What experts call: any dtype and strides."""

    @pytest.mark.parametrize("dtype", [*FUSED, "float64"])
    @pytest.mark.parametrize("strided", [False, True])
    @pytest.mark.parametrize("given_memory", [False, True])
    def test_forward_and_backward(self, kind: str, dtype: str, strided: bool, given_memory: bool) -> None:
        activation = find_activation(kind)
        h, d = draw(kind, 6, 24, dtype)
        exact, exact_gradient = exact_forward(h, kind), exact_backward(d, h, kind)
        if strided:
            h, d = h.t().contiguous().t(), d.t().contiguous().t()
        kept = h.clone()
        out, dh = (torch.full_like(each, torch.nan) if given_memory else None for each in (d, h))
        tolerance = {"float64": 1e-14, "float32": 1e-6}.get(dtype, 2e-2)
        activated = activation.activate(h, out)
        gradient = activation.backward(d, h, dh)
        if given_memory:
            assert activated is out and gradient.dh.data_ptr() == dh.data_ptr()
        for value, (expected, scale) in (
            (activated, exact),
            (gradient.dh, exact_gradient),
            (gradient.activated, exact),
        ):
            assert value.dtype == h.dtype
            # Tails of gelu are differences in torch.
            assert ((value.double() - expected).abs() <= tolerance * (scale + 1)).all()
        assert torch.equal(h, kept)

    @pytest.mark.parametrize("num_rows", [0, 1])
    def test_few_rows(self, kind: str, num_rows: int) -> None:
        activation = find_activation(kind)
        h, d = draw(kind, num_rows, 5, "float32")
        assert activation.activate(h).shape == d.shape
        dh, activated = activation.backward(d.clone(), h)
        assert dh.shape == h.shape and activated.shape == d.shape

    def test_autograd_follows_forward(self, kind: str) -> None:
        h, d = draw(kind, 4, 9, "float32")
        (dh,) = torch.autograd.grad(find_activation(kind).forward(h.requires_grad_()), h, d)
        torch.testing.assert_close(find_activation(kind).backward(d, h.detach()).dh, dh)
