"""Linear layers with weights in oneDNN's own layout, and LoRA: the fastest on a CPU when a few rows decode.

With 8 to 64 rows and float32, oneDNN multiplies a head of vocabulary size in a third to a half of the time of the BLAS
that torch calls, and with packed weights the smaller layers get faster too. The packed copies live as long as the
context; the model's own weights are never touched.

In float32, LoRA is merged into the packed copies. In half precision that would round away most of a small update, so
LoRA stays a separate product, as in the student's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rgsd.models.kernels import is_on, products

MEMORY_SHARE = 0.25
"""The share of the machine's free memory that packed copies may use."""


def can_merge(model: nn.Module) -> bool:
    """Whether every adapter in the model is plain LoRA on a plain linear layer, which `packed` supports."""
    return all(_is_plain_lora(m) for m in model.modules() if isinstance(m, BaseTunerLayer))


def _is_plain_lora(module: nn.Module) -> bool:
    return (
        type(module) is LoraLinear
        and type(module.get_base_layer()) is nn.Linear
        and not module.fan_in_fan_out
        and not module.lora_variant
        and not any(module.lora_bias.values())
    )


@contextmanager
def packed(model: nn.Module, rows: int, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Make linear layers multiply packed weights inside the context, for inference in one thread.

    Args:
        model: A model on a CPU for which `can_merge` holds.
        rows: The usual number of rows per call. The layout is chosen for it, and correct for any other.
        dtype: The dtype to multiply in, as under autocast. None: the weight's own.
    """
    room = MEMORY_SHARE * psutil.virtual_memory().available if products.has_onednn() else 0.0
    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    # Layers inside an adapter layer are computed by it, and must not be replaced themselves.
    inside = {id(part) for layer in adapted for part in layer.modules() if part is not layer}
    changed: list[nn.Module] = []
    try:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LoraLinear):
                    base: Any = module.get_base_layer()
                    lora = _active(module)
                    # Half precision: keep LoRA as a separate product.
                    if lora and (dtype or base.weight.dtype) != torch.float32:
                        plain, size = _forward(base.weight, base.bias, rows, dtype, room)
                        module.forward = _with_lora(plain, module, lora, dtype)
                        room -= size
                        changed.append(module)
                        continue
                    weight, bias = _merged_weight(module, lora), base.bias
                elif (
                    type(module) is nn.Linear
                    and id(module) not in inside
                    and module.weight.numel() >= products.MIN_WEIGHT
                ):
                    weight, bias = module.weight, module.bias
                else:
                    continue
                module.forward, size = _forward(weight, bias, rows, dtype, room)
                room -= size
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Make frozen linear layers use `products.linear` inside the context, and add the plain LoRA on them in place.

    Nothing changes under autocast, on other devices, or in other dtypes. Nor with gradient checkpointing, whose second
    forward pass runs after the context and must equal the first.
    """
    changed: list[nn.Module] = []
    is_checkpointing = model.training and bool(getattr(model, "is_gradient_checkpointing", False))
    try:
        if is_on() and products.has_onednn() and not torch.is_autocast_enabled("cpu") and not is_checkpointing:
            for module in model.modules():
                # Somebody else has replaced this forward already, e.g. accelerate.
                if "forward" in vars(module):
                    continue
                if type(module) is nn.Linear and _is_frozen(module):
                    module.forward = _frozen_forward(module)
                elif isinstance(module, LoraLinear) and (adapter := _only_adapter(module)):
                    module.forward = _adapted_forward(module, adapter)
                else:
                    continue
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _is_frozen(module: nn.Linear) -> bool:
    weight, bias = module.weight, module.bias
    return (
        not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= products.MIN_WEIGHT
    )


def _frozen_forward(module: nn.Linear) -> Any:
    def forward(x: Tensor) -> Tensor:
        return products.FrozenLinear.apply(x, module.weight, module.bias)  # pyright: ignore[reportReturnType]

    return forward


def _only_adapter(module: LoraLinear) -> str | None:
    """The layer's adapter, if `AdaptedLinear` can compute it, else None.

    It must be the only one, plain, trained in float32, without dropout, on a frozen layer.
    """
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or len(active) != 1 or not _is_plain_lora(module):
        return None
    (name,) = active
    base: Any = module.get_base_layer()
    parts = (module.lora_A[name].weight, module.lora_B[name].weight)
    is_plain = all(type(w) is nn.Parameter and w.dtype == torch.float32 and w.requires_grad for w in parts)
    dropout = module.lora_dropout[name]
    is_dropping = module.training and not (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0)
    return name if is_plain and not is_dropping and _is_frozen(base) else None


def _adapted_forward(module: LoraLinear, adapter: str) -> Any:
    base: Any = module.get_base_layer()
    a, b, scale = module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return products.AdaptedLinear.apply(x, base.weight, base.bias, a.weight, b.weight, scale)  # pyright: ignore[reportReturnType]

    return forward


def _active(module: LoraLinear) -> list[str]:
    """The names of the adapters that the layer adds in its forward pass."""
    if module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _merged_weight(module: LoraLinear, lora: list[str]) -> Tensor:
    """The base weight plus the adapters' updates, as a new tensor unless there are none."""
    weight: Any = module.get_base_layer().weight
    if not lora:
        return weight
    # PEFT computes each update in the adapter's own dtype.
    deltas = [module.get_delta_weight(name) for name in lora]
    return (weight + sum(deltas[1:], deltas[0])).to(weight.dtype)


def _with_lora(
    plain: Callable[..., Tensor], module: LoraLinear, lora: list[str], dtype: torch.dtype | None
) -> Callable[..., Tensor]:
    """PEFT's forward pass: the base layer's product plus the adapters', in the adapters' dtype or autocast's."""

    def transposed(part: Any) -> Tensor:
        return part.weight.detach().to(dtype or part.weight.dtype).T

    parts = [(transposed(module.lora_A[n]), transposed(module.lora_B[n]), module.scaling[n]) for n in lora]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        y = plain(x)
        y_NO, x_NI = y.flatten(0, -2), x.flatten(0, -2)
        for a_IR, b_RO, scale in parts:
            # In place if both have the same dtype. Otherwise added in the adapter's, then rounded.
            y_NO = y_NO.to(a_IR.dtype).addmm_(x_NI.to(a_IR.dtype) @ a_IR, b_RO, alpha=scale)
        return y_NO.to(y.dtype).view(y.shape)

    return forward


def _forward(
    weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype | None, room: float
) -> tuple[Callable[..., Tensor], int]:
    """A linear layer's forward with this weight, packed if it is large and there is room, and the bytes of the copy."""
    weight = weight.detach().to(dtype or weight.dtype)
    bias = None if bias is None else bias.detach().to(weight.dtype)
    size = weight.numel() * weight.element_size()
    is_worth_it = weight.dtype in (torch.float32, torch.bfloat16) and weight.numel() >= products.MIN_WEIGHT
    if not is_worth_it or size > room:
        return lambda x, *_, **__: F.linear(x.to(weight.dtype), weight, bias), 0
    # Weights are reordered once per context, which pays off over the many steps of a decode loop.
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    packed_weight, kind = pack(weight, rows), weight.dtype
    return lambda x, *_, **__: multiply(x.to(kind), packed_weight, bias, "none", [], ""), size
