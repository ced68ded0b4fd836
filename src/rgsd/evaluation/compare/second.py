"""A second opinion: the same responses under another judge, and whether the result survives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rgsd import data as rubric_data
from rgsd.errors import ConfigError, DataError, JudgeError, RunError
from rgsd.evaluation.arms import judged_fields
from rgsd.evaluation.compare.arms import choose_judge, common_judges, shared_prompts
from rgsd.evaluation.compare.changes import by_criterion
from rgsd.evaluation.conclusions import conclude
from rgsd.evaluation.run_ref import EvalArm
from rgsd.evaluation.samples import Sample, append_sample
from rgsd.evaluation.statistics import Agreement, agreement, interval
from rgsd.evaluation.summaries import paired_difference, usage_totals
from rgsd.judges import Judge, JudgeConfig, Judgement
from rgsd.progress import counting, say
from rgsd.rubrics import Example
from rgsd.runs import SAMPLES, hold


@dataclass(frozen=True, slots=True)
class SecondJudge:
    """A judge that judges stored responses before they are compared.

    Args:
        config: Its settings.
        data, schema: Rubric data, if the data is no longer where the run says.
        build: Makes the judge; None: `rgsd.judges.build_judge`.
    """

    config: JudgeConfig
    data: str | None = None
    schema: str | None = None
    build: Callable[[JudgeConfig], Judge] | None = None


# --- What a second judge says ---------------------------------------------------------------------------------------


def second_opinion(
    arms: Sequence[EvalArm], judge: str, other: str, ids: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """What another judge says of the same responses, and whether the ranking survives.

    Agreement covers every criterion of every arm that both judges scored, with the first judge as the reference.
    Scores, differences and rankings cover the prompts that both judges scored for all arms.
    """
    firsts = [{i: a.by_judge[judge][i] for i in ids} for a in arms]
    seconds, n_other_text = [], 0
    for arm, first in zip(arms, firsts, strict=True):
        samples = {i: arm.by_judge[other][i] for i in ids if i in arm.by_judge[other]}
        same = {i: s for i, s in samples.items() if s.judged_text == first[i].judged_text}
        n_other_text += len(samples) - len(same)
        seconds.append(same)
    pairs = [_verdict_pairs(a, b) for a, b in zip(firsts, seconds, strict=True)]
    every_pair = [pair for part in pairs for pair in part]
    both = [
        i
        for i in ids
        if all(
            a[i].score is not None and i in b and b[i].score is not None for a, b in zip(firsts, seconds, strict=True)
        )
    ]
    labels = [a.label for a in arms]
    opinion: dict[str, Any] = {
        "judge": other,
        "n_prompts": len(both),
        "n_other_response": n_other_text,
        "agreement": asdict(_agreement(every_pair, seed)),
        "agreement_by_run": {label: asdict(_agreement(part, seed)) for label, part in zip(labels, pairs, strict=True)},
        "met_share": _met_share(every_pair),
        "usage": usage_totals([s for samples in seconds for s in samples.values()]),
    }
    if not both:
        return opinion | {"scores": {}, "differences": [], "rankings": None, "is_ranking_kept": None}
    scored = {
        name: [[samples[i] for i in both] for samples in side] for name, side in ((judge, firsts), (other, seconds))
    }
    return opinion | _rankings(labels, scored, judge, other, seed)


Scored = Mapping[str, Sequence[Sequence[Sample]]]
"""Judge -> each arm's samples of the same prompts."""


def _rankings(labels: Sequence[str], scored: Scored, judge: str, other: str, seed: int) -> dict[str, Any]:
    scores = {
        name: [
            interval([s.score for s in own if s.score is not None], scoring=own[0].scoring, seed=seed) for own in arms
        ]
        for name, arms in scored.items()
    }
    rankings = {
        name: [labels[k] for k in np.argsort([-v.mean for v in values], kind="stable")]
        for name, values in scores.items()
    }
    differences = []
    for k, label in enumerate(labels[1:], 1):
        first, second = (paired_difference(arms[0], arms[k], seed=seed) for arms in (scored[judge], scored[other]))
        assert first is not None
        assert second is not None
        differences.append(
            {
                "run": label,
                "against": labels[0],
                "first": asdict(first),
                "second": asdict(second),
                "is_sign_kept": bool(np.sign(first.mean) == np.sign(second.mean)),
                "conclusion_first": str(conclude(first)),
                "conclusion_second": str(conclude(second)),
            }
        )
    return {
        "scores": {name: dict(zip(labels, map(asdict, values), strict=True)) for name, values in scores.items()},
        "differences": differences,
        "rankings": rankings,
        "is_ranking_kept": rankings[judge] == rankings[other],
    }


@dataclass(frozen=True, slots=True)
class _VerdictPair:
    """What two judges say of one criterion of a prompt's response."""

    prompt: str
    first: bool
    second: bool


def _verdict_pairs(first: Mapping[str, Sample], second: Mapping[str, Sample]) -> list[_VerdictPair]:
    pairs = []
    for i, sample in second.items():
        others = by_criterion(sample)
        for key, verdict in by_criterion(first[i]).items():
            other = others[key].is_met if key in others else None
            if verdict.is_met is not None and other is not None:
                pairs.append(_VerdictPair(i, verdict.is_met, other))
    return pairs


def _agreement(pairs: Sequence[_VerdictPair], seed: int) -> Agreement:
    return agreement([p.first for p in pairs], [p.second for p in pairs], [p.prompt for p in pairs], seed=seed)


def _met_share(pairs: Sequence[_VerdictPair]) -> dict[str, float] | None:
    if not pairs:
        return None
    return {"first": sum(p.first for p in pairs) / len(pairs), "second": sum(p.second for p in pairs) / len(pairs)}


# --- Judging stored responses ---------------------------------------------------------------------------------------


def load_examples(arm: EvalArm, data: str | None = None, schema: str | None = None) -> dict[str, Example]:
    """The examples of a run's data by id, from the place in its settings or from `data`.

    Raises:
        RunError: If its settings do not name the data.
        DataError: If the data cannot be read.
    """
    settings = arm.run.settings
    source = data or settings.get("data")
    if not source:
        raise RunError(f"the settings of {arm.run.folder} name no data: pass its rubric data with --data")
    if data is None:
        schema = settings.get("schema")
    loaded = rubric_data.load(source, schema=schema, split=settings.get("data_split"), skip_bad_rows=True)
    return {e.id: e for e in loaded.examples}


def rejudge(
    samples: Sequence[Sample],
    examples: Mapping[str, Example],
    judge: Judge,
    done: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Judge the responses of samples again.

    Args:
        samples: Samples of any judge.
        examples: Their examples by id.
        judge: The new judge.
        done: Called with each new sample on arrival, in any order.

    Returns:
        One new sample per sample, in their order.

    Raises:
        DataError: If an example is missing, or differs from the sample's.
        JudgeError: If the judge cannot continue. `done` has received what was judged.
    """
    chosen = [_example_of(sample, examples) for sample in samples]
    judged: dict[int, Sample] = {}
    with counting(f"{judge.name}: judgements", len(samples)) as counter:

        def store(i: int, judgement: Judgement) -> None:
            fields = judged_fields(chosen[i], samples[i].judged_text, judge, judgement)
            judged[i] = replace(samples[i], **fields)
            if done is not None:
                done(judged[i])
            counter.advance()

        judge.judge_all([(e, s.judged_text) for e, s in zip(chosen, samples, strict=True)], done=store)
    return [judged[i] for i in sorted(judged)]


def _example_of(sample: Sample, examples: Mapping[str, Example]) -> Example:
    example = examples.get(sample.example_id)
    remedy = "pass the data that the run was measured on with --data"
    if example is None:
        raise DataError(
            f"example {sample.example_id!r} is not among the {len(examples)} examples of the data: {remedy}"
        )
    criteria = [v.criterion for v in sample.verdicts]
    if [c.text for c in example.rubric] != criteria or example.messages[-1]["content"] != sample.question:
        raise DataError(f"example {sample.example_id!r} has another prompt or rubric than the run's sample: {remedy}")
    return example


@dataclass(frozen=True, slots=True)
class SecondPlan:
    """What a new judge is to judge, and its part in the comparison.

    Args:
        by: The judge to compare by, once it has judged.
        judge2: The new judge, if it is the second one; empty if it is the only judge of all arms.
        ids: The examples to judge; None: all.
    """

    by: str
    judge2: list[str]
    ids: list[str] | None


def plan_second(arms: Sequence[EvalArm], name: str, by: str | None = None) -> SecondPlan:
    """A second opinion on the compared prompts; or the first opinion, if no judge judged all arms.

    Raises:
        ConfigError: If the judge is the one to compare by.
        RunError: If there is nothing to compare.
    """
    others = [j for j in common_judges(arms) if j != name]
    is_first_everywhere = all(next(iter(a.by_judge)) == name for a in arms)
    if by == name or is_first_everywhere:
        raise ConfigError(
            f"judge is {name!r}, whose verdicts are compared: name another judge, or compare by another one with --by"
        )
    if not others and by is None:
        return SecondPlan(by=name, judge2=[], ids=None)
    judge = choose_judge(arms, by or others[0])
    return SecondPlan(by=judge, judge2=[name], ids=shared_prompts(arms, judge).ids)


def unjudged(arm: EvalArm, judge: str, ids: Sequence[str] | None = None) -> list[Sample]:
    """The samples, by the arm's first judge, whose responses a judge has not fully judged.

    Args:
        arm: The arm.
        judge: The judge's name.
        ids: Only these examples; None: all.
    """
    complete = {i for i, s in arm.by_judge.get(judge, {}).items() if not s.problem}
    samples = {i: s for judged in reversed(arm.by_judge.values()) for i, s in judged.items()}
    return [samples[i] for i in (samples if ids is None else ids) if i in samples and i not in complete]


def judge_again(arm: EvalArm, judge: Judge, examples: Mapping[str, Example], samples: Sequence[Sample]) -> None:
    """Let a judge judge stored responses. The run and the arm's `by_judge` get its samples, one by one.

    Args:
        arm: The arm.
        judge: The new judge.
        examples: The examples by id.
        samples: What `unjudged` returns.

    Raises:
        DataError, JudgeError: As `rejudge`.
        RunError: If another process writes to the run.
    """
    hold(arm.run.folder)
    target = arm.by_judge.setdefault(judge.name, {})

    def store(sample: Sample) -> None:
        append_sample(arm.run, sample)
        target[sample.example_id] = sample

    try:
        rejudge(samples, examples, judge, done=store)
    except (JudgeError, KeyboardInterrupt):
        say(f"What was judged is in {arm.run.folder / SAMPLES}; the same command continues from there.")
        raise
