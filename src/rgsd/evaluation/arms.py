"""One arm of an evaluation: prompts -> responses -> judgements -> samples.

Responses and samples are stored one by one, so a killed evaluation continues where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rgsd.errors import JudgeError
from rgsd.evaluation.responses import THINK_TAGS, StoredResponse, judged_text, respond, stored_responses
from rgsd.evaluation.samples import CriterionVerdict, Sample, append_sample, read_samples
from rgsd.inference import Conversation, Generator, Response, digest
from rgsd.judges import Judge, Judgement, record_requests
from rgsd.progress import counting, say
from rgsd.rubrics import Example, score
from rgsd.runs import JUDGE_REQUESTS, SAMPLES, SET_ASIDE, Run


def evaluate_arm(
    run: Run,
    arm: str,
    examples: Sequence[Example],
    prompts: Sequence[Conversation],
    generator: Generator | None,
    judge: Judge,
    *,
    think_tags: tuple[str, str] = THINK_TAGS,
) -> list[Sample]:
    """Generate and judge one arm into the run's responses.jsonl and samples.jsonl.

    A stored response counts if the same weights, settings and prompt made it; a stored verdict counts if the same judge
    gave it on the same text and criteria. Neither is paid for twice. Samples with unscored criteria are judged again;
    everything that no longer counts is moved to set-aside.jsonl, and its number is reported.

    Args:
        run: The run.
        arm: The arm's name: what is measured, and what it is shown.
        examples: The examples.
        prompts: One prompt per example, as the model reads it.
        generator: Writes the responses. None uses the stored ones, which must be complete.
        judge: Gives the verdicts.
        think_tags: Tags of the reasoning, which is removed before judging.

    Returns:
        One sample per example, in their order.

    Raises:
        JudgeError: If the judge cannot continue. The run keeps what was judged.
    """
    if generator is None:
        stored = stored_responses(run, arm)
        if missing := [e.id for e in examples if e.id not in stored]:
            raise JudgeError(f"{len(missing)} examples have no response in arm {arm!r}, and no model was given")
    else:
        stored = respond(run, arm, examples, prompts, generator)
    texts = {e.id: judged_text(stored[e.id].response, think_tags) for e in examples}
    samples = _judged(run, arm, examples, texts, judge)
    unjudged = [e for e in examples if e.id not in samples]
    if unjudged:
        record_requests(judge, run.folder / JUDGE_REQUESTS, arm)
        with counting(f"{arm}: judgements", len(unjudged)) as counter:

            def store(i: int, judgement: Judgement) -> None:
                example = unjudged[i]
                sample = _sample(arm, example, stored[example.id], texts[example.id], judge, judgement)
                samples[example.id] = sample
                append_sample(run, sample)
                counter.advance()

            judge.judge_all([(e, texts[e.id]) for e in unjudged], done=store)
    return [samples[e.id] for e in examples]


def _judged(
    run: Run, arm: str, examples: Sequence[Example], texts: Mapping[str, str], judge: Judge
) -> dict[str, Sample]:
    """The judge's stored samples that count, by example. Stale ones, of any judge, are set aside."""
    keys = {e.id: verdict_key(e, texts[e.id], judge) for e in examples}
    samples: dict[str, Sample] = {}
    stale = set()
    for sample in read_samples(run):
        key, stored_key = keys.get(sample.example_id), sample.verdict_key
        if sample.arm != arm or key is None:
            continue
        if sample.judge == judge.name:
            is_stale = stored_key != key
        else:
            # The settings of another judge are unknown here; the text and criteria that it read are not.
            is_stale = stored_key is not None and stored_key["read"] != key["read"]
        if is_stale:
            stale.add((sample.example_id, sample.judge))
        elif sample.judge == judge.name and not sample.problem:
            samples[sample.example_id] = sample
    if stale:
        run.set_aside(SAMPLES, lambda row: row["arm"] == arm and (row["example_id"], row.get("judge")) in stale)
        say(
            f"{arm}: set aside {len(stale)} samples (in {SET_ASIDE}): the judge's settings, the criteria or the judged "
            "text have changed"
        )
    return samples


def verdict_key(example: Example, text: str, judge: Judge) -> dict[str, str]:
    """What verdicts depend on, as digests.

    Returns:
        `judge`: who judges, and how. `read`: the conversation, the criteria and the response.
    """
    criteria = [[c.text, c.weight, c.title, list(c.tags), c.check] for c in example.rubric]
    read = [[dict(m) for m in example.messages], example.scoring, criteria, text]
    return {"judge": digest(getattr(judge, "identity", judge.name)), "read": digest(read)}


def judge_responses(
    examples: Sequence[Example],
    responses: Sequence[Response],
    judge: Judge,
    *,
    arm: str,
    think_tags: tuple[str, str] = THINK_TAGS,
) -> list[Sample]:
    """Judge responses without a run folder: one sample per response, in their order."""
    texts = [judged_text(r, think_tags) for r in responses]
    judgements = judge.judge_all(list(zip(examples, texts, strict=True)))
    return [
        _sample(arm, example, StoredResponse(example.id, response, None), text, judge, judgement)
        for example, response, text, judgement in zip(examples, responses, texts, judgements, strict=True)
    ]


def _sample(
    arm: str, example: Example, stored: StoredResponse, text: str, judge: Judge, judgement: Judgement
) -> Sample:
    return Sample(
        arm=arm,
        example_id=example.id,
        scoring=example.scoring,
        question=example.messages[-1]["content"],
        response=stored.response.text,
        n_tokens=stored.response.n_tokens,
        is_truncated=stored.response.is_truncated,
        response_key=stored.key,
        **judged_fields(example, text, judge, judgement),
    )


def judged_fields(example: Example, text: str, judge: Judge, judgement: Judgement) -> dict[str, Any]:
    """The fields of a `Sample` that come from a judgement of `text`."""
    result = score(example.rubric, judgement.verdicts, example.scoring, text)
    return {
        "domain": example.domain or "",
        "tags": tuple(example.tags),
        "judged_text": text,
        "score": result.value,
        "coverage": result.coverage,
        "judge": judge.name,
        "verdict_key": verdict_key(example, text, judge),
        "verdicts": tuple(
            CriterionVerdict(c.text, c.weight, v.met, v.grade, v.reason, tuple(c.tags))
            for c, v in zip(example.rubric, judgement.verdicts, strict=True)
        ),
        "replies": tuple(judgement.replies),
        "usage": judgement.usage,
        "problem": judgement.problem,
    }


def check_coverage(samples: Sequence[Sample], least: float) -> None:
    """Refuse a score that rests on too few verdicts.

    Raises:
        JudgeError: If the judge scored a smaller share of the arm's criteria than `least`; it counts the reasons.
    """
    verdicts = [v for s in samples for v in s.verdicts]
    n_scored = sum(v.value is not None for v in verdicts)
    if not verdicts or n_scored / len(verdicts) >= least:
        return
    problems = Counter(s.problem or "unknown" for s in samples if s.coverage < 1)
    reasons = ", ".join(f"{count} {problem}" for problem, count in problems.most_common())
    raise JudgeError(
        f"the judge scored {100 * n_scored / len(verdicts):.1f} % of the criteria of arm {samples[0].arm!r}; "
        f"min_coverage is {100 * least:.1f} %. Responses with unscored criteria: {reasons}. Their scores cannot be "
        f"trusted: run the same command again to judge only those, or look at the judge's replies in {SAMPLES}"
    )
