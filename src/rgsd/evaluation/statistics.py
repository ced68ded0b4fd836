"""What rows of an evaluation say: scores, shares, differences and agreement, each with its interval over prompts.

Every interval is a 95 % bootstrap that resamples whole prompts, never single criteria: the criteria of a prompt are met
or missed by one response, and fall together. Its quantiles are expanded for small n (`quantiles`); `python -m
benchmarks.coverage` measures how often it covers the truth. A share of nothing or of everything, where a bootstrap has
no width at all, gets the exact bound for as many prompts (Clopper and Pearson's).

Only `conclude` turns an interval into a verdict, and it gives none below `LEAST_FOR_A_VERDICT` prompts.

Letters in names: N prompts (or other clusters), K columns, B resamples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import stdtrit

from rgsd.errors import DataError
from rgsd.rubrics import CLIPPED_MEANS, TAG_SCORINGS, Criterion, Rubric, Score, Verdict, score

N_RESAMPLES = 10_000
TAIL = 0.025
"""Probability that a 95 % interval leaves out on each side."""
LEAST_FOR_A_VERDICT = 30
"""Prompts below which no difference is called better or worse: from here on the 95 % interval holds the true mean in at
least 92 % of the samples in every case of `benchmarks/coverage.py`; at 20 prompts the worst case is below 90 %."""
NUMBERS_AT_ONCE = 2_000_000
"""Random numbers drawn at once: 16 MB of them, however many prompts there are."""
NUMBERS_KEPT = 50_000_000
"""Resamples are kept for the next statistic of as many prompts while they fit into so many bytes."""
USABLE_SHARE = 0.9
"""An interval needs this share of resamples in which its statistic is defined."""
MOST_TEXTS = 100
"""Recurring criteria listed one by one, the most frequent first."""
GRADE_MET = 0.5
"""From this grade on, a graded verdict counts as met where a yes or no is needed (agreement between judges)."""
LEAST_FOR_A_LINE = 10
"""Pairs below which no line through them is trusted."""

Row = Mapping[str, Any]
"""A line of samples.jsonl."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic that may be undefined, with its 95 % bootstrap interval over prompts.

    Args:
        value: None where it is undefined.
        low, high: None where it is undefined, or defined in too few resamples.
        n: prompts (clusters) that it rests on.
        note: why something is None; empty otherwise.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    note: str = ""


@lru_cache(maxsize=256)
def quantiles(n: int) -> tuple[float, float]:
    """Quantiles of the resamples that bound a 95 % interval over n prompts.

    A resample of n values spreads less than a new sample would, by sqrt((n - 1) / n), and a normal quantile is too
    small for an estimated spread. So the tail is Phi(-sqrt(n / (n - 1)) t), with t Student's quantile at n - 1 degrees
    of freedom: the expanded percentile interval of Hesterberg (2015), "What Teachers Should Know About the Bootstrap".
    """
    if n < 2:
        return TAIL, 1 - TAIL
    t = -float(stdtrit(n - 1, TAIL))
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)
    return tail, 1 - tail


def student_quantile(degrees_of_freedom: int) -> float:
    """Student's 97.5 % quantile."""
    return -float(stdtrit(degrees_of_freedom, TAIL))


def interval(
    values: Sequence[float], *, scoring: str = "satisfaction", seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Interval:
    """Mean and 95 % bootstrap interval over prompts; clipped where the dataset's authors clip the mean.

    Args:
        values: one a prompt.
        scoring: a key of `rgsd.rubrics.SCORINGS`; says whether the mean is clipped to [0, 1].
        seed: of the resampling.
        n_resamples: B.

    Raises:
        DataError: without a value, or with one that is not finite.
    """
    array_N = np.asarray(values, dtype=np.float64)
    n = len(array_N)
    if not n:
        raise DataError("an interval needs at least one value, got none: nothing was scored")
    if not np.isfinite(array_N).all():
        position = int(np.flatnonzero(~np.isfinite(array_N))[0])
        raise DataError(
            f"value {position} of {n} is {array_N[position]}, a finite number is wanted: a score that is not finite "
            "comes from a damaged row or an absurd weight"
        )
    means_B = np.concatenate([array_N[draws].mean(1) for draws in _draws(n, seed, n_resamples)])
    low, high = np.quantile(means_B, quantiles(n))
    found = [array_N.mean(), low, high]
    if scoring in CLIPPED_MEANS:
        found = [min(1.0, max(0.0, v)) for v in found]
    return Interval(*(float(v) for v in found), n=n)


def _draws(n: int, seed: int, n_resamples: int) -> Iterator[np.ndarray]:
    """Which prompts each resample holds, (b, N) at a time; the same numbers however many come at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, NUMBERS_AT_ONCE // n)
    for start in range(0, n_resamples, step):
        yield rng.integers(0, n, size=(min(step, n_resamples - start), n))


def resampled_sums(columns_NK: np.ndarray, *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> np.ndarray:
    """The columns' sums in every bootstrap resample of the rows.

    Whatever is a function of sums over prompts (a ratio, kappa, F1, a regression line) gets its interval from these.

    Args:
        columns_NK: a row a prompt.
        seed: of the resampling.
        n_resamples: B.

    Returns:
        (B, K).
    """
    n = len(columns_NK)
    if not n:
        raise DataError("a bootstrap needs at least one prompt, got none")
    if n * n_resamples <= NUMBERS_KEPT:
        kept = _kept_times(n, seed, n_resamples)
        step = max(1, NUMBERS_AT_ONCE // n)
        times = (kept[start : start + step] for start in range(0, n_resamples, step))
    else:
        times = _times(n, seed, n_resamples)
    return np.concatenate([t.astype(np.float64) @ columns_NK for t in times])


def _times(n: int, seed: int, n_resamples: int) -> Iterator[np.ndarray]:
    """How often each prompt stands in each resample, (b, N) at a time."""
    for draws in _draws(n, seed, n_resamples):
        offsets = np.arange(len(draws))[:, None] * n
        # Once on average; 256 times does not happen.
        yield np.bincount((draws + offsets).ravel(), minlength=draws.size).reshape(draws.shape).astype(np.uint8)


@lru_cache(maxsize=1)
def _kept_times(n: int, seed: int, n_resamples: int) -> np.ndarray:
    return np.concatenate(list(_times(n, seed, n_resamples)))


def _estimate(value: float, draws_B: np.ndarray, n: int, note: str = "") -> Estimate:
    """An estimate out of a value and its resamples, in both of which NaN stands for undefined."""
    if math.isnan(value):
        return Estimate(None, None, None, n, note)
    usable = draws_B[~np.isnan(draws_B)]
    if len(usable) < USABLE_SHARE * len(draws_B):
        share = 100 * len(usable) / len(draws_B)
        return Estimate(float(value), None, None, n, f"no interval: it is defined in {share:.0f} % of the resamples")
    low, high = np.quantile(usable, quantiles(n))
    return Estimate(float(value), float(low), float(high), n)


def ratio(
    over_N: Sequence[float],
    under_N: Sequence[float],
    *,
    is_share: bool = False,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Estimate:
    """Sum of one column over the sum of another, e.g. criteria met over criteria scored; a pair of numbers a prompt.

    Args:
        over_N, under_N: the columns.
        is_share: the ratio is a part of a whole, prompt by prompt, so that it lies in [0, 1].
        seed: of the resampling.
        n_resamples: B.
    """
    columns_N2 = np.stack([np.asarray(over_N, np.float64), np.asarray(under_N, np.float64)], 1).reshape(-1, 2)
    columns_N2 = columns_N2[(columns_N2 != 0).any(1)]
    n = len(columns_N2)
    if not n or not columns_N2[:, 1].sum():
        return Estimate(None, None, None, n, "there is nothing to take a share of")
    total = columns_N2.sum(0)
    sums = resampled_sums(columns_N2, seed=seed, n_resamples=n_resamples)
    found = _estimate(float(total[0] / total[1]), _divided(sums[:, 0], sums[:, 1]), n)
    return _at_the_edge(found) if is_share else found


def _at_the_edge(share: Estimate) -> Estimate:
    """A share of 0 or 1 with the exact bound on the other side: what would show nothing else in n prompts in 2.5 % of
    all cases."""
    if share.value not in (0.0, 1.0):
        return share
    width = 1 - TAIL ** (1 / share.n)
    return Estimate(share.value, *((0.0, width) if share.value == 0 else (1 - width, 1.0)), share.n)


def _divided(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under != 0)


# Verdicts.


class Conclusion(StrEnum):
    """What a difference shows; its value is the wording everywhere."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no gain shown"
    TOO_FEW = "too few prompts to say"


Difference = Interval | Estimate | Mapping[str, Any]
"""A difference with its interval: either class, or what `asdict` makes of it."""


def conclude(found: Difference | None, *, above: float = 0.0) -> Conclusion:
    """What a difference shows: the one place where an interval becomes a verdict.

    Args:
        found: the difference; None, or without an interval, says nothing.
        above: what it is compared with; a negative one asks whether something is "no less, but for a margin".

    Returns:
        `TOO_FEW` below `LEAST_FOR_A_VERDICT` prompts, where the interval covers too seldom what it claims to; else
        `BETTER` or `WORSE` when the whole interval lies above or below `above`.

    Raises:
        DataError: when the interval is not finite.
    """
    _, low, high, n = _parts(found)
    if low is None or high is None or n < LEAST_FOR_A_VERDICT:
        return Conclusion.TOO_FEW
    if low > above:
        return Conclusion.BETTER
    return Conclusion.WORSE if high < above else Conclusion.NOT_SHOWN


def is_shown(found: Difference | None) -> bool:
    """Whether a difference is called better or worse."""
    return conclude(found) in (Conclusion.BETTER, Conclusion.WORSE)


def points(found: Difference) -> str:
    """A difference of scores in points: "+21.0 points (95 % interval +16.5 to +25.6)"."""
    value, low, high, _ = _parts(found)
    if value is None:
        note = found["note"] if isinstance(found, Mapping) else getattr(found, "note", "")
        return note or "undefined"
    said = f"{100 * value:+.1f} points"
    return said if low is None or high is None else f"{said} (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"


def verdict_sentence(name: str, other: str, found: Difference) -> str:
    """The verdict on a difference as a sentence, the same in every command and on every page.

    Args:
        name: what is judged, e.g. "trained".
        other: what it is compared with, e.g. "base".
        found: the score of `name` minus that of `other`.
    """
    n = _parts(found)[3]
    size = f"{points(found)}, {n:,} prompt{'' if n == 1 else 's'}"
    match conclude(found):
        case Conclusion.BETTER | Conclusion.WORSE as way:
            return f"{name} is {way} than {other}: {size}."
        case Conclusion.TOO_FEW as way:
            return f"{name} against {other}: {way}: {size}; a verdict takes at least {LEAST_FOR_A_VERDICT}."
        case way:
            return f"{name} against {other}: {way}: {size}."


def _parts(found: Difference | None) -> tuple[float | None, float | None, float | None, int]:
    """Value, low, high and n of a difference in any of its forms."""
    if found is None:
        return None, None, None, 0
    held = found if isinstance(found, Mapping) else asdict(found)
    value = held["mean"] if "mean" in held else held["value"]
    for part in (value, held["low"], held["high"]):
        if part is not None and not math.isfinite(part):
            raise DataError(f"a difference holds {part}, finite numbers are wanted: {dict(held)}")
    return value, held["low"], held["high"], held["n"]


# Rows.


def words_of(estimate: Mapping[str, Any]) -> str:
    """An estimate, as a run folder holds it, for a sentence: its value and interval, or why it has none."""
    if estimate["value"] is None:
        return estimate["note"] or "undefined"
    if estimate["low"] is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def latest(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The last row of each arm, example and judge: a later row supersedes an earlier one of the same key."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        found[(row["arm"], row["example_id"], row.get("judge"))] = dict(row)
    return list(found.values())


def verdict_of(entry: Mapping[str, Any]) -> Verdict:
    """The verdict in an entry of a row's `verdicts`."""
    return Verdict(met=entry.get("met"), grade=entry.get("grade"), reason=entry.get("reason") or "")


def value_of(entry: Mapping[str, Any]) -> float | None:
    """How far an entry's criterion is met, in [0, 1]; None when it is unscored."""
    grade, met = entry.get("grade"), entry.get("met")
    return float(grade) if grade is not None else None if met is None else float(met)


def satisfied_value(entry: Mapping[str, Any]) -> float | None:
    """How good an entry's verdict is, in [0, 1]: what a pitfall's value leaves to 1; None when it is unscored."""
    value = value_of(entry)
    return value if value is None or entry["weight"] > 0 else 1.0 - value


def is_met(entry: Mapping[str, Any]) -> bool | None:
    """An entry's verdict as a yes or no, a grade counting as met from `GRADE_MET` on; None when it is unscored."""
    value = value_of(entry)
    return None if value is None else value >= GRADE_MET


def text_of(row: Row) -> str:
    """What the judge read: the response without its reasoning."""
    return row.get("judged_text", row.get("response")) or ""


def tag_score(row: Row, tag: str) -> Score | None:
    """A row's score over only the criteria with a tag, as HealthBench scores an axis; None when it has none of them.

    The length term of HealthBench Professional is left out, as its authors leave it out of their scores by tag.
    """
    entries = [v for v in row["verdicts"] if tag in (v.get("tags") or ())]
    if not entries:
        return None
    rubric = Rubric(tuple(Criterion(v["criterion"], v["weight"]) for v in entries))
    scoring: str = TAG_SCORINGS.get(row["scoring"]) or row["scoring"]
    return score(rubric, [verdict_of(v) for v in entries], scoring, text_of(row))


def criterion_tags(rows: Sequence[Row]) -> list[str]:
    """The tags that criteria carry."""
    return sorted({t for r in rows for v in r["verdicts"] for t in v.get("tags") or ()})


def _scoring(rows: Sequence[Row]) -> str:
    """The rows' scoring; rows of several are averaged without clipping."""
    scorings = {r["scoring"] for r in rows}
    return scorings.pop() if len(scorings) == 1 else "satisfaction"


# An arm.


def summarise(rows: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """One arm under one judge, in numbers that JSON can hold.

    Args:
        rows: the arm's rows, one an example.
        seed: of the resampling.

    Returns:
        arm, score (mean, low, high, n; as the dataset defines it, None when nothing was scored), n_prompts, coverage
        (mean over prompts of the share of criteria scored), `scored` (shares of criteria and of prompts with a score),
        `unscored` (responses with an unscored criterion, by problem), `by_criterion_tag`, `by_domain` and
        `by_example_tag` (scores), `criteria_by_tag` and `criteria_by_text` (shares met and satisfied), `lengths` in
        tokens and characters, mean_tokens, truncated_share, `usage` of the judge.

    Raises:
        DataError: without a row.
    """
    if not rows:
        raise DataError("an arm without a row cannot be summarised: evaluate it first")
    scored = [r["score"] for r in rows if r["score"] is not None]
    scoring = _scoring(rows)
    tokens = [r["n_tokens"] for r in rows if r.get("n_tokens") is not None]
    truncated = [bool(r["is_truncated"]) for r in rows if r.get("is_truncated") is not None]
    return {
        "arm": rows[0]["arm"],
        "scoring": scoring,
        "score": asdict(interval(scored, scoring=scoring, seed=seed)) if scored else None,
        "coverage": float(np.mean([_coverage(r) for r in rows])),
        "n_prompts": len(rows),
        "scored": scored_shares(rows),
        "unscored": dict(Counter(r.get("problem") or "unknown" for r in rows if _coverage(r) < 1).most_common()),
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
        "truncated_share": float(np.mean(truncated)) if truncated else None,
        "by_criterion_tag": scores_by_criterion_tag(rows, seed=seed),
        "by_domain": scores_by([(r.get("domain") or "(none)", r) for r in rows], seed=seed),
        "by_example_tag": scores_by([(t, r) for r in rows for t in r.get("tags") or ()], seed=seed),
        "criteria_by_tag": shares_by_tag(rows, seed=seed),
        "criteria_by_text": shares_by_text(rows, seed=seed),
        "lengths": {"tokens": spread(tokens), "characters": spread([len(text_of(r)) for r in rows])},
        "usage": usage_totals(rows),
    }


def _coverage(row: Row) -> float:
    if row.get("coverage") is not None:
        return float(row["coverage"])
    values = [value_of(v) for v in row["verdicts"]]
    return sum(v is not None for v in values) / len(values) if values else 0.0


def scored_shares(rows: Sequence[Row]) -> dict[str, Any]:
    """How much was scored: criteria, and prompts with a score."""
    values = [value_of(v) for r in rows for v in r["verdicts"]]
    n_scored = sum(v is not None for v in values)
    n_prompts_scored = sum(r["score"] is not None for r in rows)
    return {
        "n_criteria": len(values),
        "n_criteria_scored": n_scored,
        "criteria_share": n_scored / len(values) if values else None,
        "n_prompts_scored": n_prompts_scored,
        "prompts_share": n_prompts_scored / len(rows) if rows else None,
    }


def scores_by(labelled: Iterable[tuple[str, Row]], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The score of each group of rows, with its interval and the group's number of prompts."""
    groups: dict[str, list[Row]] = {}
    for label, row in labelled:
        groups.setdefault(label, []).append(row)
    found = {}
    for label, rows in sorted(groups.items()):
        values = [r["score"] for r in rows if r["score"] is not None]
        mean = asdict(interval(values, scoring=_scoring(rows), seed=seed)) if values else None
        found[label] = {"score": mean, "n_prompts": len(rows)}
    return found


def scores_by_criterion_tag(rows: Sequence[Row], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Each tag's mean score over the prompts that have such criteria (`tag_score`), with its interval.

    A prompt whose criteria of the tag are all pitfalls, or all unscored, has no score there and is not averaged.
    """
    found = {}
    scoring = _scoring(rows)
    for tag in criterion_tags(rows):
        scores = [s for r in rows if (s := tag_score(r, tag)) is not None]
        values = [s.value for s in scores if s.value is not None]
        found[tag] = {
            "score": asdict(interval(values, scoring=scoring, seed=seed)) if values else None,
            "n_prompts": len(scores),
            "n_criteria": sum(s.n_criteria for s in scores),
            "n_scored": sum(s.n_scored for s in scores),
        }
    return found


def shares_by_tag(rows: Sequence[Row], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """How many of each tag's scored criteria were met, and satisfied (a pitfall is when it is not met)."""
    return {
        tag: _shares([[v for v in r["verdicts"] if tag in (v.get("tags") or ())] for r in rows], seed)
        for tag in criterion_tags(rows)
    }


def shares_by_text(rows: Sequence[Row], *, seed: int = 0) -> list[dict[str, Any]]:
    """The same for criteria whose text (and sign) recurs in several prompts: the `MOST_TEXTS` most frequent."""
    groups: dict[tuple[str, bool], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        for v in row["verdicts"]:
            key = (v["criterion"], v["weight"] < 0)
            groups.setdefault(key, {}).setdefault(row["example_id"], []).append(v)
    recurring = sorted((k for k, g in groups.items() if len(g) > 1), key=lambda k: (-len(groups[k]), k))
    return [
        {"criterion": text, "is_pitfall": pitfall, **_shares(list(groups[(text, pitfall)].values()), seed)}
        for text, pitfall in recurring[:MOST_TEXTS]
    ]


def _shares(entries_by_prompt: Sequence[Sequence[Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    met, satisfied, n_scored = [], [], []
    for entries in entries_by_prompt:
        scored = [v for v in entries if value_of(v) is not None]
        n_scored.append(len(scored))
        met.append(sum(value_of(v) or 0.0 for v in scored))
        satisfied.append(sum(satisfied_value(v) or 0.0 for v in scored))
    everything = [v for entries in entries_by_prompt for v in entries]
    return {
        "met": asdict(ratio(met, n_scored, is_share=True, seed=seed)),
        "satisfied": asdict(ratio(satisfied, n_scored, is_share=True, seed=seed)),
        "n_criteria": len(everything),
        "n_scored": sum(n_scored),
        "n_pitfalls": sum(v["weight"] < 0 for v in everything),
        "n_prompts": sum(bool(e) for e in entries_by_prompt),
    }


def met_by_tag(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the criteria with a yes-or-no verdict that were met, by criterion tag."""
    seen: dict[str, list[bool]] = {}
    for row in rows:
        for verdict in row["verdicts"]:
            for tag in verdict.get("tags") or ():
                if verdict["met"] is not None:
                    seen.setdefault(tag, []).append(verdict["met"])
    return {tag: float(np.mean(v)) for tag, v in sorted(seen.items())}


def spread(lengths: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 95th percentile; None of nothing."""
    if not lengths:
        return None
    median, p95 = np.quantile(lengths, [0.5, 0.95])
    return {"mean": float(np.mean(lengths)), "median": float(median), "p95": float(p95)}


def usage_totals(rows: Sequence[Row]) -> dict[str, Any]:
    """What judging the rows cost; the price (US dollars) is None when that of any row is unknown."""
    usages = [r["usage"] for r in rows if r.get("usage")]
    prices = [u.get("price") for u in usages]
    is_known = len(usages) == len(rows) and all(p is not None for p in prices)
    counts = ("calls", "cached", "prompt_tokens", "completion_tokens", "seconds")
    return {
        **{name: sum(u.get(name) or 0 for u in usages) for name in counts},
        "price": math.fsum(p for p in prices if p is not None) if is_known else None,
        "n_rows_without_usage": len(rows) - len(usages),
    }


# Two arms.


def paired_difference(rows_a: Sequence[Row], rows_b: Sequence[Row], *, seed: int = 0) -> Interval | None:
    """Mean of b minus a over the prompts that both arms scored, with its 95 % interval over those prompts.

    The means are not clipped before they are subtracted, whatever the dataset does.
    """
    a = {r["example_id"]: r["score"] for r in rows_a if r["score"] is not None}
    pairs = [r["score"] - a[r["example_id"]] for r in rows_b if r["score"] is not None and r["example_id"] in a]
    return interval(pairs, seed=seed) if pairs else None


def sign_test(won: int, lost: int) -> float:
    """Two-sided exact p value of so many wins and losses, were both equally likely; 1.0 when there are none."""
    n = won + lost
    ways = tail = 1
    for k in range(min(won, lost)):
        ways = ways * (n - k) // (k + 1)  # of losing k + 1 out of n
        tail += ways
    # Whole numbers to the last step: a float holds neither.
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for many tests at once, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        found[i] = largest
    return found


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A paired difference at equal length.

    Args:
        difference: of the scores where both responses are equally long; undefined with a note where no line is fitted.
        slope: change of that difference when the length ratio doubles.
        mean_log2_ratio: mean of log2(length b / length a); 1 is twice as long.
        is_extrapolated: whether no pair is of equal length or on the other side of it, so that the line is read where
            there are no responses.
        n: pairs.
        n_left_out: pairs in which a response is empty, which has no length ratio.
    """

    difference: Estimate
    slope: Estimate
    mean_log2_ratio: float | None
    is_extrapolated: bool
    n: int
    n_left_out: int


def length_controlled(
    differences: Sequence[float],
    lengths_a: Sequence[float],
    lengths_b: Sequence[float],
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> LengthControlled:
    """The score difference that is left at equal length.

    A line is fitted by least squares through (log2(length b / length a), score b - score a), one point a prompt; its
    height at 0 is the difference between responses of equal length. It tells association, not cause: where longer
    answers are better because they hold more that is true, that part is taken away too.

    Args:
        differences: score of b minus score of a, one a prompt.
        lengths_a, lengths_b: of the responses, in any one unit, in the same order.
        seed: of the resampling over prompts.
        n_resamples: B.
    """
    kept = [(d, a, b) for d, a, b in zip(differences, lengths_a, lengths_b, strict=True) if a > 0 and b > 0]
    n = len(kept)
    y_N = np.array([d for d, _, _ in kept], np.float64)
    x_N = np.array([math.log2(b / a) for _, a, b in kept], np.float64)
    mean = float(x_N.mean()) if n else None

    def refused(why: str) -> LengthControlled:
        nothing = Estimate(None, None, None, n, why)
        return LengthControlled(nothing, nothing, mean, False, n, len(differences) - n)

    if n < LEAST_FOR_A_LINE:
        return refused(f"{n} pairs of responses that are not empty, at least {LEAST_FOR_A_LINE} are wanted for a line")
    if float(np.ptp(x_N)) < 1e-6:
        return refused(
            "all pairs have the same length ratio"
            + (": the plain difference is the one at equal length" if abs(float(x_N[0])) < 1e-6 else "")
        )
    columns_N5 = np.stack([np.ones(n), x_N, y_N, x_N * x_N, x_N * y_N], 1)
    height, slope = _line(columns_N5.sum(0))
    heights_B, slopes_B = _line(resampled_sums(columns_N5, seed=seed, n_resamples=n_resamples))
    return LengthControlled(
        difference=_estimate(float(height), heights_B, n),
        slope=_estimate(float(slope), slopes_B, n),
        mean_log2_ratio=mean,
        is_extrapolated=bool((x_N > 0).all() or (x_N < 0).all()),
        n=n,
        n_left_out=len(differences) - n,
    )


def _line(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height at 0 and slope of least squares, from the sums of 1, x, y, xx, xy on the last axis; NaN without a line."""
    n, x, y, xx, xy = (sums[..., k] for k in range(5))
    spread_x = n * xx - x * x
    slope = _divided(n * xy - x * y, np.where(spread_x > 1e-9 * n * n, spread_x, 0.0))
    return (y - slope * x) / n, slope


# Two raters.


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two raters give the same yes-or-no verdicts; intervals over prompts.

    Args:
        n: verdicts that both gave.
        n_prompts: prompts (clusters) that they are about.
        raw: share of equal verdicts.
        kappa: Cohen's.
        balanced_f1: mean of the F1 of "met" and the F1 of "not met", the reference being right.
        both_met, reference_only, other_only, neither_met: verdicts by who says met; weights where pairs are weighted.
    """

    n: int
    n_prompts: int
    raw: Estimate
    kappa: Estimate
    balanced_f1: Estimate
    both_met: float
    reference_only: float
    other_only: float
    neither_met: float


ONE_CLASS = "undefined: all verdicts of the reference are the same, so nothing can tell agreement from chance"


def agreement(
    reference: Sequence[bool],
    other: Sequence[bool],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Agreement:
    """Agreement of two raters on the same criteria.

    Args:
        reference: one rater's verdicts; the truth, where one of them is.
        other: the other's, in the same order.
        prompts: which prompt each is about; resampled as wholes.
        seed: of the resampling.
        n_resamples: B.
    """
    return agreement_of_counts(confusion(reference, other, prompts), seed=seed, n_resamples=n_resamples)


def confusion(reference: Sequence[bool], other: Sequence[bool], prompts: Sequence[str]) -> np.ndarray:
    """Verdicts by prompt and by who says met, (N, 4): both, the reference alone, the other alone, neither."""
    position: dict[str, int] = {}
    for prompt in prompts:
        position.setdefault(prompt, len(position))
    counts_N4 = np.zeros((len(position), 4))
    for r, o, prompt in zip(reference, other, prompts, strict=True):
        counts_N4[position[prompt], 2 * (not r) + (not o)] += 1
    return counts_N4


def agreement_of_counts(counts_N4: np.ndarray, *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Agreement:
    """The same from the counts of `confusion`, which may be weights.

    Kappa and balanced F1 are undefined when the reference's verdicts are all the same: kappa is then 0 or 0/0 whatever
    the other says, and one of the two F1 has nothing to find. A rater who never says met against a reference that does
    has an F1 of 0 there.
    """
    counts_N4 = counts_N4[counts_N4.any(1)]
    n = len(counts_N4)
    total = counts_N4.sum(0) if n else np.zeros(4)
    if not n:
        nothing = Estimate(None, None, None, 0, "there are no verdicts that both gave")
        return Agreement(0, 0, nothing, nothing, nothing, 0.0, 0.0, 0.0, 0.0)
    sums = resampled_sums(counts_N4, seed=seed, n_resamples=n_resamples)
    return Agreement(
        n=round(total.sum()),
        n_prompts=n,
        raw=_at_the_edge(_estimate(float(raw_agreement(total)), raw_agreement(sums), n)),
        kappa=_estimate(float(cohens_kappa(total)), cohens_kappa(sums), n, ONE_CLASS),
        balanced_f1=_estimate(float(balanced_f1(total)), balanced_f1(sums), n, ONE_CLASS),
        both_met=float(total[0]),
        reference_only=float(total[1]),
        other_only=float(total[2]),
        neither_met=float(total[3]),
    )


def raw_agreement(counts: np.ndarray) -> np.ndarray:
    """Share of equal verdicts, from counts as `confusion` has them on the last axis; NaN of none."""
    return _divided(counts[..., 0] + counts[..., 3], counts.sum(-1))


def cohens_kappa(counts: np.ndarray) -> np.ndarray:
    """(observed - expected agreement) / (1 - expected); NaN where the reference has one class only."""
    n = counts.sum(-1)
    reference, other = counts[..., 0] + counts[..., 1], counts[..., 0] + counts[..., 2]
    expected = _divided(reference * other + (n - reference) * (n - other), n * n)
    kappa = _divided(raw_agreement(counts) - expected, 1 - expected)
    return np.where(_has_both(counts), kappa, np.nan)


def balanced_f1(counts: np.ndarray) -> np.ndarray:
    """Mean of 2 TP / (2 TP + FP + FN) for met and for not met; NaN where the reference has one class only."""
    wrong = counts[..., 1] + counts[..., 2]
    met = _divided(2 * counts[..., 0], 2 * counts[..., 0] + wrong)
    unmet = _divided(2 * counts[..., 3], 2 * counts[..., 3] + wrong)
    return np.where(_has_both(counts), (met + unmet) / 2, np.nan)


def _has_both(counts: np.ndarray) -> np.ndarray:
    return (counts[..., 0] + counts[..., 1] > 0) & (counts[..., 2] + counts[..., 3] > 0)


def count_difference(
    first_N4: np.ndarray, second_N4: np.ndarray, statistic: Any, *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Estimate:
    """Statistic of the second counts minus that of the first, both resampled together, prompt by prompt.

    Args:
        first_N4, second_N4: counts of the same prompts in the same order, as `confusion` makes them.
        statistic: `raw_agreement`, `cohens_kappa` or `balanced_f1`.
        seed: of the resampling.
        n_resamples: B.
    """
    both_N8 = np.concatenate([first_N4, second_N4], 1)
    both_N8 = both_N8[both_N8.any(1)]
    n = len(both_N8)
    if not n:
        return Estimate(None, None, None, 0, "there are no verdicts")
    total = both_N8.sum(0)
    sums = resampled_sums(both_N8, seed=seed, n_resamples=n_resamples)
    value = float(statistic(total[4:]) - statistic(total[:4]))
    return _estimate(value, statistic(sums[:, 4:]) - statistic(sums[:, :4]), n, ONE_CLASS)
