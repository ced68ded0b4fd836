"""What a training run keeps of its steps in its folder: metrics.jsonl, and no results of earlier steps."""

from __future__ import annotations

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rgsd.evaluation.responses import set_aside_stale
from rgsd.progress import Steps, development_line, say
from rgsd.report import TOKEN_MAPS
from rgsd.runs import METRICS, SET_ASIDE, Run
from rgsd.training.selection import metric_of


class RunLog(TrainerCallback):
    """Appends each logged step to metrics.jsonl and shows it in the terminal with the time left."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps = Steps()
        self._start = time.monotonic()
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock. A resumed run starts at `state.global_step`."""
        self._start, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append the numbers to metrics.jsonl, and show those of a training step or of the development prompts."""
        logs = logs or {}
        self._run.append(METRICS, [{"step": state.global_step, "time": round(time.time(), 3), **logs}])
        if "eval_prompts" in logs:
            name, best = metric_of(args), state.best_metric
            value = None if name is None else logs.get(name)
            is_better = best is None or (value is not None and (value > best) == bool(args.greater_is_better))
            say(development_line(state.global_step, logs, is_best=value is not None and is_better and value != best))
        if "loss" not in logs:
            return
        n_done = max(1, state.global_step - self._first)
        seconds_left = (time.monotonic() - self._start) / n_done * (state.max_steps - state.global_step)
        self._steps.show(state.global_step, state.max_steps, logs, seconds_left)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the run from its first checkpoint on, and delete the run that it replaces."""
        self._run.settle()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the live view."""
        self._steps.close()


class OutdatedResults(TrainerCallback):
    """Sets aside what the trained policy of an earlier step wrote, as soon as a resumed run takes another step.

    Otherwise a run that stops again would report the earlier policy's scores as its own.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_done = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set them aside before the first step."""
        if self._is_done:
            return
        self._is_done = True
        set_aside_stale(self._run, "trained", {}, "of an earlier step")
        if n := self._run.set_aside(TOKEN_MAPS, lambda row: row.get("policy") == "trained"):
            say(f"trained: set aside {n} token maps (in {SET_ASIDE}): of an earlier step")


def use_plain_progress(trainer: Any) -> None:
    """Remove transformers' progress bar and printed dictionaries; `RunLog` replaces both."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
