"""The `Judge` protocol, and the judgement that a judge returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rgsd.inference.accounting import Usage
from rgsd.rubrics import Example, Verdict


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's decisions on one response.

    Args:
        verdicts: One per criterion, in the rubric's order. Unscored (`met=None`) if the judge could not decide.
        replies: The judge's raw replies, the last try of each call. Empty for a judge that writes none.
        usage: The cost.
        problem: Why verdicts are unscored (`timeout`, `refusal`, `malformed`, ...). Empty if all are scored.
    """

    verdicts: list[Verdict]
    replies: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    problem: str = ""


Task = tuple[Example, str]
"""An example and a response to it."""


class Judge(Protocol):
    """Decides whether a response meets its criteria."""

    name: str
    """Shown in tables, and part of the key of stored verdicts, which are not reused under another name. A judge may
    also have an `identity`: a JSON value of everything else that its verdicts depend on, such as its settings."""

    def judge(self, example: Example, response: str) -> Judgement:
        """Judge one response."""
        ...

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """Judge many responses.

        Args:
            tasks: Pairs of example and response.
            done: Called in this thread with the position and judgement of each task as it completes, in any order. The
                caller can store judgements there, so that an interruption loses none.

        Returns:
            The judgements, in the order of the tasks.
        """
        ...
