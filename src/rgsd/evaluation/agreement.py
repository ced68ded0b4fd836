"""`rgsd judge check`: a judge against human verdicts, and one judge mode against the other."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rgsd.errors import ConfigError, DataError, JudgeError
from rgsd.evaluation import statistics
from rgsd.evaluation.conclusions import Conclusion, conclude, describe, points
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
from rgsd.progress import counting, say
from rgsd.settings import setting

SIGNS = ("all", "positive", "pitfall", "unstated")
SHOWN_GROUPS = 12
ENOUGH_SCORED = 0.95
EFFECTS = {
    "positive": ("gives points unearned", "withholds points"),
    "pitfall": ("takes points off unjustly", "lets pitfalls pass"),
}
"""What a false positive and a false negative do to a score, by the sign of the weight."""


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


def sentences(table: Mapping[str, Any]) -> list[str]:
    """The result of a check in plain words."""
    lines = []
    ties = f"; {table['n_ties']:,} criteria on which people tie are excluded" if table["n_ties"] else ""
    for mode in table["modes"]:
        a = mode["agreement"]
        lines.append(
            f"{mode['judge']} agrees with the people on {_percent(a['raw'])} of {a['n']:,} criteria; Cohen's kappa "
            f"{describe(a['kappa'])}, balanced F1 {describe(a['balanced_f1'])}{ties}."
        )
        if mode["n_several"]:
            lines.append(_against_people(mode))
        lines += _by_sign(mode)
        if mode["unscored_share"] > 1 - ENOUGH_SCORED:
            reasons = ", ".join(f"{count} {problem}" for problem, count in mode["unscored"].items())
            lines.append(
                f"It left {100 * mode['unscored_share']:.1f} % of the criteria unscored ({reasons}). The figures cover "
                "the rest, which may be easier."
            )
    lines += [_between_sentence(difference, table) for difference in table["between"]]
    lines += [f"Mode {mode} failed: {error}" for mode, error in table["failures"].items()]
    return lines


def _against_people(mode: Mapping[str, Any]) -> str:
    difference = mode["minus_people"]["raw"]
    start = (
        f"On {mode['n_several']:,} criteria that several people judged, it agrees with one person on "
        f"{_percent(mode['pairwise']['raw'])}, and two people with each other on "
        f"{_percent(mode['people_pairwise']['raw'])}"
    )
    if difference["low"] is None:
        return f"{start}."
    ends = {
        Conclusion.BETTER: "it agrees with people more than they do with each other",
        Conclusion.WORSE: "it is below the ceiling set by people",
        Conclusion.NOT_SHOWN: "no difference is shown between it and one more person",
        Conclusion.TOO_FEW: str(Conclusion.TOO_FEW),
    }
    return f"{start} (judge minus people: {points(difference)}): {ends[conclude(difference)]}."


def _by_sign(mode: Mapping[str, Any]) -> list[str]:
    lines = []
    for sign, name in (("positive", "criteria of positive weight"), ("pitfall", "pitfalls")):
        rates = mode["error_rates"][sign]
        if rates["n_met"] + rates["n_not_met"] == 0:
            continue
        effect = EFFECTS[sign]
        lines.append(
            f"On {name} it says met where people do not in {_percent(rates['false_positive'])} of "
            f"{rates['n_not_met']:,} ({effect[0]}), and not met where people say met in "
            f"{_percent(rates['false_negative'])} of {rates['n_met']:,} ({effect[1]})."
        )
    return lines


def _between_sentence(between: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    shares = {mode["mode"]: mode["met_share"] for mode in table["modes"]}
    people = table["modes"][0]["people_met_share"]
    d = between["met_share_difference"]
    match conclude(d):
        case Conclusion.BETTER | Conclusion.WORSE as way:
            tendency = f"{between['first'] if way is Conclusion.BETTER else between['other']} is stricter"
        case Conclusion.NOT_SHOWN:
            tendency = "no difference in strictness is shown"
        case too_few:
            tendency = f"{too_few} which mode is stricter"
    closer = {Conclusion.BETTER: between["other"], Conclusion.WORSE: between["first"]}.get(
        conclude(between["balanced_f1_difference"])
    )
    better = f" {closer} is closer to the people." if closer else ""
    first, other = between["first"], between["other"]
    return (
        f"In mode {first} it says met in {_percent(shares[first])}, in mode {other} in {_percent(shares[other])}, "
        f"people in {_percent(people)}; {other} minus {first} on the same criteria: {points(d)}: {tendency}.{better} The two "
        f"modes agree on {_percent(between['agreement']['raw'])} (kappa {describe(between['agreement']['kappa'])}): "
        "never mix their scores."
    )


def _percent(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "an undefined share"
    if estimate["low"] is None:
        return f"{100 * estimate['value']:.1f} %"
    return f"{100 * estimate['value']:.1f} % ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def show(table: Mapping[str, Any]) -> None:
    """Print a check: the modes, their errors by sign, the largest categories or tags, and the sentences."""
    console = Console(width=118)
    view = _view("Judge against people (95 % interval over prompts)", "", *(m["mode"] for m in table["modes"]))
    lines: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("criteria compared", lambda m: f"{m['n_compared']:,}"),
        ("agreement with the majority", lambda m: _percent(m["agreement"]["raw"])),
        ("Cohen's kappa", lambda m: _short(m["agreement"]["kappa"])),
        ("balanced F1", lambda m: _short(m["agreement"]["balanced_f1"])),
    ]
    if any(m["n_several"] for m in table["modes"]):
        lines += [
            ("agreement with one person", lambda m: _percent(m["pairwise"]["raw"])),
            ("  balanced F1", lambda m: _short(m["pairwise"]["balanced_f1"])),
            ("two people with each other", lambda m: _percent(m["people_pairwise"]["raw"])),
            ("  balanced F1", lambda m: _short(m["people_pairwise"]["balanced_f1"])),
        ]
    for sign in SIGNS:
        if all(m["error_rates"][sign]["n_met"] + m["error_rates"][sign]["n_not_met"] == 0 for m in table["modes"]):
            continue
        lines += [
            (f"false positives, {sign}", lambda m, s=sign: _rate(m["error_rates"][s], "false_positive")),
            (f"false negatives, {sign}", lambda m, s=sign: _rate(m["error_rates"][s], "false_negative")),
        ]
    lines += [
        ("says met", lambda m: _percent(m["met_share"])),
        ("people say met", lambda m: _percent(m["people_met_share"])),
        ("unscored", lambda m: f"{100 * m['unscored_share']:.1f} %"),
        ("requests (from the cache)", lambda m: f"{m['usage']['calls']:,} ({m['usage']['cached']:,})"),
        ("US dollars", lambda m: "unknown" if m["usage"]["price"] is None else f"{m['usage']['price']:.4f}"),
    ]
    for name, cell in lines:
        view.add_row(name, *(cell(m) for m in table["modes"]))
    console.print(view)
    for key, title in (("by_category", "category"), ("by_tag", "criterion tag")):
        if table["modes"][0][key]:
            console.print(_group_view(table["modes"], key, title))
    for sentence in table["sentences"]:
        say(sentence)


def _rate(rates: Mapping[str, Any], name: str) -> str:
    return "-" if rates[name]["value"] is None else _percent(rates[name])


def _short(estimate: Mapping[str, Any]) -> str:
    return "-" if estimate["value"] is None else describe(estimate)


def _group_view(modes: Sequence[Mapping[str, Any]], key: str, title: str) -> Table:
    groups = modes[0][key]
    largest = sorted(groups, key=lambda g: (-groups[g]["n"], g))[:SHOWN_GROUPS]
    rest = f"; the {len(largest)} largest of {len(groups)}" if len(groups) > len(largest) else ""
    view = _view(f"By {title}{rest}", title, "criteria", *(f"{m['mode']}: balanced F1" for m in modes))
    for name in largest:
        cells = [_short(m[key][name]["balanced_f1"]) if name in m[key] else "-" for m in modes]
        view.add_row(name, f"{groups[name]['n']:,}", *cells)
    return view


def _view(title: str, first: str, *columns: str) -> Table:
    view = Table(title=title)
    view.add_column(first)
    for column in columns:
        view.add_column(column, justify="right")
    return view
