"""Refuses damaged and hostile model files: non-finite weights, and whatever their parsers raise."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rgsd.errors import ModelError
from rgsd.models.sharding import local
from rgsd.models.sources import EMBEDDED


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse a model with a NaN or infinite parameter, whose every output would be meaningless.

    Only the first process checks. All processes load the same file, and under FSDP the others hold no values yet.

    Raises:
        ModelError: If a parameter is not finite, naming it.
    """
    parameter = None if os.environ.get("RANK", "0") != "0" else nonfinite_parameter(model)
    if parameter is not None:
        raise ModelError(
            f"{name!r} is damaged: its parameter {parameter} holds NaN or infinite values. Restore or download the "
            "weights again; if they were converted to float16, load them as bfloat16 or float32 (--dtype)"
        )


def nonfinite_parameter(model: torch.nn.Module) -> str | None:
    """The name of the first parameter with a NaN or infinite value, or None. Reads each weight once."""
    for name, parameter in model.named_parameters():
        # Under ZeRO-3 and FSDP, a parameter that another process holds is empty or on the `meta` device.
        is_here = bool(parameter.numel()) and not parameter.is_meta
        # Quantized weights are single bytes, which have no NaN, or which aminmax cannot read.
        if is_here and parameter.is_floating_point() and parameter.element_size() > 1:
            low, high = torch.aminmax(local(parameter.detach()))
            if not (math.isfinite(low) and math.isfinite(high)):
                return name
    return None


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn any error from a damaged or hostile model folder into a `ModelError`.

    It catches every Exception rather than a list of types: tokenizers raises a bare Exception, transformers a KeyError
    or AttributeError for whatever a JSON file lacks, and safetensors and pickle have their own.
    """
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        # torch's own message suggests weights_only=False, which would run the pickle's code.
        raise ModelError(
            f"cannot load {name!r}: its weights are a pickle that holds more than tensors and could run code. None of "
            "it was run. Use a version with .safetensors files"
        ) from error
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), repr(error))
        raise ModelError(
            f"cannot load {name!r}: {type(error).__name__}: {first_line}. Expected a hub id (owner/name) that this "
            f"machine can reach, a folder with config.json and weights, a .gguf file, or {EMBEDDED!r}"
        ) from error
