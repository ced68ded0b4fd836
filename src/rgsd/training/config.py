"""The settings of RGSD training. Each field is documented once, in its `help`; `--help` and the docs are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DistillationConfig

from rgsd.errors import ConfigError
from rgsd.prompts.messages import PromptSettings
from rgsd.settings import setting
from rgsd.training.loss import DivergenceSpec
from rgsd.training.selection import PATIENCE_HELP, THRESHOLD_HELP, check_selection


def settle_device(args: TrainingArguments) -> None:
    """Use the CPU if there is nothing else, and bf16 on devices that have it unless the settings decide otherwise.

    transformers enables bf16 on a CPU only with `use_cpu=True`.
    """
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.bf16 is None and not args.fp16:
        args.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not args.use_cpu


NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The sampling settings that leave a model's own distribution unchanged."""


def off_policy_settings(args: Any) -> list[str]:
    """The sampling settings that make rollouts off-policy: sampled from a distribution other than that of the loss.

    Args:
        args: Settings of a trainer that samples its own rollouts.

    Returns:
        Each such setting as "name=value".
    """
    of_kwargs = args.generation_kwargs if isinstance(args.generation_kwargs, dict) else {}
    off_policy = []
    for name, neutral in NEUTRAL.items():
        value = of_kwargs.get(name, getattr(args, name, None))
        if name == "temperature":
            # The loss divides its logits by the rollout's temperature, so only a different one in the loss counts.
            of_loss = getattr(args, "loss_temperature", None)
            neutral = args.temperature if of_loss is None else of_loss
        # top_k 0 and -1 (vLLM) both keep every token.
        if value is not None and value != neutral and not (name == "top_k" and value <= 0):
            off_policy.append(f"{name}={value}" + (f" (the loss has {neutral})" if name == "temperature" else ""))
    return off_policy + [f"{name}={value}" for name, value in of_kwargs.items() if name in _TRUNCATING and value]


_TRUNCATING = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size", "suppress_tokens",
               "bad_words_ids", "frequency_penalty", "presence_penalty")  # fmt: skip


def sampling_notes(args: Any, of_checkpoint: Any) -> list[str]:
    """Notes about sampling to print once before training.

    Args:
        args: Settings of a trainer that samples its own rollouts.
        of_checkpoint: The checkpoint's generation_config, which rollouts do not use.
    """
    notes = []
    if off := off_policy_settings(args):
        notes.append(
            f"Warning: rollouts are off-policy: {', '.join(off)}. They are sampled from a distribution other than the "
            "one in the loss; sampling/sampling_logp_difference measures how far apart the two are"
        )
    ignored = {n: getattr(of_checkpoint, n, None) for n in NEUTRAL}
    # 50 is the default of transformers, which every checkpoint without its own value reports.
    ignored = {n: v for n, v in ignored.items() if v is not None and v != NEUTRAL[n] and not (n == "top_k" and v == 50)}
    if ignored:
        listed = ", ".join(f"{n} {v}" for n, v in ignored.items())
        notes.append(
            f"Rollouts ignore the checkpoint's generation_config ({listed}); set these options if you want them"
        )
    return notes


@dataclass
class RGSDConfig(DistillationConfig):
    """TRL's `DistillationConfig`, plus the clip, the teacher, the teacher's prompt and the think mask of RGSD.

    Defaults that differ from TRL's: `beta` 0.5 and a clip per entry at 0.05 nats (arXiv 2606.12507), `bf16` only on
    devices that have it, `logging_steps` 1. As in TRL, the rollout's `temperature` also divides the logits of the loss
    unless `loss_temperature` is set.

    Raises:
        ConfigError: If a value is out of range, or settings contradict each other.
    """

    learning_rate: float = setting(1e-5, "Peak learning rate of AdamW. With LoRA, try 1e-4.")
    logging_steps: float = setting(1, "Log every N optimizer steps.")
    beta: float = setting(
        0.5, "Divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), 0.5 the Jensen-Shannon divergence."
    )
    clip: str = setting(
        "entry",
        "What the clip caps: each vocabulary entry of a token's divergence, the sum over a token, or nothing.",
        choices=["entry", "token", "none"],
    )
    clip_threshold: float = setting(0.05, "The clip's cap, in nats.")
    loss_temperature: float | None = setting(
        None, "Divides the logits of both models in the loss. Unset: the rollout's `temperature`."
    )
    loss_top_k: int | None = setting(
        None, "Compare only the teacher's k most likely tokens, and one bucket for all others. Unset: all tokens."
    )
    loss_chunk_tokens: int | None = setting(
        None, "Tokens whose logits the loss holds at once. Unset: as many as fill 16 MiB in float32 (CPU: 32 MiB)."
    )

    teacher_model_kind: str = setting(
        "base",
        "The teacher's weights: the base policy, an exponential moving average of the student, or the student's own.",
        choices=["base", "ema", "live"],
    )
    teacher_update_rate: float = setting(
        0.05,
        "The student's share in each update of an `ema` teacher. Parameters are averaged one by one: with LoRA, the "
        "teacher is the product of the averages of A and B, not the average of their products.",
    )
    teacher_contrast: float = setting(
        0.0,
        "Strength (gamma) of a contrastive teacher: log p* = log p(right rubric) + gamma (log p(right rubric) - "
        "log p(another prompt's rubric)), normalised. 0: off. Takes a second teacher pass.",
    )
    max_teacher_length: int | None = setting(
        None,
        "Maximum teacher prompt length in tokens. Longer prompts are an error. Unset: the model's own limit.",
    )
    max_prompt_length: int | None = setting(
        None,
        "Maximum student prompt length in tokens. Longer prompts are an error. Unset: the model's own limit.",
    )

    template: str = setting("paper", "Template of the teacher prompt: its name, or the path of a .jinja file.")
    show_weights: bool = setting(False, "Show the weight of each criterion to the teacher.")
    privileged_context: str = setting(
        "rubric",
        "What the teacher sees in addition to the prompt: its rubric, a reference response, both, the rubric of "
        "another prompt (control), or nothing (control).",
        choices=["rubric", "reference", "both", "mismatched", "none"],
    )
    max_criteria: int | None = setting(
        None, "Maximum number of criteria shown to the teacher, heaviest first. Unset: all."
    )
    criteria_tags: list[str] | None = setting(None, "Show the teacher only criteria that have one of these tags.")

    mask_thinking: bool = setting(True, "Exclude the reasoning between the think tags from the loss.")
    think_open_tag: str = setting("<think>", "The tag that opens the reasoning.")
    think_close_tag: str = setting("</think>", "The tag that closes the reasoning.")

    merge_lora_for_rollouts: bool = setting(
        True,
        "Merge LoRA into float32 base weights while sampling, and restore them bit for bit afterwards. Half-precision "
        "weights are never merged into, since rounding would lose most of the update.",
    )

    early_stopping_patience: int | None = setting(None, PATIENCE_HELP)
    early_stopping_threshold: float = setting(0.0, THRESHOLD_HELP)

    def __post_init__(self) -> None:
        settle_device(self)
        self.unset_for_selection = check_selection(self)
        super().__post_init__()
        # Built only to fail here, rather than after the model is loaded, if a setting is invalid.
        self.divergence_spec()
        self.prompt_settings()
        if self.teacher_contrast and self.privileged_context != "rubric":
            raise ConfigError(
                f"teacher_contrast {self.teacher_contrast} sets the right rubric against another prompt's, but "
                f"privileged_context is {self.privileged_context!r}: set --privileged_context rubric, or "
                "--teacher_contrast 0"
            )
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        if kwargs.get("num_return_sequences", 1) != 1:
            raise ConfigError(
                f"generation_kwargs asks for num_return_sequences={kwargs['num_return_sequences']}: "
                "RGSD samples one response per prompt; to sample more, repeat the prompt in the data"
            )
        if self.mask_thinking and not (self.think_open_tag.strip() and self.think_close_tag.strip()):
            raise ConfigError(
                "mask_thinking needs think_open_tag and think_close_tag: set both, or set mask_thinking to false"
            )
        for name in ("max_teacher_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 token, got {value}")

    def divergence_spec(self) -> DivergenceSpec:
        """The settings of the loss."""
        return DivergenceSpec(
            beta=self.beta,
            clip=self.clip,  # pyright: ignore[reportArgumentType]
            clip_threshold=self.clip_threshold,
            temperature=self.temperature if self.loss_temperature is None else self.loss_temperature,
            top_k=self.loss_top_k,
            chunk_tokens=self.loss_chunk_tokens,
            contrast=self.teacher_contrast,
        )

    def prompt_settings(self) -> PromptSettings:
        """The settings of the teacher prompt."""
        return PromptSettings(
            template=self.template,
            show_weights=self.show_weights,
            privileged_context=self.privileged_context,  # pyright: ignore[reportArgumentType]
            max_criteria=self.max_criteria,
            criteria_tags=tuple(self.criteria_tags or ()),
            seed=self.seed,
        )
