"""`rgsd compare`: runs against each other, on the same prompts and under the same judge.

What won, by how much, in which criteria and prompts, how much of it goes with length, and whether another judge says
the same. Only verdicts of one judge are ever set against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from rgsd.errors import RunError
from rgsd.evaluation import statistics
from rgsd.evaluation.compare.changes import Change, changes, difference, length, tally
from rgsd.evaluation.compare.runs import (
    ENOUGH_SCORED,
    FINGERPRINTS,
    SETTINGS,
    Contender,
    choose_judge,
    judges_of_all,
    read_contenders,
    shared_prompts,
)
from rgsd.evaluation.compare.second import (
    SecondPlan,
    judge_again,
    load_examples,
    plan_second,
    rejudge,
    second_opinion,
    unjudged,
)
from rgsd.evaluation.compare.words import sentences, show
from rgsd.judges import Judge, JudgeConfig, build_judge, try_out
from rgsd.progress import say
from rgsd.runs import Run

PROVENANCE = ("status", "started", "command", "commit", "dirty", "versions", "device")


def compare_runs(
    names: Sequence[str],
    *,
    arm: str | None = None,
    by: str | None = None,
    judge2: Sequence[str] = (),
    second: JudgeConfig | None = None,
    data: str | None = None,
    schema: str | None = None,
    seed: int = 0,
    command: str | None = None,
    build: Callable[[JudgeConfig], Judge] = build_judge,
) -> dict[str, Any]:
    """Read runs, have a second judge judge them where that is asked for, and compare.

    Args:
        names: `FOLDER` or `FOLDER:ARM`; the others are compared with the first.
        arm: arm of those that name none; None: `trained`, or the only one.
        by: the judge whose verdicts count; None: the first one that all of them have.
        judge2: judges whose stored rows are the second opinion; empty: all others that every run has.
        second: settings of a judge that judges the stored responses first; its rows are kept in the runs.
        data: rubric data for that, when it no longer lies where the run says.
        schema: its schema.
        seed: of the bootstrap.
        command: kept with the result.
        build: makes the judge.

    Raises:
        RunError: for folders, arms, judges or prompts that cannot be compared.
        JudgeError: when the second judge cannot go on. What it judged is kept, and the same command goes on from there.
    """
    contenders = read_contenders(names, arm)
    if second is not None:
        judge = build(second)
        try_out(judge, lazily=True)
        plan = plan_second(contenders, judge.name, by)
        for contender in contenders:
            todo = unjudged(contender, judge.name, plan.ids)
            say(f"{contender.label}: {judge.name} judges {len(todo):,} stored responses")
            if todo:
                judge_again(contender, judge, load_examples(contender, data, schema), todo)
        by, judge2 = plan.by, [*judge2, *plan.judge2]
    return compare(contenders, by=by, judge2=judge2, seed=seed) | {"command": command}


def compare(
    contenders: Sequence[Contender], *, by: str | None = None, judge2: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Compare every contender with the first.

    Args:
        contenders: two or more.
        by: the judge whose verdicts count.
        judge2: second judges; empty: all others that every one of them has.
        seed: of the bootstrap over prompts.

    Returns:
        `runs` (each one's summary over the shared prompts, and provenance), `differences` (`difference`, each other
        one against the first), `second_judges`, `warnings` and `sentences`; all of it JSON-able.

    Raises:
        RunError: when they cannot be compared.
    """
    judge = choose_judge(contenders, by)
    shared = shared_prompts(contenders, judge)
    seconds = _second_names(contenders, judge, judge2)
    rows = [[c.by_judge[judge][i] for i in shared.ids] for c in contenders]
    table: dict[str, Any] = {
        "kind": "comparison",
        "judge": judge,
        "n_shared_prompts": len(shared.ids),
        "seed": seed,
        "n_resamples": statistics.N_RESAMPLES,
        "rgsd": metadata.version("rgsd"),
        "warnings": shared.warnings,
        "runs": [
            {
                "run": c.label,
                "folder": str(c.run.folder),
                "arm": c.arm,
                "n_prompts": len(c.by_judge[judge]),
                "summary": statistics.summarise(r, seed=seed),
                "provenance": _provenance(c.run),
            }
            for c, r in zip(contenders, rows, strict=True)
        ],
        "differences": [
            {"run": c.label, "against": contenders[0].label, **difference(rows[0], r, seed=seed)}
            for c, r in zip(contenders[1:], rows[1:], strict=True)
        ],
        "second_judges": [second_opinion(contenders, judge, name, shared.ids, seed=seed) for name in seconds],
    }
    return table | {"sentences": sentences(table)}


def _second_names(contenders: Sequence[Contender], judge: str, wanted: Sequence[str]) -> list[str]:
    common = judges_of_all(contenders)
    for name in wanted:
        if name == judge:
            raise RunError(f"{name!r} is the judge that is compared by, wanted another one as second: name it, or none")
        if name not in common:
            have = "; ".join(f"{c.label}: {', '.join(map(repr, c.by_judge))}" for c in contenders)
            raise RunError(f"{name!r} did not judge all of the runs, which have {have}: let it judge them with --judge")
    return list(dict.fromkeys(wanted)) or [j for j in common if j != judge]


def _provenance(run: Run) -> dict[str, Any]:
    found = {k: run.meta.get(k) for k in (*PROVENANCE, *FINGERPRINTS)}
    return found | {"settings": {k: run.settings[k] for k in SETTINGS if k in (run.settings or {})}}


__all__ = [
    "ENOUGH_SCORED",
    "Change",
    "Contender",
    "SecondPlan",
    "changes",
    "choose_judge",
    "compare",
    "compare_runs",
    "difference",
    "judge_again",
    "judges_of_all",
    "length",
    "load_examples",
    "plan_second",
    "read_contenders",
    "rejudge",
    "second_opinion",
    "sentences",
    "shared_prompts",
    "show",
    "tally",
    "unjudged",
]
