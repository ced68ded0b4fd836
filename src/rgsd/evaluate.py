"""Evaluation: prompts -> responses -> judgements -> rows, kept one by one, so that a killed evaluation goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rgsd.errors import JudgeError
from rgsd.generation import Generator, Response
from rgsd.judges import Judge, Judgement
from rgsd.progress import counting
from rgsd.rubrics import Example, score
from rgsd.runs import RESPONSES, SAMPLES, Run
from rgsd.statistics import latest
from rgsd.thinking import CLOSE_TAG, OPEN_TAG, strip_thinking


def measure(
    run: Run,
    arm: str,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[Mapping[str, str]]],
    generator: Generator | None,
    judge: Judge,
    *,
    think_tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
) -> list[dict[str, Any]]:
    """Generate and judge one arm into the run's responses.jsonl and samples.jsonl; what lies there already is kept.

    A response is written as soon as it is there, a judgement likewise. Rows that the judge left unscored are judged
    again; all others are neither generated nor judged twice.

    Args:
        run: where rows are kept.
        arm: the arm's name: what is measured, and what it is shown.
        examples, prompts: one prompt an example, as the model reads it.
        generator: writes the responses; None when all of them are there.
        judge: gives the verdicts.
        think_tags: of the reasoning, which is taken out before judging.

    Returns:
        one row an example, in their order.

    Raises:
        JudgeError: when the judge cannot go on; what was judged is in the run.
    """
    responses = stored_responses(run, arm)
    missing = [i for i, e in enumerate(examples) if e.id not in responses]
    if missing:
        if generator is None:
            raise JudgeError(f"{len(missing)} examples have no response in arm {arm!r}, and no model was given")
        with counting(f"{arm}: responses", len(missing)) as counter:

            def keep(i: int, response: Response) -> None:
                example = examples[missing[i]]
                responses[example.id] = response
                run.append(RESPONSES, [{"arm": arm, "example_id": example.id, **asdict(response)}])
                counter.advance()

            generator.generate([prompts[i] for i in missing], done=keep)

    rows = {
        r["example_id"]: r
        for r in latest(run.read_lines(SAMPLES))
        if r["arm"] == arm and r["judge"] == judge.name and not r.get("problem")
    }
    unjudged = [e for e in examples if e.id not in rows]
    if unjudged:
        texts = [_judged_text(responses[e.id], think_tags) for e in unjudged]
        with counting(f"{arm}: judgements", len(unjudged)) as counter:

            def keep_row(i: int, judgement: Judgement) -> None:
                example = unjudged[i]
                row = _row(arm, example, responses[example.id], texts[i], judge.name, judgement)
                rows[example.id] = row
                run.append(SAMPLES, [row])
                counter.advance()

            judge.judge_all(list(zip(unjudged, texts, strict=True)), done=keep_row)
    return [rows[e.id] for e in examples]


def stored_responses(run: Run, arm: str) -> dict[str, Response]:
    """The responses of an arm that the run holds, by example."""
    return {
        r["example_id"]: Response(r["text"], r["n_tokens"], r["is_truncated"], r["is_opened"])
        for r in run.read_lines(RESPONSES)
        if r["arm"] == arm
    }


def _judged_text(response: Response, think_tags: tuple[str, str]) -> str:
    """The response without its reasoning; one that never left it is judged as an empty one."""
    return strip_thinking(response.text, *think_tags, opened=response.is_opened)


def judge_responses(
    examples: Sequence[Example],
    responses: Sequence[Response],
    judge: Judge,
    *,
    arm: str,
    think_tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
) -> list[dict[str, Any]]:
    """One row a response: the response, every verdict with its criterion, the score, its coverage and its cost."""
    texts = [_judged_text(r, think_tags) for r in responses]
    judgements = judge.judge_all(list(zip(examples, texts, strict=True)))
    return [
        _row(arm, e, r, t, judge.name, j) for e, r, t, j in zip(examples, responses, texts, judgements, strict=True)
    ]


def _row(arm: str, example: Example, response: Response, text: str, judge: str, judgement: Judgement) -> dict[str, Any]:
    return {
        "arm": arm,
        "example_id": example.id,
        "scoring": example.scoring,
        "question": example.messages[-1]["content"],
        "response": response.text,
        "n_tokens": response.n_tokens,
        "is_truncated": response.is_truncated,
        **judged_fields(example, text, judge, judgement),
    }


def judged_fields(example: Example, text: str, judge: str, judgement: Judgement) -> dict[str, Any]:
    """What a judgement of a response, read as `text`, adds to its row."""
    result = score(example.rubric, judgement.verdicts, example.scoring, text)
    return {
        "domain": example.domain,
        "tags": list(example.tags),
        "judged_text": text,
        "score": result.value,
        "coverage": result.coverage,
        "judge": judge,
        "verdicts": [
            {"criterion": c.text, "weight": c.weight, "tags": list(c.tags), **asdict(v)}
            for c, v in zip(example.rubric, judgement.verdicts, strict=True)
        ],
        "replies": list(judgement.replies),
        "usage": asdict(judgement.usage),
        "problem": judgement.problem,
    }


def check_coverage(rows: Sequence[Mapping[str, Any]], least: float) -> None:
    """Refuse a score that rests on too few verdicts.

    Raises:
        JudgeError: when less than `least` of the criteria were scored, with the reasons and their counts.
    """
    n = sum(len(r["verdicts"]) for r in rows)
    n_scored = sum(v["met"] is not None or v["grade"] is not None for r in rows for v in r["verdicts"])
    if not n or n_scored / n >= least:
        return
    problems = Counter(r.get("problem") or "unknown" for r in rows if r["coverage"] < 1)
    reasons = ", ".join(f"{count} {problem}" for problem, count in problems.most_common())
    raise JudgeError(
        f"the judge scored {100 * n_scored / n:.1f} % of the criteria of arm {rows[0]['arm']!r}, at least "
        f"{100 * least:.1f} % are wanted (min_coverage). Responses with unscored criteria: {reasons}. Their scores are "
        "not to be trusted; run the same command again to judge those alone, or look into the judge's replies in "
        f"{SAMPLES}"
    )
