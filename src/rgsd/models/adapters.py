"""Adapters and trained weights in the precision they need: float32, so that no small update is lost to rounding.

A bfloat16 weight has 8 significant bits. An update below 1/512 of the weight rounds away, which is where LoRA and AdamW
live for their first steps. So trained parameters are float32 (`use_float32_master_weights`), adapters are merged in
float32 and into copies (`merged`), and a rounded merge states what it lost (`Kept`).
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
"""The precisions in which a weight loses small updates."""
N_NAMED = 3
"""How many parameters an error names."""


# --- What is trained ----------------------------------------------------------------------------------------------


@torch.no_grad()
def use_float32_master_weights(model: nn.Module) -> int:
    """Turn half-precision trainable parameters into float32, in place. Returns the number of parameters changed.

    Call it before the optimizer is made. peft makes its adapters float32 by itself (`autocast_adapter_dtype=True`);
    they arrive in half precision when that was switched off, when the model was cast afterwards, or from TRL, which
    casts the adapters of a quantized model to bfloat16.

    Raises:
        ConfigError: when trained parameters share layers with frozen half-precision ones, as trained biases and
            `modules_to_save` do: such a layer cannot multiply two precisions.
    """
    half = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dtype in HALF}
    if not half:
        return 0
    of_adapters = {id(p) for _, layer in layers(model) for p in layer.parameters()}
    of_adapters -= {id(p) for _, layer in layers(model) for p in layer.get_base_layer().parameters()}
    others = [n for n, p in half.items() if id(p) not in of_adapters]
    if others and any(not p.requires_grad and p.dtype in HALF for p in model.parameters()):
        kinds = sorted({str(half[n].dtype).removeprefix("torch.") for n in others})
        named = ", ".join(others[:N_NAMED]) + (", ..." if len(others) > N_NAMED else "")
        raise ConfigError(
            f"{len(others)} trained parameters are {' and '.join(kinds)} beside frozen ones ({named}): half precision "
            "loses most updates of a training step. Load the model with dtype float32 (bf16 true still computes in "
            "bfloat16), or train LoRA adapters alone"
        )
    for parameter in half.values():
        parameter.data = parameter.data.float()
    return len(half)


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes holds the base weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


# --- Merging ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kept:
    """How much of the adapters' update a rounded merge kept.

    With U the update in float32 and V the difference between the rounded merged weight and the base weight, `share` is
    <V, U> / <U, U> over all layers: 1 when nothing was lost, 0 when rounding returned the base weights.
    """

    wanted: float = 0.0
    found: float = 0.0

    def add(self, base: Tensor, merged: Tensor, rounded: Tensor) -> None:
        """Count one weight: the base, the float32 merge, and that merge as it is stored."""
        update = merged.float() - base.float()
        self.wanted += float(update.double().square().sum())
        self.found += float(((rounded.float() - base.float()).double() * update.double()).sum())

    @property
    def share(self) -> float:
        """The share of the update that is left; 1 for an update of zero."""
        return self.found / self.wanted if self.wanted else 1.0


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer that carries adapters (peft's `BaseTunerLayer`), with its name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))


@torch.no_grad()
def merged(layer: Any, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters of a layer's base with the active adapters merged in, in float32. The layer is left as it is.

    Args:
        layer: with adapters of any kind that peft can merge. Parameters that FSDP2 shards are gathered: every process
            must call.
        base: values to merge into, where they are at hand already; by default the base layer's own.
    """
    own = dict(layer.get_base_layer().named_parameters(recurse=False))
    values = {id(p): (base or {}).get(n) for n, p in own.items()}
    # Copies of everything but the parameters, which are handed over in float32.
    memo: dict[int, Any] = {}
    for p in layer.parameters():
        given = values.get(id(p))
        value = whole(p.detach()) if given is None else given
        memo[id(p)] = nn.Parameter(value.detach().to(torch.float32, copy=True), requires_grad=False)
    scratch: Any = copy.deepcopy(layer, memo)
    if not scratch.merged:
        scratch.merge()
    return {n: memo[id(p)].data for n, p in own.items()}


def merges_exactly(model: nn.Module) -> bool:
    """Whether merging in place loses nothing but float32 rounding: base weights are float32, and none of them is shared
    with a module that has no adapter (a head tied to the embedding)."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    weights = [p for _, layer in layers(model) for p in layer.get_base_layer().parameters(recurse=False)]
    return all(p.dtype in (torch.float32, torch.float64) and owners[id(p)] == 1 for p in weights)


@contextmanager
def saved_without_the_hub() -> Iterator[None]:
    """Within it, peft saves adapters without asking the hub for the base model's config at each save.

    It asks to learn whether the vocabulary was resized, which rgsd never does; and it asks for any name, `nano` or a
    folder's, as if it were a hub id.
    """
    from peft.utils import save_and_load

    theirs = save_and_load.check_file_exists_on_hf_hub
    save_and_load.check_file_exists_on_hf_hub = lambda *args, **kwargs: None  # None: could not be found out
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")
            yield
    finally:
        save_and_load.check_file_exists_on_hf_hub = theirs


def policy(model: Any) -> Any:
    """The model to sample from and to read logits of: adapters merged where that is exact, and left unmerged where
    rounding would lose part of the update."""
    if isinstance(model, PeftModel) and merges_exactly(model):
        return model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    return model


@torch.no_grad()
def merge_and_unload(model: PeftModel, dtype: torch.dtype) -> tuple[Any, Kept]:
    """The plain model with adapters merged in float32, one layer at a time, and each weight rounded once to `dtype`.

    The model given is used up. A head that was tied to the embedding is untied when only one of them has an adapter.
    """
    kept = Kept()
    for _, layer in layers(model):
        base = layer.get_base_layer()
        before = {n: p.detach() for n, p in base.named_parameters(recurse=False)}
        for name, value in merged(layer).items():
            rounded = value.to(dtype)
            kept.add(before[name], value, rounded)
            # A new parameter, so that a weight tied to this one keeps its value.
            setattr(base, name, nn.Parameter(rounded, requires_grad=False))
    plain: Any = model.unload()  # pyright: ignore[reportCallIssue]
    plain = plain.to(dtype)
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        plain.config.tie_word_embeddings = False
    return plain, kept


# --- Sending merged weights to an inference engine ----------------------------------------------------------------


def merged_values(
    model: PeftModel, values: Callable[[], Iterable[tuple[str, Tensor]]], kept: Kept | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What `values` yields, with adapters merged in float32 into copies, each rounded once to its base weight's dtype.

    TRL 1.16 merges adapters into the base weights in place while it sends them, and subtracts them again: in bfloat16
    both steps round, so the base weights drift unless someone restores them. Here its merge is switched off while
    `values` runs, and what it yields for adapted layers is replaced.

    Args:
        model: whose parameters `values` walks.
        values: names as the engine knows them ("model.layers.0.mlp.up_proj.weight") and whole base weights.
        kept: counts what rounding to the engine's precision costs. A float32 weight is counted as bfloat16, in which
            engines serve unless told otherwise.
    """
    adapted = {
        name.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", ""): layer
        for name, layer in layers(model)
    }
    sent: set[str] = set()
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
            f"{len(missing)} adapted layers have no weight of their own to send to the inference engine, first "
            f"{missing[0]!r}: a head that is tied to the embedding cannot differ from it there. Leave it out of "
            "lora_target_modules, or sample without vLLM"
        )


@contextmanager
def _merging_off(model: Any) -> Iterator[None]:
    model.merge_adapter = model.unmerge_adapter = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.merge_adapter, model.unmerge_adapter


# --- Reading a half-precision model in float32 --------------------------------------------------------------------


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, a half-precision model computes in float32, one layer's weights at a time: it measures what the
    weights say, without the rounding of half-precision activations, and without a float32 copy of the model."""
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
        while held:  # a forward pass that failed
            failed, half = held.pop()
            failed._parameters.update(half)
