"""Run folders -> the numbers and sentences of a report. Plain data: everything here can be written as JSON.

Whatever a run lacks is a sentence in `RunFacts.problems`, never an error: an unfinished run has a report too. A folder
that is no run is refused, and a file with a line that is no row: what is missing then, nobody knows.
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
"""Token maps that `rgsd explain --keep` left in a run's folder."""
MOST_GROUPS = 12
"""Groups of criteria shown, and recurring criteria; the won first, the lost last."""
DEFAULT_BATCH = 8
"""Of transformers: prompts a device and micro-batch where the recipe says nothing."""

Row = Mapping[str, Any]


@dataclass(slots=True)
class Arm:
    """One policy of one run under one judge.

    Args:
        run, name: the run's label and the arm's name in it.
        samples: its judged responses, one per prompt.
        score: mean, low, high, n; None when nothing was scored.
        gain: the same of the paired difference to the run's baseline; None for the baseline itself.
        role: as the run says (`rgsd.runs`): baseline, conditioned, trained, control, candidate; or other.
        leaking: the prompts whose response speaks of a rubric.
        coverage: share of the criteria that were scored.
        tokens: mean, median and 95th percentile of the responses' lengths; None where they are unknown.
        truncated: share of the responses that were cut off.
        usage: what judging it cost.
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
        """Share of the responses that speak of a rubric."""
        return len(self.leaking) / len(self.samples)


@dataclass(slots=True)
class Cost:
    """What a run cost. None where its files do not say.

    Args:
        steps: optimizer steps taken.
        rollouts: responses sampled in training.
        sampled_tokens: their tokens, from the logged mean lengths.
        train_seconds, total_seconds: of the training steps, and of the whole run with its evaluations.
        phases: seconds by phase of a step.
        train_calls, train_cached, train_price: of the judge in training; RGSD has none.
        eval_calls, eval_cached, eval_price: of the judge in the evaluation. Prices are US dollars.
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


@dataclass(slots=True)
class RunFacts:
    """One run.

    Args:
        label: its name on the page.
        run: the open folder.
        kind: rgsd, grpo, sft, eval, gap or other.
        judge: whose verdicts are shown; None without any.
        judges: all that judged it.
        arms: in the order of the evaluation.
        steps: logged steps, the last line of each step.
        cost: what it cost.
        change: `rgsd.evaluation.compare.difference` from baseline to the trained arm; None where either is missing.
        maps: its token maps.
        problems: what is missing or doubtful, in sentences.
        advice: what `rgsd gap` concluded.
        added: the difference of the trained arm to the mismatched twin's: what the right rubric added; None without a
            twin that was judged.
        gains: gains by criterion tag (`rgsd.evaluation.summaries.gains_by_tag`) from baseline to the trained arm, and
            from the twin's to it; empty where there is nothing to compare.
    """

    label: str
    run: Run
    kind: str
    judge: str | None
    judges: list[str]
    arms: list[Arm]
    steps: list[dict[str, Any]]
    cost: Cost
    change: dict[str, Any] | None
    maps: list[dict[str, Any]]
    problems: list[str]
    advice: list[str] = field(default_factory=list)
    added: dict[str, Any] | None = None
    gains: dict[str, dict[str, Any]] = field(default_factory=dict)

    def role(self, role: str) -> Arm | None:
        """The first arm with this role."""
        return next((a for a in self.arms if a.role == role), None)

    @property
    def after(self) -> Arm | None:
        """The arm that the run is about: the trained policy, or the last of the models that were measured."""
        return self.role(TRAINED) or next((a for a in reversed(self.arms) if a.role == CANDIDATE), None)


@dataclass(slots=True)
class Facts:
    """Several runs, and what came of setting the others against the first (`rgsd.evaluation.compare`).

    Args:
        runs: as named.
        comparison: of `rgsd.evaluation.compare.compare`; None for one run, or where they cannot be compared.
        refusal: why they cannot.
    """

    runs: list[RunFacts]
    comparison: dict[str, Any] | None = None
    refusal: str | None = None


def read(names: Sequence[str]) -> Facts:
    """The facts of one run or more.

    Raises:
        RunError: for a folder that is no run, or one that is named twice.
    """
    folders = [Path(name) for name in names]
    if not folders:
        raise RunError("got no run, wanted at least one: rgsd report RUN [RUN ...]")
    resolved = [f.resolve() for f in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(f for f in folders if resolved.count(f.resolve()) > 1)
        raise RunError(f"got {twice} twice, wanted different runs")
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
    facts.cost = _cost(facts)
    facts.maps = _maps(run.read_lines(TOKEN_MAPS))
    if kind == "gap":
        advice = _results(run).get("advice")
        facts.advice = [str(s) for s in advice] if isinstance(advice, list) else []
    if (run.folder / RESULTS).is_file() and not _results(run):
        problems.append(f"{RESULTS} cannot be read, and is left out: the numbers below are taken from {SAMPLES}.")
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
    """The kind of a run from before runs said it themselves."""
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
    return int(settings.get("seed") or 0) if "models" in settings else int(settings.get("seed", 42))


def _steps(lines: Sequence[Row]) -> list[dict[str, Any]]:
    """The logged steps in order; of a step that a resumed run took twice, the later line."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        if "loss" in line and isinstance(line.get("step"), int):
            found[line["step"]] = dict(line)
    return [found[step] for step in sorted(found)]


def _maps(lines: Sequence[Row]) -> list[dict[str, Any]]:
    """The token maps, the last of each example and policy."""
    return list({(m.get("example_id"), m.get("policy")): dict(m) for m in lines if m.get("tokens")}.values())


# --- Arms -----------------------------------------------------------------------------------------------------------


def _arms(label: str, run: Run, samples: Sequence[Sample]) -> list[Arm]:
    by_name = by_arm(samples)
    baseline = run.arm_of(BASELINE, among=by_name)
    roles, seed = run.roles, _seed(run.settings or {})
    arms = []
    for name, own in by_name.items():
        against = by_name[baseline] if baseline is not None and name != baseline else None
        arms.append(_arm(label, own, against, roles.get(name, "other"), seed, arm_usage(run, own)))
    return arms


def _twin(run: Run, problems: list[str]) -> Run | None:
    """The run of the mismatched twin in a training run's folder, where it is finished."""
    if not (run.twin / RECORD).is_file():
        return None
    twin = open_run(run.twin)
    if run.meta.get("id") is None or twin.meta.get("control_of") != run.meta["id"]:
        problems.append(f"The run in {run.twin} is not this run's control, and is left out.")
        return None
    if twin.meta.get("status") != "finished":
        problems.append(
            "The control is not finished, and is left out: `--resume_from_checkpoint true` goes on with it."
        )
        return None
    return twin


def _twin_arms(label: str, run: Run, twin: Run, samples: Sequence[Sample]) -> list[Arm]:
    """The twin's policy as an arm of the run that it controls; none where the run's judge did not judge it."""
    own = control_samples(twin, samples[0].judge) if samples else []
    if not own:
        return []
    by_name = by_arm(samples)
    baseline = run.arm_of(BASELINE, among=by_name)
    against = None if baseline is None else by_name[baseline]
    usage = arm_usage(twin, [s for s in read_samples(twin) if s.arm == twin.arm_of(TRAINED)])
    return [_arm(label, own, against, TRAINED_CONTROL, _seed(run.settings or {}), usage)]


def _results(run: Run) -> dict[str, Any]:
    """The table that the run itself wrote; nothing where there is none that can be read."""
    try:
        found = loads((run.folder / RESULTS).read_bytes(), lenient=True)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _arm(
    label: str, samples: list[Sample], baseline: list[Sample] | None, role: str, seed: int, usage: dict[str, Any]
) -> Arm:
    gain = None if baseline is None else paired_difference(baseline, samples, seed=seed)
    return Arm(
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
    if not steps or facts.kind not in TRAINING_KINDS:
        return cost
    per_step = _rollouts_per_step(run)
    # A line of the log stands for the steps since the line before: means over them, for counts and seconds alike.
    weights = [s["step"] - before for s, before in zip(steps, [0, *(s["step"] for s in steps[:-1])], strict=True)]
    cost.rollouts = cost.steps * per_step
    judged = _judged_rollouts(run) if facts.kind == "grpo" else Usage()
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
        # Sampled once, before its steps, from the model that sees the rubric.
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
class Usage:
    """Judged rollouts, and what judging them cost; the price is None where that of any is unknown."""

    n: int = 0
    calls: int = 0
    cached: int = 0
    price: float | None = 0.0


def _judged_rollouts(run: Run) -> Usage:
    """All rollouts of a GRPO run, a line at a time: there can be a million."""
    found = Usage()
    for row in run.iterate_lines(ROLLOUTS):
        used = row.get("usage") or {}
        found.n += 1
        found.calls += used.get("calls") or 0
        found.cached += used.get("cached") or 0
        price = used.get("price")
        found.price = None if found.price is None or price is None else found.price + price
    return found


def _rollouts_per_step(run: Run) -> int:
    settings = run.settings or {}
    noted = run.meta.get("rollouts_per_step")
    if noted:
        return int(noted)
    batch = settings.get("per_device_train_batch_size", DEFAULT_BATCH)
    return int(batch) * int(settings.get("gradient_accumulation_steps", 1))


# --- What is missing ------------------------------------------------------------------------------------------------


def _missing(facts: RunFacts) -> list[str]:
    run, said = facts.run, []
    status = run.meta.get("status", "unknown")
    if status != "finished":
        how = "`--resume_from_checkpoint true` goes on with it" if facts.kind in TRAINING_KINDS else ""
        how = how or "the same command goes on with it"
        said.append(f"This run is not finished (its status is {status!r}): what is here is what there was; {how}.")
    if not facts.arms:
        kept = run.folder / RESPONSES
        said.append(
            "Responses were written, but none was judged yet."
            if kept.is_file() and kept.stat().st_size
            else f"Nothing was measured in this run: `rgsd eval {run.folder}:base {run.folder}` measures it."
        )
    elif facts.kind in TRAINING_KINDS and not facts.role(TRAINED):
        said.append("The trained policy has not been measured: there is a before, and no after.")
    elif facts.kind in TRAINING_KINDS and not facts.role(BASELINE):
        said.append("The base has not been measured in this run: there is an after, and no before.")
    if facts.kind in TRAINING_KINDS and not facts.steps:
        said.append("No training step was logged.")
    counts = {a.name: len(a.samples) for a in facts.arms}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {n}" for name, n in counts.items())
        said.append(f"The arms were not measured on equally many prompts ({told}).")
    for arm in facts.arms:
        if arm.coverage < compare.ENOUGH_SCORED:
            said.append(
                f"Only {100 * arm.coverage:.1f} % of the criteria of {arm.name} were scored: its score rests on these."
            )
    if len(facts.judges) > 1:
        said.append(f"Verdicts shown are those of {facts.judge}; also judged by {', '.join(facts.judges[1:])}.")
    return said


# --- In words -------------------------------------------------------------------------------------------------------


def verdict(facts: RunFacts) -> list[str]:
    """What a run shows, in plain sentences; the first one is the headline."""
    if facts.advice:
        return list(facts.advice)
    before, shown, after = facts.role(BASELINE), facts.role(CONDITIONED), facts.after
    said: list[str] = []
    if after is None or after.gain is None or before is None:
        only = [a for a in facts.arms if a.score]
        if after in only:
            only.insert(0, after)
        if shown and shown.gain and facts.kind in (*TRAINING_KINDS, "gap"):
            said.append(verdict_sentence(shown.name, before.name if before else "the model alone", shown.gain))
        elif only:
            score = only[0].score or {}
            said.append(f"{only[0].name} scores {score['mean']:.3f} on {score['n']} prompts.")
        else:
            said.append("Nothing was scored, so there is no result to show.")
        return said
    gain = after.gain
    if facts.added is not None:
        said.append(control_sentence(facts.added))
    said.append(verdict_sentence(after.name, before.name, gain))
    if shown and shown.gain:
        worth = f"The rubric in the prompt is worth {points(shown.gain)} to the untrained model"
        match conclude(shown.gain):
            case Conclusion.BETTER:
                said.append(f"{worth}: that is what there was to learn.")
                if conclude(gain) is Conclusion.BETTER:
                    share = gain["mean"] / shown.gain["mean"]
                    said[-1] += f" Without the rubric, {after.name} reaches {100 * share:.0f} % of it."
            case Conclusion.TOO_FEW:
                said.append(f"{worth}: {Conclusion.TOO_FEW}.")
            case conclusion:
                said.append(f"{worth} ({conclusion}): the teacher had nothing to teach.")
    said.extend(_doubts(facts, gain, after))
    return said


def _doubts(facts: RunFacts, gain: Mapping[str, Any], after: Arm) -> list[str]:
    said = []
    if line := facts.run.meta.get("lineage"):
        said.append(
            f"This run starts from the trained policy of {line[0]['run']} ({line[0]['kind']}), which is its base: the "
            "numbers say what this run added to it."
        )
    privileged_context = (facts.run.settings or {}).get("privileged_context", "rubric")
    is_rubric = facts.kind == "rgsd" and privileged_context in ("rubric", "both")
    if is_rubric and facts.added is None and conclude(gain) is Conclusion.BETTER:
        said.append(
            "This run alone cannot say whether the right rubric mattered: a control, trained on another prompt's "
            "rubric, does (`--control true`)."
        )
    if facts.kind == "sft":
        said.append("This run is a control: it was fine-tuned on the responses of the model that sees the rubric.")
    if facts.kind == "rgsd" and privileged_context in ("mismatched", "none"):
        shown = "another prompt's rubric" if privileged_context == "mismatched" else "no rubric"
        said.append(f"This run is a control: its teacher was shown {shown}.")
    if recurring := in_words(facts.run.meta.get("recurrence") or {}):
        said.append(f"Training data: {recurring}.")
    if facts.kind in TRAINING_KINDS:
        said.append("One run with one seed: the intervals are over prompts, not over repeated training.")
    if facts.judge == "checks":
        said.append("Judged by programmatic checks, which read form and coverage, not whether a claim is true.")
    elif facts.kind == "grpo" and facts.judge == _reward_judge(facts):
        said.append("This judge is also the reward that GRPO was trained on: measure it with another one too.")
    if after.leak_rate > 0:
        said.append(f"{100 * after.leak_rate:.0f} % of the trained responses speak of a rubric or its criteria.")
    return said


def _reward_judge(facts: RunFacts) -> str | None:
    return facts.judges[0] if facts.judges else None


# --- Several runs ---------------------------------------------------------------------------------------------------


def _compared(runs: list[RunFacts]) -> Facts:
    """The others against the first: each one's trained arm, or its baseline."""
    named = []
    for facts in runs:
        arm = facts.after or facts.role(BASELINE)
        if arm is None:
            return Facts(runs, refusal=f"{facts.label} has no judged responses, so the runs cannot be compared.")
        named.append(RunRef(str(facts.run.folder), arm.name))
    try:
        arms = compare.read_arms(named)
        return Facts(runs, comparison=compare.compare(arms, seed=_seed(runs[0].run.settings or {})))
    except RGSDError as error:
        return Facts(runs, refusal=str(error))


def cost_sentence(runs: Sequence[RunFacts]) -> str | None:
    """RGSD's cost beside GRPO's, where both are there and took the same held-out data."""
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
    parts.append(f"no judge call against {calls:,}" if calls else f"none judged against {grpo.cost.rollouts:,}")
    if rgsd.cost.train_seconds and grpo.cost.train_seconds:
        parts.append(f"{rgsd.cost.train_seconds:,.0f} s against {grpo.cost.train_seconds:,.0f} s of training steps")
    return f"{rgsd.label} (RGSD) beside {grpo.label} (GRPO), on the same held-out prompts: {'; '.join(parts)}."
