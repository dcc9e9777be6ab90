"""The experts of a layer and their grouped feed-forward.

[Note: stacks] The weights of several experts are a *stack*, a tensor ``[n, ...]`` for each name; those of one expert
are a *row* of it, ``(first [width * I, D], second [D, I])``. A rank computes with at most two stacks, gathered replicas
and the parameters that it owns, and sorts its tokens by stack first. Experts of its own that have replicas compute as
replicas; their rows of the parameters are passed over.

Legend: ``E`` experts, ``n`` experts of a stack, ``N`` assignments, ``D`` model dim, ``I`` hidden dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsecoll.errors import SparsecollError
from sparsecoll.moe.activation import Activation, find_activation
from sparsecoll.moe.grouped import Counts, Groups, grouped_product, grouped_weight_gradient

__all__ = ["Experts", "GroupedFFN", "Row", "Stack", "grouped_backward", "grouped_forward", "rows_of"]

Row = tuple[Tensor, ...]
Stack = Sequence[Tensor]


def rows_of(stack: Stack) -> list[Row]:
    """Views of a stack, one row for each expert."""
    return list(zip(*(weight.unbind() for weight in stack), strict=True))


@torch.no_grad()
def grouped_forward(
    x: Tensor, counts: Sequence[Counts], stacks: Sequence[Stack], activation: Activation
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Feeds each expert its tokens.

    Args:
        x: ``[N, D]``, contiguous, sorted by stack, then by expert.
        counts: for each stack ``[n]``, how many rows of ``x`` belong to each expert, as host integers, as an int64
            tensor on the device of ``x``, or as `Groups`, which remember both. For a single stack, a GPU's counts stay
            there if torch has a grouped product for the dtype; otherwise the host waits to learn them.
        stacks: see [Note: stacks]; all of ``x``'s dtype.

    Returns:
        ``y`` ``[N, D]``, and the pre-activations that `grouped_backward` wants.
    """
    groups = [Groups.of(each, x.device) for each in counts]
    if _goes_by_expert(x):
        return _forward_by_expert(x, *_by_expert(groups, stacks), activation)
    return _forward_by_stack(x, groups, stacks, activation)


@torch.no_grad()
def grouped_backward(
    dy: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    counts: Sequence[Counts],
    stacks: Sequence[Stack],
    activation: Activation,
    grad_stacks: Sequence[Stack] | None,
    need_dx: bool,
    *,
    scale: float = 1.0,
) -> Tensor | None:
    """The mirror of `grouped_forward`; the activation is computed again.

    Args:
        dy: ``[N, D]``, contiguous.
        saved: what `grouped_forward` returned; left as it is.
        grad_stacks: where weight gradients are *written*, zeros for an expert without tokens; None for none. Rows
            that are passed over may be written or not.
        scale: of the weight gradients, not of ``dx``.

    Returns:
        ``dx`` ``[N, D]``, or None without ``need_dx``.
    """
    groups = [Groups.of(each, x.device) for each in counts]
    if not _goes_by_expert(x):
        return _backward_by_stack(dy, x, saved, groups, stacks, activation, grad_stacks, need_dx, scale)
    grad_rows = None if grad_stacks is None else _by_expert(groups, grad_stacks)[1]
    return _backward_by_expert(dy, x, saved, *_by_expert(groups, stacks), activation, grad_rows, need_dx, scale)


def _goes_by_expert(x: Tensor) -> bool:
    """Whether caches count for more than launches."""
    return not x.is_cuda


def _by_expert(groups: Sequence[Groups], stacks: Sequence[Stack]) -> tuple[list[int], list[Row]]:
    """How many tokens each expert has that computes here, and its row."""
    counts, rows = [], []
    for group, stack in zip(groups, stacks, strict=True):
        its_rows = rows_of(stack)
        counts += [group.counts[place] for place in group.places]
        rows += [its_rows[place] for place in group.places]
    return counts, rows


def _forward_by_stack(
    x: Tensor, groups: Sequence[Groups], stacks: Sequence[Stack], activation: Activation
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One stack after the other, each in one product for each of its two tensors."""
    results, saved = [], []
    for part, group, (first, second) in zip(_split(x, groups), groups, stacks, strict=True):
        h = grouped_product(part, first.transpose(1, 2), group)
        results.append(grouped_product(activation.activate(h), second.transpose(1, 2), group))
        saved.append(h)
    return _join(results, x), tuple(saved)


def _backward_by_stack(
    dy: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    groups: Sequence[Groups],
    stacks: Sequence[Stack],
    activation: Activation,
    grad_stacks: Sequence[Stack] | None,
    need_dx: bool,
    scale: float,
) -> Tensor | None:
    """The mirror of `_forward_by_stack`."""
    results = []
    parts = zip(_split(dy, groups), _split(x, groups), saved, groups, stacks, strict=True)
    for number, (d_part, part, h, group, (first, second)) in enumerate(parts):
        dh, activated = activation.backward(grouped_product(d_part, second, group), h)
        if grad_stacks is not None:
            d_first, d_second = grad_stacks[number]
            grouped_weight_gradient(d_part, activated, group, d_second, scale)
            del activated
            grouped_weight_gradient(dh, part, group, d_first, scale)
        if need_dx:
            results.append(grouped_product(dh, first, group))
    return _join(results, x) if need_dx else None


def _split(x: Tensor, groups: Sequence[Groups]) -> Sequence[Tensor]:
    """The rows of each stack; of a single one the counts are not asked for, so that they can stay on a GPU."""
    return [x] if len(groups) == 1 else x.split([sum(group.counts) for group in groups])


def _join(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    parts = [part for part in parts if len(part)]
    if not parts:  # A rank may hold no expert at all; it then gets no tokens either.
        return torch.empty_like(like)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _forward_by_expert(
    x: Tensor, counts: Sequence[int], rows: Sequence[Row], activation: Activation
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One expert after the other: what lies between two products then stays in a core's cache.

    Product by product over all experts, intermediates are megabytes of fresh memory each time. Two runs of
    ``python -m bench expert_parallel`` over MPI: by hand over ours 0.86 to 0.90 that way, 0.94 this way.
    """
    y = torch.empty_like(x)
    if not rows:  # A rank may hold no expert at all; it then gets no tokens either.
        return y, (x.new_empty(0, 0),)
    first, second = rows[0]
    h = x.new_empty(len(x), first.shape[0])
    scratch = x.new_empty(max(counts), second.shape[1])
    for x_e, h_e, y_e, (first, second) in zip(x.split(counts), h.split(counts), y.split(counts), rows, strict=True):
        if len(x_e):
            torch.mm(x_e, first.t(), out=h_e)
            torch.mm(activation.activate(h_e, scratch[: len(x_e)]), second.t(), out=y_e)
    return y, (h,)


def _backward_by_expert(
    dy: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    counts: Sequence[int],
    rows: Sequence[Row],
    activation: Activation,
    grad_rows: Sequence[Row] | None,
    need_dx: bool,
    scale: float,
) -> Tensor | None:
    """The mirror of `_forward_by_expert`."""
    (h,) = saved
    dx = torch.empty_like(x) if need_dx else None
    if not rows:
        return dx
    dh_scratch = torch.empty_like(h[: max(counts)])
    d_activated_scratch = x.new_empty(max(counts), rows[0][1].shape[1])
    begin = 0
    for number, (count, (first, second)) in enumerate(zip(counts, rows, strict=True)):
        part = slice(begin, begin + count)
        begin += count
        gradients = grad_rows[number] if grad_rows is not None else ()
        if not count:
            for gradient in gradients:
                gradient.zero_()
            continue
        d_activated = torch.mm(dy[part], second, out=d_activated_scratch[:count])
        dh, activated = activation.backward(d_activated, h[part], dh_scratch[:count])
        if gradients:
            torch.addmm(gradients[1], dy[part].t(), activated, beta=0, alpha=scale, out=gradients[1])
            torch.addmm(gradients[0], dh.t(), x[part], beta=0, alpha=scale, out=gradients[0])
        if dx is not None:
            torch.mm(dh, first, out=dx[part])
    return dx


class GroupedFFN(torch.autograd.Function):
    """`grouped_forward` over one stack: ``apply(x, counts, activation, first, second)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Counts, activation: Activation, *weights: Tensor) -> Tensor:
        x, groups = x.contiguous(), Groups.of(counts, x.device)
        y, (h,) = grouped_forward(x, [groups], [weights], activation)
        ctx.save_for_backward(x, h, *weights)
        ctx.groups, ctx.activation = groups, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *weights = ctx.saved_tensors
        need_dx, _, _, *need_weights = ctx.needs_input_grad
        gradients = [torch.empty_like(weight) for weight in weights] if any(need_weights) else None
        dx = grouped_backward(
            dy.contiguous(),
            x,
            [h],
            [ctx.groups],
            [weights],
            ctx.activation,
            None if gradients is None else [gradients],
            need_dx,
        )
        return dx, None, None, *(gradients if gradients is not None else [None for _ in weights])


class Experts(nn.Module):
    """Owns the weights of a layer's experts, stacked: one parameter for each name, a row for each expert.

    The state dict has one key for each *expert* and name, ``{expert}.{name}``, whatever rows the parameters have:
    expert numbers are global, and a model that is sharded over ranks has the keys of one that is not.

    Attributes:
        num_experts: of the layer, over all ranks.
        owned: the expert of each row of the parameters, all experts unless a wrapper shards them.
        kept_slice: which slice of each expert's matrices is kept, and into how many they are cut along their first
            dimension: (0, 1) unless a wrapper does.
        gather_rows: gives the rows of the state dict, expert to row, where the parameters do not have them all.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "swiglu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = find_activation(activation)
        self.num_experts = num_experts
        self.owned: Sequence[int] = range(num_experts)
        self.kept_slice = 0, 1
        self.gather_rows: Callable[[], Mapping[int, Row]] | None = None
        first, second = self.weight_names
        self.register_parameter(
            first,
            nn.Parameter(torch.empty(num_experts, self.activation.width * hidden_dim, dim, device=device, dtype=dtype)),
        )
        self.register_parameter(
            second, nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype))
        )
        self.reset_parameters()

    @property
    def weight_names(self) -> tuple[str, str]:
        return self.activation.weight_names

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The stacked parameters, in the order in which a row has its matrices."""
        return tuple(self.get_parameter(name) for name in self.weight_names)

    def reset_parameters(self) -> None:
        """Draws each expert's matrices as `torch.nn.Linear` does."""
        for weight in self.weights:
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, counts: Counts) -> Tensor:
        """Computes ``x`` ``[N, D]``, sorted by expert, with ``counts[e]`` rows for each row of the parameters.

        ``counts`` are as in `grouped_forward`.
        """
        y: Tensor = GroupedFFN.apply(x, counts, self.activation, *self.weights)
        return y

    def extra_repr(self) -> str:
        _, dim, hidden_dim = self.get_parameter(self.weight_names[1]).shape
        return f"{self.num_experts}, dim={dim}, hidden_dim={hidden_dim}, activation={self.activation.name}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.gather_rows is not None:
            rows = self.gather_rows()
        elif len(self.owned) == self.num_experts:
            rows = dict(zip(self.owned, rows_of(self.weights), strict=True))
        else:
            raise SparsecollError(
                f"Experts.state_dict: expected gather_rows to supply all {self.num_experts} experts, "
                f"got none and {len(self.owned)} of them here"
            )
        for expert in sorted(rows):
            for name, matrix in zip(self.weight_names, rows[expert], strict=True):
                destination[f"{prefix}{expert}.{name}"] = matrix if keep_vars else matrix.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Copies the owned experts, each of them as a whole or not at all; other experts' keys are left alone."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if local_metadata.get("assign_to_params_buffers", False):
            error_msgs.append(
                f"{prefix}*: expected assign=False, for experts are copied into stacked parameters, got True"
            )
            return
        for expert, row in zip(self.owned, rows_of(self.weights), strict=True):
            keys = [f"{prefix}{expert}.{name}" for name in self.weight_names]
            missing = [key for key in keys if key not in state_dict]
            number, num_slices = self.kept_slice
            shapes = [[matrix.shape[0] * num_slices, *matrix.shape[1:]] for matrix in row]
            misshapen = [
                f"{key}: expected shape {shape}, got {_shape(state_dict[key])}"
                for key, shape in zip(keys, shapes, strict=True)
                if key in state_dict and _shape(state_dict[key]) != shape
            ]
            missing_keys.extend(missing if strict else ())
            error_msgs.extend(misshapen)
            if missing or misshapen:
                continue
            with torch.no_grad():
                for key, matrix in zip(keys, row, strict=True):
                    matrix.copy_(state_dict[key].chunk(num_slices)[number])
        if strict:
            known = {f"{prefix}{expert}.{name}" for expert in range(self.num_experts) for name in self.weight_names}
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
