"""The judge that runs programmatic checks (`rgsd.rubrics.checks`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rgsd.errors import CheckUndecided
from rgsd.judges.judgement import Judgement, Task
from rgsd.rubrics import Example, Verdict
from rgsd.rubrics.checks import CHECKS_VERSION, holds


class ChecksJudge:
    """The judge that runs the criteria's own checks: exact, free and deterministic.

    A criterion is unscored if it has no check, or if its check exceeds the limit of time or text.
    """

    name = "checks"
    identity = ("checks", CHECKS_VERSION)

    def judge(self, example: Example, response: str) -> Judgement:
        """Judge one response."""
        problem, verdicts = "", []
        for criterion in example.rubric:
            if criterion.check is None:
                problem = problem or "no check"
                reason = "this criterion has no programmatic check: use an LLM judge"
                verdicts.append(Verdict(met=None, reason=reason))
                continue
            try:
                met = holds(criterion.check, response)
            except CheckUndecided as error:
                problem = "check limit"
                verdicts.append(Verdict(met=None, reason=str(error)))
            else:
                verdicts.append(Verdict(met=met, reason=f"check {next(iter(criterion.check))}"))
        return Judgement(verdicts, problem=problem)

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """Judge many responses. See `Judge.judge_all`."""
        judgements = []
        for i, (example, response) in enumerate(tasks):
            judgements.append(self.judge(example, response))
            if done is not None:
                done(i, judgements[-1])
        return judgements
