"""From an interval to words: the only place where a difference is called better or worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from rgsd.errors import DataError
from rgsd.evaluation.statistics import Estimate, Interval

LEAST_FOR_A_VERDICT = 30
"""Fewest prompts for a verdict. From 30 prompts on, the 95 % interval covers the true mean in at least 92 % of the
samples in every case of `benchmarks/coverage.py`; at 20 prompts, the worst case is below 90 %."""

Difference = Interval | Estimate | Mapping[str, Any]
"""A difference with its interval: either class, or its `asdict`."""


class Conclusion(StrEnum):
    """What a difference shows. The value is the wording used everywhere."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no gain shown"
    TOO_FEW = "too few prompts to say"


def conclude(difference: Difference | None, *, above: float = 0.0) -> Conclusion:
    """Turn a difference into a verdict.

    Args:
        difference: The difference; None, or one without an interval, shows nothing.
        above: The value to compare with. A negative value asks for "no worse, within a margin".

    Returns:
        `TOO_FEW` below `LEAST_FOR_A_VERDICT` prompts, where intervals cover less often than they claim. Otherwise
        `BETTER` or `WORSE` if the whole interval lies above or below `above`, else `NOT_SHOWN`.

    Raises:
        DataError: If the difference or its interval is not finite.
    """
    _, low, high, n = _parts(difference)
    if low is None or high is None or not is_enough(n):
        return Conclusion.TOO_FEW
    if low > above:
        return Conclusion.BETTER
    return Conclusion.WORSE if high < above else Conclusion.NOT_SHOWN


def is_enough(n_prompts: int) -> bool:
    """Whether so many prompts carry a verdict of any kind."""
    return n_prompts >= LEAST_FOR_A_VERDICT


def is_shown(difference: Difference | None) -> bool:
    """Whether a difference is called better or worse."""
    return conclude(difference) in (Conclusion.BETTER, Conclusion.WORSE)


def points(difference: Difference) -> str:
    """A difference of scores in points: "+21.0 points (95 % interval +16.5 to +25.6)"."""
    value, low, high, _ = _parts(difference)
    if value is None:
        note = difference["note"] if isinstance(difference, Mapping) else getattr(difference, "note", "")
        return note or "undefined"
    text = f"{100 * value:+.1f} points"
    return text if low is None or high is None else f"{text} (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"


def verdict_sentence(name: str, other: str, difference: Difference) -> str:
    """The verdict on a difference as a sentence, the same in every command and on every page.

    Args:
        name: What is judged, for example "trained".
        other: What it is compared with, for example "base".
        difference: The score of `name` minus the score of `other`.
    """
    n = _parts(difference)[3]
    size = f"{points(difference)}, {n:,} prompt{'' if n == 1 else 's'}"
    match conclude(difference):
        case Conclusion.BETTER | Conclusion.WORSE as conclusion:
            return f"{name} is {conclusion} than {other}: {size}."
        case Conclusion.TOO_FEW as conclusion:
            return f"{name} against {other}: {conclusion}: {size}; a verdict takes at least {LEAST_FOR_A_VERDICT}."
        case conclusion:
            return f"{name} against {other}: {conclusion}: {size}."


def control_sentence(difference: Difference) -> str:
    """What the right rubric added, as a sentence.

    Args:
        difference: The score of the policy trained on each prompt's own rubric minus that of its mismatched twin.
    """
    n = _parts(difference)[3]
    size = f"{points(difference)}, {n:,} prompt{'' if n == 1 else 's'}"
    against = "training on another prompt's rubric"
    match conclude(difference):
        case Conclusion.BETTER:
            return f"The right rubric added to what {against} gives: {size}."
        case Conclusion.WORSE:
            return f"Training on the right rubric is worse than {against}: {size}."
        case Conclusion.TOO_FEW as conclusion:
            return (
                f"The right rubric against {against}: {conclusion}: {size}; a verdict takes at least "
                f"{LEAST_FOR_A_VERDICT}."
            )
        case _:
            return f"Nothing shows that the right rubric added to what {against} gives: {size}."


def describe(estimate: Mapping[str, Any]) -> str:
    """An estimate (its `asdict`) for a sentence: its value and interval, or why it is undefined."""
    if estimate["value"] is None:
        return estimate["note"] or "undefined"
    if estimate["low"] is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def _parts(difference: Difference | None) -> tuple[float | None, float | None, float | None, int]:
    """Value, low, high and n of a difference in any of its forms."""
    if difference is None:
        return None, None, None, 0
    fields = difference if isinstance(difference, Mapping) else asdict(difference)
    value = fields["mean"] if "mean" in fields else fields["value"]
    for part in (value, fields["low"], fields["high"]):
        if part is not None and not math.isfinite(part):
            raise DataError(f"a difference must be finite, got {part}: {dict(fields)}")
    return value, fields["low"], fields["high"], fields["n"]
