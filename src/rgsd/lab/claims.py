"""What the laboratory's runs say: figures of each arm, and the claims, each with its interval and its verdict.

Everything is computed from the rows in the run folders. With several seeds, each of which is a task of its own, an
interval is Student's over the seeds' means, which holds both the chance of the training and that of the prompts. With
one seed it is the bootstrap over prompts, which knows nothing of the chance of the training, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgsd.evaluation.conclusions import Conclusion, conclude
from rgsd.evaluation.samples import Sample, read_samples
from rgsd.evaluation.statistics import interval, student_quantile
from rgsd.lab.running import BASE_ARMS, Job
from rgsd.lab.world import Audit, World
from rgsd.prompts.leaks import mentions_rubric
from rgsd.runs import METRICS, open_run

MEASURES = {
    "satisfaction": "rubric satisfaction",
    "tokens": "tokens of a response",
    "false_share": "false claims, as a share",
    "stated": "facts stated in a response",
    "to_the_point": "stated facts that are true and were asked for, as a share",
    "names_rubric": "responses that speak of a rubric, as a share",
}
"""Figures of a prompt -> what they are."""


@dataclass(frozen=True)
class Measured:
    """One arm at one seed.

    Args:
        arm: its name; one of `BASE_ARMS` for the untrained model, with the task's name where that is another.
        seed: of the task and the training.
        values: measure -> one value a held-out prompt, in the order of the examples' ids.
        rollouts, rollout_tokens: sampled in training.
        judge_calls: responses judged in training.
        seconds: of the training command, on one core.
    """

    arm: str
    seed: int
    values: dict[str, np.ndarray]
    rollouts: int = 0
    rollout_tokens: int = 0
    judge_calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Spread:
    """A mean with its 95 % interval. `n_seeds` 1: over prompts alone."""

    mean: float
    low: float
    high: float
    n_seeds: int
    n_prompts: int


def read(job: Job) -> list[Measured]:
    """The figures of a finished run: one entry for an arm, three for the untrained model."""
    run = open_run(job.home)
    world = World(task_seed=job.seed, generality=job.task.generality)
    samples = read_samples(run)
    if job.arm is None:
        suffix = job.task.name.removeprefix("task")
        return [Measured(f"{arm}{suffix}", job.seed, _values(samples, arm, world)) for arm in BASE_ARMS]
    metrics = run.read_lines(METRICS)
    lengths = [m["completions/mean_length"] for m in metrics if "completions/mean_length" in m]
    rollouts = sum("completions/mean_length" in m for m in metrics) * int(run.meta.get("rollouts_per_step", 0))
    tokens = round(sum(lengths) * int(run.meta.get("rollouts_per_step", 0)))
    if sampled := run.meta.get("conditioned_responses"):
        rollouts, tokens = sampled["n_sampled"], sampled["n_tokens"]
    return [
        Measured(
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
        "false_share": [a.n_false / max(1, a.n_true + a.n_false) for a in audits],
        "stated": [a.n_true + a.n_false for a in audits],
        "to_the_point": [_to_the_point(s, a, world) for s, a in zip(own, audits, strict=True)],
        "names_rubric": [float(mentions_rubric(s.response)) for s in own],
    }
    return {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}


def _to_the_point(sample: Sample, audit: Audit, world: World) -> float:
    topic, modifier = sample.example_id.split("-")[:2]
    asked = {world.fact(topic, kind) for kind in world.ask(topic, modifier).kinds}
    return len(asked & set(audit.claims)) / max(1, len(audit.claims))


class Figures:
    """All runs of a laboratory."""

    def __init__(self, measured: Sequence[Measured]) -> None:
        self._of: dict[str, dict[int, Measured]] = {}
        for one in measured:
            self._of.setdefault(one.arm, {})[one.seed] = one

    @property
    def arms(self) -> list[str]:
        """Their names, the untrained model first."""
        return list(self._of)

    def of(self, arm: str) -> list[Measured]:
        """An arm's runs, by seed."""
        return [self._of[arm][seed] for seed in sorted(self._of[arm])]

    def level(self, arm: str, measure: str = "satisfaction") -> Spread:
        """An arm's mean."""
        return _spread([m.values[measure] for m in self.of(arm)])

    def difference(self, arm: str, other: str, measure: str = "satisfaction") -> Spread:
        """Arm minus other, on the same prompts, over the seeds that both have."""
        seeds = sorted(set(self._of[arm]) & set(self._of[other]))
        pairs = [(self._of[arm][s].values[measure], self._of[other][s].values[measure]) for s in seeds]
        return _spread([a - b for a, b in pairs])

    def cost(self, arm: str, what: str) -> float:
        """The mean over seeds of rollouts, rollout_tokens, judge_calls or seconds."""
        return float(np.mean([getattr(m, what) for m in self.of(arm)]))


def _spread(by_seed: Sequence[np.ndarray]) -> Spread:
    means = [float(v.mean()) for v in by_seed]
    n_prompts = sum(len(v) for v in by_seed)
    if len(means) == 1:
        found = interval(by_seed[0].tolist(), n_resamples=2_000)
        return Spread(found.mean, found.low, found.high, 1, n_prompts)
    half = student_quantile(len(means) - 1) * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    mean = float(np.mean(means))
    return Spread(mean, mean - half, mean + half, len(means), n_prompts)


# --- Claims ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """Something that the paper, or a later one, says.

    Args:
        text: what is claimed.
        arm, other: whose difference decides it.
        measure: of `MEASURES`.
        kind: "more" (arm above other), "less", "no less" (not below by more than `margin`), "same" (within it).
        margin: in the measure's unit.
        source: who says so.
    """

    text: str
    arm: str
    other: str
    measure: str = "satisfaction"
    kind: str = "more"
    margin: float = 0.05
    source: str = "2606.12507"


CLAIMS: tuple[Claim, ...] = (
    Claim("The base does better when it is shown the rubric: the conditioning gap.", "base+rubric", "base"),
    Claim("RGSD raises satisfaction on held-out prompts.", "rgsd", "base"),
    Claim("The right rubric is what teaches: a mismatched one does worse.", "rgsd", "mismatched", source="2606.19327"),
    Claim("A teacher that is shown nothing teaches nothing.", "none", "base", kind="same", source="control"),
    Claim("RGSD is on a par with judge-GRPO at equal prompts.", "rgsd", "grpo", kind="no less"),
    Claim("RGSD is ahead of judge-GRPO at about equal seconds.", "rgsd", "grpo-equal-seconds", source="this lab"),
    Claim("GRPO's responses grow longer than RGSD's.", "grpo", "rgsd", "tokens"),
    Claim("GRPO's responses hold more false claims than RGSD's.", "grpo", "rgsd", "false_share"),
    Claim("RGSD's responses are more to the point than GRPO's.", "rgsd", "grpo", "to_the_point", source="this lab"),
    Claim("On-policy distillation beats fine-tuning on the teacher's responses.", "rgsd", "sft", source="2601.18734"),
    Claim("The paper's clip of 0.05, taken an entry at a time, does no harm.", "entry-0.05", "rgsd", kind="no less"),
    Claim("The same cap on a token's sum learns less.", "token-0.05", "entry-0.05", kind="less", source="this lab"),
    Claim("Forward KL does better than Jensen-Shannon.", "beta-0", "rgsd", source="2601.18734"),
    Claim("Reverse KL does better than Jensen-Shannon.", "beta-1", "rgsd", source="this lab"),
    Claim("The raw rubric beats a self-written reference.", "rgsd", "reference"),
    Claim("A reference beside the rubric adds nothing.", "both", "rgsd", kind="same", source="this lab"),
    Claim("A frozen teacher is as good as a moving average.", "rgsd", "ema", kind="no less", source="SDFT"),
    Claim("A live teacher is no better than a frozen one.", "rgsd", "live", kind="no less", source="this lab"),
    Claim("LoRA learns as much as full training.", "lora", "rgsd", kind="no less", source="this lab"),
    Claim("Without the think-mask, reasoning learns to name the rubric.", "think-unmasked", "think", "names_rubric"),
    Claim("The think-mask costs no satisfaction.", "think", "think-unmasked", kind="no less"),
    Claim(
        "What is learnt reaches only as far as rubrics generalise.",
        "generality-0",
        "rgsd",
        kind="less",
        source="this lab",
    ),
    Claim("A stronger judge makes a better GRPO.", "judge-exact", "judge-wrong-0.3"),
    Claim("With the strongest judge, GRPO beats RGSD at equal prompts.", "grpo", "rgsd"),
    Claim("A lenient judge is hacked: more facts are stated.", "judge-lenient", "judge-exact", "stated"),
    Claim("A judge that is kind to length trains a worse policy.", "judge-lenient", "judge-exact", kind="less"),
    Claim("A judge that is kind to length makes responses grow.", "judge-lenient", "judge-exact", "tokens"),
)


@dataclass(frozen=True)
class Finding:
    """A claim with what the runs say of it."""

    claim: Claim
    difference: Spread
    verdict: str


def decide(claim: Claim, found: Spread) -> str:
    """reproduced, reversed, not reproduced, or too few prompts to say, by where the whole interval lies."""
    difference = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n_prompts}
    above = {"more": 0.0, "less": 0.0, "no less": -claim.margin, "same": -claim.margin}
    if claim.kind not in above:
        raise ValueError(f"unknown kind of claim {claim.kind!r}")
    found_as = conclude(difference, above=above[claim.kind])
    if found_as is Conclusion.TOO_FEW:
        return str(found_as)
    wanted, opposite = Conclusion.BETTER, Conclusion.WORSE
    if claim.kind == "less":
        wanted, opposite = opposite, wanted
    if claim.kind == "same" and found_as is wanted:
        # Above -margin; it must be below +margin, too.
        found_as = conclude(difference, above=claim.margin)
        wanted, opposite = opposite, wanted
    return "reproduced" if found_as is wanted else "reversed" if found_as is opposite else "not reproduced"


def findings(figures: Figures, claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """The claims whose arms were run, decided."""
    there = set(figures.arms)
    found = []
    for claim in claims:
        if {claim.arm, claim.other} <= there:
            difference = figures.difference(claim.arm, claim.other, claim.measure)
            found.append(Finding(claim, difference, decide(claim, difference)))
    return found
