"""Rubrics, verdicts, and the scores that the datasets' authors define over them.

Everything here is plain data and plain arithmetic on the standard library.

A criterion's `weight` carries its polarity: positive means that meeting it is good, negative (a pitfall) that meeting
it is bad. A verdict is met, not met, or unscored; an unscored verdict leaves both sides of every fraction, and
`Score.coverage` says how much of the rubric was left.
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
"""Smallest and largest size of a weight. Published ones lie between 0.3 and 100; sums of larger ones overflow, and a
score of theirs is not a number."""

Polarity = Literal["positive", "negative"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One thing to look for in a response.

    Args:
        text: the criterion in plain language, as published.
        weight: its points; negative for a pitfall, never zero.
        title: a short name, when the dataset has one.
        tags: what the dataset says about it, e.g. `("axis:accuracy",)`.
        check: a programmatic check that decides it exactly (see `rgsd.judges.checks`), or None.

    Raises:
        DataError: when the text is empty, or the weight is zero, not finite, or outside `WEIGHT_SIZES`.
    """

    text: str
    weight: float = 1.0
    title: str | None = None
    tags: tuple[str, ...] = ()
    check: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise DataError(f"a criterion needs a text, got {self.text!r}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise DataError(f"a criterion's weight must be a number, got {self.weight!r} for {self.text[:60]!r}")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise DataError(
                f"a criterion's weight must be finite and not zero, got {self.weight!r} for {self.text[:60]!r}: "
                "use a positive weight for what a response should do, a negative one for a pitfall"
            )
        least, most = WEIGHT_SIZES
        if not least <= abs(self.weight) <= most:
            raise DataError(
                f"a criterion's weight must be between {least:g} and {most:g} in size, got {self.weight!r} for "
                f"{self.text[:60]!r}: scores are ratios, so scale all weights of the rubric alike"
            )

    @property
    def is_pitfall(self) -> bool:
        """Whether meeting this criterion is bad."""
        return self.weight < 0


@dataclass(frozen=True, slots=True)
class Rubric:
    """The criteria of one prompt, in their published order. At least one."""

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
        id: unique within its dataset.
        messages: the turns, each with a role and a text; the last one is the user's.
        rubric: what a good response does.
        scoring: which of `SCORINGS` turns verdicts into a score; the dataset's own by default.
        reference: a reference response, when the dataset has one.
        domain: e.g. "medicine".
        tags: what the dataset says of the example.
        metadata: anything else worth keeping, JSON-serialisable.
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
                    f"example {self.id!r}, turn {number}: content must be a text, got {type(content).__name__}"
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
        """What makes two prompts the same: roles and texts with white space and case folded."""
        return json.dumps([[m["role"], " ".join(m["content"].split()).casefold()] for m in self.messages])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said of one criterion.

    Args:
        met: True, False, or None for unscored (time-out, refusal, malformed reply): never read as False.
        grade: a graded verdict in [0, 1] for scorings that use one (ResearchQA); None otherwise.
        reason: the judge's reason, or why it is unscored.
    """

    met: bool | None
    grade: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.grade is not None and not 0.0 <= self.grade <= 1.0:
            raise DataError(f"a graded verdict lies in [0, 1], got {self.grade!r}")

    @property
    def is_scored(self) -> bool:
        """Whether the judge decided."""
        return self.met is not None or self.grade is not None

    @property
    def value(self) -> float:
        """The verdict as a number in [0, 1]. Only for scored verdicts."""
        if self.grade is not None:
            return self.grade
        if self.met is None:
            raise DataError("an unscored verdict has no value: leave it out, and report the coverage")
        return float(self.met)


@dataclass(frozen=True, slots=True)
class Score:
    """A response's score under its rubric.

    Args:
        value: as the dataset defines it, or None when nothing that could earn points was scored.
        n_scored: criteria with a verdict.
        n_criteria: criteria of the rubric.
    """

    value: float | None
    n_scored: int
    n_criteria: int

    @property
    def coverage(self) -> float:
        """Share of the criteria that were scored, in [0, 1]."""
        return self.n_scored / self.n_criteria


Scored = Sequence[tuple[Criterion, Verdict]]


def _points(scored: Scored) -> float:
    return sum(c.weight * v.value for c, v in scored)


def _positive(scored: Scored) -> float:
    return sum(c.weight for c, _ in scored if c.weight > 0)


def _satisfaction(scored: Scored, response: str) -> float | None:
    positive = _positive(scored)
    return _points(scored) / positive if positive else None


def _rubrichub(scored: Scored, response: str) -> float | None:
    value = _satisfaction(scored, response)
    return None if value is None else max(0.0, value)


def _rar_explicit(scored: Scored, response: str) -> float | None:
    total = sum(abs(c.weight) for c, _ in scored)
    good = sum(abs(c.weight) * (v.value if c.weight > 0 else 1.0 - v.value) for c, v in scored)
    return good / total if total else None


LENGTH_PENALTY_PER_500_CHARS = 0.0147
LENGTH_CENTER_CHARS = 2000


def length_adjustment(response: str) -> float:
    """What HealthBench Professional adds to a score for the response's length; negative above 2,000 characters.

    The authors' term is linear on both sides of 2,000 characters: `calculate_length_adjusted_score` in
    `healthbench_eval.py` of openai/simple-evals (pull request 108; arXiv 2604.27470, section 4.1) has neither a floor
    nor a special case. So a short response gains: an empty one 0.0588. It is added to the example's score only; the
    scores by tag are without it, as there.
    """
    return -LENGTH_PENALTY_PER_500_CHARS * (len(response) - LENGTH_CENTER_CHARS) / 500


def _healthbench_professional(scored: Scored, response: str) -> float | None:
    value = _satisfaction(scored, response)
    return None if value is None else value + length_adjustment(response)


def _researchqa(scored: Scored, response: str) -> float | None:
    return sum(v.value for _, v in scored) / len(scored) if scored else None


def _prbench(scored: Scored, response: str) -> float | None:
    low = sum(c.weight for c, _ in scored if c.weight < 0)
    high = _positive(scored)
    return (_points(scored) - low) / (high - low) if high - low else None


SCORINGS = {
    # sum(w v) / sum(w > 0): the paper's rubric satisfaction, HealthBench's and ResearchRubrics' example score.
    "satisfaction": _satisfaction,
    # The same, not below zero.
    "rubrichub": _rubrichub,
    # sum(w satisfied) / sum(w); a pitfall is satisfied when it is not met.
    "rar_explicit": _rar_explicit,
    # Unclipped per example, since only HealthBench's mean is clipped (see `mean_score`).
    "healthbench": _satisfaction,
    # HealthBench Professional: the same, minus 0.0147 for every 500 characters above 2,000, plus as much below.
    "healthbench_professional": _healthbench_professional,
    # Mean of graded verdicts in {0, .25, .5, .75, 1}.
    "researchqa": _researchqa,
    # (points - min) / (max - min); `satisfaction` gives PRBench's other figure, points / positive.
    "prbench": _prbench,
}
"""Name -> score of one response from its scored (criterion, verdict) pairs and its text."""

TAG_SCORINGS = {"healthbench_professional": "healthbench"}
"""Scorings whose scores by criterion tag are taken by another one."""

CLIPPED_MEANS = frozenset({"healthbench", "healthbench_professional"})
"""Scorings whose examples stay as they are and whose mean over examples is clipped to [0, 1]."""


def score(rubric: Rubric, verdicts: Sequence[Verdict], scoring: str = "satisfaction", response: str = "") -> Score:
    """Score one response.

    Args:
        rubric: the criteria, in order.
        verdicts: one a criterion, in the same order.
        scoring: a key of `SCORINGS`.
        response: the response's text; only length-penalised scorings read it.

    Raises:
        DataError: when there is not exactly one verdict a criterion, or the scoring is unknown.
    """
    if len(verdicts) != len(rubric):
        raise DataError(f"got {len(verdicts)} verdicts for {len(rubric)} criteria: one each, in order, is wanted")
    if scoring not in SCORINGS:
        raise DataError(f"unknown scoring {scoring!r}, known: {', '.join(SCORINGS)}")
    scored = [(c, v) for c, v in zip(rubric, verdicts, strict=True) if v.is_scored]
    value = SCORINGS[scoring](scored, response) if scored else None
    if value is not None and not math.isfinite(value):
        weights = [c.weight for c, _ in scored]
        raise DataError(f"scoring {scoring!r} gives {value}, a finite number is wanted: its weights are {weights}")
    return Score(value=value, n_scored=len(scored), n_criteria=len(rubric))


def mean_score(scores: Iterable[Score], scoring: str = "satisfaction") -> float | None:
    """Mean over responses, as the dataset's authors take it; None when no response could be scored."""
    values = [s.value for s in scores if s.value is not None]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return min(1.0, max(0.0, mean)) if scoring in CLIPPED_MEANS else mean


def fingerprint(examples: Iterable[Example]) -> str:
    """A short digest of the prompts and rubrics, in order; the same data give the same digest anywhere."""
    digest = hashlib.sha256()
    for e in examples:
        criteria = [[c.text, c.weight, c.check] for c in e.rubric]
        turns = [[m["role"], m["content"]] for m in e.messages]
        record = [e.id, turns, criteria, e.scoring, e.reference]
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=True).encode())
    return digest.hexdigest()[:16]
