"""How often a 95 % interval covers the true mean: `python -m benchmarks.coverage [--quick] [--write]`.

Each case draws many samples of n prompts from a known distribution of scores or paired differences, and counts the
intervals that cover the true mean. The target is 95 %. Four methods are compared:

    percentile   the plain percentile bootstrap
    expanded     the same with `rgsd.evaluation.statistics.quantiles`; rgsd reports this one
    bca          bias-corrected and accelerated bootstrap
    t            Student's interval

All samples of one n share their resamples, so one matrix product computes every bootstrap mean. `--write` writes the
table into docs/evaluation.md.

Letters: S samples, N prompts, B resamples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from rgsd.evaluation.conclusions import LEAST_FOR_A_VERDICT
from rgsd.evaluation.statistics import TAIL, quantiles, student_quantile

SIZES = (10, 20, 30, 40, 80, 200)
N_SAMPLES, N_RESAMPLES = 6_000, 1_000
DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
BEGIN, END = "<!-- coverage: python -m benchmarks.coverage --write -->", "<!-- end of coverage -->"

Coverage = dict[str, dict[int, dict[str, float]]]
"""Case -> n -> method -> share of the intervals that cover the true mean."""
Ends = tuple[np.ndarray, np.ndarray]
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def _skewed(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.beta(0.5, 2.5, shape)


def _few_met(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.binomial(5, rng.beta(0.5, 3.0, shape)) / 5


def _symmetric(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (rng.binomial(6, 0.45, shape) - rng.binomial(6, 0.45, shape)) / 6


def _some_gain(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (rng.random(shape) < 0.3) * rng.beta(2.0, 2.0, shape) * (1 - rng.beta(0.6, 3.0, shape))


def _rare_gain(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (rng.random(shape) < 0.15) * rng.beta(3.0, 2.0, shape) - 0.2 * (rng.random(shape) < 0.05)


def _pitfalls(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    def score(p: float) -> np.ndarray:
        return rng.binomial(4, p, shape) / 4 - (rng.random(shape) < 0.1)

    return score(0.3) - score(0.25)


def _heavy_tails(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.clip(0.15 * rng.standard_t(3, shape), -1.0, 1.0)


CASES: dict[str, Draw] = {
    "scores in [0, 1], skewed": _skewed,
    "scores of 5 criteria, most unmet": _few_met,
    "differences, symmetric": _symmetric,
    "differences, 30 % of prompts gain": _some_gain,
    "differences, 15 % of prompts gain": _rare_gain,
    "differences, with occasional pitfalls": _pitfalls,
    "differences, heavy tails": _heavy_tails,
}
METHODS = ("percentile", "expanded", "bca", "t")


def bounds(values_SN: np.ndarray, rng: np.random.Generator, n_resamples: int) -> dict[str, Ends]:
    """Lower and upper bounds of each sample's interval, by method; (S,) each."""
    n = values_SN.shape[1]
    mean_S, error_S = values_SN.mean(1), values_SN.std(1, ddof=1) / np.sqrt(n)
    draws_BN = rng.integers(0, n, (n_resamples, n))
    times_BN = np.zeros((n_resamples, n))
    np.add.at(times_BN, (np.arange(n_resamples)[:, None], draws_BN), 1.0)
    means_BS = np.sort(times_BN @ values_SN.T / n, axis=0)

    def at(low_S: np.ndarray | float, high_S: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        ends = [np.rint(np.broadcast_to(q, mean_S.shape) * (n_resamples - 1)).astype(int) for q in (low_S, high_S)]
        low, high = (np.take_along_axis(means_BS, end[None], 0)[0] for end in ends)
        return low, high

    half_S = student_quantile(n - 1) * error_S
    return {
        "percentile": at(TAIL, 1 - TAIL),
        "expanded": at(*quantiles(n)),
        "bca": at(*_bca(values_SN, mean_S, means_BS)),
        "t": (mean_S - half_S, mean_S + half_S),
    }


def _bca(values_SN: np.ndarray, mean_S: np.ndarray, means_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the resamples after Efron's correction for bias and acceleration."""
    centred_SN = values_SN - mean_S[:, None]
    squares_S = np.maximum(1e-12, (centred_SN**2).sum(1))
    acceleration_S = (centred_SN**3).sum(1) / (6 * squares_S**1.5)
    below_S = (means_BS < mean_S).mean(0) + 0.5 * (means_BS == mean_S).mean(0)
    bias_S = ndtri(below_S.clip(1 / len(means_BS), 1 - 1 / len(means_BS)))

    def level(z: float) -> np.ndarray:
        return ndtr(bias_S + (bias_S + z) / (1 - acceleration_S * (bias_S + z)))

    return level(float(ndtri(TAIL))), level(float(ndtri(1 - TAIL)))


def measure(n_samples: int = N_SAMPLES, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Coverage:
    """Coverage of every case, size and method."""
    found: Coverage = {}
    for case, draw in CASES.items():
        truth = float(draw(np.random.default_rng([seed, 1]), (4_000, 1_000)).mean())
        for n in SIZES:
            rng = np.random.default_rng([seed, 2, n])
            ends = bounds(draw(rng, (n_samples, n)), rng, n_resamples)
            shares = {m: float(np.mean((low <= truth) & (truth <= high))) for m, (low, high) in ends.items()}
            found.setdefault(case, {})[n] = shares
    return found


def table(found: Coverage, n_samples: int) -> str:
    """Markdown tables: coverage of the reported method by case and n, and the worst and mean case of each method."""
    sizes = "".join(f" n = {n} |" for n in SIZES)
    rule = "|---|" + "---:|" * len(SIZES)
    lines = [f"| coverage of the 95 % interval, in % |{sizes}", rule]
    for case, by_n in found.items():
        lines.append(f"| {case} |" + "".join(f" {100 * by_n[n]['expanded']:.1f} |" for n in SIZES))
    lines += ["", f"| worst case (mean over the cases) |{sizes}", rule]
    for method in METHODS:
        cells = [[by_n[n][method] for by_n in found.values()] for n in SIZES]
        name = f"**{method}**" if method == "expanded" else method
        lines.append(f"| {name} |" + "".join(f" {100 * min(c):.1f} ({100 * np.mean(c):.1f}) |" for c in cells))
    spread = 100 * 1.96 * np.sqrt(0.95 * 0.05 / n_samples)
    lines += [
        "",
        f"{n_samples:,} samples per cell, {N_RESAMPLES:,} resamples each; error of a cell: {spread:.1f} points.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{DOCS.name}")
    chosen = parser.parse_args()
    n_samples = N_SAMPLES // 10 if chosen.quick else N_SAMPLES
    made = table(measure(n_samples), n_samples)
    print(made)
    print(f"\nMinimum number of prompts for a verdict: {LEAST_FOR_A_VERDICT}")
    if chosen.write:
        text = DOCS.read_text("utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCS.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
