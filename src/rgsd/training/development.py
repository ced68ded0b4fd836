"""Evaluation of the development prompts during training, and what follows from it: the best step, early stopping, and
warnings.

`DevelopmentMixin` makes any of TRL's trainers do it. What a score is, it does not know: a `Development` gives it, which
`rgsd.evaluation.development` implements. Nothing here leaves a trace in training: random numbers, modes, timings, logs
and the weights of the next step are those of a run without evaluations.
"""

# transformers' Trainer leaves its attributes untyped:
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate.utils import broadcast_object_list
from torch import nn

from rgsd.errors import ConfigError, RGSDError, RunError
from rgsd.models.sharding import load_weights
from rgsd.progress import say
from rgsd.training.checkpoint_mixin import CheckpointMixin, random_state_kept
from rgsd.training.checkpoints import problem_of
from rgsd.training.selection import RUBRIC_SCORE, metric_of
from rgsd.training.warnings import over_optimisation, warnings_of

T = TypeVar("T")

LEAST_COVERAGE = 0.95
"""Share of the criteria that must be scored for a rubric score to choose the best step: over fewer, it is the mean of
other criteria."""


class Development(Protocol):
    """Scores the current student on the development prompts."""

    @property
    def identity(self) -> str:
        """What the scores depend on besides the weights. Scores of another identity are never compared."""
        ...

    def score(self, step: int) -> dict[str, float]:
        """Measure the student after this optimizer step.

        Returns:
            Numbers by the names under which they are logged (`eval_...`). Without `eval_rubric_score` if nothing was
            scored.
        """
        ...

    def fall(self, best: int, step: int) -> str | None:
        """How far the score of a step lies below that of the best one, in words; None unless the difference shows."""
        ...


class DevelopmentMixin(CheckpointMixin):
    """Mixed into a trainer before TRL's class: `CheckpointMixin`, and evaluation of the development prompts.

    Args:
        development: makes the `Development`, given the trainer. With it, `evaluate` scores the development prompts, in
            the first process; without it, `evaluate` is transformers'.
        other arguments: the trainer's.

    Raises:
        ConfigError: when no process holds the whole model to generate with.
    """

    def __init__(self, *args: Any, development: Callable[[Any], Development] | None = None, **kwargs: Any) -> None:
        self._development: Development | None = None
        self._patience_used = 0
        self._warned: list[dict[str, Any]] = []
        settings = kwargs.get("args")
        strategy = None if settings is None else settings.eval_strategy
        if development is not None and settings is not None:
            settings.eval_strategy = "no"  # transformers wants a dataset for an evaluation of its own
        try:
            super().__init__(*args, **kwargs)
        finally:
            if settings is not None:
                settings.eval_strategy = strategy
        if development is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ConfigError(
                f"{engine} leaves no process with the whole model to write responses to the development prompts: leave "
                "eval_strategy out, and score the checkpoints with `rgsd eval`"
            )
        self._development = development(self)

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What this run was warned of so far: step, kind and text."""
        return list(self._warned)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best step so far: step, metric and value; None without an evaluation that counts."""
        if not self.state.best_global_step:
            return None
        metric = str(metric_of(self.args)).removeprefix("eval_")
        return {"step": self.state.best_global_step, "metric": metric, "value": self.state.best_metric}

    # --- Evaluation

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the development prompts, or with a dataset, or without a `Development`, evaluate as transformers."""
        development = self._development
        if development is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, *args, **kwargs)
        step, model = self.state.global_step, self.accelerator.unwrap_model(self.model)
        with random_state_kept(self.accelerator.device), _modes_kept(model):
            metrics = self._by_the_first(lambda: development.score(step))
            model.eval()  # by this TRL knows that the log is an evaluation's
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # Of eval_on_start, which would come again at each resume.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _by_the_first(self, work: Callable[[], T]) -> T:
        """What the first process makes of some work, in all of them. The others wait.

        Raises:
            RGSDError: in every process, what the first one raised.
        """
        if self.accelerator.num_processes == 1:
            return work()
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = work()
            except Exception as error:  # the others must not wait for ever
                found[1] = error if isinstance(error, RGSDError) else RunError(f"the first process failed: {error!r}")
                broadcast_object_list(found)
                raise
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    # --- The best step

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = metric_of(self.args)
        value = None if name is None else metrics.get(name)
        if self._development is not None:
            too_few = name == f"eval_{RUBRIC_SCORE}" and metrics.get("eval_coverage", 0.0) < LEAST_COVERAGE
            if value is None or not math.isfinite(value) or too_few:
                return False  # a step that was not measured is neither better nor worse
        before = self.state.best_metric
        is_best = super()._determine_best_metric(metrics, trial)
        if value is None:
            return is_best
        gain = math.inf if before is None else value - before if self.args.greater_is_better else before - value
        self._patience_used = 0 if gain > self._threshold else self._patience_used + 1
        if is_best:
            self.state.best_global_step = self.state.global_step
            # Whatever save_steps says: the best step can only be loaded from a checkpoint.
            self.control.should_save |= bool(self.args.load_best_model_at_end)
        else:
            self._warn_of_a_fall()
        if self._is_out_of_patience:
            self._stop_early()
        return is_best

    @property
    def _threshold(self) -> float:
        return getattr(self.args, "early_stopping_threshold", 0.0)

    @property
    def _is_out_of_patience(self) -> bool:
        patience = getattr(self.args, "early_stopping_patience", None)
        return patience is not None and self._patience_used >= patience

    def _stop_early(self) -> None:
        self.control.should_training_stop = True
        self.control.should_save |= self.args.save_strategy in ("steps", "epoch")
        best = self.best
        if best is not None and self.state.global_step < self.state.max_steps and self.is_world_process_zero():
            say(
                f"Stopping early after step {self.state.global_step} of {self.state.max_steps}: {best['metric']} has "
                f"not improved in {self._patience_used} evaluation{'s' * (self._patience_used > 1)} "
                f"(early_stopping_patience). Best: {best['value']:.4f} at step {best['step']}"
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_out_of_patience:
            return super()._run_epoch(*args, **kwargs)
        # Resumed from the checkpoint at which it had stopped.
        self.control.should_training_stop = True
        self.model.train()
        return None

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # transformers would load the best step even after SIGTERM, and with save_total_limit 1 delete the last
        # checkpoint, from which the run goes on.
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
        try:
            done = super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best
        is_interrupted = self._stop_signal is not None and self.state.global_step < self.state.max_steps
        if self.args.load_best_model_at_end and not is_interrupted:
            self._load_best()
        return done

    def _load_best(self) -> None:
        """Load the weights of the best step into the model.

        Raises:
            RunError: If the checkpoint of that step is incomplete or damaged.
        """
        found = self.best
        if found is None:
            if self.is_world_process_zero():
                say("No evaluation counted, so there is no best step: the weights are those of the last step")
            return
        folder = self._checkpoint_of(found["step"])
        problem = self._by_the_first(lambda: problem_of(folder))
        if problem is not None:
            raise RunError(
                f"{folder.name}, the best step, cannot be loaded: {problem}. Resume from an earlier checkpoint with "
                "--resume_from_checkpoint PATH, or export the checkpoint that you want"
            )
        self.state.best_model_checkpoint = str(folder)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self._load_best_model()
        else:
            load_weights(self.accelerator.unwrap_model(self.model), folder)
        if self.is_world_process_zero():
            say(
                f"The weights are those of step {found['step']} of {self.state.global_step}, the best by "
                f"{found['metric']} ({found['value']:.4f})"
            )

    def _checkpoint_of(self, step: int) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}"

    # --- Warnings

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        for kind, text in warnings_of(self.state.log_history):
            self._warn(kind, text)

    def _warn_of_a_fall(self) -> None:
        """Say so when the score has fallen while the divergence still falls."""
        development, best, step = self._development, self.state.best_global_step, self.state.global_step
        is_score = metric_of(self.args) == f"eval_{RUBRIC_SCORE}"
        if development is None or not best or not is_score or not self.is_world_process_zero():
            return
        if (text := over_optimisation(self.state.log_history, best, step)) and (fall := development.fall(best, step)):
            self._warn("over-optimisation", f"The development score fell by {fall} since step {best}, {text}")

    def _warn(self, kind: str, text: str) -> None:
        """Say a warning, the first time that a run gives reason to."""
        if not self.is_world_process_zero() or any(w["kind"] == kind for w in self._warned):
            return
        self._warned.append({"step": self.state.global_step, "kind": kind, "text": text})
        say(f"Warning, step {self.state.global_step}: {text}")

    # --- Resuming

    def _progress(self) -> dict[str, Any]:
        kept = {"patience_used": self._patience_used, "warned": self._warned, "measure": self._measure}
        return super()._progress() | {"selection": kept}

    def _restore_progress(self) -> None:
        kept: Mapping[str, Any] = self._restored.get("selection") or {}
        super()._restore_progress()
        self._patience_used, self._warned = kept.get("patience_used", 0), list(kept.get("warned", ()))
        if not kept or self.state.best_metric is None:
            return
        problem = self._by_the_first(lambda: self._why_best_is_void(kept.get("measure")))
        if problem is not None:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
            self._patience_used = 0
            if self.is_world_process_zero():
                say(f"The best step is sought anew from step {self.state.global_step} on: {problem}")

    @property
    def _measure(self) -> list[str | None]:
        """What the best step was chosen by."""
        return [metric_of(self.args), None if self._development is None else self._development.identity]

    def _why_best_is_void(self, measure: list[str | None] | None) -> str | None:
        """Why the best step of a resumed run no longer counts, or None."""
        step = self.state.best_global_step
        if measure != self._measure:
            return "the metric, the judge, its settings, the development prompts or the length of responses changed"
        if self.args.load_best_model_at_end and step:
            problem = problem_of(self._checkpoint_of(step))
            return None if problem is None else f"checkpoint-{step}, the best so far, cannot be used ({problem})"
        return None


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Within it, switch modules between training and evaluation at will."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


__all__ = ["Development", "DevelopmentMixin"]
