"""From a transformers model to the `Head` of the loss, and the check that both give the same logits.

The loss applies the head itself, a chunk of tokens at a time, so it must repeat whatever the model's forward pass does
to its logits: a bias, a scale, a soft cap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rgsd.errors import ModelError
from rgsd.models import check_finite
from rgsd.models.adapters import base_network
from rgsd.models.sharding import whole
from rgsd.training.loss import Head

TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.04
"""Allowed difference between the two logits, as a share of the largest: float32 rounding, or a few times the epsilon of
half precision."""


def head_of(student: Any, weight: Tensor | None = None, bias: Tensor | None = None) -> Head:
    """A model's head, with the post-processing of logits that its config names, read as TRL reads it.

    Args:
        student: The model, unwrapped.
        weight, bias: Values to use in place of the model's own.
    """
    own = student.get_output_embeddings()
    used_weight, used_bias = (own.weight, own.bias) if weight is None else (weight, bias)
    config = student.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(whole(used_weight), None if used_bias is None else whole(used_bias), _logit_scale(config), softcap)


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
    if divisor is None:
        return 1.0
    return divisor if config.model_type == "hyperclovax" else 1.0 / divisor


def check_head(student: Any, name: str, own_NV: Tensor, hidden_NH: Tensor, head_NV: Tensor) -> None:
    """Refuse a model that does more to its logits than `head_of` knows: the loss would train a different model.

    Args:
        student: The model, unwrapped.
        name: Its name, for the error.
        own_NV: Logits of a few tokens from its forward pass.
        hidden_NH: Its final hidden states of these tokens.
        head_NV: What the `Head` makes of them.

    Raises:
        ModelError: If logits are not finite, or differ by more than rounding.
    """
    exact_NV = own_NV.float()
    # -inf is legitimate: some models mask unused entries of the vocabulary.
    if not bool(torch.isfinite(exact_NV.amax(-1)).all()):
        check_finite(student, name)
        raise ModelError(
            f"the logits of {name!r} are not finite, although its weights are: load it in bfloat16 or float32"
        )
    is_exact = own_NV.dtype == head_NV.dtype == hidden_NH.dtype
    difference_NV = torch.where(exact_NV == head_NV, 0.0, (exact_NV - head_NV).abs())  # -inf minus -inf is NaN
    limit = (TOLERANCE if is_exact else LOW_PRECISION_TOLERANCE) * float(exact_NV.abs().max())
    if float(difference_NV.max()) > limit:
        worst = int(difference_NV.argmax())
        raise ModelError(
            f"the model's own logit of a token is {float(exact_NV.flatten()[worst]):.6g}, but its head gives "
            f"{float(head_NV.flatten()[worst]):.6g} for the same hidden state: {type(base_network(student)).__name__} "
            "does more in its forward pass than apply the head (and the scale or soft cap in its config). RGSD does "
            "not support this architecture"
        )
