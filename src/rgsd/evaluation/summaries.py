"""Summaries of samples: one arm, two arms on the same prompts, and the table of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rgsd.errors import DataError
from rgsd.evaluation.conclusions import control_sentence, verdict_sentence
from rgsd.evaluation.samples import CriterionVerdict, Sample, read_samples
from rgsd.evaluation.statistics import Interval, interval, ratio
from rgsd.judges import ledger_usage
from rgsd.progress import say
from rgsd.rubrics import TAG_SCORINGS, Criterion, Rubric, Score, score
from rgsd.runs import CONTROL_ARM, JUDGE_REQUESTS, RESULTS, TRAINED, TRAINED_CONTROL, TRAINING_KINDS, Run

MOST_TEXTS = 100
"""Recurring criteria that are listed one by one, the most frequent first."""
MOST_PARTS = 16
"""Lines of the printed table of parts; results.json holds all of them."""
TAG_GROUPS = ("content", "safety", "form", "pitfall")
"""Tags that say what kind of criterion it is. Where the data have them, tables show these and leave finer tags out."""
CONTROL_WORDS = "control: trained on another prompt's rubric"
"""The twin's policy in tables."""
MOST_PAIRS = 3
"""Differences that the printed table by tag shows side by side."""
_PROVENANCE = ("commit", "dirty", "train_fingerprint", "held_out_fingerprint", "model_fingerprint", "command")


# --- One arm --------------------------------------------------------------------------------------------------------


def summarise(samples: Sequence[Sample], *, seed: int = 0) -> dict[str, Any]:
    """Summarise one arm under one judge, in numbers that JSON can hold.

    Args:
        samples: The arm's samples, one per example.
        seed: Seed of the bootstrap.

    Returns:
        arm; score (mean, low, high, n; None when nothing was scored); n_prompts; coverage (mean over prompts of the
        share of criteria scored); `scored` (shares of criteria and of prompts); `unscored` (responses with an unscored
        criterion, by problem); `by_criterion_tag`, `by_domain` and `by_example_tag` (scores); `criteria_by_tag` and
        `criteria_by_text` (shares met and satisfied); `lengths` in tokens and characters; mean_tokens;
        truncated_share; `usage` of the judge.

    Raises:
        DataError: Without a sample.
    """
    if not samples:
        raise DataError("an arm needs at least one sample for a summary, got none: evaluate it first")
    scoring = _scoring(samples)
    tokens = [s.n_tokens for s in samples if s.n_tokens is not None]
    return {
        "arm": samples[0].arm,
        "scoring": scoring,
        "score": mean_score(samples, seed=seed),
        "coverage": float(np.mean([s.coverage for s in samples])),
        "n_prompts": len(samples),
        "scored": scored_shares(samples),
        "unscored": dict(Counter(s.problem or "unknown" for s in samples if s.coverage < 1).most_common()),
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
        "truncated_share": truncated_share(samples),
        "by_criterion_tag": scores_by_criterion_tag(samples, seed=seed),
        "by_domain": scores_by([(s.domain or "(none)", s) for s in samples], seed=seed),
        "by_example_tag": scores_by([(tag, s) for s in samples for tag in s.tags], seed=seed),
        "criteria_by_tag": shares_by_tag(samples, seed=seed),
        "criteria_by_text": shares_by_text(samples, seed=seed),
        "lengths": {"tokens": spread(tokens), "characters": spread([len(s.judged_text) for s in samples])},
        "usage": usage_totals(samples),
    }


def _scoring(samples: Sequence[Sample]) -> str:
    """The samples' scoring. Samples of several scorings are averaged without clipping."""
    scorings = {s.scoring for s in samples}
    return scorings.pop() if len(scorings) == 1 else "satisfaction"


def mean_score(samples: Sequence[Sample], *, seed: int = 0) -> dict[str, Any] | None:
    """Mean score with its interval, as a dictionary; None when nothing was scored."""
    values = [s.score for s in samples if s.score is not None]
    return asdict(interval(values, scoring=_scoring(samples), seed=seed)) if values else None


def truncated_share(samples: Sequence[Sample]) -> float | None:
    """Share of the responses that were cut off; None when unknown."""
    truncated = [s.is_truncated for s in samples if s.is_truncated is not None]
    return float(np.mean(truncated)) if truncated else None


def scored_shares(samples: Sequence[Sample]) -> dict[str, Any]:
    """How much was scored: criteria, and prompts with a score."""
    values = [v.value for s in samples for v in s.verdicts]
    n_scored = sum(v is not None for v in values)
    n_prompts_scored = sum(s.score is not None for s in samples)
    return {
        "n_criteria": len(values),
        "n_criteria_scored": n_scored,
        "criteria_share": n_scored / len(values) if values else None,
        "n_prompts_scored": n_prompts_scored,
        "prompts_share": n_prompts_scored / len(samples) if samples else None,
    }


def scores_by(labelled: Iterable[tuple[str, Sample]], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The score of each group of samples, with its interval and its number of prompts."""
    groups: dict[str, list[Sample]] = {}
    for label, sample in labelled:
        groups.setdefault(label, []).append(sample)
    return {
        label: {"score": mean_score(group, seed=seed), "n_prompts": len(group)}
        for label, group in sorted(groups.items())
    }


def tag_score(sample: Sample, tag: str) -> Score | None:
    """A sample's score over only the criteria with a tag, as HealthBench scores an axis; None without such criteria.

    The length term of HealthBench Professional is left out, as its authors leave it out of their scores by tag.
    """
    verdicts = [v for v in sample.verdicts if tag in v.tags]
    if not verdicts:
        return None
    rubric = Rubric(tuple(Criterion(v.criterion, v.weight) for v in verdicts))
    scoring = TAG_SCORINGS.get(sample.scoring) or sample.scoring
    return score(rubric, [v.verdict for v in verdicts], scoring, sample.judged_text)


def criterion_tags(samples: Sequence[Sample]) -> list[str]:
    """The tags that criteria carry."""
    return sorted({tag for s in samples for v in s.verdicts for tag in v.tags})


def scores_by_criterion_tag(samples: Sequence[Sample], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Each tag's mean score over the prompts that have such criteria (`tag_score`), with its interval.

    A prompt whose criteria of the tag are all pitfalls, or all unscored, has no score for the tag and is not averaged.
    """
    table = {}
    scoring = _scoring(samples)
    for tag in criterion_tags(samples):
        scores = [s for sample in samples if (s := tag_score(sample, tag)) is not None]
        values = [s.value for s in scores if s.value is not None]
        table[tag] = {
            "score": asdict(interval(values, scoring=scoring, seed=seed)) if values else None,
            "n_prompts": len(scores),
            "n_criteria": sum(s.n_criteria for s in scores),
            "n_scored": sum(s.n_scored for s in scores),
        }
    return table


def shares_by_tag(samples: Sequence[Sample], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """How many of each tag's scored criteria were met, and satisfied (a pitfall is satisfied when it is not met)."""
    return {
        tag: _shares([[v for v in s.verdicts if tag in v.tags] for s in samples], seed)
        for tag in criterion_tags(samples)
    }


def shares_by_text(samples: Sequence[Sample], *, seed: int = 0) -> list[dict[str, Any]]:
    """The same for criteria whose text and sign recur in several prompts: the `MOST_TEXTS` most frequent."""
    groups: dict[tuple[str, bool], dict[str, list[CriterionVerdict]]] = {}
    for sample in samples:
        for v in sample.verdicts:
            groups.setdefault((v.criterion, v.is_pitfall), {}).setdefault(sample.example_id, []).append(v)
    recurring = sorted((k for k, g in groups.items() if len(g) > 1), key=lambda k: (-len(groups[k]), k))
    return [
        {"criterion": text, "is_pitfall": is_pitfall, **_shares(list(groups[(text, is_pitfall)].values()), seed)}
        for text, is_pitfall in recurring[:MOST_TEXTS]
    ]


def _shares(verdicts_by_prompt: Sequence[Sequence[CriterionVerdict]], seed: int) -> dict[str, Any]:
    scored = [[v for v in verdicts if v.value is not None] for verdicts in verdicts_by_prompt]
    n_scored = [len(verdicts) for verdicts in scored]
    met = [sum(v.value or 0.0 for v in verdicts) for verdicts in scored]
    satisfied = [sum(v.satisfied or 0.0 for v in verdicts) for verdicts in scored]
    return {
        "met": asdict(ratio(met, n_scored, is_share=True, seed=seed)),
        "satisfied": asdict(ratio(satisfied, n_scored, is_share=True, seed=seed)),
        "n_criteria": sum(map(len, verdicts_by_prompt)),
        "n_scored": sum(n_scored),
        "n_pitfalls": sum(v.is_pitfall for verdicts in verdicts_by_prompt for v in verdicts),
        "n_prompts": sum(map(bool, verdicts_by_prompt)),
    }


def met_by_tag(samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the criteria with a yes-or-no verdict that were met, by criterion tag."""
    met: dict[str, list[bool]] = {}
    for sample in samples:
        for verdict in sample.verdicts:
            for tag in verdict.tags:
                if verdict.met is not None:
                    met.setdefault(tag, []).append(verdict.met)
    return {tag: float(np.mean(values)) for tag, values in sorted(met.items())}


def spread(lengths: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 95th percentile; None without a value."""
    if not lengths:
        return None
    median, p95 = np.quantile(lengths, [0.5, 0.95])
    return {"mean": float(np.mean(lengths)), "median": float(median), "p95": float(p95)}


def usage_totals(samples: Sequence[Sample]) -> dict[str, Any]:
    """What judging the samples cost. The price (US dollars) is None when the price of any sample is unknown."""
    usages = [s.usage for s in samples if s.usage is not None]
    prices = [u.price for u in usages if u.price is not None]
    counts = ("calls", "cached", "prompt_tokens", "completion_tokens", "seconds")
    return {
        **{name: sum(getattr(u, name) for u in usages) for name in counts},
        "price": math.fsum(prices) if len(prices) == len(samples) else None,
        "n_rows_without_usage": len(samples) - len(usages),
    }


def arm_usage(run: Run, samples: Sequence[Sample]) -> dict[str, Any]:
    """What judging an arm cost, by the run's ledger of requests: requests of killed processes are in no sample."""
    totals = usage_totals(samples)
    recorded = ledger_usage(run.folder / JUDGE_REQUESTS, samples[0].arm, samples[0].judge) if samples else None
    # A run of an older version has no ledger, or one that begins after its first samples.
    if recorded is None or recorded.calls < totals["calls"]:
        return totals
    return totals | {name: value for name, value in asdict(recorded).items() if name != "cached"}


# --- Two arms -------------------------------------------------------------------------------------------------------


def paired_difference(before: Sequence[Sample], after: Sequence[Sample], *, seed: int = 0) -> Interval | None:
    """Mean of after minus before over the prompts that were scored in both, with its 95 % interval; None without such
    a prompt.

    Scores are not clipped before they are subtracted, even where the dataset clips its mean.
    """
    scores = {s.example_id: s.score for s in before if s.score is not None}
    differences = [s.score - scores[s.example_id] for s in after if s.score is not None and s.example_id in scores]
    return interval(differences, seed=seed) if differences else None


def gains_by_tag(before: Sequence[Sample], after: Sequence[Sample], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """How much more of each tag's criteria `after` satisfies, over the criteria that were scored in both.

    A pitfall is satisfied when the response avoids it, so that a gain is good for every tag.

    Args:
        before, after: Samples of the same prompts under the same judge.
        seed: Seed of the bootstrap over prompts.

    Returns:
        By tag (`shown_tags` of them): value, low, high, n (prompts) and note of the difference, a share of the
        criteria; `before` and `after` (shares satisfied); `n_criteria`.
    """
    earlier = {s.example_id: s for s in before}
    pairs = [(earlier[s.example_id], s) for s in after if s.example_id in earlier]
    moved: dict[str, list[tuple[list[float], list[float]]]] = {}
    for old, new in pairs:
        by_tag: dict[str, tuple[list[float], list[float]]] = {}
        for a, b in _same_criteria(old, new):
            if a.satisfied is not None and b.satisfied is not None:
                for tag in a.tags:
                    olds, news = by_tag.setdefault(tag, ([], []))
                    olds.append(a.satisfied)
                    news.append(b.satisfied)
        for tag, values in by_tag.items():
            moved.setdefault(tag, []).append(values)
    return {tag: _gain(moved[tag], seed) for tag in shown_tags(moved)}


def _same_criteria(old: Sample, new: Sample) -> list[tuple[CriterionVerdict, CriterionVerdict]]:
    """The verdicts on criteria that both samples have, matched by text, sign and occurrence."""
    by_key: dict[tuple[str, bool], list[CriterionVerdict]] = {}
    for v in old.verdicts:
        by_key.setdefault((v.criterion, v.is_pitfall), []).append(v)
    matched = []
    for v in new.verdicts:
        left = by_key.get((v.criterion, v.is_pitfall))
        if left:
            matched.append((left.pop(0), v))
    return matched


def _gain(by_prompt: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> dict[str, Any]:
    sizes = [len(olds) for olds, _ in by_prompt]
    found = ratio([sum(news) - sum(olds) for olds, news in by_prompt], sizes, seed=seed)
    n = sum(sizes)
    shares = {name: sum(sum(values[at]) for values in by_prompt) / n for at, name in enumerate(("before", "after"))}
    return {**asdict(found), **shares, "n_criteria": n}


def shown_tags(tags: Iterable[str]) -> list[str]:
    """The tags that tables show: the groups of `TAG_GROUPS` that the data have, else axes, else all of them."""
    tags = set(tags)
    groups = [tag for tag in TAG_GROUPS if tag in tags]
    axes = sorted(tag for tag in tags if tag.startswith("axis:"))
    return groups or axes or sorted(tags)


# --- The table of a run ---------------------------------------------------------------------------------------------


def results(
    arms: Mapping[str, Sequence[Sample]],
    run: Run,
    seed: int,
    *,
    judge: str,
    baseline: str = "base",
    control: Run | None = None,
) -> dict[str, Any]:
    """The table of a run: one row per arm, paired differences to the baseline, and provenance.

    Args:
        arms: Each arm's samples.
        run: The run.
        seed: Seed of the bootstrap.
        judge: Who judged.
        baseline: The arm that the others are compared with.
        control: The run of the mismatched twin. Its trained policy becomes the arm `control`, and the trained policy
            is compared with it too.
    """
    arms = dict(arms)
    usages = {arm: arm_usage(run, samples) for arm, samples in arms.items()}
    twin = [] if control is None else control_samples(control, judge)
    if control is not None and twin:
        arms[CONTROL_ARM] = twin
        usages[CONTROL_ARM] = arm_usage(control, [replace(s, arm="trained") for s in twin])
    roles = run.roles
    trained = next((arm for arm in arms if roles.get(arm) == TRAINED), None)
    pairs = [(arm, baseline) for arm in arms if arm != baseline and baseline in arms]
    if twin and trained is not None:
        pairs.append((trained, CONTROL_ARM))
    differences, by_tag = {}, {}
    for arm, other in pairs:
        difference = paired_difference(arms[other], arms[arm], seed=seed)
        if difference is not None:
            differences[f"{arm} - {other}"] = asdict(difference)
            by_tag[f"{arm} - {other}"] = gains_by_tag(arms[other], arms[arm], seed=seed)
    return {
        "kind": run.meta.get("kind"),
        "arms": [
            summarise(samples, seed=seed) | {"role": roles.get(arm), "usage": usages[arm]}
            for arm, samples in arms.items()
        ],
        "differences": differences,
        "gains_by_tag": by_tag,
        "baseline": baseline,
        "met_by_tag": {arm: met_by_tag(samples) for arm, samples in arms.items()},
        "judge": judge,
        "seed": seed,
        "provenance": {name: run.meta.get(name) for name in _PROVENANCE},
    }


def control_samples(control: Run, judge: str | None) -> list[Sample]:
    """The samples of a mismatched twin's trained policy, as the arm `control` of the run that it controls."""
    trained = control.arm_of(TRAINED)
    return [replace(s, arm=CONTROL_ARM) for s in read_samples(control) if s.arm == trained and s.judge == judge]


def show_results(table: Mapping[str, Any]) -> None:
    """Print a run's table and its verdict."""
    baseline = table.get("baseline", "base")
    view = Table(title="Rubric satisfaction (95 % interval over prompts)")
    columns = ("policy", "score", "95 % interval", f"minus {baseline}", "95 % interval", "prompts", "coverage")
    for column in (*columns, "mean tokens"):
        view.add_column(column, justify="left" if column == "policy" else "right")
    for arm in table["arms"]:
        gain = table["differences"].get(f"{arm['arm']} - {baseline}")
        view.add_row(
            arm_words(arm["arm"], arm.get("role")),
            *score_cells(arm["score"]),
            f"{gain['mean']:+.3f}" if gain else "",
            f"{gain['low']:+.3f} to {gain['high']:+.3f}" if gain else "",
            str(arm["n_prompts"]),
            f"{100 * arm['coverage']:.0f} %",
            tokens_cell(arm["mean_tokens"]),
        )
    console = Console(width=118)
    console.print(view)
    _show_parts(table["arms"])
    pairs = _shown_pairs(table)
    if any(len(gains) > 1 for gains in pairs.values()):
        console.print(gains_view(pairs))
    _show_usage(table)
    trained = _arm_with(table, TRAINED)
    gain = table["differences"].get(f"{trained} - {baseline}") if table.get("kind") in TRAINING_KINDS else None
    if gain is not None:
        say(verdict_sentence(str(trained), baseline, gain))
    added = table["differences"].get(f"{trained} - {_arm_with(table, TRAINED_CONTROL)}")
    if added is not None:
        say(control_sentence(added))


def _arm_with(table: Mapping[str, Any], role: str) -> str | None:
    return next((a["arm"] for a in table["arms"] if a.get("role") == role), None)


def arm_words(arm: str, role: str | None) -> str:
    """An arm's name in a table."""
    return CONTROL_WORDS if role == TRAINED_CONTROL else arm


def _shown_pairs(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The differences that the table by tag shows: in a training run what training did, else each of the first."""
    gains = table.get("gains_by_tag") or {}
    trained = _arm_with(table, TRAINED)
    if table.get("kind") in TRAINING_KINDS and trained is not None:
        gains = {pair: found for pair, found in gains.items() if pair.startswith(f"{trained} - ")}
    return dict(list(gains.items())[:MOST_PAIRS])


def gains_view(pairs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Gains by criterion tag as a printed table.

    Args:
        pairs: "A - B" -> `gains_by_tag` of the two.
    """
    view = Table(title="Criteria satisfied, in points, by tag (a pitfall is satisfied when it is avoided)")
    view.add_column("tag")
    view.add_column("criteria", justify="right")
    for pair in pairs:
        for column in (pair.replace(" - ", " minus "), "95 % interval"):
            view.add_column(column, justify="right")
    tags = list(dict.fromkeys(tag for gains in pairs.values() for tag in gains))
    for tag in tags[:MOST_PARTS]:
        n = max(gains[tag]["n_criteria"] for gains in pairs.values() if tag in gains)
        cells = [cell for gains in pairs.values() for cell in gain_cells(gains.get(tag))]
        view.add_row(tag.removeprefix("axis:").replace("[", "\\["), f"{n:,}", *cells)
    if len(tags) > MOST_PARTS:
        view.caption = f"{len(tags) - MOST_PARTS} more in {RESULTS}"
    return view


def gain_cells(gain: Mapping[str, Any] | None) -> tuple[str, str]:
    """A gain by tag and its interval, in points, for a table."""
    if gain is None or gain["value"] is None:
        return "", ""
    interval_cell = "" if gain["low"] is None else f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    return f"{100 * gain['value']:+.1f}", interval_cell


def score_cells(mean: Mapping[str, Any] | None) -> tuple[str, str]:
    """A score and its interval, for a table."""
    return (f"{mean['mean']:.3f}", f"{mean['low']:.3f} to {mean['high']:.3f}") if mean else ("unscored", "")


def tokens_cell(mean_tokens: float | None) -> str:
    """A mean length, for a table."""
    return "" if mean_tokens is None else f"{mean_tokens:.0f}"


def _show_parts(arms: Sequence[Mapping[str, Any]]) -> None:
    """Scores by axis and by domain, where there are several."""
    for key, title in (("by_criterion_tag", "axis"), ("by_domain", "domain")):
        parts = {name for arm in arms for name in arm[key]}
        names = sorted(n for n in parts if title == "domain" or n.startswith("axis:"))
        if len(names) < 2:
            continue
        view = Table(title=f"Score by {title}")
        view.add_column(title)
        for arm in arms:
            view.add_column(arm_words(arm["arm"], arm.get("role")), justify="right")
        for name in names[:MOST_PARTS]:
            scores = [arm[key].get(name, {}).get("score") for arm in arms]
            view.add_row(name.removeprefix("axis:"), *(f"{s['mean']:.3f}" if s else "" for s in scores))
        Console(width=118).print(view)
        if len(names) > MOST_PARTS:
            say(f"{len(names) - MOST_PARTS} more in {RESULTS}.")


def _show_usage(table: Mapping[str, Any]) -> None:
    """What the judge cost."""
    usages = [arm["usage"] for arm in table["arms"]]
    calls, cached = (sum(u.get(name, 0) for u in usages) for name in ("calls", "cached"))
    if calls or cached:
        prices = [u.get("price") for u in usages]
        price = "price unknown" if any(p is None for p in prices) else f"{sum(prices):.4f} dollars"
        say(f"Judge: {table['judge']}, {calls} calls, {cached} replies from the cache, {price}.")
