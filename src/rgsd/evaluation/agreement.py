"""`rgsd judge check`: a judge against human verdicts, and one judge mode against the other."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgsd.errors import ConfigError, DataError, JudgeError, JudgeUnreachable
from rgsd.evaluation import statistics
from rgsd.evaluation.agreement_words import SIGNS, sentences
from rgsd.evaluation.samples import is_met
from rgsd.evaluation.statistics import (
    Estimate,
    agreement,
    agreement_of_counts,
    confusion,
    count_difference,
    ratio,
)
from rgsd.judges import Judge, JudgeConfig, Usage, build_judge, try_out
from rgsd.judges.config import MODES
from rgsd.judges.labelled import Labelled, LabelledSet, group, read_labelled
from rgsd.judges.llm import LLMJudge
from rgsd.progress import counting, say
from rgsd.settings import setting


@dataclass(frozen=True, slots=True)
class JudgedItems:
    """A judge's verdicts on labelled items.

    Args:
        mode: The judge mode.
        judge: The judge's name.
        met: One verdict per item; None if unscored.
        problems: Why items are unscored, with counts.
        usage: What judging cost.
        n_responses: Number of judged responses.
    """

    mode: str
    judge: str
    met: list[bool | None]
    problems: dict[str, int]
    usage: Usage
    n_responses: int


@dataclass
class AgreementConfig:
    """How a judge is compared with human verdicts."""

    modes: list[str] = setting(list(MODES), "Judge modes to check: batched, per_criterion or both.")
    max_prompts: int | None = setting(None, "Check on this many prompts, drawn by the seed. Unset: all.")
    seed: int = setting(0, "Seed of the draw and of the bootstrap.")
    output: str | None = setting(None, "Write the whole result to this .json file.", aliases=["-o"])

    def __post_init__(self) -> None:
        self.modes = [mode for text in self.modes for mode in text.split(",") if mode]


def check_file(
    path: str | Path,
    config: JudgeConfig,
    *,
    modes: Sequence[str] = MODES,
    max_prompts: int | None = None,
    seed: int = 0,
    build: Callable[[JudgeConfig], Judge] = build_judge,
) -> dict[str, Any]:
    """Read human verdicts, run the judge in every mode, and compare them.

    Args:
        path: As `rgsd.judges.labelled.read_labelled` reads it.
        config: The judge; its mode is set to each of `modes`.
        modes: `batched`, `per_criterion` or both.
        max_prompts: Use this many prompts, drawn by the seed; None: all.
        seed: Seed of that draw and of the bootstrap.
        build: Makes the judge.

    Raises:
        ConfigError: If the judge cannot judge such data, or a mode is unknown.
        DataError: If the file cannot be used.
        JudgeError: If the judge cannot continue. Its cache keeps the paid replies, and the same command continues.
    """
    if not config.is_llm:
        raise ConfigError(
            f"judge must be an LLM, got {config.judge!r}: labelled criteria have no programmatic checks. Name the LLM "
            "to compare with people, for example --judge openai/gpt-5.4"
        )
    if not modes or any(m not in MODES for m in modes):
        raise ConfigError(f"modes must be {' or '.join(MODES)} or both, got {list(modes)}")
    labelled = sampled(read_labelled(path), max_prompts, seed)
    say(f"{path} ({labelled.form}): {_numbers(labelled)}")
    judges = {mode: build(dataclasses.replace(config, judge_mode=mode)) for mode in modes}
    for judge in judges.values():
        try_out(judge, lazily=True)
    table = check(labelled, judges, seed=seed)
    fields = ("judge", "judge_strictness", "judge_temperature", "judge_reasoning_effort", "judge_sample")
    return table | {
        "labelled": str(path),
        "max_prompts": max_prompts,
        "judge_settings": {name: getattr(config, name) for name in fields},
    }


def sampled(labelled: LabelledSet, max_prompts: int | None, seed: int) -> LabelledSet:
    """The items of `max_prompts` prompts, drawn by the seed, in their order."""
    keys = list(dict.fromkeys(item.prompt_key for item in labelled.items))
    if max_prompts is None or max_prompts >= len(keys):
        return labelled
    if max_prompts < 1:
        raise ConfigError(f"max_prompts must be at least 1, got {max_prompts}")
    chosen = {keys[i] for i in np.random.default_rng(seed).permutation(len(keys))[:max_prompts]}
    return dataclasses.replace(labelled, items=tuple(i for i in labelled.items if i.prompt_key in chosen))


def _numbers(labelled: LabelledSet) -> str:
    items = labelled.items
    n_prompts = len({i.prompt_key for i in items})
    people = sum(len(i.labels) for i in items)
    return (
        f"{len(items):,} criteria of {len(group(items)):,} responses to {n_prompts:,} prompts, "
        f"with {people:,} verdicts of people"
    )


def check(labelled: LabelledSet, judges: Mapping[str, Judge], *, seed: int = 0) -> dict[str, Any]:
    """Judge every labelled criterion with each judge, and compare it with the people and with the other judges.

    Args:
        labelled: Criteria with human verdicts. Each response is one task with all of its criteria.
        judges: Mode -> judge; normally one model in two modes.
        seed: Seed of the bootstrap over prompts.

    Returns:
        `n_*` counts; `humans`: agreement of the people with each other; `modes`: one `report` per mode; `between`: each
        later mode against the first; `sentences`: the result in plain words.

    Raises:
        JudgeError: If every judge failed: it could not continue, or scored nothing. If only one of several failed, the
            others are reported, and `failures` holds its error by mode.
    """
    items = labelled.items
    if not items:
        raise DataError("a check needs at least one labelled criterion, got none: pass a file with human verdicts")
    judged, failures = _judge_all(judges, items)
    table: dict[str, Any] = {
        "kind": "judge check",
        "form": labelled.form,
        "n_items": len(items),
        "n_prompts": len({i.prompt_key for i in items}),
        "n_responses": judged[0].n_responses,
        "n_labels": sum(len(i.labels) for i in items),
        "n_ties": sum(i.majority is None for i in items),
        "n_without_label": labelled.n_without_label,
        "seed": seed,
        "n_resamples": statistics.N_RESAMPLES,
        "humans": asdict(agreement_of_counts(_people_counts(items), seed=seed)),
        "modes": [report(items, mode, seed=seed) for mode in judged],
        "between": [between(items, judged[0], other, seed=seed) for other in judged[1:]],
        "failures": failures,
    }
    return table | {"sentences": sentences(table)}


def _judge_all(judges: Mapping[str, Judge], items: Sequence[Labelled]) -> tuple[list[JudgedItems], dict[str, str]]:
    """The verdicts of every mode that worked, and the errors of the others.

    Raises:
        JudgeError: The first error, if all modes failed.
    """
    judged, errors = [], {}
    for mode, judge in judges.items():
        try:
            judged.append(_judge(mode, judge, items))
        except JudgeError as error:
            errors[mode] = error
            if isinstance(error, JudgeUnreachable):
                # One server serves all modes: waiting for it once is enough.
                for other in judges.values():
                    if isinstance(other, LLMJudge):
                        other.assume_unreachable(error)
    if not judged:
        raise next(iter(errors.values()))
    return judged, {mode: str(error) for mode, error in errors.items()}


def _judge(mode: str, judge: Judge, items: Sequence[Labelled]) -> JudgedItems:
    groups = group(items)
    met: list[bool | None] = [None] * len(items)
    problems: Counter[str] = Counter()
    with counting(f"{judge.name}: judgements", len(groups)) as counter:
        judgements = judge.judge_all([(g.example, g.response) for g in groups], done=lambda i, j: counter.advance())
    usage = Usage()
    for response, judgement in zip(groups, judgements, strict=True):
        usage += judgement.usage
        for position, verdict in zip(response.positions, judgement.verdicts, strict=True):
            met[position] = is_met(verdict)
            if met[position] is None:
                problems[judgement.problem or "unknown"] += 1
    if all(m is None for m in met):
        reasons = ", ".join(f"{count} {problem}" for problem, count in problems.most_common())
        raise JudgeError(
            f"{judge.name} scored none of {len(items)} criteria ({reasons}): check the judge's address, model and key, "
            "then run the same command again"
        )
    return JudgedItems(mode, judge.name, met, dict(problems.most_common()), usage, len(groups))


def report(items: Sequence[Labelled], judged: JudgedItems, *, seed: int = 0) -> dict[str, Any]:
    """A judge against the people, in numbers that JSON can hold.

    Against the majority, without ties: `agreement`, `by_category`, `by_tag`, and `error_rates` by the weight's sign.
    Against single people, on criteria that several people judged, weighted by their number: `pairwise`. The people
    against each other, on the same criteria: `people_pairwise`. The judge minus the people: `minus_people`, which shows
    whether the judge is as good as one more person. Agreement with a majority does not show that.
    """
    decided = [
        (item, item.majority, met)
        for item, met in zip(items, judged.met, strict=True)
        if item.majority is not None and met is not None
    ]
    n_unscored = sum(met is None for met in judged.met)
    several = [(i, met) for i, met in zip(items, judged.met, strict=True) if len(i.labels) > 1 and met is not None]
    single_N4, people_N4 = _judge_counts(several), _people_counts([item for item, _ in several])
    measures = {
        "raw": statistics.raw_agreement,
        "kappa": statistics.cohens_kappa,
        "balanced_f1": statistics.balanced_f1,
    }
    return {
        "mode": judged.mode,
        "judge": judged.judge,
        "n_items": len(items),
        "n_compared": len(decided),
        "n_unscored": n_unscored,
        "unscored_share": n_unscored / len(items),
        "unscored": judged.problems,
        "agreement": _agreement(decided, seed),
        "error_rates": {sign: _error_rates(decided, sign, seed) for sign in SIGNS},
        "met_share": asdict(_share([(i, float(met)) for i, _, met in decided], seed)),
        "people_met_share": asdict(_share([(i, float(bool(m))) for i, m, _ in decided], seed)),
        "by_category": _grouped([((d[0].category,) if d[0].category else (), d) for d in decided], seed),
        "by_tag": _grouped([(d[0].tags, d) for d in decided], seed),
        "n_several": len(several),
        "pairwise": asdict(agreement_of_counts(single_N4, seed=seed)),
        "people_pairwise": asdict(agreement_of_counts(people_N4, seed=seed)),
        "minus_people": {
            name: asdict(count_difference(people_N4, single_N4, measure, seed=seed))
            for name, measure in measures.items()
        },
        "usage": asdict(judged.usage),
        "price_per_1000_responses": None
        if judged.usage.price is None or judged.usage.cached
        else 1000 * judged.usage.price / judged.n_responses,
    }


Decided = tuple[Labelled, bool | None, bool]
"""An item, the verdict of the majority, and the verdict of the judge."""


def _agreement(decided: Sequence[Decided], seed: int) -> dict[str, Any]:
    people, judge = [bool(m) for _, m, _ in decided], [met for _, _, met in decided]
    return asdict(agreement(people, judge, [i.prompt_key for i, _, _ in decided], seed=seed))


def _grouped(labelled: Sequence[tuple[Sequence[str], Decided]], seed: int) -> dict[str, Any]:
    groups: dict[str, list[Decided]] = {}
    for labels, decided in labelled:
        for label in labels:
            groups.setdefault(label, []).append(decided)
    return {label: _agreement(members, seed) for label, members in sorted(groups.items())}


def _error_rates(decided: Sequence[Decided], sign: str, seed: int) -> dict[str, Any]:
    """False positives: the share of what people call not met that the judge calls met. False negatives: the reverse."""
    chosen = [d for d in decided if sign in ("all", d[0].sign)]
    unmet = [(i, float(met)) for i, majority, met in chosen if not majority]
    met = [(i, float(not judged)) for i, majority, judged in chosen if majority]
    return {
        "false_positive": asdict(_share(unmet, seed)),
        "false_negative": asdict(_share(met, seed)),
        "n_not_met": len(unmet),
        "n_met": len(met),
    }


def _share(values: Sequence[tuple[Labelled, float]], seed: int, *, is_share: bool = True) -> Estimate:
    """Mean of the values with its interval over prompts; `is_share` if they are in [0, 1]."""
    over: Counter[str] = Counter()
    under: Counter[str] = Counter()
    for item, value in values:
        over[item.prompt_key] += value  # pyright: ignore
        under[item.prompt_key] += 1
    return ratio([over[k] for k in under], list(under.values()), is_share=is_share, seed=seed)


def _judge_counts(several: Sequence[tuple[Labelled, bool]]) -> np.ndarray:
    """The judge against each person, (N, 4) by prompt, as from `statistics.confusion`."""
    pairs = [(label, met, item.prompt_key) for item, met in several for label in item.labels]
    return confusion([p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs])


def _people_counts(items: Sequence[Labelled]) -> np.ndarray:
    """Each person against each other person, (N, 4) by prompt. A criterion with k people has weight k, as in
    `_judge_counts`."""
    position: dict[str, int] = {}
    several = [item for item in items if len(item.labels) > 1]
    for item in several:
        position.setdefault(item.prompt_key, len(position))
    counts_N4 = np.zeros((len(position), 4))
    for item in several:
        k, yes = len(item.labels), sum(item.labels)
        no = k - yes
        ordered_pairs = np.array([yes * (yes - 1), yes * no, no * yes, no * (no - 1)], np.float64)
        counts_N4[position[item.prompt_key]] += ordered_pairs / (k - 1)
    return counts_N4


def between(items: Sequence[Labelled], first: JudgedItems, other: JudgedItems, *, seed: int = 0) -> dict[str, Any]:
    """The second mode minus the first, on criteria that both scored; people count where they do not tie."""
    both = [
        (item, a, b) for item, a, b in zip(items, first.met, other.met, strict=True) if a is not None and b is not None
    ]
    keys = [item.prompt_key for item, _, _ in both]
    decided = [(item, item.majority, a, b) for item, a, b in both if item.majority is not None]
    decided_keys = [item.prompt_key for item, *_ in decided]
    truth = [bool(m) for _, m, _, _ in decided]
    first_N4 = confusion(truth, [a for *_, a, _ in decided], decided_keys)
    other_N4 = confusion(truth, [b for *_, b in decided], decided_keys)
    return {
        "first": first.mode,
        "other": other.mode,
        "n": len(both),
        "met_share_difference": asdict(
            _share([(item, float(b) - float(a)) for item, a, b in both], seed, is_share=False)
        ),
        "agreement_difference": asdict(count_difference(first_N4, other_N4, statistics.raw_agreement, seed=seed)),
        "balanced_f1_difference": asdict(count_difference(first_N4, other_N4, statistics.balanced_f1, seed=seed)),
        "agreement": asdict(agreement([a for _, a, _ in both], [b for *_, b in both], keys, seed=seed)),
    }
