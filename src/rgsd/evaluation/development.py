"""The development prompts, scored during training: greedy responses of the current student, judged like held-out ones.

The samples of each evaluation are lines of development.jsonl, with their step: never of samples.jsonl, which holds the
evaluation before and after training. Held-out prompts have no part in this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rgsd.errors import JudgeError
from rgsd.evaluation.arms import judge_responses, verdict_key
from rgsd.evaluation.conclusions import Conclusion, conclude
from rgsd.evaluation.responses import THINK_TAGS
from rgsd.evaluation.samples import Sample, latest
from rgsd.evaluation.summaries import mean_score, paired_difference, scored_shares, usage_totals
from rgsd.inference import Conversation, Response, TransformersGenerator, digest
from rgsd.judges import Judge, record_requests
from rgsd.progress import say
from rgsd.rows import check, is_count
from rgsd.rubrics import Example
from rgsd.runs import DEVELOPMENT, JUDGE_REQUESTS, Run

ARM = "development"
"""The arm of the samples, and of the judge's requests."""
TRAINING = "training"
"""What further requests of the judge are for, once an evaluation during training is done: GRPO's rewards."""


@dataclass
class DevelopmentScorer:
    """A `rgsd.training.development.Development`.

    Args:
        run: Keeps the samples.
        examples: The development examples.
        prompts: One per example, as the student reads it.
        generator: Writes the student's greedy responses.
        judge: Scores them; None if nothing can, and the divergence is all there is.
        think_tags: Tags of the reasoning, which is removed before judging.
        divergence: How far the teacher is from the student on the responses, in nats a token; None without a teacher.
        seed: Of the bootstrap.
    """

    run: Run
    examples: Sequence[Example]
    prompts: Sequence[Conversation]
    generator: TransformersGenerator
    judge: Judge | None
    think_tags: tuple[str, str] = THINK_TAGS
    divergence: Callable[[Sequence[Response]], float | None] | None = None
    seed: int = 0
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        """Raises:
        PromptTooLong: For a prompt that leaves no room for the longest response: before training, not in its midst.
        """
        sent = self.generator.check(self.prompts)
        # What scores depend on besides the weights.
        judged = [verdict_key(e, "", self.judge) for e in self.examples] if self.judge else None
        self.identity = digest([sent, self.generator.sampling.identity(), self.think_tags, judged])

    def score(self, step: int) -> dict[str, float]:
        """See `Development.score`. A judge that cannot be reached or afforded leaves the step without a score; training
        goes on."""
        started = time.monotonic()
        responses = self.generator.generate(self.prompts)
        found = {
            "eval_response_length": float(np.mean([r.n_tokens for r in responses])),
            "eval_truncated_share": float(np.mean([r.is_truncated for r in responses])),
            "eval_prompts": float(len(responses)),
        }
        divergence = None if self.divergence is None else self.divergence(responses)
        if divergence is not None:
            found["eval_divergence"] = divergence
        if self.judge is not None:
            found |= self._judged(step, responses, self.judge)
        return found | {"eval_runtime": round(time.monotonic() - started, 3)}

    def _judged(self, step: int, responses: Sequence[Response], judge: Judge) -> dict[str, float]:
        record_requests(judge, self.run.folder / JUDGE_REQUESTS, ARM)
        try:
            samples = judge_responses(self.examples, responses, judge, arm=ARM, think_tags=self.think_tags)
        except JudgeError as error:
            say(f"Step {step}: the development prompts were not scored: {error}")
            return {"eval_coverage": 0.0}
        finally:
            record_requests(judge, self.run.folder / JUDGE_REQUESTS, TRAINING)
        # All at once: an evaluation is in the file whole, or not at all.
        self.run.append(DEVELOPMENT, [{"step": step, **s.to_row()} for s in samples])
        score, usage = mean_score(samples, seed=self.seed), usage_totals(samples)
        found = {"eval_coverage": float(scored_shares(samples)["criteria_share"] or 0.0)}
        if score is not None:
            found["eval_rubric_score"] = float(score["mean"])
        if usage["calls"] or usage["cached"]:
            found["eval_judge/calls"] = float(usage["calls"])
            if usage["price"] is not None:
                found["eval_judge/dollars"] = float(usage["price"])
        return found

    def fall(self, best: int, step: int) -> str | None:
        """See `Development.fall`: the difference on the same prompts, if it counts as worse (`conclude`)."""
        stored = read_development(self.run)
        difference = paired_difference(stored.get(best, []), stored.get(step, []), seed=self.seed)
        if difference is None or conclude(difference) is not Conclusion.WORSE:
            return None
        low, high = -100 * difference.high, -100 * difference.low
        return f"{-100 * difference.mean:.1f} points (95 % interval {low:.1f} to {high:.1f}, {difference.n} prompts)"


def read_development(run: Run) -> dict[int, list[Sample]]:
    """The samples of each evaluation during training, by step.

    Raises:
        RunError: If a line is not a sample with a step; it names the file and the line.
    """
    found: dict[int, list[Sample]] = {}
    for step, sample in run.iterate_lines(DEVELOPMENT, _parse):
        found.setdefault(step, []).append(sample)
    return {step: latest(found[step]) for step in sorted(found)}


def _parse(row: Mapping[str, Any]) -> tuple[int, Sample]:
    check(row, {"step": (is_count, True)})
    return row["step"], Sample.from_row(row)
