"""The recipe of a training run: all of its settings, and values derived from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import ModelConfig

from rgsd.data.config import DataConfig
from rgsd.errors import ConfigError
from rgsd.evaluation.config import EvalConfig
from rgsd.inference import SamplingConfig
from rgsd.judges import JudgeConfig
from rgsd.training.config import RGSDConfig
from rgsd.training.grpo import RubricGRPOConfig
from rgsd.training.sft import RubricSFTConfig

# Credentials, paths of this machine, and settings that apply to a single call.
_NOT_STORED = frozenset(
    {
        *("logging_dir", "hub_token", "push_to_hub_token", "overwrite", "resume_from_checkpoint", "local_rank"),
        # Follows the verbosity of libraries, so it differs between two calls with the same recipe.
        "disable_tqdm",
    }
)


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run.

    Raises:
        ConfigError: If a step would take no prompt.
    """

    model: ModelConfig
    data: DataConfig
    evaluation: EvalConfig
    training: RGSDConfig | RubricGRPOConfig | RubricSFTConfig
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self.training, name) < 1:  # TRL takes 0 and fails later
                raise ConfigError(f"{name} must be at least 1, got {getattr(self.training, name)}")

    @property
    def kind(self) -> Literal["rgsd", "grpo", "sft"]:
        """The training method, as run.json names it."""
        if isinstance(self.training, RubricGRPOConfig):
            return "grpo"
        return "sft" if isinstance(self.training, RubricSFTConfig) else "rgsd"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run's folder."""
        return self.training.process_index == 0

    def sampling(self, max_new_tokens: int | None = None) -> SamplingConfig:
        """Greedy sampling with the run's chat template and think tags; by default up to `max_completion_length`."""
        args: Any = self.training
        return SamplingConfig(
            max_new_tokens or args.max_completion_length or 512,
            chat_template_kwargs=args.chat_template_kwargs or {},
            think_tags=(args.think_open_tag, args.think_close_tag),
        )

    def settings(self) -> dict[str, Any]:
        """The settings to store with the run: one flat mapping, as in a recipe's YAML.

        It holds all of rgsd's own settings, so that a later change of a default cannot change the run, and those of
        TRL's that differ from their defaults. What chooses the best step is left out if it was left open: it follows
        from the judge.
        """
        filled_in = getattr(self.training, "unset_for_selection", ())
        flat: dict[str, Any] = {}
        for part in self._parts:
            for f in dataclasses.fields(part):
                value = getattr(part, f.name)
                is_own = part is not self.training or f.name in type(part).__annotations__
                default = f.default if f.default is not dataclasses.MISSING else None
                if f.init and (is_own or (value != default and value not in ("", {}, []))):
                    flat[f.name] = getattr(value, "value", value)
        flat["output_dir"] = self.training.output_dir
        return {k: v for k, v in flat.items() if _is_plain(v) and k not in (*_NOT_STORED, *filled_in)}

    def defaults(self) -> dict[str, Any]:
        """The values of the settings that `settings` leaves out."""
        every_field = (f for part in self._parts for f in dataclasses.fields(part))
        return {f.name: f.default for f in every_field if f.default is not dataclasses.MISSING}

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self.model, self.data, self.evaluation, self.judge, self.training)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, str | int | float | bool)
