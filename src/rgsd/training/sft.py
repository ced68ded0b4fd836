"""The off-policy control: supervised fine-tuning on what the base model writes when it is shown the rubric.

RGSD distils the conditioned base policy on the student's own responses. Here the same policy's responses are sampled
once, and TRL's SFTTrainer, used as it is, trains the student to write them from the prompt alone. What RGSD gains over
this is what being on-policy is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl import SFTConfig, SFTTrainer

from rgsd.errors import ConfigError
from rgsd.inference import Response, SamplingConfig, TransformersGenerator, replay
from rgsd.progress import counting
from rgsd.prompts.leaks import mentions_rubric
from rgsd.prompts.messages import PromptSettings, training_rows
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, strip_thinking
from rgsd.rubrics import Example
from rgsd.settings import setting
from rgsd.training.checkpoints import CheckpointMixin
from rgsd.training.config import settle_device

NOT_IN_LOSS = -100
"""The label that torch's cross-entropy leaves out."""


@dataclass
class RubricSFTConfig(SFTConfig):
    """TRL's `SFTConfig` plus how the responses to learn are sampled.

    Differs from TRL's defaults: no `max_length` (nothing is cut), `bf16` only where the device has it, `logging_steps`
    1.

    Raises:
        ConfigError: for a value out of range.
    """

    learning_rate: float = setting(1e-5, "Peak learning rate of AdamW. With LoRA, try 1e-4.")
    logging_steps: float = setting(1, "Log every so many optimizer steps.")
    max_length: int | None = setting(None, "Longest sequence in tokens; longer ones are cut. Unset: nothing is cut.")
    responses_per_prompt: int = setting(1, "Responses sampled from the conditioned base model for each prompt.")
    temperature: float = setting(1.0, "Temperature at which they are sampled; 0 is greedy.")
    max_completion_length: int = setting(512, "Longest of them in tokens. A response that was cut off is left out.")
    drop_leaks: bool = setting(True, "Leave out responses whose answer speaks of the rubric.")
    mask_thinking: bool = setting(True, "Leave reasoning between the think tags out of the loss.")
    think_open_tag: str = setting(OPEN_TAG, "What opens reasoning.")
    think_close_tag: str = setting(CLOSE_TAG, "What closes reasoning.")
    template: str = setting("paper", "Prompt of the conditioned model: a named template, or your own .jinja file.")
    show_weights: bool = setting(False, "Show each criterion's weight in it.")
    privileged_context: str = setting(
        "rubric",
        "What the conditioned model sees beside the prompt: the rubric, a reference response, both, another prompt's "
        "rubric (control), or nothing (control).",
        choices=["rubric", "reference", "both", "mismatched", "none"],
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(None, "Passed to the chat template.")

    def __post_init__(self) -> None:
        settle_device(self)
        super().__post_init__()
        self.prompt_settings()
        for name in ("responses_per_prompt", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}: 0 (greedy) or more is wanted")
        if self.temperature == 0 and self.responses_per_prompt > 1:
            raise ConfigError(
                f"responses_per_prompt is {self.responses_per_prompt} at temperature 0: greedy responses to a prompt "
                "are all the same. Raise the temperature, or sample one"
            )

    def prompt_settings(self) -> PromptSettings:
        """The prompt of the conditioned model."""
        return PromptSettings(
            template=self.template,
            show_weights=self.show_weights,
            privileged_context=self.privileged_context,  # pyright: ignore[reportArgumentType]
            seed=self.seed,
        )


class RubricSFTTrainer(CheckpointMixin, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """TRL's SFTTrainer with whole checkpoints and exact resume."""


@dataclass(frozen=True, slots=True)
class ConditionedResponses:
    """What the conditioned model wrote.

    Args:
        rows: for SFTTrainer: `input_ids` (student's prompt, response, end) and `labels`.
        n_sampled: responses sampled.
        n_tokens: of them.
        n_truncated, n_leaking: left out, because they were cut off or spoke of the rubric.
    """

    rows: list[dict[str, Any]]
    n_sampled: int
    n_tokens: int
    n_truncated: int
    n_leaking: int


def sample_conditioned(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    args: RubricSFTConfig,
    *,
    batch_size: int,
    references: dict[str, str] | None = None,
) -> ConditionedResponses:
    """Sample the base model's responses to prompts with rubrics, and make them the targets of the prompts alone.

    Args:
        model, tokenizer: the base model.
        examples: the training set.
        args: how to sample, and what to leave out.
        batch_size: prompts generated at once.
        references: example id -> reference response, as in `rgsd.prompts.messages.training_rows`.

    Raises:
        ConfigError: when no response is left to learn.
    """
    prompts = training_rows(examples, args.prompt_settings(), references)
    template_kwargs: Any = args.chat_template_kwargs or {}
    rows: list[dict[str, Any]] = []
    n_truncated = n_leaking = n_tokens = 0
    with counting("conditioned responses", len(prompts) * args.responses_per_prompt) as counter:
        for draw in range(args.responses_per_prompt):
            sampling = SamplingConfig(
                args.max_completion_length,
                temperature=args.temperature,
                # A stream of its own for each draw of each run.
                seed=args.seed * 100_003 + draw,
                chat_template_kwargs=template_kwargs,
                think_tags=(args.think_open_tag, args.think_close_tag),
            )
            generator = TransformersGenerator(model, tokenizer, sampling, batch_size=batch_size)
            responses = generator.generate([p["teacher_prompt"] for p in prompts], lambda i, r: counter.advance())
            for example, prompt, response in zip(examples, prompts, responses, strict=True):
                n_tokens += response.n_tokens
                if response.is_truncated:
                    n_truncated += 1
                elif args.drop_leaks and _leaks(example, response, args):
                    n_leaking += 1
                else:
                    rows.append(_row(prompt, response, tokenizer, args, template_kwargs))
    n_sampled = len(prompts) * args.responses_per_prompt
    if not any(label != NOT_IN_LOSS for row in rows for label in row["labels"]):
        raise ConfigError(
            f"of {n_sampled} conditioned responses none is left to learn: {n_truncated} were cut off at "
            f"{args.max_completion_length} tokens (raise max_completion_length), {n_leaking} speak of the rubric "
            "(another template may help, or drop_leaks false)"
        )
    return ConditionedResponses(rows, n_sampled, n_tokens, n_truncated, n_leaking)


def _leaks(example: Example, response: Response, args: RubricSFTConfig) -> bool:
    answer = strip_thinking(response.text, args.think_open_tag, args.think_close_tag, response.starts_in_thinking)
    return mentions_rubric(answer, "\n".join(m["content"] for m in example.messages))


def _row(
    prompt: dict[str, Any], response: Response, tokenizer: Any, args: RubricSFTConfig, template_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The student's prompt and the response as token ids, the answer and its end labelled."""
    before = replay.prompt_ids(tokenizer, prompt["prompt"], template_kwargs)
    read = replay.replay(
        response,
        tokenizer,
        think_tags=(args.think_open_tag, args.think_close_tag),
        mask_thinking=args.mask_thinking,
    )
    labels = [token if kept else NOT_IN_LOSS for token, kept in zip(read.ids, read.in_loss, strict=True)]
    return {"input_ids": before + read.ids, "labels": [NOT_IN_LOSS] * len(before) + labels}
