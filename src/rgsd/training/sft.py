"""The off-policy baseline: supervised fine-tuning on responses that the base model writes when it sees the rubric.

RGSD distills the conditioned base policy on the student's own responses. Here the responses of that same policy are
sampled once, and TRL's SFTTrainer trains the student to write them from the prompt alone. RGSD's lead over this
baseline is what being on-policy is worth.
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
from rgsd.training.config import settle_device
from rgsd.training.development import DevelopmentMixin
from rgsd.training.selection import PATIENCE_HELP, THRESHOLD_HELP, check_selection

NOT_IN_LOSS = -100
"""The label that torch's cross-entropy ignores."""


@dataclass
class RubricSFTConfig(SFTConfig):
    """TRL's `SFTConfig`, plus how the responses to learn from are sampled.

    Defaults that differ from TRL's: no `max_length` (nothing is truncated), `bf16` only on devices that have it,
    `logging_steps` 1.

    Raises:
        ConfigError: If a value is out of range.
    """

    learning_rate: float = setting(1e-5, "Peak learning rate of AdamW. With LoRA, try 1e-4.")
    logging_steps: float = setting(1, "Log every N optimizer steps.")
    max_length: int | None = setting(
        None, "Maximum sequence length in tokens; longer ones are truncated. Unset: no limit."
    )
    responses_per_prompt: int = setting(1, "Responses per prompt, sampled from the conditioned base model.")
    temperature: float = setting(1.0, "Sampling temperature of these responses; 0 is greedy.")
    max_completion_length: int = setting(512, "Maximum response length in tokens. Truncated responses are dropped.")
    drop_leaks: bool = setting(True, "Drop responses whose answer mentions the rubric.")
    mask_thinking: bool = setting(True, "Exclude the reasoning between the think tags from the loss.")
    think_open_tag: str = setting(OPEN_TAG, "The tag that opens the reasoning.")
    think_close_tag: str = setting(CLOSE_TAG, "The tag that closes the reasoning.")
    template: str = setting(
        "paper", "Template of the conditioned model's prompt: its name, or the path of a .jinja file."
    )
    show_weights: bool = setting(False, "Show the weight of each criterion in that prompt.")
    privileged_context: str = setting(
        "rubric",
        "What the conditioned model sees in addition to the prompt: its rubric, a reference response, both, the rubric "
        "of another prompt (control), or nothing (control).",
        choices=["rubric", "reference", "both", "mismatched", "none"],
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(None, "Arguments of the chat template, as JSON.")
    early_stopping_patience: int | None = setting(None, PATIENCE_HELP)
    early_stopping_threshold: float = setting(0.0, THRESHOLD_HELP)

    def __post_init__(self) -> None:
        settle_device(self)
        self.unset_for_selection = check_selection(self)
        super().__post_init__()
        self.prompt_settings()
        for name in ("responses_per_prompt", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be at least 0 (greedy), got {self.temperature}")
        if self.temperature == 0 and self.responses_per_prompt > 1:
            raise ConfigError(
                f"responses_per_prompt is {self.responses_per_prompt} at temperature 0, but greedy responses to a "
                "prompt are all the same: raise the temperature, or sample one"
            )

    def prompt_settings(self) -> PromptSettings:
        """The settings of the conditioned model's prompt."""
        return PromptSettings(
            template=self.template,
            show_weights=self.show_weights,
            privileged_context=self.privileged_context,  # pyright: ignore[reportArgumentType]
            seed=self.seed,
        )


class RubricSFTTrainer(DevelopmentMixin, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """TRL's SFTTrainer with complete checkpoints and exact resume."""


@dataclass(frozen=True, slots=True)
class ConditionedResponses:
    """Responses of the base model with the rubric in its prompt, as training rows.

    Args:
        rows: For SFTTrainer: `input_ids` (the student's prompt, response, end of sequence) and `labels`.
        n_sampled: Number of sampled responses.
        n_tokens: Their tokens in total.
        n_truncated: Responses that were dropped because they were truncated.
        n_leaking: Responses that were dropped because they mention the rubric.
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
    """Sample the base model's responses to prompts with rubrics, as targets for the prompts alone.

    Args:
        model, tokenizer: The base model.
        examples: The training set.
        args: How to sample, and what to drop.
        batch_size: Prompts per generation batch.
        references: Reference responses by example id, as in `rgsd.prompts.messages.training_rows`.

    Raises:
        ConfigError: If no response is left to learn from.
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
                # Draws of one run, and runs with neighbouring seeds, must not repeat each other's random numbers.
                seed=args.seed * 100_003 + draw,
                chat_template_kwargs=template_kwargs,
                think_tags=(args.think_open_tag, args.think_close_tag),
            )
            generator = TransformersGenerator(model, tokenizer, sampling, batch_size=batch_size)
            responses = generator.generate([p["teacher_prompt"] for p in prompts], lambda i, r: counter.advance())
            for example, prompt, response in zip(examples, prompts, responses, strict=True):
                n_tokens += response.n_tokens
                # A truncated response would teach the student to stop in mid-sentence.
                if response.is_truncated:
                    n_truncated += 1
                elif args.drop_leaks and _leaks(example, response, args):
                    n_leaking += 1
                else:
                    rows.append(_row(prompt, response, tokenizer, args, template_kwargs))
    n_sampled = len(prompts) * args.responses_per_prompt
    if not any(label != NOT_IN_LOSS for row in rows for label in row["labels"]):
        raise ConfigError(
            f"none of {n_sampled} conditioned responses is left to learn from: {n_truncated} were truncated at "
            f"{args.max_completion_length} tokens (raise max_completion_length), {n_leaking} mention the rubric "
            "(try another template, or drop_leaks false)"
        )
    return ConditionedResponses(rows, n_sampled, n_tokens, n_truncated, n_leaking)


def _leaks(example: Example, response: Response, args: RubricSFTConfig) -> bool:
    answer = strip_thinking(response.text, args.think_open_tag, args.think_close_tag, response.starts_in_thinking)
    return mentions_rubric(answer, "\n".join(m["content"] for m in example.messages))


def _row(
    prompt: dict[str, Any], response: Response, tokenizer: Any, args: RubricSFTConfig, template_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The student's prompt and the response as token ids, with labels for the tokens in the loss only."""
    prompt_ids = replay.prompt_ids(tokenizer, prompt["prompt"], template_kwargs)
    replayed = replay.replay(
        response,
        tokenizer,
        think_tags=(args.think_open_tag, args.think_close_tag),
        mask_thinking=args.mask_thinking,
    )
    # Prompt and reasoning are context: the model reads them, but is not trained to write them.
    labels = [token if kept else NOT_IN_LOSS for token, kept in zip(replayed.ids, replayed.in_loss, strict=True)]
    return {"input_ids": prompt_ids + replayed.ids, "labels": [NOT_IN_LOSS] * len(prompt_ids) + labels}
