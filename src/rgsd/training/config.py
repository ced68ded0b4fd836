"""The settings of a run. Each field is documented once, in its `help`; the command line and the docs are made of it."""

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


def settle_device(args: TrainingArguments) -> None:
    """Decide where a run computes, and whether in bf16 where that is left open: on a device that has it.

    transformers grants bf16 on a CPU only to who says that a CPU is meant; where there is nothing else, it is.
    """
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.bf16 is None and not args.fp16:
        args.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not args.use_cpu


NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling settings with which a model's own distribution is sampled."""


def off_policy_settings(args: Any) -> list[str]:
    """Sampling settings under which rollouts come from another distribution than the one the loss is taken on.

    Args:
        args: of a trainer that samples its own rollouts. A `temperature` counts only where the loss has another one.
    """
    of_kwargs = args.generation_kwargs if isinstance(args.generation_kwargs, dict) else {}
    found = []
    for name, neutral in NEUTRAL.items():
        value = of_kwargs.get(name, getattr(args, name, None))
        if name == "temperature":
            of_loss = getattr(args, "loss_temperature", None)
            neutral = args.temperature if of_loss is None else of_loss
        # top_k 0 and -1 (vLLM) both keep every token.
        if value is not None and value != neutral and not (name == "top_k" and value <= 0):
            found.append(f"{name}={value}" + (f" (the loss has {neutral})" if name == "temperature" else ""))
    found += [f"{name}={value}" for name, value in of_kwargs.items() if name in _TRUNCATING and value]
    return found


_TRUNCATING = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size", "suppress_tokens",
               "bad_words_ids", "frequency_penalty", "presence_penalty")  # fmt: skip


def sampling_notes(args: Any, of_checkpoint: Any) -> list[str]:
    """What to say once before training: which settings make rollouts off-policy, and which ones of the checkpoint's
    generation_config (`of_checkpoint`) are not used in them."""
    notes = []
    if off := off_policy_settings(args):
        notes.append(
            f"Warning: rollouts are off-policy: {', '.join(off)}. They come from another distribution than the loss is "
            "taken on; sampling/sampling_logp_difference says how far apart the two are"
        )
    ignored = {n: getattr(of_checkpoint, n, None) for n in NEUTRAL}
    ignored = {n: v for n, v in ignored.items() if v is not None and v != NEUTRAL[n] and not (n == "top_k" and v == 50)}
    if ignored:
        listed = ", ".join(f"{n} {v}" for n, v in ignored.items())
        notes.append(
            f"The checkpoint's generation_config ({listed}) is not used in rollouts; set what you want of it yourself"
        )
    return notes


@dataclass
class RGSDConfig(DistillationConfig):
    """TRL's `DistillationConfig` plus what RGSD adds: the clip, the teacher, the teacher's prompt, the think-mask.

    Differs from TRL's defaults: `beta` 0.5 and an entry clip of 0.05 nats (the paper, arXiv 2606.12507), `bf16` only
    where the device has it, `logging_steps` 1. The rollout's `temperature` also divides the logits of the loss unless
    `loss_temperature` says otherwise, as in TRL.

    Raises:
        ConfigError: for a value out of range or settings that contradict each other, naming the remedy.
    """

    learning_rate: float = setting(1e-5, "Peak learning rate of AdamW. With LoRA, try 1e-4.")
    logging_steps: float = setting(1, "Log every so many optimizer steps.")
    beta: float = setting(
        0.5, "Divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), 0.5 the Jensen-Shannon divergence."
    )
    clip: str = setting(
        "entry",
        "What the clip caps: each vocabulary entry of a token's divergence, the token's sum, or nothing.",
        choices=["entry", "token", "none"],
    )
    clip_threshold: float = setting(0.05, "The cap of the clip, in nats.")
    loss_temperature: float | None = setting(
        None, "Divides both models' logits in the loss. Unset: the rollout's `temperature`."
    )
    loss_top_k: int | None = setting(
        None, "Compare only the teacher's k likeliest words, and one bucket for all others. Unset: every word."
    )
    loss_chunk_tokens: int | None = setting(
        None, "Tokens whose logits are held at once in the loss. Unset: as many as make 16 MiB in fp32."
    )

    teacher_model_kind: str = setting(
        "base",
        "The teacher's weights: the base policy (LoRA: adapters off), an exponential moving average, or the student's.",
        choices=["base", "ema", "live"],
    )
    teacher_update_rate: float = setting(
        0.05,
        "Share of the student mixed into an `ema` teacher after each step. The average is over parameters: with LoRA, "
        "A and B are averaged each, and the teacher is the product of the averages, not the average of the products.",
    )
    max_teacher_length: int | None = setting(
        None,
        "Longest teacher prompt in tokens. Longer is an error, never cut. Unset: what the model's positions allow.",
    )
    max_prompt_length: int | None = setting(
        None,
        "Longest student prompt in tokens. Longer is an error, never cut. Unset: what the model's positions allow.",
    )

    template: str = setting("paper", "Teacher prompt: a named template, or the path of your own .jinja file.")
    show_weights: bool = setting(False, "Show the criteria's weights to the teacher.")
    privileged_context: str = setting(
        "rubric",
        "What the teacher sees beside the prompt: its rubric, a reference response, both, another prompt's rubric "
        "(control), or nothing (control).",
        choices=["rubric", "reference", "both", "mismatched", "none"],
    )
    max_criteria: int | None = setting(
        None, "Show the teacher at most so many criteria, heaviest first. Unset: all of them."
    )
    criteria_tags: list[str] | None = setting(None, "Show the teacher only criteria with one of these tags.")

    mask_thinking: bool = setting(True, "Leave reasoning between the think tags out of the loss.")
    think_open_tag: str = setting("<think>", "What opens reasoning.")
    think_close_tag: str = setting("</think>", "What closes reasoning.")

    merge_lora_for_rollouts: bool = setting(
        True,
        "Merge LoRA into the base weights while sampling, where these are float32, and restore them bit for bit "
        "afterwards. Half-precision weights are never merged into: rounding would lose most of the update.",
    )

    def __post_init__(self) -> None:
        settle_device(self)
        super().__post_init__()
        self.divergence_spec()
        self.prompt_settings()
        if self.num_completions_per_prompt_conflict():
            raise ConfigError(
                f"generation_kwargs asks for num_return_sequences={self.generation_kwargs['num_return_sequences']}: "  # pyright: ignore
                "RGSD samples one response a prompt; repeat the prompt in the data to sample more"
            )
        if self.mask_thinking and not (self.think_open_tag.strip() and self.think_close_tag.strip()):
            raise ConfigError("mask_thinking needs think_open_tag and think_close_tag; or set mask_thinking to false")
        for name in ("max_teacher_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 token, got {value}")

    def num_completions_per_prompt_conflict(self) -> bool:
        """Whether `generation_kwargs` asks for more than one response a prompt."""
        kwargs = self.generation_kwargs
        return isinstance(kwargs, dict) and kwargs.get("num_return_sequences", 1) != 1

    def divergence_spec(self) -> DivergenceSpec:
        """The loss that these settings describe."""
        return DivergenceSpec(
            beta=self.beta,
            clip=self.clip,  # pyright: ignore[reportArgumentType]
            clip_threshold=self.clip_threshold,
            temperature=self.temperature if self.loss_temperature is None else self.loss_temperature,
            top_k=self.loss_top_k,
            chunk_tokens=self.loss_chunk_tokens,
        )

    def prompt_settings(self) -> PromptSettings:
        """The teacher's prompt that these settings describe."""
        return PromptSettings(
            template=self.template,
            show_weights=self.show_weights,
            privileged_context=self.privileged_context,  # pyright: ignore[reportArgumentType]
            max_criteria=self.max_criteria,
            criteria_tags=tuple(self.criteria_tags or ()),
            seed=self.seed,
        )
