"""Judges: who decides whether a response meets its criteria."""

from __future__ import annotations

from typing import Protocol

from rgsd.judges.checks import ChecksJudge
from rgsd.rubrics import Example, Verdict

__all__ = ["ChecksJudge", "Judge"]


class Judge(Protocol):
    """Gives one verdict a criterion, in the rubric's order; unscored (`met=None`) where it could not decide."""

    name: str

    def judge(self, example: Example, response: str) -> list[Verdict]:
        """The verdicts on one response."""
        ...
