"""The sample: one judged response, from the judge to the report.

A run keeps its samples in samples.jsonl, one line each. `Sample.to_row` and `Sample.from_row` are the only code that
knows the format of a line; everything else takes `Sample`s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rgsd.judges import Usage
from rgsd.rows import (
    USAGE,
    BadRow,
    Fields,
    are_texts,
    check,
    is_count,
    is_flag,
    is_grade,
    is_list,
    is_number,
    is_object,
    is_text,
    is_weight,
)
from rgsd.rubrics import Verdict
from rgsd.runs import SAMPLES, Run

FORMAT = 1
"""Version of a line in samples.jsonl. Lines without one were written before the version was, and are version 1."""
GRADE_MET = 0.5
"""A graded verdict counts as met from this grade on, where a yes or no is needed (agreement between judges)."""
UNKNOWN_JUDGE = "unknown"

_VERDICT: Fields = {
    "criterion": (is_text, True),
    "weight": (is_weight, True),
    "tags": (are_texts, False),
    "met": (is_flag, False),
    "grade": (is_grade, False),
    "reason": (is_text, False),
}
_SAMPLE: Fields = {
    "format": (is_count, False),
    "arm": (is_text, True),
    "example_id": (is_text, True),
    "scoring": (is_text, True),
    "verdicts": (is_list, True),
    "score": (is_number, False),
    "coverage": (is_grade, False),
    "question": (is_text, False),
    "response": (is_text, False),
    "judged_text": (is_text, False),
    "judge": (is_text, False),
    "domain": (is_text, False),
    "tags": (are_texts, False),
    "n_tokens": (is_count, False),
    "is_truncated": (is_flag, False),
    "problem": (is_text, False),
    "replies": (are_texts, False),
    "usage": (is_object, False),
    "response_key": (is_object, False),
    "verdict_key": (is_object, False),
}


@dataclass(frozen=True, slots=True)
class CriterionVerdict:
    """A criterion and the judge's verdict on it.

    Args:
        criterion, weight, tags: The criterion; a negative weight marks a pitfall.
        met, grade, reason: The verdict, as in `rgsd.rubrics.Verdict`.
    """

    criterion: str
    weight: float
    met: bool | None = None
    grade: float | None = None
    reason: str = ""
    tags: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The verdict alone."""
        return Verdict(self.met, self.grade, self.reason)

    @property
    def value(self) -> float | None:
        """How far the criterion is met, in [0, 1]; None when unscored."""
        return self.verdict.value if self.verdict.is_scored else None

    @property
    def satisfied(self) -> float | None:
        """How good the verdict is, in [0, 1]: `value`, or 1 - `value` for a pitfall; None when unscored."""
        return self.value if self.value is None or not self.is_pitfall else 1.0 - self.value

    @property
    def is_met(self) -> bool | None:
        """The verdict as a yes or no (`is_met`)."""
        return is_met(self.verdict)

    @property
    def is_pitfall(self) -> bool:
        """Whether meeting the criterion costs points."""
        return self.weight < 0


def is_met(verdict: Verdict) -> bool | None:
    """A verdict as a yes or no; a grade counts as met from `GRADE_MET` on. None when unscored."""
    return verdict.value >= GRADE_MET if verdict.is_scored else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response under one judge.

    Args:
        arm: The arm that responded.
        example_id, question, domain, tags: The example; `question` is its last message.
        scoring: A key of `rgsd.rubrics.SCORINGS`.
        response: The response as generated, with its reasoning.
        judged_text: What the judge read: the response without its reasoning.
        n_tokens, is_truncated: The response's length and whether it was cut off; None when unknown.
        response_key: What the response depends on (`rgsd.inference.ResponseKey`); None when unknown.
        judge: The judge's name.
        verdict_key: What the verdicts depend on (`rgsd.evaluation.arms.verdict_key`); None when unknown.
        verdicts: One per criterion, in the rubric's order.
        score: As the dataset defines it; None when nothing was scored.
        coverage: Share of the criteria that were scored.
        replies: The judge's raw replies.
        usage: What judging cost; None when unknown.
        problem: Why criteria are unscored; empty when none is.
    """

    arm: str
    example_id: str
    scoring: str
    score: float | None
    verdicts: tuple[CriterionVerdict, ...]
    coverage: float
    judge: str = UNKNOWN_JUDGE
    question: str = ""
    domain: str = ""
    tags: tuple[str, ...] = ()
    response: str = ""
    judged_text: str = ""
    n_tokens: int | None = None
    is_truncated: bool | None = None
    response_key: Mapping[str, str] | None = None
    verdict_key: Mapping[str, str] | None = None
    replies: tuple[str, ...] = ()
    usage: Usage | None = None
    problem: str = ""

    def to_row(self) -> dict[str, Any]:
        """The sample as a line of samples.jsonl."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """Read a line of samples.jsonl. Run folders are untrusted: every known field is checked, unknown ones are
        ignored.

        Raises:
            BadRow: If a field is missing or has another type, or a newer version of rgsd wrote the line.
        """
        _check(row)
        verdicts = tuple(
            CriterionVerdict(
                criterion=v["criterion"],
                weight=v["weight"],
                met=v.get("met"),
                grade=v.get("grade"),
                reason=v.get("reason") or "",
                tags=tuple(v.get("tags") or ()),
            )
            for v in row["verdicts"]
        )
        coverage, response, judged_text = row.get("coverage"), row.get("response") or "", row.get("judged_text")
        if coverage is None:
            coverage = sum(v.value is not None for v in verdicts) / len(verdicts) if verdicts else 0.0
        return cls(
            **{name: row[name] for name in _PLAIN if row.get(name) is not None},
            score=row["score"],
            verdicts=verdicts,
            coverage=coverage,
            tags=tuple(row.get("tags") or ()),
            response=response,
            judged_text=response if judged_text is None else judged_text,
            replies=tuple(row.get("replies") or ()),
            usage=_usage_of(row.get("usage")),
        )


def _usage_of(row: Mapping[str, Any] | None) -> Usage | None:
    if not row:
        return None
    # A missing price is an unknown price, never a price of 0.
    return Usage(**{name: row.get(name) or 0 for name in USAGE if name != "price"}, price=row.get("price"))


_PLAIN = (
    "arm", "example_id", "scoring", "judge", "question", "domain", "n_tokens", "is_truncated", "response_key",
    "verdict_key", "problem",
)  # fmt: skip
"""Fields that a line holds as they are."""


def _check(row: Mapping[str, Any]) -> None:
    check(row, _SAMPLE)
    if (row.get("format") or FORMAT) > FORMAT:
        raise BadRow(f"format is {row['format']}, this version of rgsd reads up to {FORMAT}: update rgsd")
    if "score" not in row:
        raise BadRow("score is missing: it must be a number, or null when nothing was scored")
    for position, verdict in enumerate(row["verdicts"]):
        if not isinstance(verdict, Mapping):
            raise BadRow(f"verdicts[{position}] must be an object, got {type(verdict).__name__}")
        check(verdict, _VERDICT, f"verdicts[{position}].")
    check(row.get("usage") or {}, USAGE, "usage.")


def read_samples(run: Run) -> list[Sample]:
    """The samples of a run. A later line replaces an earlier one of the same arm, example and judge.

    Raises:
        RunError: If a line is not a sample; it names the file and the line.
    """
    return latest(run.iterate_lines(SAMPLES, Sample.from_row))


def append_sample(run: Run, sample: Sample) -> None:
    """Add a sample to a run. It is on the disk when this returns."""
    run.append(SAMPLES, [sample.to_row()])


def latest(samples: Iterable[Sample]) -> list[Sample]:
    """The last sample of each arm, example and judge, in the order in which they first appear."""
    return list({(s.arm, s.example_id, s.judge): s for s in samples}.values())


def by_arm(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """The samples of each arm, arms in the order in which they first appear."""
    arms: dict[str, list[Sample]] = {}
    for sample in samples:
        arms.setdefault(sample.arm, []).append(sample)
    return arms
