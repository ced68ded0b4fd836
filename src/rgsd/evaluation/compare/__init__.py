"""`rgsd compare`: runs against each other, on the same prompts and under the same judge.

Which one scored higher and by how much, in which criteria and prompts, how much of it is length, and whether another
judge agrees. Verdicts of different judges are never compared. Read `arms` (what is compared), `changes` (the numbers),
`second` (another judge), `words` (sentences and tables).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from rgsd.errors import RunError
from rgsd.evaluation.compare.arms import (
    ENOUGH_SCORED,
    FINGERPRINTS,
    choose_judge,
    common_judges,
    read_arms,
    shared_prompts,
)
from rgsd.evaluation.compare.changes import Change, changes, difference, length, tally
from rgsd.evaluation.compare.second import (
    SecondJudge,
    SecondPlan,
    judge_again,
    load_examples,
    plan_second,
    rejudge,
    second_opinion,
    unjudged,
)
from rgsd.evaluation.compare.words import sentences, show
from rgsd.evaluation.run_ref import EvalArm, RunRef
from rgsd.evaluation.statistics import N_RESAMPLES
from rgsd.evaluation.summaries import summarise
from rgsd.judges import build_judge, try_out
from rgsd.progress import say
from rgsd.runs import Run

_PROVENANCE = ("status", "started", "command", "commit", "dirty", "versions", "device", *FINGERPRINTS)
_SETTINGS = ("data", "schema", "data_split", "model_name_or_path", "models", "seed", "judge", "judge_mode")


def compare_runs(
    names: Sequence[str],
    *,
    arm: str | None = None,
    by: str | None = None,
    judge2: Sequence[str] = (),
    second: SecondJudge | None = None,
    seed: int = 0,
    command: str | None = None,
) -> dict[str, Any]:
    """Read runs, let a second judge judge them if one is given, and compare them.

    Args:
        names: As `RunRef.parse` reads them. The others are compared with the first.
        arm: The arm of those that name none; None: the trained policy, or the only arm.
        by: The judge whose verdicts are compared; None: the first judge of all runs.
        judge2: Judges whose stored samples are the second opinion; empty: all other judges of all runs.
        second: A judge that first judges the stored responses. The runs keep its samples.
        seed: Seed of the bootstrap.
        command: Stored with the result.

    Raises:
        RunError: If the folders, arms, judges or prompts cannot be compared.
        JudgeError: If the second judge cannot continue. Its samples are kept, and the same command continues.
    """
    arms = read_arms([RunRef.parse(name) for name in names], arm)
    if second is not None:
        judge = (second.build or build_judge)(second.config)
        try_out(judge, lazily=True)
        plan = plan_second(arms, judge.name, by)
        for each in arms:
            todo = unjudged(each, judge.name, plan.ids)
            say(f"{each.label}: {judge.name} judges {len(todo):,} stored responses")
            if todo:
                judge_again(each, judge, load_examples(each, second.data, second.schema), todo)
        by, judge2 = plan.by, [*judge2, *plan.judge2]
    return compare(arms, by=by, judge2=judge2, seed=seed) | {"command": command}


def compare(
    arms: Sequence[EvalArm], *, by: str | None = None, judge2: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Compare every arm with the first.

    Args:
        arms: Two or more.
        by: The judge whose verdicts are compared.
        judge2: Second judges; empty: all other judges of all arms.
        seed: Seed of the bootstrap over prompts.

    Returns:
        `runs` (the summary of each over the shared prompts, and its provenance), `differences` (`difference` of each
        other arm and the first), `second_judges`, `warnings` and `sentences`. All of it can be written as JSON.

    Raises:
        RunError: If they cannot be compared.
    """
    judge = choose_judge(arms, by)
    shared = shared_prompts(arms, judge)
    seconds = _second_names(arms, judge, judge2)
    samples = [[a.by_judge[judge][i] for i in shared.ids] for a in arms]
    table: dict[str, Any] = {
        "kind": "comparison",
        "judge": judge,
        "n_shared_prompts": len(shared.ids),
        "seed": seed,
        "n_resamples": N_RESAMPLES,
        "rgsd": metadata.version("rgsd"),
        "warnings": shared.warnings,
        "runs": [
            {
                "run": a.label,
                "folder": str(a.run.folder),
                "arm": a.name,
                "n_prompts": len(a.by_judge[judge]),
                "summary": summarise(own, seed=seed),
                "provenance": _provenance(a.run),
            }
            for a, own in zip(arms, samples, strict=True)
        ],
        "differences": [
            {"run": a.label, "against": arms[0].label, **difference(samples[0], own, seed=seed)}
            for a, own in zip(arms[1:], samples[1:], strict=True)
        ],
        "second_judges": [second_opinion(arms, judge, name, shared.ids, seed=seed) for name in seconds],
    }
    return table | {"sentences": sentences(table)}


def _second_names(arms: Sequence[EvalArm], judge: str, wanted: Sequence[str]) -> list[str]:
    common = common_judges(arms)
    for name in wanted:
        if name == judge:
            raise RunError(f"the second judge must differ from the first, got {name!r} for both: name another, or none")
        if name not in common:
            judges = "; ".join(f"{a.label}: {', '.join(map(repr, a.by_judge))}" for a in arms)
            raise RunError(
                f"{name!r} did not judge all of the runs. Their judges are {judges}: let it judge them with --judge"
            )
    return list(dict.fromkeys(wanted)) or [j for j in common if j != judge]


def _provenance(run: Run) -> dict[str, Any]:
    meta = {name: run.meta.get(name) for name in _PROVENANCE}
    return meta | {"settings": {name: run.settings[name] for name in _SETTINGS if name in run.settings}}


__all__ = [
    "ENOUGH_SCORED",
    "Change",
    "SecondJudge",
    "SecondPlan",
    "changes",
    "choose_judge",
    "common_judges",
    "compare",
    "compare_runs",
    "difference",
    "judge_again",
    "length",
    "load_examples",
    "plan_second",
    "read_arms",
    "rejudge",
    "second_opinion",
    "sentences",
    "shared_prompts",
    "show",
    "tally",
    "unjudged",
]
