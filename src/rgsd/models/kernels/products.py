"""A linear layer by the faster of torch's two CPU libraries.

For float32, torch calls its BLAS, and oneDNN only for bfloat16. Yet oneDNN takes about nine tenths of the time for
layers of a thousand rows, and two thirds for a head of vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rgsd.models.kernels import is_on

MIN_WEIGHT = 1 << 16
"""Elements below which a weight is left to torch: the call would cost more than it saves."""


def has_onednn() -> bool:
    """Whether this build of torch includes oneDNN's linear layer for this machine."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, like `F.linear`, which it calls if autograd needs a graph: oneDNN's operator has no gradient."""
    # Subclasses (DTensor, quantized weights) implement their own products.
    is_plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == x.device.type == "cpu"
    if (
        is_plain
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and is_on()
        and has_onednn()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class FrozenLinear(torch.autograd.Function):
    """A linear layer with a frozen weight, whose forward and backward pass both use `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.T) if ctx.needs_input_grad[0] else None, None, None


class AdaptedLinear(torch.autograd.Function):
    """A linear layer with a frozen weight and trained LoRA: x W' + b + scale (x A') B'.

    The products are those of PEFT's layer, but LoRA's are scaled and added to the large ones in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        # addmm_ works on matrices, so all leading dimensions become rows.
        x_TI = x.reshape(-1, x.size(-1))
        low_TR = x_TI @ a.T
        y_TO = linear(x_TI, weight, bias).addmm_(low_TR, b.T, alpha=scale)
        ctx.save_for_backward(x_TI, low_TR, weight, a, b)
        ctx.scale = scale
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_TI, low_TR, weight, a, b = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.size(-1))
        grad_low_TR = (grad_TO @ b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad_TO, weight.T).addmm_(grad_low_TR, a).view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_low_TR.T @ x_TI, (grad_TO.T @ low_TR).mul_(ctx.scale), None
