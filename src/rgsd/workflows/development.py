"""Evaluation during training: whether a recipe asks for it, what measures it, and the scorer of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rgsd.data.config import DataSplit
from rgsd.errors import ConfigError
from rgsd.evaluation.development import DevelopmentScorer
from rgsd.inference import TransformersGenerator
from rgsd.judges import Judge, missing_checks
from rgsd.progress import say
from rgsd.prompts.messages import PromptSettings, teacher_prompts
from rgsd.rubrics import Example
from rgsd.runs import Run
from rgsd.training.selection import DIVERGENCE, RUBRIC_SCORE, settle_metric
from rgsd.workflows.recipe import Recipe


@dataclass(frozen=True)
class DevelopmentPlan:
    """What is evaluated during training.

    Args:
        examples: The development examples.
        is_judged: Whether the judge scores them; otherwise the divergence is all that is measured.
    """

    examples: Sequence[Example]
    is_judged: bool


def plan_development(recipe: Recipe, split: DataSplit) -> DevelopmentPlan | None:
    """The evaluation during training that a recipe asks for; None for none. Fills in the metric of the best step.

    Raises:
        ConfigError: If there is nothing to evaluate on, or nothing to measure it by.
    """
    args = recipe.training
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "no":
        if split.development:
            say(
                f"{len(split.development)} development prompts are set aside; eval_strategy scores them during training"
            )
        return None
    if not split.development:
        raise ConfigError(
            f"eval_strategy is {strategy!r}, but there are no development prompts: set development to a share of the "
            "training prompts (e.g. 0.1), or development_tags to their tags. Held-out prompts are never used during "
            "training"
        )
    if strategy == "steps" and "eval_steps" in args.unset_for_selection:
        raise ConfigError(
            "eval_strategy is 'steps', but eval_steps is unset: set it to the optimizer steps between two evaluations, "
            f"each of which writes {len(split.development)} responses"
        )
    problem = missing_checks(split.development, recipe.judge)
    if problem and recipe.kind != "rgsd":
        raise ConfigError(
            f"the development prompts cannot be scored ({problem}): name an LLM judge with --judge, or leave "
            "eval_strategy out"
        )
    if problem:
        say(f"Development: {problem}, so the divergence is measured instead of a score. --judge names an LLM judge")
    available = [*([] if problem else [RUBRIC_SCORE]), *([DIVERGENCE] if recipe.kind == "rgsd" else [])]
    settle_metric(args, args.unset_for_selection, available)
    return DevelopmentPlan(split.development, not problem)


def scorer_of(
    plan: DevelopmentPlan,
    recipe: Recipe,
    run: Run,
    tokenizer: Any,
    judge: Judge,
    rows: Sequence[Mapping[str, Any]] | None,
) -> Callable[[Any], DevelopmentScorer]:
    """What makes the scorer of a trainer.

    Args:
        plan: What is evaluated.
        recipe: The run's settings.
        run: The run's folder.
        tokenizer: The policy's.
        judge: The run's.
        rows: RGSD's rows of the development examples, whose divergence is measured; None for other methods.
    """
    sampling = recipe.sampling(recipe.evaluation.eval_max_new_tokens)

    def make(trainer: Any) -> DevelopmentScorer:
        student = trainer.accelerator.unwrap_model(trainer.model)
        batch_size = recipe.evaluation.eval_generation_batch_size
        return DevelopmentScorer(
            run,
            plan.examples,
            teacher_prompts(plan.examples, PromptSettings(privileged_context="none")),
            TransformersGenerator(student, tokenizer, sampling, batch_size=batch_size),
            judge if plan.is_judged else None,
            sampling.think_tags,
            partial(trainer.divergence_on, rows) if rows is not None else None,
            recipe.training.seed,
        )

    return make
