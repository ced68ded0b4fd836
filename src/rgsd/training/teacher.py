"""The teacher: the student's own network with different values in its trainable parameters.

    base   The policy before training. With a fresh LoRA adapter that is the network with its adapters disabled, which
           costs nothing. Otherwise a frozen copy of the trainable parameters is swapped in.
    ema    An exponential moving average of the trainable parameters, swapped in.
    live   The student itself.

There is never a second network. RGSD (arXiv 2606.12507) trains against `base`; SDPO (arXiv 2601.20802) uses `ema`.
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
        model: The student, unwrapped, with the base policy's weights.
        kind: The kind of teacher.
        teacher_update_rate: The student's share in each update of an `ema` teacher, in (0, 1].

    Raises:
        ConfigError: If the kind is unknown, the rate is out of range, or an `ema` teacher would average half precision.
    """

    def __init__(self, model: nn.Module, kind: TeacherKind = "base", teacher_update_rate: float = 0.05) -> None:
        if kind not in ("base", "ema", "live"):
            raise ConfigError(f"teacher_model_kind must be 'base', 'ema' or 'live', got {kind!r}")
        if not 0.0 < teacher_update_rate <= 1.0:
            raise ConfigError(
                f"teacher_update_rate must lie in (0, 1], got {teacher_update_rate}: it is the student's share in an "
                "update"
            )
        if kind == "ema" and any(
            p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()
        ):
            raise ConfigError(
                "teacher_model_kind 'ema' averages in the precision of the parameters, and half precision loses small "
                "updates: load the model with dtype float32 (bf16 autocast still applies), or train LoRA adapters, "
                "which are float32"
            )
        self.model = model
        self.kind = kind
        self.teacher_update_rate = teacher_update_rate
        # A resumed or warm-started adapter is not zero: then the base policy includes it, and a copy is needed.
        self._adapters_off = kind == "base" and isinstance(model, PeftModel) and _adapters_do_nothing(model)
        self._copy: dict[str, Tensor] = {}
        if kind == "ema" or (kind == "base" and not self._adapters_off):
            self._copy = {name: p.detach().clone() for name, p in self._trainable()}

    @property
    def is_swapped(self) -> bool:
        """Whether the teacher is a copy of the trained parameters that is swapped in."""
        return bool(self._copy)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the model the teacher inside the context: in eval mode, without a graph.

        Never enter between a student's forward and backward pass, because the weights change in place.
        """
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
        """Swap the values of copy and parameters, bit for bit, with one extra parameter in memory at a time."""
        self._match()
        for name, parameter in self._trainable():
            # In place, so that the optimizer, FSDP and tied weights keep their references.
            held = parameter.detach().clone()
            parameter.copy_(self._copy[name])
            self._copy[name].copy_(held)

    def _match(self) -> None:
        """Shard and place the copy like the parameters: FSDP2 shards these after this object is created."""
        for name, parameter in self._trainable():
            if name in self._copy:
                self._copy[name] = placed_like(self._copy[name], parameter)

    def has_copy_of(self, parameter: Tensor) -> bool:
        """Whether the teacher holds its own value of one of the model's tensors."""
        return any(own is parameter and name in self._copy for name, own in self._trainable())

    def value_of(self, parameter: Tensor | None) -> Tensor | None:
        """The teacher's value of one of the model's tensors. Call it only outside `active`, which swaps the values."""
        for name, own in self._trainable():
            if own is parameter and name in self._copy:
                return self._copy[name]
        return None if parameter is None else parameter.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the student, after each optimizer step. Other kinds of teacher ignore it."""
        if self.kind != "ema":
            return
        self._match()
        for name, parameter in self._trainable():
            # copy += rate * (student - copy)
            self._copy[name].lerp_(parameter.detach(), self.teacher_update_rate)

    def state_dict(self) -> dict[str, Tensor]:
        """The full average, for a checkpoint. Every process must call it.

        Empty for the other kinds, which are rebuilt from the base weights.
        """
        return {name: whole(tensor) for name, tensor in self._copy.items()} if self.kind == "ema" else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the average from a checkpoint.

        Raises:
            ModelError: If the names or shapes are not those of this model's trainable parameters.
        """
        expected = {name: tuple(t.shape) for name, t in self._copy.items()}
        got = {name: tuple(t.shape) for name, t in state.items()}
        if expected != got:
            differing = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
            raise ModelError(
                f"the teacher in the checkpoint does not fit this model: {len(differing)} parameters differ, first "
                f"{differing[0]!r} (expected shape {expected.get(differing[0])}, got {got.get(differing[0])}). Resume "
                "with the run's own model, LoRA settings and teacher_model_kind"
            )
        self._match()
        for name, tensor in state.items():
            self._copy[name].copy_(placed_like(tensor, self._copy[name]))


def _adapters_do_nothing(model: PeftModel) -> bool:
    """Whether all LoRA adapters still have B = 0, so that disabling them gives the base policy."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name, _ in trainable if "lora_" not in name]
    # The update is B A, so B = 0 suffices. Modules in modules_to_save start as copies of their frozen originals, which
    # PEFT restores when adapters are disabled. Any other trainable parameter would stay trained.
    if any("modules_to_save" not in name for name in others):
        return False
    return all(not bool(p.detach().any()) for name, p in trainable if "lora_B" in name or "lora_embedding_B" in name)
