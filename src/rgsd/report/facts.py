"""The facts of a report: numbers and sentences, read from run folders.

An unfinished run has a report too, so anything missing is a sentence in `RunFacts.problems` and not an error. A folder
that is not a run, or a file with a malformed line, is an error, because nobody can tell what is missing then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rgsd.data.recurrence import in_words
from rgsd.errors import RGSDError, RunError
from rgsd.evaluation import compare
from rgsd.evaluation.conclusions import Conclusion, conclude, control_sentence, points, verdict_sentence
from rgsd.evaluation.run_ref import RunRef
from rgsd.evaluation.samples import Sample, by_arm, read_samples
from rgsd.evaluation.summaries import (
    arm_usage,
    control_samples,
    gains_by_tag,
    mean_score,
    paired_difference,
    scored_shares,
    spread,
    truncated_share,
)
from rgsd.prompts.leaks import mentions_rubric
from rgsd.rows import loads
from rgsd.runs import (
    BASELINE,
    CANDIDATE,
    CONDITIONED,
    METRICS,
    RECORD,
    RESPONSES,
    RESULTS,
    ROLLOUTS,
    SAMPLES,
    TRAINED,
    TRAINED_CONTROL,
    TRAINING_KINDS,
    Run,
    open_run,
)

TOKEN_MAPS = "explanations.jsonl"
"""Token maps that `rgsd explain --keep` stored in a run's folder."""
MOST_GROUPS = 12
"""Groups of criteria, and recurring criteria, to show."""
DEFAULT_BATCH = 8
"""The default of transformers' per_device_train_batch_size."""

Row = Mapping[str, Any]


@dataclass(slots=True)
class ReportArm:
    """One policy of one run under one judge.

    Args:
        run: The run's label.
        name: The arm's name.
        samples: Judged responses, one per prompt.
        score: Mean score with its interval (mean, low, high, n); None when nothing was scored.
        gain: Paired difference to the run's baseline, in the same form; None for the baseline itself.
        role: A role of `rgsd.runs` (baseline, conditioned, trained, control, candidate), or "other".
        leaking: Example ids of the responses that mention a rubric.
        coverage: Share of the criteria that were scored.
        tokens: Mean, median and 95th percentile of the lengths of the responses; None if unknown.
        truncated: Share of the responses that were cut off; None if unknown.
        usage: What judging cost (`rgsd.evaluation.summaries.arm_usage`).
    """

    run: str
    name: str
    samples: list[Sample]
    score: dict[str, Any] | None
    gain: dict[str, Any] | None
    role: str
    leaking: frozenset[str]
    coverage: float
    tokens: dict[str, float] | None
    truncated: float | None
    usage: dict[str, Any]

    @property
    def leak_rate(self) -> float:
        """Share of the responses that mention a rubric."""
        return len(self.leaking) / len(self.samples)


@dataclass(slots=True)
class Cost:
    """What a run cost. A field is None if the run's files do not say.

    Args:
        steps: Optimizer steps taken.
        rollouts: Responses sampled for training.
        sampled_tokens: Their tokens, from the logged mean lengths.
        train_seconds: Duration of the training steps.
        total_seconds: Duration of the run, with its evaluations.
        phases: Phase of a training step -> its seconds.
        train_calls, train_cached, train_price: Judge requests for training, replies from the cache, and their price in
            US dollars. RGSD and SFT train without a judge.
        eval_calls, eval_cached, eval_price: The same for the evaluation.
        development_calls, development_price: Judge requests for the development prompts, and their price.
    """

    steps: int = 0
    rollouts: int | None = None
    sampled_tokens: int | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    train_calls: int | None = None
    train_cached: int | None = None
    train_price: float | None = None
    eval_calls: int = 0
    eval_cached: int = 0
    eval_price: float | None = None
    development_calls: int | None = None
    development_price: float | None = None


@dataclass(slots=True)
class RunFacts:
    """The facts of one run.

    Args:
        label: The run's name on the page.
        run: The open run folder.
        kind: rgsd, grpo, sft, eval, gap or other.
        judge: The judge whose verdicts are shown; None without verdicts.
        judges: All judges of the run.
        arms: The arms, in the order of the evaluation.
        steps: Logged training steps, one entry per step.
        cost: What the run cost.
        change: `rgsd.evaluation.compare.difference` from the baseline to the run's main arm; None if one is missing.
        maps: Token maps.
        problems: What is missing or doubtful, in sentences.
        advice: The advice of `rgsd gap`.
        added: What the right rubric added: the difference of the trained arm to that of the mismatched control; None
            without a control that was judged.
        gains: Gains by criterion tag (`rgsd.evaluation.summaries.gains_by_tag`), from the baseline to the trained arm
            and from the control to the trained arm; empty without two arms to compare.
        development: Logged evaluations of the development prompts during training, one entry per step.
    """

    label: str
    run: Run
    kind: str
    judge: str | None
    judges: list[str]
    arms: list[ReportArm]
    steps: list[dict[str, Any]]
    cost: Cost
    change: dict[str, Any] | None
    maps: list[dict[str, Any]]
    problems: list[str]
    advice: list[str] = field(default_factory=list)
    added: dict[str, Any] | None = None
    gains: dict[str, dict[str, Any]] = field(default_factory=dict)
    development: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best step on the development prompts, from run.json: step, metric, value, is_loaded, n_prompts."""
        return self.run.meta.get("best")

    def role(self, role: str) -> ReportArm | None:
        """The first arm with this role."""
        return next((a for a in self.arms if a.role == role), None)

    @property
    def after(self) -> ReportArm | None:
        """The run's main arm: the trained policy, or else the last evaluated model."""
        return self.role(TRAINED) or next((a for a in reversed(self.arms) if a.role == CANDIDATE), None)


@dataclass(slots=True)
class Facts:
    """The facts of one or more runs, and the comparison of the others with the first.

    Args:
        runs: The runs, in the order given.
        comparison: Result of `rgsd.evaluation.compare.compare`; None for a single run, or if they cannot be compared.
        refusal: Why the runs cannot be compared.
    """

    runs: list[RunFacts]
    comparison: dict[str, Any] | None = None
    refusal: str | None = None


def read(names: Sequence[str]) -> Facts:
    """Read the facts of one or more runs.

    Raises:
        RunError: If a folder is not a run, or is named twice.
    """
    folders = [Path(name) for name in names]
    if not folders:
        raise RunError("expected at least one run, got none: rgsd report RUN [RUN ...]")
    resolved = [f.resolve() for f in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(f for f in folders if resolved.count(f.resolve()) > 1)
        raise RunError(f"expected different runs, got {twice} twice: name each run once")
    short = [f.name for f in resolved]
    labels = short if len(set(short)) == len(short) else [str(f) for f in folders]
    runs = [_run(label, open_run(folder)) for label, folder in zip(labels, folders, strict=True)]
    if len(runs) == 1:
        return Facts(runs)
    return _compared(runs)


def _run(label: str, run: Run) -> RunFacts:
    settings, problems = run.settings or {}, []
    samples = read_samples(run)
    judges = list(dict.fromkeys(s.judge for s in samples))
    judge = judges[0] if judges else None
    samples = [s for s in samples if s.judge == judge]
    steps = _steps(run.read_lines(METRICS))
    kind = run.meta.get("kind") or _kind(settings, steps)
    arms = _arms(label, run, samples)
    twin = _twin(run, problems)
    if twin is not None:
        arms += _twin_arms(label, run, twin, samples)
    facts = RunFacts(label, run, kind, judge, judges, arms, steps, Cost(), None, [], problems)
    facts.development = _steps(run.read_lines(METRICS), "eval_prompts")
    facts.cost = _cost(facts)
    facts.maps = _maps(run.read_lines(TOKEN_MAPS))
    if kind == "gap":
        advice = _results(run).get("advice")
        facts.advice = [str(s) for s in advice] if isinstance(advice, list) else []
    if (run.folder / RESULTS).is_file() and not _results(run):
        problems.append(f"{RESULTS} cannot be read and is ignored. All numbers below come from {SAMPLES}.")
    before, after = facts.role(BASELINE), facts.after
    if before and after:
        facts.change = compare.difference(before.samples, after.samples, seed=_seed(settings))
        facts.gains["baseline"] = gains_by_tag(before.samples, after.samples, seed=_seed(settings))
    control = facts.role(TRAINED_CONTROL)
    if control and after:
        added = paired_difference(control.samples, after.samples, seed=_seed(settings))
        facts.added = None if added is None else asdict(added)
        facts.gains["control"] = gains_by_tag(control.samples, after.samples, seed=_seed(settings))
    problems.extend(_missing(facts))
    return facts


def _kind(settings: Mapping[str, Any], steps: Sequence[Row]) -> str:
    """The kind of a run that was written before run.json stored the kind."""
    if "templates" in settings and "models" in settings:
        return "gap"
    if "models" in settings:
        return "eval"
    if "responses_per_prompt" in settings:
        return "sft"
    if "num_generations" in settings or any("reward" in s for s in steps):
        return "grpo"
    return "rgsd" if "clip_threshold" in settings else "other"


def _seed(settings: Mapping[str, Any]) -> int:
    # The defaults of `rgsd eval` (0) and of transformers' trainers (42), for runs that do not store their seed.
    return int(settings.get("seed") or 0) if "models" in settings else int(settings.get("seed", 42))


def _steps(lines: Sequence[Row], marker: str = "loss") -> list[dict[str, Any]]:
    """The logged steps in order: the lines with the field `marker`. A resumed run repeats steps; the later line of a
    step counts."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        if marker in line and isinstance(line.get("step"), int):
            steps[line["step"]] = dict(line)
    return [steps[step] for step in sorted(steps)]


def _maps(lines: Sequence[Row]) -> list[dict[str, Any]]:
    """The token maps. The last one of each example and policy counts."""
    return list({(m.get("example_id"), m.get("policy")): dict(m) for m in lines if m.get("tokens")}.values())


# --- Arms -----------------------------------------------------------------------------------------------------------


def _arms(label: str, run: Run, samples: Sequence[Sample]) -> list[ReportArm]:
    by_name = by_arm(samples)
    baseline = run.arm_of(BASELINE, among=by_name)
    roles, seed = run.roles, _seed(run.settings or {})
    arms = []
    for name, own in by_name.items():
        against = by_name[baseline] if baseline is not None and name != baseline else None
        arms.append(_arm(label, own, against, roles.get(name, "other"), seed, arm_usage(run, own)))
    return arms


def _twin(run: Run, problems: list[str]) -> Run | None:
    """The run of the mismatched control in a training run's folder; None if it is missing or unfinished."""
    if not (run.twin / RECORD).is_file():
        return None
    twin = open_run(run.twin)
    if run.meta.get("id") is None or twin.meta.get("control_of") != run.meta["id"]:
        problems.append(f"The run in {run.twin} is not this run's control and is left out.")
        return None
    if twin.meta.get("status") != "finished":
        problems.append("The control is not finished and is left out: resume it with `--resume_from_checkpoint`.")
        return None
    return twin


def _twin_arms(label: str, run: Run, twin: Run, samples: Sequence[Sample]) -> list[ReportArm]:
    """The control's policy as an arm of the run; empty if the run's judge did not judge it."""
    own = control_samples(twin, samples[0].judge) if samples else []
    if not own:
        return []
    by_name = by_arm(samples)
    baseline = run.arm_of(BASELINE, among=by_name)
    against = None if baseline is None else by_name[baseline]
    usage = arm_usage(twin, [s for s in read_samples(twin) if s.arm == twin.arm_of(TRAINED)])
    return [_arm(label, own, against, TRAINED_CONTROL, _seed(run.settings or {}), usage)]


def _results(run: Run) -> dict[str, Any]:
    """The content of results.json; empty if it is missing or cannot be read."""
    try:
        table = loads((run.folder / RESULTS).read_bytes(), lenient=True)
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _arm(
    label: str, samples: list[Sample], baseline: list[Sample] | None, role: str, seed: int, usage: dict[str, Any]
) -> ReportArm:
    gain = None if baseline is None else paired_difference(baseline, samples, seed=seed)
    return ReportArm(
        run=label,
        name=samples[0].arm,
        samples=samples,
        score=mean_score(samples, seed=seed),
        gain=None if gain is None else asdict(gain),
        role=role,
        leaking=frozenset(s.example_id for s in samples if mentions_rubric(s.judged_text, s.question)),
        coverage=float(scored_shares(samples)["criteria_share"] or 0.0),
        tokens=spread([s.n_tokens for s in samples if s.n_tokens is not None]),
        truncated=truncated_share(samples),
        usage=usage,
    )


# --- Cost -----------------------------------------------------------------------------------------------------------


def _cost(facts: RunFacts) -> Cost:
    run, steps = facts.run, facts.steps
    usages = [a.usage for a in facts.arms]
    prices = [u["price"] for u in usages]
    cost = Cost(
        steps=steps[-1]["step"] if steps else 0,
        total_seconds=run.meta.get("seconds"),
        eval_calls=sum(u["calls"] for u in usages),
        eval_cached=sum(u["cached"] for u in usages),
        eval_price=math.fsum(prices) if all(p is not None for p in prices) else None,
    )
    if any("eval_coverage" in row for row in facts.development):
        cost.development_calls = round(sum(row.get("eval_judge/calls", 0) for row in facts.development))
        cost.development_price = sum(row.get("eval_judge/dollars", 0.0) for row in facts.development)
    if not steps or facts.kind not in TRAINING_KINDS:
        return cost
    per_step = _rollouts_per_step(run)
    # With logging_steps > 1, a line holds means over the steps since the line before, so it counts once for each.
    weights = [s["step"] - before for s, before in zip(steps, [0, *(s["step"] for s in steps[:-1])], strict=True)]
    cost.rollouts = cost.steps * per_step
    judged = _judged_rollouts(run) if facts.kind == "grpo" else RolloutUsage()
    # Rollouts are counted rather than computed where possible. A resumed run has lost those of repeated steps.
    if judged.n and not run.meta.get("resumed"):
        cost.rollouts = judged.n
        per_step = round(judged.n / cost.steps)
    lengths = [s.get("response_length", s.get("completions/mean_length")) for s in steps]
    if all(n is not None for n in lengths):
        cost.sampled_tokens = round(sum(n * w * per_step for n, w in zip(lengths, weights, strict=True)))
    cost.phases = {
        phase: float(sum(s.get(f"seconds/{phase}", 0.0) * w for s, w in zip(steps, weights, strict=True)))
        for phase in ("rollout", "teacher", "student", "update")
        if any(f"seconds/{phase}" in s for s in steps)
    }
    seconds = [s.get("step_time") for s in steps]
    if cost.phases:
        cost.train_seconds = sum(cost.phases.values())
    elif all(s is not None for s in seconds):
        cost.train_seconds = float(sum(s * w for s, w in zip(seconds, weights, strict=True)))  # pyright: ignore
    if facts.kind == "sft":
        # SFT samples all its responses before its first step.
        sampled = run.meta.get("conditioned_responses") or {}
        cost.rollouts, cost.sampled_tokens = sampled.get("n_sampled"), sampled.get("n_tokens")
    if facts.kind in ("rgsd", "sft"):
        cost.train_calls, cost.train_cached, cost.train_price = 0, 0, 0.0
    elif judged.n:
        cost.train_calls, cost.train_cached, cost.train_price = judged.calls, judged.cached, judged.price
    elif all("judge/calls" in s for s in steps):
        cost.train_calls = round(sum(s["judge/calls"] * w for s, w in zip(steps, weights, strict=True)))
        cost.train_cached = round(sum(s["judge/cached"] * w for s, w in zip(steps, weights, strict=True)))
        cost.train_price = steps[-1].get("judge/total_dollars")
    return cost


@dataclass(slots=True)
class RolloutUsage:
    """The number of judged rollouts and what judging cost. The price is None if that of any rollout is unknown."""

    n: int = 0
    calls: int = 0
    cached: int = 0
    price: float | None = 0.0


def _judged_rollouts(run: Run) -> RolloutUsage:
    """Sum over the rollouts of a GRPO run, one line at a time, since there can be a million."""
    total = RolloutUsage()
    for row in run.iterate_lines(ROLLOUTS):
        usage = row.get("usage") or {}
        total.n += 1
        total.calls += usage.get("calls") or 0
        total.cached += usage.get("cached") or 0
        price = usage.get("price")
        total.price = None if total.price is None or price is None else total.price + price
    return total


def _rollouts_per_step(run: Run) -> int:
    settings = run.settings or {}
    noted = run.meta.get("rollouts_per_step")
    if noted:
        return int(noted)
    batch = settings.get("per_device_train_batch_size", DEFAULT_BATCH)
    return int(batch) * int(settings.get("gradient_accumulation_steps", 1))


# --- What is missing ------------------------------------------------------------------------------------------------


def _missing(facts: RunFacts) -> list[str]:
    run, problems = facts.run, []
    is_training = facts.kind in TRAINING_KINDS
    status = run.meta.get("status", "unknown")
    if status != "finished":
        how = "resume it with `--resume_from_checkpoint`" if is_training else "repeat the command to continue it"
        problems.append(f"This run is not finished (status {status!r}): {how}.")
    if not facts.arms:
        responses = run.folder / RESPONSES
        problems.append(
            "The run has responses, but none of them has been judged."
            if responses.is_file() and responses.stat().st_size
            else f"The run has not been evaluated: evaluate it with `rgsd eval {run.folder}:base {run.folder}`."
        )
    elif is_training and not facts.role(TRAINED):
        problems.append("The trained policy has not been evaluated.")
    elif is_training and not facts.role(BASELINE):
        problems.append("The base model has not been evaluated.")
    if is_training and not facts.steps:
        problems.append("No training step has been logged.")
    counts = {a.name: len(a.samples) for a in facts.arms}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in counts.items())
        problems.append(f"The arms have different numbers of prompts ({listed}).")
    problems.extend(f"At step {w['step']} of training: {w['text']}." for w in run.meta.get("warnings") or [])
    for arm in facts.arms:
        if arm.coverage < compare.ENOUGH_SCORED:
            problems.append(f"Only {100 * arm.coverage:.1f} % of the criteria of {arm.name} were scored.")
    if len(facts.judges) > 1:
        others = ", ".join(facts.judges[1:])
        problems.append(f"The verdicts shown are from {facts.judge}. Other judges of this run: {others}.")
    return problems


# --- In words -------------------------------------------------------------------------------------------------------


def verdict(facts: RunFacts) -> list[str]:
    """What a run shows, in plain sentences. The first one is the headline."""
    if facts.advice:
        return list(facts.advice)
    before, conditioned, after = facts.role(BASELINE), facts.role(CONDITIONED), facts.after
    if after is None or after.gain is None or before is None:
        return [_headline_without_gain(facts)]
    gain = after.gain
    sentences = [] if facts.added is None else [control_sentence(facts.added)]
    sentences.append(verdict_sentence(after.name, before.name, gain))
    if conditioned and conditioned.gain:
        worth = f"The rubric in the prompt is worth {points(conditioned.gain)} to the untrained model"
        match conclude(conditioned.gain):
            case Conclusion.BETTER:
                sentences.append(f"{worth}, which is what training can teach.")
                if conclude(gain) is Conclusion.BETTER:
                    share = gain["mean"] / conditioned.gain["mean"]
                    sentences[-1] += f" Without the rubric, {after.name} reaches {100 * share:.0f} % of it."
            case Conclusion.TOO_FEW:
                sentences.append(f"{worth}: {Conclusion.TOO_FEW}.")
            case Conclusion.WORSE:
                sentences.append(f"{worth}, so the teacher had nothing to teach.")
            case conclusion:
                sentences.append(f"{worth}: {conclusion}, so it is not shown that the teacher had anything to teach.")
    return sentences + _caveats(facts, gain, after)


def _headline_without_gain(facts: RunFacts) -> str:
    """The headline of a run without a pair of arms to compare."""
    before, conditioned, after = facts.role(BASELINE), facts.role(CONDITIONED), facts.after
    if conditioned and conditioned.gain and facts.kind in (*TRAINING_KINDS, "gap"):
        return verdict_sentence(conditioned.name, before.name if before else "the model alone", conditioned.gain)
    scored = [arm for arm in (after, *facts.arms) if arm and arm.score]
    if not scored:
        return "Nothing was scored, so there is no result to show."
    score = scored[0].score or {}
    return f"{scored[0].name} scores {score['mean']:.3f} on {score['n']} prompts."


def _caveats(facts: RunFacts, gain: Mapping[str, Any], after: ReportArm) -> list[str]:
    """What a reader must know to judge the gain of a run."""
    caveats = []
    if best := facts.best:
        scored = f"{best['metric']} {best['value']:.3f} on {best['n_prompts']} development prompts".replace("_", " ")
        last = facts.run.meta.get("steps") or facts.cost.steps
        caveats.append(
            f"The trained policy is that of step {best['step']} of {last}, the best by {scored}. The best of several "
            "is partly luck; the held-out prompts show what it is worth."
            if best.get("is_loaded")
            else f"The trained policy is that of the last step, {last}. Step {best['step']} was the best ({scored})."
        )
    if lineage := facts.run.meta.get("lineage"):
        caveats.append(
            f"This run's base model is the trained policy of {lineage[0]['run']} ({lineage[0]['kind']}). The numbers "
            "show what this run added to it."
        )
    context = (facts.run.settings or {}).get("privileged_context", "rubric")
    sees_rubric = facts.kind == "rgsd" and context in ("rubric", "both")
    if sees_rubric and facts.added is None and conclude(gain) is Conclusion.BETTER:
        caveats.append(
            "This run alone cannot tell whether the right rubric mattered. A control that is trained on another "
            "prompt's rubric can (`--control`)."
        )
    if facts.kind == "sft":
        caveats.append("This run is a control: it was fine-tuned on responses of the model with the rubric.")
    if facts.kind == "rgsd" and context in ("mismatched", "none"):
        context_in_words = "another prompt's rubric" if context == "mismatched" else "no rubric"
        caveats.append(f"This run is a control: its teacher saw {context_in_words}.")
    if recurring := in_words(facts.run.meta.get("recurrence") or {}):
        caveats.append(f"Training data: {recurring}.")
    if facts.kind in TRAINING_KINDS:
        caveats.append(
            "The intervals cover the choice of prompts, but not the randomness of training: one seed was run."
        )
    if facts.judge == "checks":
        caveats.append("Judged by programmatic checks, which cannot tell whether a claim is true.")
    elif facts.kind == "grpo" and facts.judges and facts.judge == facts.judges[0]:
        # A judge that a policy was trained on overrates it.
        caveats.append("GRPO was trained on the reward of this judge: evaluate the run with another judge too.")
    if after.leak_rate > 0:
        caveats.append(f"{100 * after.leak_rate:.0f} % of the trained responses mention a rubric or its criteria.")
    return caveats


# --- Several runs ---------------------------------------------------------------------------------------------------


def _compared(runs: list[RunFacts]) -> Facts:
    """Compare the main arms of the others, or else their baselines, with that of the first."""
    refs = []
    for facts in runs:
        arm = facts.after or facts.role(BASELINE)
        if arm is None:
            return Facts(runs, refusal=f"{facts.label} has no judged responses, so the runs cannot be compared.")
        refs.append(RunRef(str(facts.run.folder), arm.name))
    try:
        arms = compare.read_arms(refs)
        return Facts(runs, comparison=compare.compare(arms, seed=_seed(runs[0].run.settings or {})))
    except RGSDError as error:
        return Facts(runs, refusal=str(error))


def cost_sentence(runs: Sequence[RunFacts]) -> str | None:
    """Compare the cost of an RGSD run and a GRPO run; None unless both are among the runs, with equal held-out data."""
    rgsd, grpo = (next((r for r in runs if r.kind == k and r.cost.rollouts), None) for k in ("rgsd", "grpo"))
    if rgsd is None or grpo is None:
        return None
    prints = [r.run.meta.get("held_out_fingerprint") for r in (rgsd, grpo)]
    if None in prints or len(set(prints)) > 1:
        return None
    parts = [f"{rgsd.cost.rollouts:,} against {grpo.cost.rollouts:,} sampled responses"]
    if rgsd.cost.sampled_tokens and grpo.cost.sampled_tokens:
        parts.append(f"{rgsd.cost.sampled_tokens:,} against {grpo.cost.sampled_tokens:,} sampled tokens")
    calls = (grpo.cost.train_calls or 0) + (grpo.cost.train_cached or 0)
    parts.append(f"0 against {calls:,} judge calls" if calls else f"0 against {grpo.cost.rollouts:,} judged responses")
    if rgsd.cost.train_seconds and grpo.cost.train_seconds:
        parts.append(f"{rgsd.cost.train_seconds:,.0f} s against {grpo.cost.train_seconds:,.0f} s of training steps")
    return f"{rgsd.label} (RGSD) against {grpo.label} (GRPO), on the same held-out prompts: {'; '.join(parts)}."
