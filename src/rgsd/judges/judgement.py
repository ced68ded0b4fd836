"""What a judge is, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rgsd.inference.accounting import Usage
from rgsd.rubrics import Example, Verdict


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's word on one response.

    Args:
        verdicts: one a criterion, in the rubric's order; unscored (`met=None`) where the judge could not decide.
        replies: the judge's raw replies, the last attempt of each call; empty for a judge that writes none.
        usage: what it cost.
        problem: why verdicts are unscored (`timeout`, `refusal`, `malformed`, ...); empty when all are scored.
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
    """In tables, and for keys of stored verdicts: verdicts of another name are not taken for its own. A judge may also
    have `identity`, a JSON value of what else its verdicts depend on (its settings, the version of its prompt)."""

    def judge(self, example: Example, response: str) -> Judgement:
        """The judgement of one response."""
        ...

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """The judgements of many responses, in their order.

        Args:
            tasks: pairs of example and response.
            done: called in this thread with a task's position and its judgement as soon as that is there, in any
                order; so that what was judged is kept when the rest is not.
        """
        ...
