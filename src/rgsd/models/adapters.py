"""Adapters and trained weights in float32, so that rounding loses no small update.

A bfloat16 weight has 8 significant bits, so an update below 1/512 of the weight rounds away. The first steps of LoRA
and AdamW are that small. Trained parameters are therefore float32 (`use_float32_master_weights`), adapters are merged
in float32 and into copies (`merged`), and a merge that rounds reports what it lost (`Kept`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rgsd.errors import ConfigError, ModelError
from rgsd.models.sharding import whole

HALF = (torch.bfloat16, torch.float16)
"""The dtypes in which a weight loses small updates."""
MAX_NAMED = 3
"""How many parameters an error lists at most."""


# --- What is trained ----------------------------------------------------------------------------------------------


@torch.no_grad()
def use_float32_master_weights(model: nn.Module) -> int:
    """Convert half-precision trainable parameters to float32, in place. Call it before creating the optimizer.

    PEFT already makes its adapters float32 (`autocast_adapter_dtype=True`). They arrive in half precision if that was
    disabled, if the model was cast afterwards, or from TRL, which casts the adapters of quantized models to bfloat16.

    Returns:
        The number of parameters changed.

    Raises:
        ConfigError: If trained parameters share a layer with frozen half-precision ones, as trained biases and
            `modules_to_save` do: such a layer cannot multiply two precisions.
    """
    half = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dtype in HALF}
    if not half:
        return 0
    of_adapters = {id(p) for _, layer in layers(model) for p in layer.parameters()}
    # An adapter layer's parameters include those of its base layer.
    of_adapters -= {id(p) for _, layer in layers(model) for p in layer.get_base_layer().parameters()}
    others = [n for n, p in half.items() if id(p) not in of_adapters]
    if others and any(not p.requires_grad and p.dtype in HALF for p in model.parameters()):
        kinds = sorted({str(half[n].dtype).removeprefix("torch.") for n in others})
        named = ", ".join(others[:MAX_NAMED]) + (", ..." if len(others) > MAX_NAMED else "")
        raise ConfigError(
            f"{len(others)} trained parameters are {' and '.join(kinds)}, in layers with frozen ones ({named}): half "
            "precision loses most of each update. Load the model with dtype float32 (with bf16 true it still computes "
            "in bfloat16), or train only LoRA adapters"
        )
    for parameter in half.values():
        parameter.data = parameter.data.float()
    return len(half)


def base_network(model: Any) -> Any:
    """The transformers model inside a PeftModel, with its adapters in place, or any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes stores the base weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


# --- Merging ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kept:
    """How much of the adapters' update a rounded merge kept.

    With U the update in float32, and V the difference between the rounded merged weight and the base weight, `share` is
    <V, U> / <U, U> over all layers: 1 if nothing was lost, 0 if rounding gave back the base weights.
    """

    norm: float = 0.0
    overlap: float = 0.0

    def add(self, base: Tensor, merged: Tensor, rounded: Tensor) -> None:
        """Count one weight: its base value, the float32 merge, and that merge as stored."""
        update = merged.float() - base.float()
        self.norm += float(update.double().square().sum())
        self.overlap += float(((rounded.float() - base.float()).double() * update.double()).sum())

    @property
    def share(self) -> float:
        """The share of the update that survives; 1 for an update of zero."""
        return self.overlap / self.norm if self.norm else 1.0


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All layers with adapters (PEFT's `BaseTunerLayer`), with their names."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))


@torch.no_grad()
def merged(layer: Any, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters of a layer's base, in float32, with the active adapters merged in. The layer stays unchanged.

    Args:
        layer: A layer with any adapters that PEFT can merge. Parameters that FSDP2 shards are gathered, so every
            process must call.
        base: Values to merge into, by name, in place of the base layer's own.
    """
    own = dict(layer.get_base_layer().named_parameters(recurse=False))
    values = {id(p): (base or {}).get(n) for n, p in own.items()}
    # deepcopy's memo replaces each parameter by its float32 value, so PEFT's own merge runs on a float32 copy of the
    # layer: every kind of adapter is supported, and the layer itself is never written to.
    memo: dict[int, Any] = {}
    for p in layer.parameters():
        base_value = values.get(id(p))
        value = whole(p.detach()) if base_value is None else base_value
        memo[id(p)] = nn.Parameter(value.detach().to(torch.float32, copy=True), requires_grad=False)
    scratch: Any = copy.deepcopy(layer, memo)
    if not scratch.merged:
        scratch.merge()
    return {n: memo[id(p)].data for n, p in own.items()}


def merges_exactly(model: nn.Module) -> bool:
    """Whether merging in place loses nothing but float32 rounding.

    That holds if the base weights are float32, and none is shared with a module without an adapter, as a head tied to
    the embedding is.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    weights = [p for _, layer in layers(model) for p in layer.get_base_layer().parameters(recurse=False)]
    return all(p.dtype in (torch.float32, torch.float64) and owners[id(p)] == 1 for p in weights)


@contextmanager
def saved_without_the_hub() -> Iterator[None]:
    """Keep PEFT from asking the Hub for the base model's config whenever it saves an adapter.

    It asks to learn whether the vocabulary was resized, which rgsd never does, and takes every name for a Hub id, even
    `nano` or a folder.
    """
    from peft.utils import save_and_load

    original = save_and_load.check_file_exists_on_hf_hub
    save_and_load.check_file_exists_on_hf_hub = lambda *args, **kwargs: None  # None means "unknown"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")
            yield
    finally:
        save_and_load.check_file_exists_on_hf_hub = original


def policy(model: Any) -> Any:
    """The model with its adapters merged if that is exact, otherwise unmerged, so that rounding loses no update."""
    if isinstance(model, PeftModel) and merges_exactly(model):
        return model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    return model


@torch.no_grad()
def merge_and_unload(model: PeftModel, dtype: torch.dtype) -> tuple[Any, Kept]:
    """Merge adapters in float32, one layer at a time, and round each weight once.

    Args:
        model: The model, which is used up. A head tied to the embedding is untied if only one of them has an adapter.
        dtype: Of the merged weights.

    Returns:
        The plain model, and what rounding kept of the update.
    """
    kept = Kept()
    for _, layer in layers(model):
        base = layer.get_base_layer()
        before = {n: p.detach() for n, p in base.named_parameters(recurse=False)}
        for name, value in merged(layer).items():
            rounded = value.to(dtype)
            kept.add(before[name], value, rounded)
            # A new parameter: writing in place would also change a weight that is tied to this one.
            setattr(base, name, nn.Parameter(rounded, requires_grad=False))
    plain: Any = model.unload()  # pyright: ignore[reportCallIssue]
    plain = plain.to(dtype)
    # Merging into only one of two tied weights has untied them, and the config must say so, or loading ties them again.
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        plain.config.tie_word_embeddings = False
    return plain, kept


# --- Sending merged weights to an inference engine ----------------------------------------------------------------


def merged_values(
    model: PeftModel, values: Callable[[], Iterable[tuple[str, Tensor]]], kept: Kept | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The pairs that `values` yields, with adapters merged in float32 and each weight rounded once to its own dtype.

    TRL 1.16 merges adapters into the base weights in place while it sends them, and subtracts them again. In bfloat16
    both steps round, so the base weights would drift. Here its merge is disabled while `values` runs, and the values of
    adapted layers are replaced.

    Args:
        model: The model whose parameters `values` walks.
        values: Yields the engine's names ("model.layers.0.mlp.up_proj.weight") with full base weights.
        kept: Counts what rounding to the engine's precision costs. A float32 weight counts as bfloat16, in which
            engines serve by default.

    Raises:
        ModelError: If an adapted layer has no weight of its own among the values.
    """
    adapted = {
        name.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", ""): layer
        for name, layer in layers(model)
    }
    sent: set[str] = set()
    # TRL calls merge_adapter and unmerge_adapter while it yields the values.
    with _merging_off(model):
        for name, value in values():
            owner, _, own = name.rpartition(".")
            layer = adapted.get(owner)
            if layer is None:
                yield name, value
                continue
            sent.add(owner)
            full = merged(layer, {own: value})[own]
            if kept is not None:
                kept.add(value, full, full.to(value.dtype if value.dtype in HALF else torch.bfloat16))
            yield name, full.to(value.dtype)
    if missing := sorted(adapted.keys() - sent):
        raise ModelError(
            f"{len(missing)} layers with adapters have no weights of their own to send to the inference engine, first "
            f"{missing[0]!r}: there, a head tied to the embedding cannot differ from it. Remove the head from "
            "lora_target_modules, or sample without vLLM"
        )


@contextmanager
def _merging_off(model: Any) -> Iterator[None]:
    model.merge_adapter = model.unmerge_adapter = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.merge_adapter, model.unmerge_adapter


# --- Computing in float32 with a half-precision model -------------------------------------------------------------


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Make a half-precision model compute in float32, one layer's weights at a time.

    The logits then depend only on the weights and not on the rounding of activations, without a float32 copy of the
    whole model.
    """
    held: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []

    def before(module: nn.Module, *_: Any) -> None:
        half = {n: p for n, p in module.named_parameters(recurse=False) if p.dtype in HALF}
        held.append((module, half))
        for name, p in half.items():
            module._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=False)

    def after(module: nn.Module, *_: Any) -> None:
        module._parameters.update(held.pop()[1])

    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_pre_hook(before) for m in owners] + [m.register_forward_hook(after) for m in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while held:  # left over if a forward pass raised
            failed, half = held.pop()
            failed._parameters.update(half)
