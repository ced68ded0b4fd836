"""What the lab measures: per-prompt values of each arm, read from its runs, with means and intervals.

Several seeds give an interval that covers the randomness of training and that of the prompts. Where each seed is its
own task, as in the nano world, it is Student's over the means of the seeds. Where all seeds share the prompts, it is
clustered both ways, by seed and by prompt. A single seed gives a bootstrap interval over prompts, which does not cover
the randomness of training.

Letters in names: S seeds, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rgsd.evaluation.samples import Sample, read_samples
from rgsd.evaluation.statistics import interval, student_quantile
from rgsd.lab.benches import HELD_OUT, Bench, NanoBench
from rgsd.lab.running import BASE_ARMS, LabJob
from rgsd.runs import METRICS, Run, open_run


@dataclass(frozen=True)
class Measurement:
    """One arm at one seed.

    Args:
        arm: Name of the arm. The untrained model has the arms of `BASE_ARMS`, with the task's name appended unless it
            is the default task.
        seed: Seed of the task and of training.
        values: Measure -> one value per held-out prompt, in the order of the examples' ids.
        rollouts: Responses sampled during training.
        rollout_tokens: Their tokens.
        judge_calls: Responses judged during training.
        seconds: Duration of the training command. Costs of an arm that starts from another one include that arm's.
    """

    arm: str
    seed: int
    values: dict[str, np.ndarray]
    rollouts: int = 0
    rollout_tokens: int = 0
    judge_calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class SeedInterval:
    """A mean with its 95 % interval, over seeds, or over prompts if there is only one seed."""

    mean: float
    low: float
    high: float
    n_seeds: int
    n_prompts: int


def read_measurements(job: LabJob) -> list[Measurement]:
    """Read a finished run: one measurement of an arm, or one per arm of the untrained model."""
    run = open_run(job.home)
    samples = read_samples(run)
    if job.arm is None:
        suffix = job.task.name.removeprefix("task")
        return [Measurement(f"{arm}{suffix}", job.seed, _values(samples, arm, job)) for arm in BASE_ARMS]
    return [_with_costs(Measurement(job.arm.name, job.seed, _values(samples, "trained", job)), job.home)]


def read_all(jobs: Sequence[LabJob]) -> LabResults:
    """Read all finished runs of a lab. Where seeds share the prompts, the untrained model counts for each of them."""
    bench, seeds = jobs[0].bench, sorted({job.seed for job in jobs})
    found = []
    for job in jobs:
        for one in read_measurements(job):
            shared = job.arm is None and bench.shares_prompts
            found += [replace(one, seed=seed) for seed in seeds] if shared else [one]
    return LabResults(found, bench, jobs[0].split)


def _with_costs(found: Measurement, home: Path) -> Measurement:
    """Add the costs of a run's training, and of the run that it starts from."""
    run = open_run(home)
    rollouts, tokens = _rollouts(run)
    found = replace(
        found,
        rollouts=found.rollouts + rollouts,
        rollout_tokens=found.rollout_tokens + tokens,
        judge_calls=found.judge_calls + (rollouts if run.meta.get("kind") == "grpo" else 0),
        seconds=found.seconds + float(run.meta["seconds"]),
    )
    after = run.meta.get("lab_settings", {}).get("after")
    return _with_costs(found, home.with_name(after)) if after else found


def _rollouts(run: Run) -> tuple[int, int]:
    """Responses that a training run sampled, and their tokens."""
    if sampled := run.meta.get("conditioned_responses"):
        return sampled["n_sampled"], sampled["n_tokens"]
    lengths = [m["completions/mean_length"] for m in run.read_lines(METRICS) if "completions/mean_length" in m]
    per_step = int(run.meta.get("rollouts_per_step", 0))
    return len(lengths) * per_step, round(sum(lengths) * per_step)


def _values(samples: Sequence[Sample], arm: str, job: LabJob) -> dict[str, np.ndarray]:
    own = sorted((s for s in samples if s.arm == job.stored_arm(arm)), key=lambda s: s.example_id)
    return job.bench.values(own, job.seed, job.task)


class LabResults:
    """The measurements of all arms and seeds.

    Args:
        measurements: All of them.
        bench: Where they were taken; by default the nano world.
        split: The prompts on which they were taken.
    """

    def __init__(self, measurements: Sequence[Measurement], bench: Bench | None = None, split: str = HELD_OUT) -> None:
        self.bench, self.split = bench or NanoBench(), split
        self._by_arm: dict[str, dict[int, Measurement]] = {}
        for measurement in measurements:
            self._by_arm.setdefault(measurement.arm, {})[measurement.seed] = measurement

    @property
    def arms(self) -> list[str]:
        """Names of the arms, the untrained model's first."""
        return list(self._by_arm)

    @property
    def n_seeds(self) -> int:
        """The largest number of seeds of an arm."""
        return max(len(by_seed) for by_seed in self._by_arm.values())

    def of(self, arm: str) -> list[Measurement]:
        """An arm's measurements, by seed."""
        return [self._by_arm[arm][seed] for seed in sorted(self._by_arm[arm])]

    def mean(self, arm: str, measure: str = "satisfaction") -> SeedInterval:
        """An arm's mean."""
        return self._interval([m.values[measure] for m in self.of(arm)])

    def difference(self, arm: str, other: str, measure: str = "satisfaction") -> SeedInterval:
        """Arm minus other, paired by prompt, over the seeds that both have."""
        seeds = sorted(set(self._by_arm[arm]) & set(self._by_arm[other]))
        pairs = [(self._by_arm[arm][s].values[measure], self._by_arm[other][s].values[measure]) for s in seeds]
        return self._interval([a - b for a, b in pairs])

    def cost(self, arm: str, what: str) -> float:
        """The mean over seeds of rollouts, rollout_tokens, judge_calls or seconds."""
        return float(np.mean([getattr(m, what) for m in self.of(arm)]))

    def _interval(self, by_seed: Sequence[np.ndarray]) -> SeedInterval:
        """A mean over seeds and prompts; a prompt without a value in some seed is left out."""
        if len(by_seed) == 1 or not self.bench.shares_prompts:
            return _over_seeds([v[~np.isnan(v)] for v in by_seed])
        values_SP = np.stack(by_seed)
        return _over_seeds_and_prompts(values_SP[:, ~np.isnan(values_SP).any(0)])


def _over_seeds(by_seed: Sequence[np.ndarray]) -> SeedInterval:
    """The interval where each seed has prompts of its own."""
    n_prompts = sum(len(v) for v in by_seed)
    if not all(len(v) for v in by_seed):
        return SeedInterval(math.nan, math.nan, math.nan, len(by_seed), n_prompts)
    means = [float(v.mean()) for v in by_seed]
    if len(means) == 1:
        over_prompts = interval(by_seed[0].tolist(), n_resamples=2_000)
        return SeedInterval(over_prompts.mean, over_prompts.low, over_prompts.high, 1, n_prompts)
    # Not pooled over prompts: prompts of one seed share a task and a trained policy, so they are not independent.
    half = student_quantile(len(means) - 1) * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    mean = float(np.mean(means))
    return SeedInterval(mean, mean - half, mean + half, len(means), n_prompts)


def _over_seeds_and_prompts(values_SP: np.ndarray) -> SeedInterval:
    """The interval where all seeds have the same prompts: a random effect of the seed and one of the prompt.

    The variance of the mean is that between seeds plus that between prompts, minus the residual, which both contain
    (clustering in two ways). Welch and Satterthwaite's formula gives the degrees of freedom.
    """
    n_seeds, n_prompts = values_SP.shape
    if n_prompts < 2:
        return SeedInterval(math.nan, math.nan, math.nan, n_seeds, n_seeds * n_prompts)
    seeds_S, prompts_P, mean = values_SP.mean(1), values_SP.mean(0), float(values_SP.mean())
    of_seeds, of_prompts = float(seeds_S.var(ddof=1)) / n_seeds, float(prompts_P.var(ddof=1)) / n_prompts
    rest_SP = values_SP - seeds_S[:, None] - prompts_P + mean
    residual = float((rest_SP**2).sum()) / ((n_seeds - 1) * (n_prompts - 1)) / (n_seeds * n_prompts)
    variance = max(of_seeds, of_prompts, of_seeds + of_prompts - residual)
    if not variance:
        return SeedInterval(mean, mean, mean, n_seeds, n_seeds * n_prompts)
    freedom = (of_seeds + of_prompts) ** 2 / (of_seeds**2 / (n_seeds - 1) + of_prompts**2 / (n_prompts - 1))
    half = student_quantile(freedom) * math.sqrt(variance)
    return SeedInterval(mean, mean - half, mean + half, n_seeds, n_seeds * n_prompts)
