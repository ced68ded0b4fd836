"""Progress output: bars and a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rgsd.redaction import redact

SECONDS_BETWEEN_LINES = 10.0
TREND = 32
"""Logged steps in a sparkline of the live view."""
SHADES = "▁▂▃▄▅▆▇█"

# Name, key, factor, unit and digits of each number in the live view. Numbers that a step does not log are left out.
NUMBERS: tuple[tuple[str, str, float, str, int], ...] = (
    ("loss", "loss", 1, "", 4),
    ("reward", "reward", 1, "", 3),
    ("divergence", "divergence", 1, "nats", 4),
    ("after the clip", "clipped_divergence", 1, "nats", 4),
    ("tokens clipped", "clipped_share", 100, "%", 0),
    ("teacher's first choice", "agreement", 100, "%", 1),
    ("response", "response_length", 1, "tokens", 0),
    ("response", "completions/mean_length", 1, "tokens", 0),
    ("token accuracy", "mean_token_accuracy", 100, "%", 0),
    ("cut off", "truncated_share", 100, "%", 0),
    ("mention a rubric", "leak_rate", 100, "%", 1),
    ("unscored", "unscored_share", 100, "%", 1),
    ("judge calls", "judge/total_calls", 1, "", 0),
    ("judge", "judge/total_dollars", 1, "dollars", 4),
    ("student's entropy", "student_entropy", 1, "nats", 3),
    ("speed", "tokens_per_second", 1, "tokens/s", 0),
)


def say(text: str) -> None:
    """Print a line immediately. Among launched processes, only the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        print(redact(text), flush=True)


class Counter:
    """Counts up to a total, and prints lines with the time left."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._start = self._last = time.monotonic()

    def advance(self, by: int = 1) -> None:
        """Count `by` more. Prints a line every ten seconds and at the end."""
        self.done += by
        now = time.monotonic()
        # The first item arrives only after its whole batch was computed, so it says nothing about the rate.
        is_time = now - self._last >= SECONDS_BETWEEN_LINES and self.done > by
        if is_time or self.done >= self.total:
            self._last = now
            left = (now - self._start) / self.done * (self.total - self.done)
            say(f"  {self.label}: {self.done}/{self.total}" + (f", about {left:.0f} s left" if left >= 1 else ""))


class _Bar:
    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._progress, self._task = progress, progress.add_task(label, total=total)

    def advance(self, by: int = 1) -> None:
        self._progress.advance(self._task, by)


class Steps:
    """Shows the steps of a training run as they are logged.

    Args:
        console: Console for the live view. None: the terminal, or plain lines if stdout is not a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or (Console() if _is_terminal() else None)
        self._past: dict[str, list[float]] = {}
        self._live: Live | None = None

    def show(self, step: int, total: int, logs: Mapping[str, Any], left: float) -> None:
        """Show one logged step.

        Args:
            step: Optimizer steps taken.
            total: Optimizer steps of the run.
            logs: The logged numbers.
            left: Estimated seconds until the end.
        """
        if self._console is None:
            say(line(step, total, logs, left))
            return
        for _, key, *_ in NUMBERS:
            if key in self._past or key in logs:
                self._past.setdefault(key, []).append(float(logs.get(key, math.nan)))
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
            # The live view hides the cursor. Show it again even if training ends with an error.
            atexit.register(self.close)
        self._live.update(self.view(step, total, left), refresh=True)

    def view(self, step: int, total: int, left: float) -> Group:
        """The live view: a progress bar, and the most important numbers with sparklines."""
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"  step {step}/{total}",
            ProgressBar(total=max(1, total), completed=step, width=36),
            f"about {_duration(left)} left" if step < total else "done",
        )
        body = Table.grid(padding=(0, 2))
        body.add_column()
        body.add_column(justify="right")
        body.add_column()
        for name, key, factor, unit, digits in NUMBERS:
            past = self._past.get(key)
            if past:
                shown = f"{factor * past[-1]:,.{digits}f} {unit}".strip() if math.isfinite(past[-1]) else ""
                body.add_row(f"  {name}", shown, Text(trend(past), style="cyan"))
        return Group(head, body)

    def close(self) -> None:
        """Stop the live view. Its last state stays on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)


def line(step: int, total: int, logs: Mapping[str, Any], left: float) -> str:
    """A logged step as a line."""
    if "reward" in logs:
        return (
            f"  step {step}/{total}: reward {logs['reward']:.3f}, unscored "
            f"{100 * logs.get('unscored_share', 0):.0f} %, judge calls {logs.get('judge/total_calls', 0):.0f}, "
            f"response {logs.get('completions/mean_length', 0):.0f} tokens, about {left:.0f} s left"
        )
    if "divergence" not in logs:  # supervised fine-tuning
        accuracy = logs.get("mean_token_accuracy")
        return (
            f"  step {step}/{total}: loss {logs['loss']:.4f} nats per token, "
            + (f"token accuracy {100 * accuracy:.0f} %, " if accuracy is not None else "")
            + f"about {left:.0f} s left"
        )
    return (
        f"  step {step}/{total}: loss {logs['loss']:.4f}, divergence "
        f"{logs['divergence']:.4f} nats, clipped {100 * logs.get('clipped_share', 0):.0f} %, "
        f"response {logs.get('response_length', 0):.0f} tokens, leak {100 * logs.get('leak_rate', 0):.0f} %, "
        f"about {left:.0f} s left"
    )


def development_line(step: int, logs: Mapping[str, Any], *, is_best: bool) -> str:
    """One evaluation of the development prompts in a line."""
    parts = []
    if "eval_rubric_score" in logs:
        parts.append(f"score {logs['eval_rubric_score']:.3f}")
        if logs["eval_coverage"] < 1:
            parts.append(f"{100 * logs['eval_coverage']:.1f} % of the criteria scored")
    elif "eval_coverage" in logs:
        parts.append("not scored")
    if "eval_divergence" in logs:
        parts.append(f"divergence {logs['eval_divergence']:.4f} nats")
    parts.append(f"response {logs['eval_response_length']:.0f} tokens")
    parts.append(f"cut off {100 * logs['eval_truncated_share']:.0f} %")
    if is_best:
        parts[0] += " (best so far)"
    return f"  development, step {step}, {logs['eval_prompts']:.0f} prompts: {', '.join(parts)}"


def trend(values: list[float]) -> str:
    """A sparkline of the last values, with a gap for a value that is not finite."""
    last = values[-TREND:]
    known = [v for v in last if math.isfinite(v)]
    if not known:
        return ""
    low, high = min(known), max(known)
    step = (high - low) / (len(SHADES) - 1)
    return "".join(" " if not math.isfinite(v) else SHADES[round((v - low) / step) if step else 0] for v in last)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _is_terminal() -> bool:
    """Whether stdout is a terminal that can show a live view. RGSD_PLAIN=1 requests plain lines."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("RGSD_PLAIN")


@contextmanager
def counting(label: str, total: int) -> Iterator[Counter | _Bar]:
    """A progress display: a bar in a terminal, plain lines elsewhere. Call its `advance` for each finished item."""
    if not _is_terminal():
        yield Counter(label, total)
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console()) as progress:
        yield _Bar(progress, label, total)
