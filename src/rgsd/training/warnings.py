"""What in a run's log deserves a warning. Decided from the log alone, so a resumed run decides as one never stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WINDOW = 5
"""Logged steps over which a number is averaged: one step has few responses."""
MOST_TRUNCATED = 1 / 3
"""Share of the responses that may be cut off at the limit."""
RUNAWAY = 2.0
"""Times the length of the first steps' responses above which a length is called a runaway. The paper's GRPO runs grew
1.4 to 2.3 times."""

# RGSD's names and TRL's for GRPO.
_TRUNCATED = ("truncated_share", "completions/clipped_ratio")
_LENGTH = ("response_length", "completions/mean_length")

Log = Sequence[Mapping[str, Any]]
"""Logged rows in order, each with its `step`."""


def warnings_of(log: Log) -> Iterator[tuple[str, str]]:
    """Kind and text of each warning that the latest row of a log gives reason to."""
    if not log:
        return
    evaluated = log[-1].get("eval_truncated_share")
    if evaluated is not None and evaluated > MOST_TRUNCATED:
        yield (
            "development truncation",
            f"{100 * evaluated:.0f} % of the development responses were cut off. A response that is cut off cannot "
            "meet criteria about its end, and scores compare lengths: raise eval_max_new_tokens",
        )
    truncated = _values(log, _TRUNCATED)
    if len(truncated) >= WINDOW and (share := _mean(truncated[-WINDOW:])) > MOST_TRUNCATED:
        yield (
            "truncation",
            f"{100 * share:.0f} % of the rollouts of the last {WINDOW} logged steps were cut off. The student then "
            "learns little about how to end: raise max_completion_length, or look for responses that never end",
        )
    lengths = _values(log, _LENGTH)
    if len(lengths) >= 2 * WINDOW:
        first, last = _mean(lengths[:WINDOW]), _mean(lengths[-WINDOW:])
        if first > 0 and last > RUNAWAY * first:
            yield (
                "length",
                f"responses are {last / first:.1f} times as long as in the first {WINDOW} logged steps ({last:.0f} "
                f"against {first:.0f} tokens; the warning comes above {RUNAWAY:g}). Longer responses can meet more "
                "criteria without being better: compare scores at equal length in the report, or stop earlier",
            )


def over_optimisation(log: Log, best: int, step: int) -> str | None:
    """Whether the divergence on the development prompts has still fallen since the best step.

    Returns:
        The end of a sentence that begins with the fall of the score; None if it has not fallen, or is not measured.
    """
    then, now = (_at(log, s, "eval_divergence") for s in (best, step))
    if then is None or now is None or now >= then:
        return None
    return (
        f"while the divergence still fell, from {then:.4f} to {now:.4f} nats: the student comes closer to the teacher, "
        "and its responses get worse. Train for fewer steps, or with a lower learning_rate; load_best_model_at_end "
        "keeps the best step"
    )


def _values(log: Log, names: Sequence[str]) -> list[float]:
    """One a row: TRL logs its own name beside RGSD's."""
    found = (next((row[n] for n in names if isinstance(row.get(n), int | float)), None) for row in log)
    return [float(value) for value in found if value is not None]


def _at(log: Log, step: int, name: str) -> float | None:
    return next((row[name] for row in log if row.get("step") == step and name in row), None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
