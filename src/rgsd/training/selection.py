"""Settings that choose a step of a run by its evaluations: which contradict each other, and what was left open.

`eval_strategy`, `eval_steps`, `load_best_model_at_end`, `metric_for_best_model`, `greater_is_better` and the save
settings are transformers'. Early stopping has the names of its EarlyStoppingCallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rgsd.errors import ConfigError

PATIENCE_HELP = (
    "Stop after this many evaluations in a row (eval_strategy) without a better metric_for_best_model. Unset: never."
)
THRESHOLD_HELP = "How much metric_for_best_model must improve to count, in its own unit."

RUBRIC_SCORE, DIVERGENCE = "rubric_score", "divergence"
"""What can choose the best step: the mean rubric score of the development prompts, or the divergence on them in nats a
token. A greater score is better, and a lower divergence."""


def check_selection(args: Any) -> frozenset[str]:
    """Refuse contradictions, before transformers looks at the settings.

    Args:
        args: settings of a trainer, as they were given.

    Returns:
        The names of the settings about evaluation that were left unset. transformers fills them in.

    Raises:
        ConfigError: naming the settings and the remedy.
    """
    strategy, saved = _plain(args.eval_strategy), _plain(args.save_strategy)
    patience, threshold = args.early_stopping_patience, args.early_stopping_threshold
    if strategy == "no":
        for name, is_set in (
            ("load_best_model_at_end", args.load_best_model_at_end),
            ("early_stopping_patience", patience is not None),
        ):
            if is_set:
                raise ConfigError(
                    f"{name} needs evaluations during training, but eval_strategy is 'no': set eval_strategy to steps "
                    f"and eval_steps to a number of steps, or leave {name} out"
                )
    if patience is not None and patience < 1:
        raise ConfigError(
            f"early_stopping_patience must be at least 1 evaluation, got {patience}: leave it out for none"
        )
    if threshold < 0:
        raise ConfigError(f"early_stopping_threshold must be at least 0, got {threshold}")
    if threshold and patience is None:
        raise ConfigError(
            f"early_stopping_threshold is {threshold}, but nothing stops early: set early_stopping_patience too"
        )
    if args.load_best_model_at_end:
        _check_saving(args, strategy, saved)
    return frozenset(n for n in ("eval_steps", "metric_for_best_model", "greater_is_better") if not _is_set(args, n))


def _check_saving(args: Any, strategy: str, saved: str) -> None:
    """The best step can only be loaded if it has a checkpoint."""
    if saved == "no":
        raise ConfigError(
            "load_best_model_at_end needs checkpoints, but save_strategy is 'no': set save_strategy to "
            f"{strategy!r}, and save_total_limit to 1 to keep no more than the best and the last"
        )
    if saved not in (strategy, "best"):
        raise ConfigError(
            f"load_best_model_at_end needs checkpoints where it evaluates, but save_strategy is {saved!r} and "
            f"eval_strategy is {strategy!r}: make them the same"
        )
    if strategy == saved == "steps":
        every, save = args.eval_steps or args.logging_steps, args.save_steps
        # Shares of all steps (below 1) are compared as such, without rounding errors.
        if (every < 1) != (save < 1) or (every and round(save * 1e6) % round(every * 1e6)):
            raise ConfigError(
                f"save_steps is {save:g}, which is not a multiple of eval_steps ({every:g}): the checkpoints of "
                "load_best_model_at_end must fall on evaluations. Change one of the two"
            )


def metric_of(args: Any) -> str | None:
    """The name of the metric that chooses the best step, as evaluations log it; None if none does."""
    name = args.metric_for_best_model
    return None if name is None else name if name.startswith("eval_") else f"eval_{name}"


def settle_metric(args: Any, unset: frozenset[str], available: Sequence[str]) -> None:
    """Fill in what chooses the best step of a run whose development prompts are scored.

    Args:
        args: settings of a trainer.
        unset: what `check_selection` returned for them.
        available: what the prompts are measured by, of `RUBRIC_SCORE` and `DIVERGENCE`; the first is the default.

    Raises:
        ConfigError: for a metric that is not available, or one turned around.
    """
    if "metric_for_best_model" in unset:
        args.metric_for_best_model = available[0]
    name = str(args.metric_for_best_model).removeprefix("eval_")
    if name not in available:
        remedy = "name an LLM judge with judge, or " if name == RUBRIC_SCORE else ""
        raise ConfigError(
            f"metric_for_best_model is {name!r}, but this run measures its development prompts by "
            f"{' and '.join(available)}: {remedy}leave it out"
        )
    greater = name == RUBRIC_SCORE
    if "greater_is_better" not in unset and args.greater_is_better is not greater:
        raise ConfigError(
            f"greater_is_better is {args.greater_is_better}, but a {'greater' if greater else 'lower'} {name} is "
            "better: leave it out"
        )
    args.greater_is_better = greater


def _is_set(args: Any, name: str) -> bool:
    return getattr(args, name) not in (None, 0) if name == "eval_steps" else getattr(args, name) is not None


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
