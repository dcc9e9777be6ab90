"""The MoE layer of one process against a plain loop over tokens, and the parts that it is made of."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecoll.errors import InvalidArgument, SparsecollError
from sparsecoll.moe import (
    Activation,
    Experts,
    MoELayer,
    auxiliary_loss,
    combine,
    find_activation,
    grouped_backward,
    grouped_forward,
    inverse_permutation,
    permute,
    rows_of,
    sort_by_expert,
)
from sparsecoll.moe import experts as experts_module
from sparsecoll.moe.grouped import Groups, grouped_product, grouped_weight_gradient
from sparsecoll.moe.upload import upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
# The smallest sizes that torch's grouped_mm takes are multiples of 16 bytes; the odd ones go through the loop.
SIZES = [(16, 24), (5, 3)]


class CountProducts(TorchDispatchMode):
    """Counts products of matrices, a grouped one as one."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func.overloadpacket.__name__ in ("mm", "addmm", "_grouped_mm")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["by expert", "by stack"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How experts are computed; by stack as on a GPU."""
    monkeypatch.setattr(experts_module, "_goes_by_expert", lambda x: request.param == "by expert")
    return str(request.param)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def feed_forward(x: Tensor, first: Tensor, second: Tensor, activation: str) -> Tensor:
    """One expert by the book, nothing fused."""
    h = first @ x
    if activation == "gelu":
        return second @ (h * 0.5 * (1 + torch.erf(h / 2**0.5)))
    gate, up = h[: len(h) // 2], h[len(h) // 2 :]
    return second @ (gate * torch.sigmoid(gate) * up)


def naive_forward(layer: MoELayer, x: Tensor) -> Tensor:
    """One token and one expert at a time."""
    activation = layer.experts.activation.name
    outputs = []
    for token in x.reshape(-1, layer.dim):
        scores = torch.exp(layer.router.weight @ token)
        chosen = scores.argsort(descending=True)[: layer.router.top_k].tolist()
        total = scores[chosen].sum() if layer.router.normalize_weights else scores.sum()
        y = torch.zeros_like(token)
        for expert in chosen:
            first, second = (weight[expert] for weight in layer.experts.weights)
            y = y + scores[expert] / total * feed_forward(token, first, second, activation)
        if layer.shared_expert is not None:
            first, second = layer.shared_expert.parameters()
            y = y + feed_forward(token, first, second, activation)
        outputs.append(y)
    return torch.stack(outputs).view(x.shape)


def gradients(layer: MoELayer, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of an arbitrary scalar of ``y``; names as in the layer, and ``x``."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    scalar = (y * torch.arange(y.numel(), device=y.device).double().cos().to(y.dtype).view(y.shape)).sum()
    return dict(zip(("x", *names), torch.autograd.grad(scalar, (x, *parameters)), strict=True))


@pytest.mark.parametrize(("dim", "hidden_dim"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize(("normalize_weights", "shared_hidden_dim"), [(True, 0), (False, 7)])
def test_layer_equals_a_loop_over_tokens(
    dim: int,
    hidden_dim: int,
    dtype: torch.dtype,
    tolerance: float,
    activation: str,
    top_k: int,
    normalize_weights: bool,
    shared_hidden_dim: int,
) -> None:
    layer = MoELayer(
        dim,
        hidden_dim,
        5,
        top_k,
        activation=activation,
        shared_hidden_dim=shared_hidden_dim,
        normalize_weights=normalize_weights,
        dtype=dtype,
    )
    x = torch.randn(2, 7, dim, dtype=dtype, requires_grad=True)
    expected, y = naive_forward(layer, x), layer(x)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    expected_gradients = gradients(layer, x, expected)
    for name, gradient in gradients(layer, x, y).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dim", "hidden_dim"), [(32, 16), (6, 5)])
def test_bfloat16_is_close_to_float32(device: str, dim: int, hidden_dim: int) -> None:
    layer = MoELayer(dim, hidden_dim, 4, 2, aux_loss_coef=0.1, device=device, dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).float()
    x = torch.randn(24, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    x_exact = x.detach().float().requires_grad_()
    y = layer(x)
    # Rounding must not send a token elsewhere: the exact twin takes the same routes.
    routing = exact.router(x_exact)
    ids = layer.router(x).expert_ids
    weights = routing.probabilities.gather(1, ids)
    routing = routing._replace(expert_ids=ids, weights=weights / weights.sum(-1, keepdim=True))
    y_exact = exact.dispatcher(x_exact, routing, exact.experts)
    assert y.dtype == torch.bfloat16
    assert layer.aux_loss is not None and layer.aux_loss.dtype == torch.float32
    torch.testing.assert_close(y.float(), y_exact, rtol=0.03, atol=0.03 * float(y_exact.detach().abs().max()))
    exact_gradients = gradients(exact, x_exact, y_exact)
    for name, gradient in gradients(layer, x, y).items():
        reference = exact_gradients[name]
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - reference).norm() < 0.03 * reference.norm(), name


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_no_tokens_keep_the_graph_connected(shape: tuple[int, ...]) -> None:
    layer = MoELayer(6, 4, 3, 2, shared_hidden_dim=5, aux_loss_coef=0.5)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    assert layer.aux_loss is not None and layer.aux_loss.item() == 0
    (y.sum() + auxiliary_loss(layer)).backward()
    assert x.grad is not None and x.grad.shape == shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(("dim", "hidden_dim"), SIZES)
def test_an_expert_without_tokens_has_a_zero_gradient(dim: int, hidden_dim: int) -> None:
    layer = MoELayer(dim, hidden_dim, 4, 1)
    with torch.no_grad():
        layer.router.weight[2] = -layer.router.weight[0]
        layer.router.weight[3] = 0
        layer.router.weight[1] = layer.router.weight[0] * 2
    x = layer.router.weight[0].detach().sign().repeat(6, 1)
    layer(x).square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[1].any() and not parameter.grad[[0, 2, 3]].any()


def test_input_and_incoming_gradient_need_not_be_contiguous() -> None:
    layer = MoELayer(6, 5, 4, 2, dtype=torch.float64)
    x = torch.randn(6, 9, dtype=torch.float64).t().requires_grad_()
    dense = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    assert not x.is_contiguous() and dense.is_contiguous()
    y, expected = layer(x), layer(dense)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.sum().backward()  # an expanded scalar
    expected.backward(torch.ones_like(expected))
    assert x.grad is not None and dense.grad is not None
    torch.testing.assert_close(x.grad, dense.grad, rtol=1e-12, atol=1e-12)


def test_two_forwards_before_backward_and_a_retained_graph() -> None:
    layer = MoELayer(16, 8, 4, 2, dtype=torch.float32)
    first, second = torch.randn(5, 16), torch.randn(9, 16)

    def parameter_gradients(*losses: Tensor) -> list[Tensor]:
        layer.zero_grad()
        for loss in losses:
            loss.backward(retain_graph=True)
        return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]

    apart = [parameter_gradients(layer(x).square().sum()) for x in (first, second)]
    losses = [layer(x).square().sum() for x in (first, second)]
    for together, one, other in zip(parameter_gradients(*losses), *apart, strict=True):
        torch.testing.assert_close(together, one + other)
    for again, one in zip(parameter_gradients(losses[0]), apart[0], strict=True):
        assert torch.equal(again, one)


def test_copies_and_pickles_do_not_carry_a_call() -> None:
    layer = MoELayer(6, 4, 3, 2, aux_loss_coef=0.1)
    x = torch.randn(5, 6)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert twin.aux_loss is None and layer.aux_loss is not None
        assert torch.equal(twin(x), y)
        twin(x).sum().backward()
    assert layer.experts.gate_up_proj.grad is None


def test_activation_checkpointing_changes_nothing() -> None:
    layer = MoELayer(6, 4, 3, 2, dtype=torch.float64)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    expected = gradients(layer, x, layer(x))
    for name, gradient in gradients(layer, x, y).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("frozen", ["router.weight", "experts.gate_up_proj", "experts.down_proj", "experts", "x"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    layer = MoELayer(6, 4, 3, 2, dtype=torch.float64)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    expected = gradients(layer, x, layer(x))
    for name, leaf in leaves.items():
        leaf.requires_grad_(not name.startswith(frozen))
    y = layer(x).flatten()
    (y * torch.arange(len(y)).double().cos()).sum().backward()
    for name, leaf in leaves.items():
        if name.startswith(frozen):
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-12, atol=1e-12)


def test_arguments_that_break_a_rule_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"expected top_k in 1\.\.3 \(num_experts\), got 4"):
        MoELayer(6, 4, 3, 4)
    with pytest.raises(InvalidArgument, match="expected one of swiglu, gelu, got 'relu'"):
        MoELayer(6, 4, 3, 1, activation="relu")
    with pytest.raises(InvalidArgument, match="expected hidden_dim >= 1, got 0"):
        MoELayer(6, 0, 3, 1)
    with pytest.raises(InvalidArgument, match=r"expected torch.float32 \[\.\.\., 6\], got torch.float32 \[2, 5\]"):
        MoELayer(6, 4, 3, 1)(torch.zeros(2, 5))
    with pytest.raises(InvalidArgument, match=r"got torch.float64 \[2, 6\]"):
        MoELayer(6, 4, 3, 1)(torch.zeros(2, 6, dtype=torch.float64))


def test_initial_weights_have_the_bounds_of_linear_layers() -> None:
    layer = MoELayer(64, 25, 16, 2, shared_hidden_dim=8)
    for name, fan_in in {"router.weight": 64, "experts.gate_up_proj": 64, "experts.down_proj": 25}.items():
        weight = layer.get_parameter(name)
        assert 0.95 / fan_in**0.5 < float(weight.detach().abs().max()) <= 1 / fan_in**0.5
        assert float(weight.detach().std()) == pytest.approx((1 / 3 / fan_in) ** 0.5, rel=0.1)


class TestAuxiliaryLoss:
    @pytest.mark.parametrize("top_k", [1, 3])
    def test_equals_the_formula_and_its_gradient(self, top_k: int) -> None:
        layer = MoELayer(6, 4, 5, top_k, aux_loss_coef=0.01, dtype=torch.float64)
        x = torch.randn(11, 6, dtype=torch.float64)
        layer(x)
        probabilities = (x @ layer.router.weight.t()).softmax(-1)
        fraction = F.one_hot(probabilities.argsort(dim=-1, descending=True)[:, :top_k], 5).sum((0, 1)).double() / (
            11 * top_k
        )
        expected = 0.01 * 5 * sum(fraction[e] * probabilities[:, e].mean() for e in range(5))
        assert layer.aux_loss is not None
        torch.testing.assert_close(layer.aux_loss, expected, rtol=1e-12, atol=0)
        actual_gradient, expected_gradient = (
            torch.autograd.grad(loss, layer.router.weight)[0] for loss in (layer.aux_loss, expected)
        )
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-10, atol=1e-16)

    def test_is_one_for_a_fair_router_and_more_for_a_biased_one(self) -> None:
        layer = MoELayer(4, 4, 4, 1, aux_loss_coef=1.0, dtype=torch.float64)
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(4) * 50)
        layer(torch.eye(4, dtype=torch.float64))
        assert layer.aux_loss is not None and layer.aux_loss.item() == pytest.approx(1)
        layer(torch.eye(4, dtype=torch.float64)[[0, 0, 0]])
        assert layer.aux_loss.item() == pytest.approx(4)

    def test_sums_over_the_layers_of_a_model(self) -> None:
        model = nn.Sequential(
            MoELayer(4, 4, 4, 1, aux_loss_coef=1.0), MoELayer(4, 4, 4, 1), MoELayer(4, 4, 4, 2, aux_loss_coef=0.5)
        )
        model(torch.randn(7, 4))
        first, silent, last = (layer.aux_loss for layer in model)
        assert silent is None
        assert torch.equal(auxiliary_loss(model), first + last)
        assert auxiliary_loss(nn.Linear(2, 2)).item() == 0


class TestStateDict:
    def test_has_one_key_for_each_expert_and_weight(self) -> None:
        layer = MoELayer(6, 4, 3, 2, activation="gelu", shared_hidden_dim=5)
        assert [name for name, _ in layer.named_parameters()] == [
            "router.weight",
            "experts.up_proj",
            "experts.down_proj",
            "shared_expert.up_proj.weight",
            "shared_expert.down_proj.weight",
        ]
        state = layer.state_dict()
        assert list(state) == [
            "router.weight",
            *(f"experts.{expert}.{name}" for expert in range(3) for name in ("up_proj", "down_proj")),
            "shared_expert.up_proj.weight",
            "shared_expert.down_proj.weight",
        ]
        assert state["experts.1.up_proj"].shape == (4, 6) and state["experts.1.down_proj"].shape == (6, 4)
        assert torch.equal(state["experts.2.down_proj"], layer.experts.get_parameter("down_proj")[2])
        assert not any(value.requires_grad for value in state.values())

    def test_round_trip(self) -> None:
        source, target = (nn.Sequential(MoELayer(6, 4, 12, 2)) for _ in range(2))
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer))
        for (name, value), other in zip(source.named_parameters(), target.parameters(), strict=True):
            assert torch.equal(value, other), name

    def test_strict_reports_missing_and_unexpected_keys(self) -> None:
        layer = MoELayer(6, 4, 3, 2)
        state = layer.state_dict()
        del state["experts.1.down_proj"]
        state["experts.3.down_proj"] = state["experts.gate_up_proj"] = torch.zeros(6, 4)
        with pytest.raises(RuntimeError) as error:
            layer.load_state_dict(state)
        assert 'Missing key(s) in state_dict: "experts.1.down_proj"' in str(error.value)
        assert 'Unexpected key(s) in state_dict: "experts.3.down_proj", "experts.gate_up_proj"' in str(error.value)
        result = layer.load_state_dict(state, strict=False)
        assert result.missing_keys == ["experts.1.down_proj"]
        assert result.unexpected_keys == ["experts.3.down_proj", "experts.gate_up_proj"]

    def test_no_expert_is_loaded_by_half(self) -> None:
        layer = MoELayer(6, 4, 3, 2)
        before = copy.deepcopy(layer.experts)
        state = {name: value + 1 for name, value in layer.state_dict().items()}
        del state["experts.0.down_proj"]
        state["experts.2.down_proj"] = torch.zeros(6, 5)
        with pytest.raises(RuntimeError, match=r"experts\.2\.down_proj: expected shape \[6, 4\], got \[6, 5\]"):
            layer.load_state_dict(state, strict=False)
        for after, old in zip(layer.experts.parameters(), before.parameters(), strict=True):
            assert torch.equal(after[[0, 2]], old[[0, 2]]) and torch.equal(after[1], old[1] + 1)

    def test_assign_is_refused(self) -> None:
        layer = MoELayer(6, 4, 3, 2)
        with pytest.raises(RuntimeError, match="expected assign=False"):
            layer.load_state_dict(layer.state_dict(), assign=True)

    def test_sharded_experts_save_what_is_gathered_and_load_what_they_own(self) -> None:
        whole, part = Experts(5, 6, 4), Experts(5, 6, 4)
        part.owned = [1, 4]
        for name in part.weight_names:
            setattr(part, name, nn.Parameter(torch.zeros(2, *part.get_parameter(name).shape[1:])))
        with pytest.raises(SparsecollError, match="expected gather_rows to supply all 5 experts, got none and 2"):
            part.state_dict()
        result = part.load_state_dict(whole.state_dict())
        assert result.missing_keys == [] and result.unexpected_keys == []
        for mine, full in zip(part.weights, whole.weights, strict=True):
            assert torch.equal(mine, full[[1, 4]])
        part.gather_rows = lambda: dict(enumerate(rows_of(whole.weights)))
        gathered = part.state_dict()
        assert list(gathered) == list(whole.state_dict())
        assert all(torch.equal(value, gathered[name]) for name, value in whole.state_dict().items())


class TestPermute:
    @settings(max_examples=30)
    @given(st.integers(0, 40), st.integers(1, 4), st.integers(4, 9), st.integers(0, 2**31))
    def test_sort_is_stable_and_complete(self, num_tokens: int, top_k: int, num_experts: int, seed: int) -> None:
        ids = torch.randint(num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed))
        order, counts = sort_by_expert(ids, num_experts)
        assert torch.equal(order, ids.flatten().argsort(stable=True))
        assert torch.equal(counts, ids.flatten().bincount(minlength=num_experts))
        assert torch.equal(inverse_permutation(order)[order], torch.arange(len(order)))

    def test_an_expert_out_of_range_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match=r"expected expert ids in 0\.\.2"):
            sort_by_expert(torch.tensor([[0, 3]]), 3)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_values(self, device: str, dtype: torch.dtype) -> None:
        ids = torch.randint(5, (13, 3), device=device)
        order, _ = sort_by_expert(ids, 5)
        position = inverse_permutation(order).view(13, 3)
        # Small integers and powers of two: sums are exact in every dtype.
        x = torch.randint(-4, 5, (13, 7), device=device).to(dtype)
        weights = 0.5 ** torch.randint(0, 3, (13, 3), device=device).to(dtype)
        rows = permute(x, order // 3, position)
        assert torch.equal(rows, x[order // 3])
        assert torch.equal(combine(rows, position, weights), x * weights.sum(1, keepdim=True))

    def test_gradients(self) -> None:
        order, _ = sort_by_expert(torch.randint(4, (5, 2)), 4)
        position = inverse_permutation(order).view(5, 2)
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        y = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: permute(x, order // 2, position), x)
        assert torch.autograd.gradcheck(lambda x: permute(x, torch.tensor([4, 0, 0, 2])), x)
        assert torch.autograd.gradcheck(lambda y, w: combine(y, position, w), (y, weights))
        assert torch.autograd.gradcheck(lambda y: combine(y, position, weights.detach()), y)


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_upload(device: str) -> None:
    arrays = [np.arange(5), np.empty(0, np.int64), np.array([2**40])]
    tensors = upload(arrays, torch.device(device))
    assert [(t.device.type, t.dtype, tuple(t.shape)) for t in tensors] == [
        (device, torch.int64, array.shape) for array in arrays
    ]
    if device != "meta":
        assert [tensor.tolist() for tensor in tensors] == [array.tolist() for array in arrays]


class TestGroupedFFN:
    COUNTS = (3, 0, 4, 1)

    @pytest.mark.parametrize("activation", ["swiglu", "gelu"])
    def test_gradcheck(self, activation: str) -> None:
        experts = Experts(4, 3, 2, activation=activation, dtype=torch.float64)
        x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)

        def compute(x: Tensor, *weights: Tensor) -> Tensor:
            parameters = dict(zip(experts.weight_names, weights, strict=True))
            return torch.func.functional_call(experts, parameters, (x, list(self.COUNTS)))

        assert torch.autograd.gradcheck(compute, (x, *experts.weights))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_counts_may_be_known_to_the_host_or_the_device(self, device: str, dtype: torch.dtype) -> None:
        activation = find_activation("gelu")
        stack = [w.detach() for w in Experts(4, 16, 8, activation="gelu", device=device, dtype=dtype).weights]
        x = torch.randn(8, 16, device=device, dtype=dtype)
        there = torch.tensor(self.COUNTS, device=device)
        expected, _ = grouped_forward(x, [self.COUNTS], [stack], activation)
        for counts in (list(self.COUNTS), there, Groups(there, x.device), Groups(self.COUNTS, x.device)):
            y, _ = grouped_forward(x, [counts], [stack], activation)
            assert torch.equal(y, expected)

    @pytest.mark.parametrize("counts", [COUNTS, torch.tensor(COUNTS)], ids=["host", "device"])
    def test_groups_know_both_sides(self, counts: tuple[int, ...] | Tensor) -> None:
        groups = Groups(counts, torch.device("cpu"))
        assert groups.counts == [3, 0, 4, 1] and list(groups.places) == [0, 1, 2, 3]
        assert groups.ends.dtype == torch.int32 and groups.ends.tolist() == [3, 3, 7, 8]
        ends = torch.zeros(4, dtype=torch.int32)
        assert Groups(counts, torch.device("cpu"), ends).ends is ends, "what the caller has is not made again"

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_products_of_no_rows(self, device: str, dtype: torch.dtype) -> None:
        stack = torch.randn(3, 16, 8, device=device, dtype=dtype)
        groups, gradient = Groups([0, 0, 0], stack.device), torch.full_like(stack, 7)
        none = torch.empty(0, 16, device=device, dtype=dtype)
        assert grouped_product(none, stack, groups).shape == (0, 8)
        grouped_weight_gradient(none, none[:, :8], groups, gradient)
        assert not gradient.any()

    def test_gradients_that_nobody_wants_are_not_computed(self, path: str) -> None:
        activation = find_activation("swiglu")
        stack = [weight.detach() for weight in Experts(4, 16, 8).weights]
        x, dy = torch.randn(8, 16), torch.randn(8, 16)
        _, saved = grouped_forward(x, [self.COUNTS], [stack], activation)
        with CountProducts() as products:
            assert grouped_backward(dy, x, saved, [self.COUNTS], [stack], activation, None, False) is None
            num_without = products.num
            dx = grouped_backward(dy, x, saved, [self.COUNTS], [stack], activation, None, True)
        assert dx is not None and dx.shape == x.shape
        assert (num_without, products.num) == ((1, 1 + 2) if path == "by stack" else (3, 3 + 6))

    def test_a_rank_without_experts(self, path: str) -> None:
        activation, none = find_activation("gelu"), torch.zeros(0, 6)
        y, saved = grouped_forward(none, [], [], activation)
        assert len(y) == 0
        dx = grouped_backward(none, none, saved, [], [], activation, [], True)
        assert dx is not None and len(dx) == 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the weights of some experts live.

    Attributes:
        experts: in the order of compute.
        stacks: what holds them, NaN where nobody may look.
        places: of each stack, which of its rows they are.
    """

    experts: list[int]
    stacks: list[list[Tensor]]
    places: list[list[int]]

    def counts(self, of_expert: Sequence[int]) -> list[Groups]:
        numbers, groups = iter([of_expert[expert] for expert in self.experts]), []
        for stack, places in zip(self.stacks, self.places, strict=True):
            counts = [0] * len(stack[0])
            for place in places:
                counts[place] = next(numbers)
            groups.append(Groups(counts, stack[0].device, places=places))
        return groups

    def rows(self, stacks: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
        return [rows_of(stack)[place] for stack, places in zip(stacks, self.places, strict=True) for place in places]


def layouts_of(weights: Sequence[Tensor]) -> dict[str, Layout]:
    """Five experts in several layouts."""
    wide = []
    for weight in weights:
        stack = torch.full((10, *weight.shape[1:]), torch.nan, dtype=weight.dtype, device=weight.device)
        stack[::2] = weight
        wide.append(stack)

    def owned(places: list[int]) -> list[Tensor]:
        stack = [torch.full_like(weight, torch.nan) for weight in weights]
        for mine, weight in zip(stack, weights, strict=True):
            mine[places] = weight[places]
        return stack

    def gathered(experts: list[int]) -> list[Tensor]:
        return [weight[experts] for weight in weights]

    whole = list(range(5))
    return {
        "one stack": Layout(whole, [list(weights)], [whole]),
        "evenly spaced": Layout(whole, [[stack[::2] for stack in wide]], [whole]),
        "rows between": Layout(whole, [wide], [[0, 2, 4, 6, 8]]),
        "replicas and owned": Layout([1, 4, 0, 2, 3], [gathered([1, 4]), owned([0, 2, 3])], [[0, 1], [0, 2, 3]]),
        "replicas, one owned": Layout([0, 1, 3, 4, 2], [gathered([0, 1, 3, 4]), owned([2])], [[0, 1, 2, 3], [2]]),
        "an expert for each stack": Layout(whole, [gathered([expert]) for expert in whole], [[0]] * 5),
    }


class TestStacks:
    """The same numbers wherever weights live and whichever way they are computed."""

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(
        ("dtype", "dim", "tolerance"),
        [(torch.float64, 16, 1e-12), (torch.float32, 16, 1e-5), (torch.bfloat16, 16, 3e-2), (torch.float32, 5, 1e-5)],
        ids=str,
    )
    @pytest.mark.parametrize("name", ["swiglu", "gelu"])
    @pytest.mark.parametrize("of_expert", [(3, 0, 4, 1, 2), (0, 0, 0, 0, 6), (0, 5, 0, 0, 1), (0,) * 5], ids=str)
    def test_equals_autograd(
        self,
        device: str,
        dtype: torch.dtype,
        dim: int,
        tolerance: float,
        name: str,
        of_expert: tuple[int, ...],
        path: str,
    ) -> None:
        activation = find_activation(name)
        weights = [w.detach() for w in Experts(5, dim, 8, activation=name, device=device, dtype=dtype).weights]
        inputs, d_outputs = (
            [torch.randn(count, dim, device=device, dtype=dtype) for count in of_expert] for _ in range(2)
        )
        for label, layout in layouts_of(weights).items():
            exact = [t.double().requires_grad_() for t in [*weights, torch.cat([inputs[e] for e in layout.experts])]]
            y, dx, gradients = self._compute(layout, of_expert, inputs, d_outputs, activation)
            expected = torch.cat(
                [
                    activation.forward(rows @ exact[0][expert].t()) @ exact[1][expert].t()
                    for rows, expert in zip(
                        exact[2].split([of_expert[e] for e in layout.experts]), layout.experts, strict=True
                    )
                ]
            )
            dy = torch.cat([d_outputs[expert] for expert in layout.experts]).double()
            first, second, d_input = torch.autograd.grad(expected, exact, dy)
            pairs = [(y, expected), (dx, d_input)]
            for expert, (d_first, d_second) in zip(layout.experts, gradients, strict=True):
                pairs += [(d_first, first[expert] / 3), (d_second, second[expert] / 3)]
                assert of_expert[expert] or not (d_first.any() or d_second.any()), "zeros without tokens"
            for value, reference in pairs:
                assert value.dtype == dtype
                error = (value.double() - reference).norm()
                assert error <= tolerance * reference.norm(), f"{label}: {error} of {reference.norm()}"

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_expert_by_expert_the_bits_do_not_depend_on_the_place(self, dtype: torch.dtype) -> None:
        of_expert, activation = (3, 0, 4, 1, 2), find_activation("swiglu")
        layouts = layouts_of([weight.detach() for weight in Experts(5, 16, 8, dtype=dtype).weights])
        inputs, d_outputs = ([torch.randn(count, 16, dtype=dtype) for count in of_expert] for _ in range(2))
        results = []
        for label in ("one stack", "evenly spaced", "rows between", "an expert for each stack"):
            y, dx, gradients = self._compute(layouts[label], of_expert, inputs, d_outputs, activation)
            results.append([y, dx, *(matrix for row in gradients for matrix in row)])
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))

    @staticmethod
    def _compute(
        layout: Layout,
        of_expert: Sequence[int],
        inputs: list[Tensor],
        d_outputs: list[Tensor],
        activation: Activation,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        x, dy = (torch.cat([parts[expert] for expert in layout.experts]) for parts in (inputs, d_outputs))
        groups = layout.counts(of_expert)
        poisoned = [[torch.full(w.shape, torch.nan).to(w) for w in stack] for stack in layout.stacks]
        y, saved = grouped_forward(x, groups, layout.stacks, activation)
        kept = [each.clone() for each in saved]
        dx = grouped_backward(dy, x, saved, groups, layout.stacks, activation, poisoned, True, scale=1 / 3)
        assert all(map(torch.equal, saved, kept)) and dx is not None
        return y, dx, layout.rows(poisoned)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("label", ["one stack", "rows between", "replicas and owned", "replicas, one owned"])
    def test_one_product_for_each_stack(self, dtype: torch.dtype, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(experts_module, "_goes_by_expert", lambda x: False)
        layout = layouts_of([weight.detach() for weight in Experts(5, 16, 8, dtype=dtype).weights])[label]
        parts = [torch.randn(3, 16, dtype=dtype) for _ in range(5)]
        with CountProducts() as products:
            self._compute(layout, [3] * 5, parts, parts, find_activation("swiglu"))
        assert products.num == 6 * len(layout.stacks), "2 in forward, 4 in backward"
