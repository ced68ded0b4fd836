"""The GRPO baseline: TRL's GRPOTrainer, with the judge's rubric score as the reward.

A response that the judge left unscored has no reward, which is not zero: TRL leaves it out of the mean and deviation
of its group, and gives it no advantage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from rgsd.errors import ConfigError
from rgsd.inference import decode, own_generation_config
from rgsd.judges import Judge, Usage
from rgsd.progress import say
from rgsd.prompts.leaks import mentions_rubric
from rgsd.prompts.messages import PromptSettings, student_messages
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, strip_thinking
from rgsd.rubrics import Example, score
from rgsd.settings import setting
from rgsd.training.checkpoint_mixin import check_alignment
from rgsd.training.checkpoints import append_together
from rgsd.training.config import sampling_notes, settle_device
from rgsd.training.development import DevelopmentMixin
from rgsd.training.selection import PATIENCE_HELP, THRESHOLD_HELP, check_selection


@dataclass
class RubricGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`, plus the settings of the rubric reward.

    Defaults that differ from TRL's: `num_generations` 16 (the paper's G), `bf16` only on devices that have it,
    `logging_steps` 1.

    Raises:
        ConfigError: If settings contradict each other.
    """

    learning_rate: float = setting(1e-6, "Peak learning rate of AdamW. With LoRA, try 1e-5.")
    logging_steps: float = setting(1, "Log every N optimizer steps.")
    num_generations: int | None = setting(16, "Responses per prompt (G).")
    template: str = setting("paper", "Template of the prompt of `base+rubric` in the evaluation, as in `rgsd train`.")
    show_weights: bool = setting(False, "Show the weight of each criterion in that prompt.")
    think_open_tag: str = setting(OPEN_TAG, "The tag that opens the reasoning.")
    think_close_tag: str = setting(CLOSE_TAG, "The tag that closes the reasoning. Reasoning is removed before judging.")
    keep_rollouts: bool = setting(True, "Write every rollout with its verdicts to rollouts.jsonl.")
    early_stopping_patience: int | None = setting(None, PATIENCE_HELP)
    early_stopping_threshold: float = setting(0.0, THRESHOLD_HELP)

    def __post_init__(self) -> None:
        settle_device(self)
        self.unset_for_selection = check_selection(self)
        # Before TRL's own check, which does not name the setting.
        if (self.num_generations or 0) < 2:
            raise ConfigError(
                f"num_generations is {self.num_generations}, but GRPO compares responses to the same prompt: use at "
                "least 2 (the paper uses 16)"
            )
        group = self.num_generations_eval or self.num_generations or 1
        if self.per_device_eval_batch_size % group:
            # TRL's own evaluation needs whole groups. The development prompts do not use it.
            self.per_device_eval_batch_size = group
        super().__post_init__()

    def prompt_settings(self) -> PromptSettings:
        """The settings of the prompt of `base+rubric` in the evaluation."""
        return PromptSettings(template=self.template, show_weights=self.show_weights)


class RubricReward:
    """Rubric satisfaction according to a judge, as a reward function for TRL's trainers.

    Args:
        examples: The training set. A row's `example_id` selects the example.
        judge: The judge.
        tokenizer: Decodes the ids of completions. TRL's own texts drop special tokens, and with them think tags that
            are special tokens. None uses TRL's texts.
        think_tags: The tags around the reasoning, which is removed before judging.
        starts_in_thinking: Whether the chat template already opens the reasoning.
        log: A .jsonl file for the rollouts, or None.
    """

    __name__ = "rubric"

    def __init__(
        self,
        examples: Sequence[Example],
        judge: Judge,
        *,
        tokenizer: Any = None,
        think_tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
        starts_in_thinking: bool = False,
        log: Path | None = None,
    ) -> None:
        self._examples = {e.id: e for e in examples}
        self._judge, self._think_tags, self._starts_in_thinking, self._log = judge, think_tags, starts_in_thinking, log
        self._tokenizer = tokenizer
        self.usage = Usage()

    def __call__(self, completions: Sequence[Any], example_id: Sequence[str], **kwargs: Any) -> list[float | None]:
        """One reward per completion, or None for a completion whose rubric is not fully scored."""
        examples = [self._examples[i] for i in example_id]
        # The judge sees the answer alone, as in the evaluation.
        texts = self._texts(completions, kwargs.get("completion_ids"))
        answers = [strip_thinking(t, *self._think_tags, starts_in_thinking=self._starts_in_thinking) for t in texts]
        judgements = self._judge.judge_all(list(zip(examples, answers, strict=True)))
        scores = [
            score(e.rubric, j.verdicts, e.scoring, a) for e, j, a in zip(examples, judgements, answers, strict=True)
        ]
        # A score of part of a rubric is not comparable with scores of all of it, and GRPO compares rewards.
        rewards = [s.value if s.coverage == 1.0 else None for s in scores]
        used = sum((j.usage for j in judgements), Usage())
        self.usage += used
        leaks = [mentions_rubric(a, _question(e)) for a, e in zip(answers, examples, strict=True)]
        self._report(kwargs, used, rewards, [s.coverage for s in scores], leaks)
        if self._log is not None:
            step = getattr(kwargs.get("trainer_state"), "global_step", None)
            rows = [
                {
                    "step": step,
                    "example_id": example.id,
                    "response": text,
                    "reward": reward,
                    "problem": judgement.problem,
                    "verdicts": [v.met if v.grade is None else v.grade for v in judgement.verdicts],
                    "usage": asdict(judgement.usage),
                }
                for example, text, judgement, reward in zip(examples, texts, judgements, rewards, strict=True)
            ]
            append_together(self._log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return rewards

    def _texts(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None) -> list[str]:
        if self._tokenizer is None or completion_ids is None:
            return [_text(c) for c in completions]
        return [decode(self._tokenizer, ids, self._think_tags) for ids in completion_ids]

    def _report(
        self,
        kwargs: Mapping[str, Any],
        used: Usage,
        rewards: Sequence[float | None],
        coverage: Sequence[float],
        leaks: Sequence[bool],
    ) -> None:
        log_metric = kwargs.get("log_metric")
        if log_metric is None:
            return
        n = len(rewards)
        log_metric("judge/calls", float(used.calls))
        log_metric("judge/cached", float(used.cached))
        log_metric("judge/prompt_tokens", float(used.prompt_tokens))
        log_metric("judge/completion_tokens", float(used.completion_tokens))
        log_metric("judge/seconds", used.seconds)
        if used.price is not None:
            log_metric("judge/dollars", used.price)
            if self.usage.price is not None:
                log_metric("judge/total_dollars", self.usage.price)
        log_metric("judge/total_calls", float(self.usage.calls))
        log_metric("coverage", sum(coverage) / n)
        log_metric("unscored_share", sum(r is None for r in rewards) / n)
        log_metric("leak_rate", sum(leaks) / n)


class RubricGRPOTrainer(DevelopmentMixin, GRPOTrainer):
    """TRL's GRPOTrainer with complete checkpoints and exact resume.

    Raises:
        ConfigError: If a checkpoint would fall between a rollout and the last step that uses it.
    """

    def __init__(self, *positional: Any, **kwargs: Any) -> None:
        super().__init__(*positional, **kwargs)
        args: Any = self.args
        if self.is_world_process_zero():
            for note in sampling_notes(args, self.accelerator.unwrap_model(self.model).generation_config):
                say(note)
        steps_per_rollout = args.steps_per_generation / args.gradient_accumulation_steps * args.num_iterations
        if args.save_strategy == "steps":
            check_alignment(args.save_steps, steps_per_rollout)
        if args.load_best_model_at_end and args.eval_strategy == "steps":  # every new best step is saved
            check_alignment(args.eval_steps, steps_per_rollout, "eval_steps")

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # transformers fills unset options (min_p, no_repeat_ngram_size, ...) from the checkpoint's generation_config,
        # which would make rollouts off-policy.
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        with own_generation_config(self.accelerator.unwrap_model(self.model), self.generation_config):
            return super()._generate_single_turn(*args, **kwargs)

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {"usage": [asdict(r.usage) for r in self._rubric_rewards()]}

    def _rubric_rewards(self) -> list[RubricReward]:
        return [r for r in self.reward_funcs if isinstance(r, RubricReward)]

    def _restore_progress(self) -> None:
        for reward, usage in zip(self._rubric_rewards(), self._restored.get("usage", []), strict=False):
            reward.usage = Usage(**usage)
        super()._restore_progress()


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _question(example: Example) -> str:
    """The text that the leak meter compares an answer with: everything that the student reads."""
    return "\n".join(m["content"] for m in student_messages(example))


def grpo_rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows for TRL's GRPOTrainer: the student's prompt, and the example's id for the reward."""
    return [{"prompt": student_messages(e), "example_id": e.id} for e in examples]
