"""The teacher: the student's own network with other values in its trainable parameters.

    base   the policy as it was before training. With a fresh LoRA adapter that is the network with its adapters off,
           at no cost; otherwise a frozen copy of the trainable parameters (and of nothing else) is swapped in.
    ema    an exponential moving average of the trainable parameters, swapped in.
    live   the student itself, as it is now.

No second network is ever built. (RGSD, arXiv 2606.12507, trains against `base`; SDPO, arXiv 2601.20802, uses `ema`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from rgsd.errors import ConfigError, ModelError
from rgsd.models.sharding import placed_like, reshard, whole

TeacherKind = Literal["base", "ema", "live"]


class Teacher:
    """Switches a model between student and teacher, in place.

    Args:
        model: the student, unwrapped, holding the base policy's weights.
        kind: `base`, `ema` or `live`.
        teacher_update_rate: the share of the student that `update` mixes into the average, in (0, 1]; only for `ema`.

    Raises:
        ConfigError: for an unknown kind or a rate out of range.
    """

    def __init__(self, model: nn.Module, kind: TeacherKind = "base", teacher_update_rate: float = 0.05) -> None:
        if kind not in ("base", "ema", "live"):
            raise ConfigError(f"teacher_model_kind must be 'base', 'ema' or 'live', got {kind!r}")
        if not 0.0 < teacher_update_rate <= 1.0:
            raise ConfigError(
                f"teacher_update_rate must lie in (0, 1], got {teacher_update_rate}: it is the student's "
                f"share in an update"
            )
        if kind == "ema" and any(
            p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()
        ):
            raise ConfigError(
                "teacher_model_kind 'ema' averages in the parameters' own precision, and half precision loses "
                "small updates: "
                "load the model with dtype float32 (bf16 autocast stays on), or train LoRA, whose adapters are fp32"
            )
        self.model = model
        self.kind = kind
        self.teacher_update_rate = teacher_update_rate
        self._adapters_off = kind == "base" and isinstance(model, PeftModel) and _adapters_do_nothing(model)
        self._copy: dict[str, Tensor] = {}
        if kind == "ema" or (kind == "base" and not self._adapters_off):
            self._copy = {name: p.detach().clone() for name, p in self._trainable()}

    @property
    def is_swapped(self) -> bool:
        """Whether the teacher is a copy of the trained parameters, swapped in."""
        return bool(self._copy)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the model is the teacher, in eval mode, and builds no graph. Never enter between a student's
        forward and its backward: the weights change in place."""
        was_training = self.model.training
        self.model.eval()
        reshard(self.model)
        try:
            with torch.no_grad(), self._weights():
                yield
        finally:
            self.model.train(was_training)

    def _weights(self):
        if self._adapters_off:
            return self.model.disable_adapter()  # pyright: ignore[reportCallIssue]
        return self._swapped() if self._copy else nullcontext()

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            reshard(self.model)
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap the copy's values and the parameters', bit for bit, holding one parameter more at a time."""
        self._match()
        for name, parameter in self._trainable():
            held = parameter.detach().clone()
            parameter.copy_(self._copy[name])
            self._copy[name].copy_(held)

    def _match(self) -> None:
        """Cut and place the copy as the parameters are by now: FSDP2 shards them after this object was made."""
        for name, parameter in self._trainable():
            if name in self._copy:
                self._copy[name] = placed_like(self._copy[name], parameter)

    def has_copy_of(self, parameter: Tensor) -> bool:
        """Whether the teacher's value of one of the model's tensors is not the student's."""
        return any(own is parameter and name in self._copy for name, own in self._trainable())

    def value_of(self, parameter: Tensor | None) -> Tensor | None:
        """The teacher's value of one of the model's tensors. Only outside `active`."""
        for name, own in self._trainable():
            if own is parameter and name in self._copy:
                return self._copy[name]
        return None if parameter is None else parameter.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the student; call it once after each optimizer step. Nothing for other kinds."""
        if self.kind != "ema":
            return
        self._match()
        for name, parameter in self._trainable():
            self._copy[name].lerp_(parameter.detach(), self.teacher_update_rate)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, whole, for a checkpoint (every process must call); empty for kinds that can be rebuilt from the
        base weights."""
        return {name: whole(tensor) for name, tensor in self._copy.items()} if self.kind == "ema" else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the average back from a checkpoint.

        Raises:
            ModelError: when the names or shapes are not those of this model's trainable parameters.
        """
        expected = {name: tuple(t.shape) for name, t in self._copy.items()}
        got = {name: tuple(t.shape) for name, t in state.items()}
        if expected != got:
            differing = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
            raise ModelError(
                f"the checkpoint's teacher does not fit this model: {len(differing)} parameters differ, first "
                f"{differing[0]!r} (wanted {expected.get(differing[0])}, got {got.get(differing[0])}): "
                "resume with the same model, LoRA settings and teacher_model_kind as the run had"
            )
        self._match()
        for name, tensor in state.items():
            self._copy[name].copy_(placed_like(tensor, self._copy[name]))


def _adapters_do_nothing(model: PeftModel) -> bool:
    """Whether every LoRA adapter is still at its initialisation, B = 0, so that adapters off is the base policy."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name, _ in trainable if "lora_" not in name]
    # Only B decides; A may hold anything. Modules that are trained whole start as their frozen original.
    if any("modules_to_save" not in name for name in others):
        return False
    return all(not bool(p.detach().any()) for name, p in trainable if "lora_B" in name or "lora_embedding_B" in name)
