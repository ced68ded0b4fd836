"""Rubrics, verdicts, and scores as the datasets' authors define them. Standard library only.

The sign of a criterion's `weight` is its polarity: meeting a positive criterion is good, meeting a negative one (a
pitfall) is bad. A verdict is met, not met, or unscored. Unscored verdicts leave the numerator and the denominator of
every score; `Score.coverage` reports how much of the rubric remains.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rgsd.errors import DataError

Message = Mapping[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""

WEIGHT_SIZES = (1e-6, 1e6)
"""The smallest and largest absolute weight. Published weights lie between 0.3 and 100; sums of much larger ones
overflow."""

Polarity = Literal["positive", "negative"]
"""Whether meeting a criterion is good or bad."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One thing to look for in a response.

    Args:
        text: The criterion in plain language, as published.
        weight: Points for meeting it. Negative for a pitfall, never zero.
        title: A short name, if the dataset has one.
        tags: The dataset's labels, e.g. `("axis:accuracy",)`.
        check: A programmatic check that decides the criterion exactly (see `rgsd.rubrics.checks`), or None.

    Raises:
        DataError: If the text is empty, or the weight is zero, not finite, or outside `WEIGHT_SIZES`.
    """

    text: str
    weight: float = 1.0
    title: str | None = None
    tags: tuple[str, ...] = ()
    check: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise DataError(f"a criterion's text must be a non-empty string, got {self.text!r}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise DataError(f"a criterion's weight must be a number, got {self.weight!r} for {self.text[:60]!r}")
        # isfinite() overflows for a whole number beyond floats, which the limit below refuses.
        if (isinstance(self.weight, float) and not math.isfinite(self.weight)) or self.weight == 0:
            raise DataError(
                f"a criterion's weight must be finite and not zero, got {self.weight!r} for {self.text[:60]!r}: "
                "use a positive weight for what a response should do, a negative one for a pitfall"
            )
        least, most = WEIGHT_SIZES
        if not least <= abs(self.weight) <= most:
            raise DataError(
                f"a criterion's absolute weight must be between {least:g} and {most:g}, got {self.weight!r} for "
                f"{self.text[:60]!r}: scores are ratios, so divide all weights of the rubric by the same number"
            )

    @property
    def is_pitfall(self) -> bool:
        """Whether meeting this criterion is bad."""
        return self.weight < 0


@dataclass(frozen=True, slots=True)
class Rubric:
    """The criteria of one prompt, in published order. Never empty."""

    criteria: tuple[Criterion, ...]

    def __post_init__(self) -> None:
        if not self.criteria:
            raise DataError("a rubric needs at least one criterion, got none")

    def __len__(self) -> int:
        return len(self.criteria)

    def __iter__(self):
        return iter(self.criteria)

    @property
    def positive_points(self) -> float:
        """Sum of the positive weights."""
        return sum(c.weight for c in self.criteria if c.weight > 0)

    @property
    def negative_points(self) -> float:
        """Sum of the negative weights; zero or less."""
        return sum(c.weight for c in self.criteria if c.weight < 0)

    @property
    def is_checkable(self) -> bool:
        """Whether every criterion carries a programmatic check."""
        return all(c.check is not None for c in self.criteria)


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation instance: a conversation that ends with the user, and its rubric.

    Args:
        id: Unique within the dataset.
        messages: The turns, each with a role and a string content. The last turn is the user's.
        rubric: What a good response does.
        scoring: The key of `SCORINGS` that turns verdicts into a score.
        reference: A reference response, if the dataset has one.
        domain: E.g. "medicine".
        tags: The dataset's labels.
        metadata: Anything else worth keeping, JSON-serializable.
    """

    id: str
    messages: tuple[Message, ...] = field(hash=False)
    rubric: Rubric
    scoring: str = "satisfaction"
    reference: str | None = None
    domain: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError(f"example {self.id!r} has no messages: its prompt needs at least one user turn")
        for number, message in enumerate(self.messages):
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant", "tool", "developer"):
                raise DataError(f"example {self.id!r}, turn {number}: unknown role {role!r}")
            if not isinstance(content, str):
                raise DataError(
                    f"example {self.id!r}, turn {number}: content must be a string, got {type(content).__name__}"
                )
        if self.messages[-1]["role"] != "user":
            raise DataError(
                f"example {self.id!r} ends with a turn of role {self.messages[-1]['role']!r}: "
                "a prompt must end with the user's turn, which the model answers"
            )
        if not self.messages[-1]["content"].strip():
            raise DataError(f"example {self.id!r} ends with an empty user turn")
        if self.scoring not in SCORINGS:
            raise DataError(f"example {self.id!r}: unknown scoring {self.scoring!r}, known: {', '.join(SCORINGS)}")

    @property
    def prompt_key(self) -> str:
        """Equal for prompts that differ only in whitespace and case."""
        return json.dumps([[m["role"], " ".join(m["content"].split()).casefold()] for m in self.messages])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's decision on one criterion.

    Args:
        met: True, False, or None for unscored (timeout, refusal, malformed reply). Unscored never counts as False.
        grade: A grade in [0, 1] for scorings that use one (ResearchQA), else None.
        reason: The judge's reason, or why the criterion is unscored.
    """

    met: bool | None
    grade: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.grade is not None and not 0.0 <= self.grade <= 1.0:
            raise DataError(f"a grade must be in [0, 1], got {self.grade!r}")

    @property
    def is_scored(self) -> bool:
        """Whether the judge decided the criterion."""
        return self.met is not None or self.grade is not None

    @property
    def value(self) -> float:
        """The verdict as a number in [0, 1]. Raises DataError if unscored."""
        if self.grade is not None:
            return self.grade
        if self.met is None:
            raise DataError("an unscored verdict has no value: leave it out and report the coverage")
        return float(self.met)


@dataclass(frozen=True, slots=True)
class Score:
    """A response's score under its rubric.

    Args:
        value: The score as the dataset defines it, or None if no criterion that can earn points was scored.
        n_scored: Number of criteria with a verdict.
        n_criteria: Number of criteria in the rubric.
    """

    value: float | None
    n_scored: int
    n_criteria: int

    @property
    def coverage(self) -> float:
        """Share of criteria that were scored, in [0, 1]."""
        return self.n_scored / self.n_criteria


Scored = Sequence[tuple[Criterion, Verdict]]
"""The criteria of a response that have a verdict, each with its verdict."""


def _points(scored: Scored) -> float:
    return sum(c.weight * v.value for c, v in scored)


def _positive(scored: Scored) -> float:
    return sum(c.weight for c, _ in scored if c.weight > 0)


def _satisfaction(scored: Scored, response: str) -> float | None:
    # Pitfalls count in the numerator only: a response that meets every positive criterion and no pitfall scores 1.
    positive = _positive(scored)
    return _points(scored) / positive if positive else None


def _rubrichub(scored: Scored, response: str) -> float | None:
    value = _satisfaction(scored, response)
    return None if value is None else max(0.0, value)


def _rar_explicit(scored: Scored, response: str) -> float | None:
    # Here, avoiding a pitfall earns its points, so the denominator has all weights.
    total = sum(abs(c.weight) for c, _ in scored)
    good = sum(abs(c.weight) * (v.value if c.weight > 0 else 1.0 - v.value) for c, v in scored)
    return good / total if total else None


LENGTH_PENALTY_PER_500_CHARS = 0.0147
LENGTH_CENTER_CHARS = 2000


def length_adjustment(response: str) -> float:
    """HealthBench Professional's length term, added to an example's score. Negative above 2,000 characters.

    The authors' term is linear on both sides of 2,000 characters, without a floor, so short responses gain: an
    empty one gains 0.0588. Scores by tag do not include it. Source: `calculate_length_adjusted_score` in
    `healthbench_eval.py` of openai/simple-evals (pull request 108); arXiv 2604.27470, section 4.1.
    """
    return -LENGTH_PENALTY_PER_500_CHARS * (len(response) - LENGTH_CENTER_CHARS) / 500


def _healthbench_professional(scored: Scored, response: str) -> float | None:
    value = _satisfaction(scored, response)
    return None if value is None else value + length_adjustment(response)


def _researchqa(scored: Scored, response: str) -> float | None:
    return sum(v.value for _, v in scored) / len(scored) if scored else None


def _prbench(scored: Scored, response: str) -> float | None:
    # From the lowest to the highest possible points of the scored criteria, mapped to [0, 1].
    low = sum(c.weight for c, _ in scored if c.weight < 0)
    high = _positive(scored)
    return (_points(scored) - low) / (high - low) if high - low else None


SCORINGS = {
    # sum(w v) / sum(w > 0): the paper's rubric satisfaction, HealthBench's and ResearchRubrics' example score.
    "satisfaction": _satisfaction,
    # Satisfaction, clipped at zero.
    "rubrichub": _rubrichub,
    # sum(w satisfied) / sum(w); a pitfall is satisfied when it is not met.
    "rar_explicit": _rar_explicit,
    # Unclipped per example: HealthBench clips only the mean (see `mean_score`).
    "healthbench": _satisfaction,
    # HealthBench plus the length term: minus 0.0147 per 500 characters above 2,000, plus as much below.
    "healthbench_professional": _healthbench_professional,
    # Mean of graded verdicts in {0, .25, .5, .75, 1}.
    "researchqa": _researchqa,
    # (points - min) / (max - min). For PRBench's other score, points / positive, use `satisfaction`.
    "prbench": _prbench,
}
"""Functions by name that score a response from its scored (criterion, verdict) pairs and its text."""

TAG_SCORINGS = {"healthbench_professional": "healthbench"}
"""The scoring to use for scores by criterion tag, where it differs."""

CLIPPED_MEANS = frozenset({"healthbench", "healthbench_professional"})
"""Scorings that clip the mean over examples to [0, 1], but not the score of each example."""


def score(rubric: Rubric, verdicts: Sequence[Verdict], scoring: str = "satisfaction", response: str = "") -> Score:
    """Score one response.

    Args:
        rubric: The criteria, in order.
        verdicts: One per criterion, in the same order.
        scoring: A key of `SCORINGS`.
        response: The response's text. Only scorings with a length term read it.

    Raises:
        DataError: If there is not exactly one verdict per criterion, or the scoring is unknown.
    """
    if len(verdicts) != len(rubric):
        raise DataError(
            f"got {len(verdicts)} verdicts for {len(rubric)} criteria: pass one verdict per criterion, in order"
        )
    if scoring not in SCORINGS:
        raise DataError(f"unknown scoring {scoring!r}, known: {', '.join(SCORINGS)}")
    scored = [(c, v) for c, v in zip(rubric, verdicts, strict=True) if v.is_scored]
    value = SCORINGS[scoring](scored, response) if scored else None
    if value is not None and not math.isfinite(value):
        weights = [c.weight for c, _ in scored]
        raise DataError(f"scoring {scoring!r} must give a finite number, got {value} from the weights {weights}")
    return Score(value=value, n_scored=len(scored), n_criteria=len(rubric))


def mean_score(scores: Iterable[Score], scoring: str = "satisfaction") -> float | None:
    """The mean over responses, as the dataset's authors compute it. None if no response was scored."""
    values = [s.value for s in scores if s.value is not None]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return min(1.0, max(0.0, mean)) if scoring in CLIPPED_MEANS else mean


def fingerprint(examples: Iterable[Example]) -> str:
    """A short digest of the prompts and rubrics, in order. The same data gives the same digest on every machine."""
    digest = hashlib.sha256()
    for e in examples:
        criteria = [[c.text, c.weight, c.check] for c in e.rubric]
        turns = [[m["role"], m["content"]] for m in e.messages]
        record = [e.id, turns, criteria, e.scoring, e.reference]
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=True).encode())
    return digest.hexdigest()[:16]
