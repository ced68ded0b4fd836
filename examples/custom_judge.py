"""A custom judge: any object with `name`, `judge` and `judge_all`. This one counts the words that criterion and
response share.

    rgsd eval nano --data bundled --max_prompts 4 --judge python:custom_judge:build   # with examples/ on PYTHONPATH

rgsd imports the module and calls `build` with `judge_kwargs`. A criterion that the judge cannot decide gets `met=None`
(unscored), never False.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rgsd.judges import Judgement, Task
from rgsd.rubrics import Example, Verdict


class OverlapJudge:
    """Calls a criterion met when the response contains enough of its longer words.

    Args:
        share: Smallest share of a criterion's words (five letters or more) that the response must contain.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        self.share = share
        self.name = f"overlap ({share:g})"
        # Part of the key of stored verdicts, so verdicts of other settings are never reused.
        self.identity = self.name

    def judge(self, example: Example, response: str) -> Judgement:
        """One verdict per criterion, in the rubric's order."""
        words = set(re.findall(r"\w{5,}", response.lower()))
        verdicts = []
        for criterion in example.rubric:
            wanted = set(re.findall(r"\w{5,}", criterion.text.lower()))
            if not wanted:
                verdicts.append(Verdict(met=None, reason="the criterion has no word of five letters"))
                continue
            overlap = len(wanted & words) / len(wanted)
            verdicts.append(Verdict(met=overlap >= self.share, reason=f"{overlap:.0%} of its words"))
        return Judgement(verdicts)

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """Judge many responses in order, and pass each judgement to `done`."""
        judgements = []
        for i, (example, response) in enumerate(tasks):
            judgements.append(self.judge(example, response))
            if done is not None:
                done(i, judgements[-1])
        return judgements


def build(share: float = 0.5) -> OverlapJudge:
    """What `--judge python:custom_judge:build` calls."""
    return OverlapJudge(share)
