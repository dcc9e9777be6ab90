"""AdamW as mixed precision has it: 16-bit parameters, and a float32 master copy with moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MasterAdamW"]

_PIECE = 1 << 15
"""Elements that are updated at a time, so that hardly any memory is taken for wide gradients."""


class MasterAdamW(torch.optim.Optimizer):
    """State of a parameter, of its shape and in float32: ``master``, ``exp_avg``, ``exp_avg_sq``; 12 bytes for 2."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Takes no closure."""
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["master"] = param.to(torch.float32, copy=True)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(state["master"]) for _ in range(2))
            state["step"] = 0
        state["step"] += 1
        (beta1, beta2), lr, step = group["betas"], group["lr"], state["step"]
        tensors = param, grad, state["master"], state["exp_avg"], state["exp_avg_sq"]
        buffer = state["master"].new_empty(min(_PIECE, param.numel()))
        for part, narrow, master, mean, square in zip(*(each.view(-1).split(_PIECE) for each in tensors), strict=True):
            wide = buffer[: len(part)].copy_(narrow)
            mean.lerp_(wide, 1 - beta1)
            square.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            scale = torch.sqrt(square, out=wide).div_((1 - beta2**step) ** 0.5).add_(group["eps"])
            master.mul_(1 - lr * group["decay"]).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
            part.copy_(master)
