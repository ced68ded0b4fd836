"""What the lab measures: per-prompt values of each arm, read from its runs, with means and intervals.

Several seeds give a Student interval over the means of the seeds. Each seed is its own task, so this interval covers
the randomness of training and that of the prompts. A single seed gives a bootstrap interval over prompts, which does
not cover the randomness of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgsd.evaluation.samples import Sample, read_samples
from rgsd.evaluation.statistics import interval, student_quantile
from rgsd.lab.running import BASE_ARMS, LabJob
from rgsd.lab.world import Audit, World
from rgsd.prompts.leaks import mentions_rubric
from rgsd.runs import METRICS, open_run

MEASURES = {
    "satisfaction": "rubric satisfaction",
    "tokens": "tokens per response",
    "false_share": "share of false claims",
    "stated": "facts stated per response",
    "to_the_point": "share of stated facts that are true and asked for",
    "names_rubric": "share of responses that mention a rubric",
}
"""Measure of a prompt -> its description."""


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
        seconds: Duration of the training command, on one core.
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
    world = job.world
    samples = read_samples(run)
    if job.arm is None:
        suffix = job.task.name.removeprefix("task")
        return [Measurement(f"{arm}{suffix}", job.seed, _values(samples, arm, world)) for arm in BASE_ARMS]
    lengths = [m["completions/mean_length"] for m in run.read_lines(METRICS) if "completions/mean_length" in m]
    per_step = int(run.meta.get("rollouts_per_step", 0))
    rollouts, tokens = len(lengths) * per_step, round(sum(lengths) * per_step)
    if sampled := run.meta.get("conditioned_responses"):
        rollouts, tokens = sampled["n_sampled"], sampled["n_tokens"]
    return [
        Measurement(
            job.arm.name,
            job.seed,
            _values(samples, "trained", world),
            rollouts=rollouts,
            rollout_tokens=tokens,
            judge_calls=rollouts if job.arm.command == "grpo" else 0,
            seconds=float(run.meta["seconds"]),
        )
    ]


def _values(samples: Sequence[Sample], arm: str, world: World) -> dict[str, np.ndarray]:
    own = sorted((s for s in samples if s.arm == arm), key=lambda s: s.example_id)
    audits = [world.audit(s.example_id.split("-")[0], s.judged_text) for s in own]
    columns = {
        "satisfaction": [s.score for s in own],
        "tokens": [s.n_tokens for s in own],
        "false_share": [a.n_false / max(1, len(a.claims)) for a in audits],
        "stated": [len(a.claims) for a in audits],
        "to_the_point": [_to_the_point(s, a, world) for s, a in zip(own, audits, strict=True)],
        "names_rubric": [float(mentions_rubric(s.response)) for s in own],
    }
    return {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}


def _to_the_point(sample: Sample, audit: Audit, world: World) -> float:
    topic, modifier = sample.example_id.split("-")[:2]
    asked = {world.fact(topic, kind) for kind in world.ask(topic, modifier).kinds}
    return len(asked & set(audit.claims)) / max(1, len(audit.claims))


class LabResults:
    """The measurements of all arms and seeds."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
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
        return _interval([m.values[measure] for m in self.of(arm)])

    def difference(self, arm: str, other: str, measure: str = "satisfaction") -> SeedInterval:
        """Arm minus other, paired by prompt, over the seeds that both have."""
        seeds = sorted(set(self._by_arm[arm]) & set(self._by_arm[other]))
        pairs = [(self._by_arm[arm][s].values[measure], self._by_arm[other][s].values[measure]) for s in seeds]
        return _interval([a - b for a, b in pairs])

    def cost(self, arm: str, what: str) -> float:
        """The mean over seeds of rollouts, rollout_tokens, judge_calls or seconds."""
        return float(np.mean([getattr(m, what) for m in self.of(arm)]))


def _interval(by_seed: Sequence[np.ndarray]) -> SeedInterval:
    means = [float(v.mean()) for v in by_seed]
    n_prompts = sum(len(v) for v in by_seed)
    if len(means) == 1:
        over_prompts = interval(by_seed[0].tolist(), n_resamples=2_000)
        return SeedInterval(over_prompts.mean, over_prompts.low, over_prompts.high, 1, n_prompts)
    # Not pooled over prompts: prompts of one seed share a task and a trained policy, so they are not independent.
    half = student_quantile(len(means) - 1) * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    mean = float(np.mean(means))
    return SeedInterval(mean, mean - half, mean + half, len(means), n_prompts)
