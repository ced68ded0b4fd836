"""Intervals and tests over prompts. Numbers in, numbers out; `rgsd.evaluation.summaries` applies them to samples.

Every interval is a 95 % bootstrap that resamples whole prompts, never single criteria: the criteria of a prompt are met
or missed by one response, so their verdicts are correlated. Its quantiles are expanded for small n (`quantiles`);
`python -m benchmarks.coverage` measures how often it covers the truth. A share of 0 or 1, where a bootstrap interval
has no width, gets the exact (Clopper-Pearson) bound for that number of prompts.

Letters in names: N prompts (or other clusters), K columns, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

from rgsd.errors import DataError
from rgsd.rubrics import CLIPPED_MEANS

N_RESAMPLES = 10_000
TAIL = 0.025
"""Probability that a 95 % interval leaves out on each side."""
NUMBERS_AT_ONCE = 2_000_000
"""Random numbers drawn at once, which take 16 MB, for any number of prompts."""
NUMBERS_KEPT = 50_000_000
"""Resamples up to this many bytes are kept for the next statistic over the same number of prompts."""
USABLE_SHARE = 0.9
"""Least share of resamples in which a statistic must be defined to get an interval."""
LEAST_FOR_A_LINE = 10
"""Fewest pairs for a regression line."""


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
        value: The statistic; None if undefined.
        low, high: The interval; None if the statistic is undefined, or defined in too few resamples.
        n: Number of prompts (clusters).
        note: Why something is None; empty otherwise.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    note: str = ""


@lru_cache(maxsize=256)
def quantiles(n: int) -> tuple[float, float]:
    """Quantiles of the resamples that bound a 95 % interval over n prompts.

    Means of resamples vary less than means of new samples, by sqrt((n - 1) / n), and a normal quantile is too small for
    an estimated variance. The tail is therefore Phi(-sqrt(n / (n - 1)) t), with t the Student quantile at n - 1 degrees
    of freedom: the expanded percentile interval of Hesterberg (2015), "What Teachers Should Know About the Bootstrap".
    """
    if n < 2:
        return TAIL, 1 - TAIL
    t = -float(stdtrit(n - 1, TAIL))
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)
    return tail, 1 - tail


def student_quantile(degrees_of_freedom: float) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    return -float(stdtrit(degrees_of_freedom, TAIL))


def interval(
    values: Sequence[float], *, scoring: str = "satisfaction", seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Interval:
    """Mean and 95 % bootstrap interval over prompts, clipped where the dataset's authors clip the mean.

    Args:
        values: One value per prompt.
        scoring: A key of `rgsd.rubrics.SCORINGS`; decides whether the mean is clipped to [0, 1].
        seed: Seed of the bootstrap.
        n_resamples: B.

    Raises:
        DataError: Without a value, or if a value is not finite.
    """
    array_N = np.asarray(values, dtype=np.float64)
    n = len(array_N)
    if not n:
        raise DataError("an interval needs at least one value, got none: nothing was scored")
    if not np.isfinite(array_N).all():
        position = int(np.flatnonzero(~np.isfinite(array_N))[0])
        raise DataError(
            f"value {position} of {n} must be finite, got {array_N[position]}: look for a damaged sample or an extreme "
            "criterion weight"
        )
    means_B = np.concatenate([array_N[draws].mean(1) for draws in _draws(n, seed, n_resamples)])
    low, high = np.quantile(means_B, quantiles(n))
    bounds = [array_N.mean(), low, high]
    if scoring in CLIPPED_MEANS:
        bounds = [min(1.0, max(0.0, v)) for v in bounds]
    return Interval(*(float(v) for v in bounds), n=n)


def _draws(n: int, seed: int, n_resamples: int) -> Iterator[np.ndarray]:
    """The prompts of each resample, in blocks (b, N)."""
    # numpy draws integers one after the other, so the size of the blocks does not change the numbers.
    rng = np.random.default_rng(seed)
    step = max(1, NUMBERS_AT_ONCE // n)
    for start in range(0, n_resamples, step):
        yield rng.integers(0, n, size=(min(step, n_resamples - start), n))


def resampled_sums(columns_NK: np.ndarray, *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> np.ndarray:
    """Sums of the columns in every bootstrap resample of the rows.

    Every statistic that is a function of sums over prompts (a ratio, kappa, F1, a regression line) gets its interval
    from these sums: one matrix product instead of B passes over the data.

    Args:
        columns_NK: One row per prompt.
        seed: Seed of the bootstrap.
        n_resamples: B.

    Returns:
        The sums, (B, K).
    """
    n = len(columns_NK)
    if not n:
        raise DataError("a bootstrap needs at least one prompt, got none")
    if n * n_resamples <= NUMBERS_KEPT:
        cached = _cached_times(n, seed, n_resamples)
        step = max(1, NUMBERS_AT_ONCE // n)
        times = (cached[start : start + step] for start in range(0, n_resamples, step))
    else:
        times = _times(n, seed, n_resamples)
    return np.concatenate([t.astype(np.float64) @ columns_NK for t in times])


def _times(n: int, seed: int, n_resamples: int) -> Iterator[np.ndarray]:
    """How often each resample holds each prompt, in blocks (b, N)."""
    for draws in _draws(n, seed, n_resamples):
        offsets = np.arange(len(draws))[:, None] * n
        # Counts average 1 and fit a byte: a count of 256 is out of reach.
        yield np.bincount((draws + offsets).ravel(), minlength=draws.size).reshape(draws.shape).astype(np.uint8)


@lru_cache(maxsize=1)
def _cached_times(n: int, seed: int, n_resamples: int) -> np.ndarray:
    return np.concatenate(list(_times(n, seed, n_resamples)))


def _estimate(value: float, draws_B: np.ndarray, n: int, note: str = "") -> Estimate:
    """An estimate from a value and its resamples; NaN means undefined in both."""
    if math.isnan(value):
        return Estimate(None, None, None, n, note)
    usable = draws_B[~np.isnan(draws_B)]
    if len(usable) < USABLE_SHARE * len(draws_B):
        share = 100 * len(usable) / len(draws_B)
        return Estimate(float(value), None, None, n, f"no interval: defined in {share:.0f} % of the resamples")
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
    """Sum of one column over the sum of another, for example criteria met over criteria scored.

    Args:
        over_N, under_N: Numerator and denominator of each prompt.
        is_share: Whether every numerator is a part of its denominator, which bounds the ratio to [0, 1].
        seed: Seed of the bootstrap.
        n_resamples: B.
    """
    columns_N2 = np.stack([np.asarray(over_N, np.float64), np.asarray(under_N, np.float64)], 1).reshape(-1, 2)
    columns_N2 = columns_N2[(columns_N2 != 0).any(1)]
    n = len(columns_N2)
    if not n or not columns_N2[:, 1].sum():
        return Estimate(None, None, None, n, "nothing to take a share of")
    total = columns_N2.sum(0)
    sums = resampled_sums(columns_N2, seed=seed, n_resamples=n_resamples)
    estimate = _estimate(float(total[0] / total[1]), _divided(sums[:, 0], sums[:, 1]), n)
    return _with_exact_bound(estimate) if is_share else estimate


def _with_exact_bound(share: Estimate) -> Estimate:
    """A share of 0 or 1 gets the exact bound on its other side; other shares are returned unchanged."""
    if share.value not in (0.0, 1.0):
        return share
    # All n prompts agree with probability (1 - width)^n = TAIL.
    width = 1 - TAIL ** (1 / share.n)
    return Estimate(share.value, *((0.0, width) if share.value == 0 else (1 - width, 1.0)), share.n)


def _divided(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under != 0)


# --- Tests and lines ------------------------------------------------------------------------------------------------


def sign_test(won: int, lost: int) -> float:
    """Two-sided exact p-value of wins and losses under equal odds; 1.0 when there are none."""
    n = won + lost
    ways = tail = 1
    for k in range(min(won, lost)):
        ways = ways * (n - k) // (k + 1)  # n choose k + 1
        tail += ways
    # Integers until the last step: neither the sum nor 2^n fits a float for large n.
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for multiple tests, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A paired difference at equal length.

    Args:
        difference: Difference of the scores of equally long responses; undefined, with a note, without a line.
        slope: Change of that difference when the length ratio doubles.
        mean_log2_ratio: Mean of log2(length b / length a); 1 means twice as long.
        is_extrapolated: Whether all length ratios lie on one side of 1, so the line is read outside the data.
        n: Number of pairs.
        n_left_out: Pairs with an empty response, which have no length ratio.
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
    """The score difference that remains at equal length.

    Fits a least-squares line through (log2(length b / length a), score b - score a), one point per prompt. Its height
    at 0 is the difference between responses of equal length. This measures association, not cause: where longer answers
    are better because they contain more that is true, that part is removed too.

    Args:
        differences: Score of b minus score of a, one per prompt.
        lengths_a, lengths_b: Lengths of the responses, in the same unit and order.
        seed: Seed of the bootstrap over prompts.
        n_resamples: B.
    """
    pairs = [(d, a, b) for d, a, b in zip(differences, lengths_a, lengths_b, strict=True) if a > 0 and b > 0]
    n = len(pairs)
    y_N = np.array([d for d, _, _ in pairs], np.float64)
    x_N = np.array([math.log2(b / a) for _, a, b in pairs], np.float64)
    mean = float(x_N.mean()) if n else None

    def refused(why: str) -> LengthControlled:
        nothing = Estimate(None, None, None, n, why)
        return LengthControlled(nothing, nothing, mean, False, n, len(differences) - n)

    if n < LEAST_FOR_A_LINE:
        return refused(f"a line takes at least {LEAST_FOR_A_LINE} pairs of non-empty responses, got {n}")
    if float(np.ptp(x_N)) < 1e-6:
        return refused(
            "all pairs have the same length ratio"
            + (": the plain difference is the difference at equal length" if abs(float(x_N[0])) < 1e-6 else "")
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
    """Least-squares height at 0 and slope, from the sums of 1, x, y, xx, xy on the last axis; NaN without a line."""
    n, x, y, xx, xy = (sums[..., k] for k in range(5))
    spread_x = n * xx - x * x
    slope = _divided(n * xy - x * y, np.where(spread_x > 1e-9 * n * n, spread_x, 0.0))
    return (y - slope * x) / n, slope


# --- Two raters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two raters on yes-or-no verdicts; intervals over prompts.

    Args:
        n: Verdicts that both gave.
        n_prompts: Prompts (clusters) that they are about.
        raw: Share of equal verdicts.
        kappa: Cohen's kappa.
        balanced_f1: Mean of the F1 of "met" and the F1 of "not met", with the reference as the truth.
        both_met, reference_only, other_only, neither_met: Counts by who says met, or sums of weights.
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


ONE_CLASS = "undefined: all verdicts of the reference are the same, so agreement cannot be separated from chance"


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
        reference: One rater's verdicts; the truth, if one of them is.
        other: The other rater's verdicts, in the same order.
        prompts: The prompt of each verdict; whole prompts are resampled.
        seed: Seed of the bootstrap.
        n_resamples: B.
    """
    return agreement_of_counts(confusion(reference, other, prompts), seed=seed, n_resamples=n_resamples)


def confusion(reference: Sequence[bool], other: Sequence[bool], prompts: Sequence[str]) -> np.ndarray:
    """Verdicts by prompt and by who says met, (N, 4): both, only the reference, only the other, neither."""
    position: dict[str, int] = {}
    for prompt in prompts:
        position.setdefault(prompt, len(position))
    counts_N4 = np.zeros((len(position), 4))
    for r, o, prompt in zip(reference, other, prompts, strict=True):
        counts_N4[position[prompt], 2 * (not r) + (not o)] += 1
    return counts_N4


def agreement_of_counts(counts_N4: np.ndarray, *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Agreement:
    """Agreement from the counts of `confusion`, which may be weights.

    Kappa and balanced F1 are undefined when all verdicts of the reference are the same: kappa is then 0 or 0/0 for any
    other rater, and one of the two F1 has no positive case. A rater who never says met, against a reference that does,
    has an F1 of 0 for "met".
    """
    counts_N4 = counts_N4[counts_N4.any(1)]
    n = len(counts_N4)
    total = counts_N4.sum(0) if n else np.zeros(4)
    if not n:
        nothing = Estimate(None, None, None, 0, "no verdicts that both gave")
        return Agreement(0, 0, nothing, nothing, nothing, 0.0, 0.0, 0.0, 0.0)
    sums = resampled_sums(counts_N4, seed=seed, n_resamples=n_resamples)
    return Agreement(
        n=round(total.sum()),
        n_prompts=n,
        raw=_with_exact_bound(_estimate(float(raw_agreement(total)), raw_agreement(sums), n)),
        kappa=_estimate(float(cohens_kappa(total)), cohens_kappa(sums), n, ONE_CLASS),
        balanced_f1=_estimate(float(balanced_f1(total)), balanced_f1(sums), n, ONE_CLASS),
        both_met=float(total[0]),
        reference_only=float(total[1]),
        other_only=float(total[2]),
        neither_met=float(total[3]),
    )


def raw_agreement(counts: np.ndarray) -> np.ndarray:
    """Share of equal verdicts, from counts on the last axis as in `confusion`; NaN without verdicts."""
    return _divided(counts[..., 0] + counts[..., 3], counts.sum(-1))


def cohens_kappa(counts: np.ndarray) -> np.ndarray:
    """(observed - expected agreement) / (1 - expected); NaN if the reference has only one class."""
    n = counts.sum(-1)
    reference, other = counts[..., 0] + counts[..., 1], counts[..., 0] + counts[..., 2]
    expected = _divided(reference * other + (n - reference) * (n - other), n * n)
    kappa = _divided(raw_agreement(counts) - expected, 1 - expected)
    return np.where(_has_both(counts), kappa, np.nan)


def balanced_f1(counts: np.ndarray) -> np.ndarray:
    """Mean of 2 TP / (2 TP + FP + FN) for met and for not met; NaN if the reference has only one class."""
    wrong = counts[..., 1] + counts[..., 2]
    met = _divided(2 * counts[..., 0], 2 * counts[..., 0] + wrong)
    unmet = _divided(2 * counts[..., 3], 2 * counts[..., 3] + wrong)
    return np.where(_has_both(counts), (met + unmet) / 2, np.nan)


def _has_both(counts: np.ndarray) -> np.ndarray:
    return (counts[..., 0] + counts[..., 1] > 0) & (counts[..., 2] + counts[..., 3] > 0)


def count_difference(
    first_N4: np.ndarray,
    second_N4: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Estimate:
    """A statistic of the second counts minus the same of the first. Both are resampled together.

    Args:
        first_N4, second_N4: Counts of the same prompts in the same order, as from `confusion`.
        statistic: `raw_agreement`, `cohens_kappa` or `balanced_f1`.
        seed: Seed of the bootstrap.
        n_resamples: B.
    """
    both_N8 = np.concatenate([first_N4, second_N4], 1)
    both_N8 = both_N8[both_N8.any(1)]
    n = len(both_N8)
    if not n:
        return Estimate(None, None, None, 0, "no verdicts")
    total = both_N8.sum(0)
    sums = resampled_sums(both_N8, seed=seed, n_resamples=n_resamples)
    value = float(statistic(total[4:]) - statistic(total[:4]))
    return _estimate(value, statistic(sums[:, 4:]) - statistic(sums[:, :4]), n, ONE_CLASS)
