"""Evaluation: prompts -> responses -> judgements -> rows, kept one by one, so that a killed evaluation goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rgsd.errors import ConfigError, JudgeError
from rgsd.evaluation.statistics import latest
from rgsd.inference import Generator, Response, ResponseKey, digest
from rgsd.judges import Judge, Judgement
from rgsd.progress import counting, say
from rgsd.prompts.messages import reference_request
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, strip_thinking
from rgsd.rubrics import Example, score
from rgsd.runs import REFERENCES, RESPONSES, SAMPLES, SET_ASIDE, Run


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
    again; all others are neither generated nor judged twice. A stored response counts only if the same weights,
    settings and prompt made it, a stored verdict only if the same judge gave it on the same text and criteria; rows of
    which this is not so are moved to set-aside.jsonl, and their number is said.

    Args:
        run: where rows are kept.
        arm: the arm's name: what is measured, and what it is shown.
        examples, prompts: one prompt an example, as the model reads it.
        generator: writes the responses; None takes the stored ones as they are, all of which must be there.
        judge: gives the verdicts.
        think_tags: of the reasoning, which is taken out before judging.

    Returns:
        one row an example, in their order.

    Raises:
        JudgeError: when the judge cannot go on; what was judged is in the run.
    """
    ids = [e.id for e in examples]
    if generator is None:
        stored = _stored(run, arm)
        if missing := [i for i in ids if i not in stored]:
            raise JudgeError(f"{len(missing)} examples have no response in arm {arm!r}, and no model was given")
    else:
        stored = _respond(run, arm, ids, prompts, generator)
    texts = {e.id: _judged_text(stored[e.id].response, think_tags) for e in examples}
    rows = _judged(run, arm, examples, texts, judge)
    unjudged = [e for e in examples if e.id not in rows]
    if unjudged:
        with counting(f"{arm}: judgements", len(unjudged)) as counter:

            def keep_row(i: int, judgement: Judgement) -> None:
                example = unjudged[i]
                row = _row(arm, example, stored[example.id], texts[example.id], judge, judgement)
                rows[example.id] = row
                run.append(SAMPLES, [row])
                counter.advance()

            judge.judge_all([(e, texts[e.id]) for e in unjudged], done=keep_row)
    return [rows[e.id] for e in examples]


def respond(
    run: Run,
    arm: str,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[Mapping[str, str]]],
    generator: Generator,
) -> dict[str, Response]:
    """The responses of an arm by example, generated where responses.jsonl has none that counts; as in `measure`."""
    stored = _respond(run, arm, [e.id for e in examples], prompts, generator)
    return {i: s.response for i, s in stored.items()}


def _respond(
    run: Run, arm: str, ids: Sequence[str], prompts: Sequence[Sequence[Mapping[str, str]]], generator: Generator
) -> dict[str, _Stored]:
    keys = dict(zip(ids, generator.keys(prompts), strict=True))
    set_aside_stale(run, arm, keys)
    stored = _stored(run, arm)
    missing = [i for i, example_id in enumerate(ids) if example_id not in stored]
    if missing:
        with counting(f"{arm}: responses", len(missing)) as counter:

            def keep(i: int, response: Response) -> None:
                example_id = ids[missing[i]]
                key = asdict(keys[example_id])
                stored[example_id] = _Stored(response, key)
                run.append(RESPONSES, [{"arm": arm, "example_id": example_id, **asdict(response), "key": key}])
                counter.advance()

            generator.generate([prompts[i] for i in missing], done=keep)
    return stored


def references(
    run: Run,
    examples: Sequence[Example],
    generator: Generator,
    *,
    think_tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
    also: Run | None = None,
    keep: bool = True,
) -> dict[str, str]:
    """References that a base model writes from the rubrics, by example, without its reasoning.

    Args:
        run: keeps them in references.jsonl, from which they are taken again for the same weights, settings and prompt.
        examples: to write them for.
        generator: the base model.
        think_tags: of the reasoning.
        also: a run whose references, by the same weights from the same prompt, are taken too.
        keep: whether this process writes them into the run.

    Raises:
        ConfigError: when an answer is empty, as it is where the reasoning took all tokens.
    """
    prompts = [reference_request(e) for e in examples]
    keys = dict(zip((e.id for e in examples), generator.keys(prompts), strict=True))
    found: dict[str, Response] = {}
    for row in [*(also.read_lines(REFERENCES) if also else []), *run.read_lines(REFERENCES)]:
        key = keys.get(row["example_id"])
        if key is not None and all(row["key"].get(part) == getattr(key, part) for part in ("weights", "prompt")):
            is_same = row["key"].get("settings") == key.settings
            if is_same or (also is not None and row["example_id"] not in found):
                found[row["example_id"]] = _response_of(row)
    missing = [i for i, e in enumerate(examples) if e.id not in found]
    if missing:
        with counting("self-written references", len(missing)) as counter:

            def store(i: int, response: Response) -> None:
                example = examples[missing[i]]
                found[example.id] = response
                if keep:
                    key = asdict(keys[example.id])
                    run.append(REFERENCES, [{"example_id": example.id, **asdict(response), "key": key}])
                counter.advance()

            generator.generate([prompts[i] for i in missing], done=store)
    texts = {e.id: _judged_text(found[e.id], think_tags).strip() for e in examples}
    if empty := [i for i, text in texts.items() if not text]:
        n_cut = sum(found[i].is_truncated for i in empty)
        raise ConfigError(
            f"the base model wrote {len(empty)} of {len(examples)} references without an answer (first: "
            f"{', '.join(empty[:5])}), {n_cut} of them cut off before it: raise max_completion_length, or leave those "
            "prompts out"
        )
    return texts


def stored_references(run: Run) -> dict[str, str]:
    """The self-written references that a run holds, by example, without their reasoning."""
    tags = (run.settings.get("think_open_tag") or OPEN_TAG, run.settings.get("think_close_tag") or CLOSE_TAG)
    return {r["example_id"]: _judged_text(_response_of(r), tags).strip() for r in run.read_lines(REFERENCES)}


def _response_of(row: Mapping[str, Any]) -> Response:
    return Response(row["text"], row["n_tokens"], row["is_truncated"], row["starts_in_thinking"])


@dataclass(frozen=True, slots=True)
class _Stored:
    """A response that a run holds, and what it was made from; no key where the run does not say."""

    response: Response
    key: dict[str, str] | None


def _stored(run: Run, arm: str) -> dict[str, _Stored]:
    return {
        r["example_id"]: _Stored(_response_of(r), r.get("key")) for r in run.read_lines(RESPONSES) if r["arm"] == arm
    }


def stored_responses(run: Run, arm: str) -> dict[str, Response]:
    """The responses of an arm that the run holds, by example."""
    return {i: s.response for i, s in _stored(run, arm).items()}


def set_aside_stale(run: Run, arm: str, keys: Mapping[str, ResponseKey]) -> None:
    """Move an arm's responses and verdicts that do not count any more to set-aside.jsonl, and say how many.

    Args:
        run, arm: whose.
        keys: of the responses that count, by example; all others of this arm are stale.
    """
    wanted = {i: asdict(key) for i, key in keys.items()}

    def is_stale(row: Mapping[str, Any], field: str) -> bool:
        return row["arm"] == arm and (row["example_id"] not in wanted or row.get(field) != wanted[row["example_id"]])

    responses = [r for r in run.read_lines(RESPONSES) if is_stale(r, "key")]
    samples = [r for r in run.read_lines(SAMPLES) if is_stale(r, "response_key")]
    if not responses and not samples:
        return
    why = Counter(_difference(r.get("key"), wanted.get(r["example_id"])) for r in responses)
    why = why or Counter(_difference(r.get("response_key"), wanted.get(r["example_id"])) for r in samples)
    run.set_aside(SAMPLES, samples)  # first, so that no kill leaves a verdict whose response is gone
    run.set_aside(RESPONSES, responses)
    say(
        f"{arm}: {len(responses)} stored responses and {len(samples)} judged rows are set aside (in {SET_ASIDE}): "
        + ", ".join(f"{n} {reason}" for reason, n in why.most_common())
    )


def _difference(found: Mapping[str, str] | None, wanted: Mapping[str, str] | None) -> str:
    """Why a stored response does not count."""
    if wanted is None:
        return "to prompts that are not measured"
    if found is None:
        return "of unknown origin"
    for part, said in (("weights", "of other weights"), ("settings", "with other generation settings")):
        if found.get(part) != wanted[part]:
            return said
    return "to another prompt"


def _judged(
    run: Run, arm: str, examples: Sequence[Example], texts: Mapping[str, str], judge: Judge
) -> dict[str, dict[str, Any]]:
    """The judge's rows that count, by example. Those that do not, of whichever judge, are set aside."""
    wanted = {e.id: verdict_key(e, texts[e.id], judge) for e in examples}
    rows: dict[str, dict[str, Any]] = {}
    stale = []
    for row in latest(run.read_lines(SAMPLES)):
        key, found = wanted.get(row["example_id"]), row.get("verdict_key")
        if row["arm"] != arm or key is None:
            continue
        if row["judge"] == judge.name:
            is_stale = found != key
        else:  # another judge's settings are not known here; what it read is
            is_stale = found is not None and found["read"] != key["read"]
        if is_stale:
            stale.append(row)
        elif row["judge"] == judge.name and not row.get("problem"):
            rows[row["example_id"]] = row
    if stale:
        names = {(r["example_id"], r["judge"]) for r in stale}
        old = [r for r in run.read_lines(SAMPLES) if r["arm"] == arm and (r["example_id"], r["judge"]) in names]
        run.set_aside(SAMPLES, old)
        say(
            f"{arm}: {len(stale)} judged rows are set aside (in {SET_ASIDE}): the judge's settings, the criteria or "
            "the text that was judged were others"
        )
    return rows


def verdict_key(example: Example, text: str, judge: Judge) -> dict[str, str]:
    """What verdicts depend on, as digests: who judges and how, and what was read: conversation, criteria, response."""
    criteria = [[c.text, c.weight, c.title, list(c.tags), c.check] for c in example.rubric]
    read = [[dict(m) for m in example.messages], example.scoring, criteria, text]
    return {"judge": digest(getattr(judge, "identity", judge.name)), "read": digest(read)}


def _judged_text(response: Response, think_tags: tuple[str, str]) -> str:
    """The response without its reasoning; one that never left it is judged as an empty one."""
    return strip_thinking(response.text, *think_tags, starts_in_thinking=response.starts_in_thinking)


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
        _row(arm, e, _Stored(r, None), t, judge, j)
        for e, r, t, j in zip(examples, responses, texts, judgements, strict=True)
    ]


def _row(arm: str, example: Example, stored: _Stored, text: str, judge: Judge, judgement: Judgement) -> dict[str, Any]:
    response = stored.response
    return {
        "arm": arm,
        "example_id": example.id,
        "scoring": example.scoring,
        "question": example.messages[-1]["content"],
        "response": response.text,
        "n_tokens": response.n_tokens,
        "is_truncated": response.is_truncated,
        "response_key": stored.key,
        **judged_fields(example, text, judge, judgement),
    }


def judged_fields(example: Example, text: str, judge: Judge, judgement: Judgement) -> dict[str, Any]:
    """What a judgement of a response, read as `text`, adds to its row."""
    result = score(example.rubric, judgement.verdicts, example.scoring, text)
    return {
        "domain": example.domain,
        "tags": list(example.tags),
        "judged_text": text,
        "score": result.value,
        "coverage": result.coverage,
        "judge": judge.name,
        "verdict_key": verdict_key(example, text, judge),
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
