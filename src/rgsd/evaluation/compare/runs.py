"""Runs to compare: read, and cut to the prompts and the judge that they share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsd.errors import RunError
from rgsd.evaluation import statistics
from rgsd.runs import RECORD, SAMPLES, TRAINED, Run, open_run

ENOUGH_SCORED = 0.95
"""Criteria that must be scored, as a share, for a comparison to pass without a warning."""
FINGERPRINTS = ("held_out_fingerprint", "train_fingerprint", "model_fingerprint")
SETTINGS = ("data", "schema", "data_split", "model_name_or_path", "models", "seed", "judge", "judge_mode")
Row = Mapping[str, Any]
Rows = dict[str, dict[str, Any]]
"""Rows of one arm and one judge, by example."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One arm of one run.

    Args:
        label: its name in tables.
        run: the open run.
        arm: the arm.
        by_judge: judge -> its rows by example, in the order in which the judges came.
    """

    label: str
    run: Run
    arm: str
    by_judge: dict[str, Rows]


def read_contenders(names: Sequence[str], arm: str | None = None) -> list[Contender]:
    """The arms that the names stand for.

    Raises:
        RunError: for fewer than two, the same one twice, a folder that is no run, or an arm that it does not have.
    """
    if len(names) < 2:
        raise RunError(f"got {len(names)} run, wanted at least two: rgsd compare RUN_A RUN_B (a RUN is FOLDER[:ARM])")
    parts = [_split_name(name) for name in names]
    found: list[Contender] = []
    for folder, wanted in parts:
        run = open_run(folder)
        rows = statistics.latest(run.read_lines(SAMPLES))
        if not rows:
            raise RunError(
                f"{folder} has no judged responses (no {SAMPLES}): measure it first, `rgsd eval {folder} --judge J`"
            )
        chosen = _arm_of(run, rows, wanted, arm)
        by_judge: dict[str, Rows] = {}
        for row in rows:
            if row["arm"] == chosen:
                by_judge.setdefault(_judge_of(row), {})[row["example_id"]] = row
        found.append(Contender("", run, chosen, by_judge))
    labels = _labels(found)
    if doubled := [label for label, count in Counter(labels).items() if count > 1]:
        raise RunError(f"got {doubled[0]} twice, wanted different runs or arms: name another, e.g. FOLDER:base")
    return [Contender(label, c.run, c.arm, c.by_judge) for label, c in zip(labels, found, strict=True)]


def _split_name(name: str) -> tuple[Path, str | None]:
    """Folder and arm; a colon may stand in either."""
    if (Path(name) / RECORD).is_file():
        return Path(name), None
    for position in (i for i, letter in enumerate(name) if letter == ":"):
        if (Path(name[:position]) / RECORD).is_file():
            return Path(name[:position]), name[position + 1 :]
    return Path(name), None


def _arm_of(run: Run, rows: Sequence[Row], wanted: str | None, default: str | None) -> str:
    """The arm that is named, else the run's trained policy, else its only arm."""
    folder = run.folder
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    arm = wanted or default or run.arm_of(TRAINED, among=arms) or (arms[0] if len(arms) == 1 else None)
    if arm is None or arm not in arms:
        got = f"no arm {arm!r}" if arm else f"{len(arms)} arms, of which none is a trained policy"
        raise RunError(f"{folder} has {got}, its arms are {', '.join(arms)}: name one, {folder}:{arms[0]}")
    return arm


def _judge_of(row: Row) -> str:
    return row.get("judge") or "unknown"


def _labels(contenders: Sequence[Contender]) -> list[str]:
    """The shortest of folder's name, name:arm and path:arm that tells all of them apart."""
    folders = [c.run.folder for c in contenders]
    for made in (
        [f.resolve().name for f in folders],
        [f"{f.resolve().name}:{c.arm}" for f, c in zip(folders, contenders, strict=True)],
    ):
        if len(set(made)) == len(made):
            return made
    return [f"{f.resolve()}:{c.arm}" for f, c in zip(folders, contenders, strict=True)]


def judges_of_all(contenders: Sequence[Contender]) -> list[str]:
    """The judges that judged every one of them, in the first one's order."""
    return [j for j in contenders[0].by_judge if all(j in c.by_judge for c in contenders)]


def choose_judge(contenders: Sequence[Contender], wanted: str | None = None) -> str:
    """The judge whose verdicts are compared.

    Raises:
        RunError: when none judged all of them, or not the wanted one; it names each run's judges.
    """
    common = judges_of_all(contenders)
    if wanted in common or (wanted is None and common):
        return wanted or common[0]
    have = "; ".join(f"{c.label} was judged by {', '.join(map(repr, c.by_judge))}" for c in contenders)
    problem = f"{wanted!r} did not judge all of the runs" if wanted else "no judge judged all of the runs"
    raise RunError(
        f"{problem}: {have}. Verdicts of different judges are never compared: let one judge them all, "
        "rgsd compare ... --judge J"
    )


@dataclass(frozen=True, slots=True)
class Shared:
    """The prompts that all contenders were judged on.

    Args:
        ids: their examples, in the first contender's order.
        warnings: what differs between the runs, in sentences.
    """

    ids: list[str]
    warnings: list[str]


def shared_prompts(contenders: Sequence[Contender], judge: str) -> Shared:
    """The prompts to compare on.

    Raises:
        RunError: when there is none, or the runs score differently.
    """
    rows = [c.by_judge[judge] for c in contenders]
    same_id = [i for i in rows[0] if all(i in r for r in rows)]
    ids = [i for i in same_id if len({r[i].get("question") for r in rows}) == 1]
    prints = {c.label: c.run.meta.get("held_out_fingerprint") for c in contenders}
    if not ids:
        counts = ", ".join(
            f"{c.label} has {len(r)} (held-out fingerprint {prints[c.label] or 'unknown'})"
            for c, r in zip(contenders, rows, strict=True)
        )
        also = f"; {len(same_id)} ids are the same, but their texts differ" if same_id else ""
        raise RunError(
            f"the runs share no prompt: {counts}{also}. Only answers to the same prompts can be compared: measure all "
            "of them on the same data, rgsd eval RUN_A RUN_B --data D --judge J"
        )
    for i in ids:
        scorings = {c.label: r[i]["scoring"] for c, r in zip(contenders, rows, strict=True)}
        if len(set(scorings.values())) > 1:
            told = ", ".join(f"{label}: {scoring}" for label, scoring in scorings.items())
            raise RunError(
                f"prompt {i!r} is scored in different ways ({told}): measure the runs again on the same data"
            )
    warnings = []
    if len(ids) < len(same_id):
        warnings.append(f"{len(same_id) - len(ids)} prompts have the same id and another text: they are left out.")
    if len(set(prints.values()) - {None}) > 1:
        told = ", ".join(f"{label}: {p}" for label, p in prints.items())
        warnings.append(f"The held-out data differ ({told}): only the prompts that all runs share are compared.")
    if differing := sum(len({_rubric_key(r[i]) for r in rows}) > 1 for i in ids):
        warnings.append(
            f"The rubrics of {differing} of {len(ids)} shared prompts differ between the runs: scores of these are not "
            "quite comparable, and only criteria of the same text are counted as won or lost."
        )
    for c, r in zip(contenders, rows, strict=True):
        shares = statistics.scored_shares([r[i] for i in ids])
        if (shares["criteria_share"] or 0) < ENOUGH_SCORED:
            warnings.append(
                f"{c.label}: only {100 * (shares['criteria_share'] or 0):.1f} % of the criteria were scored by {judge}."
            )
        if len(r) > len(ids):
            warnings.append(f"{c.label}: {len(r) - len(ids)} of its {len(r)} prompts are not in every run.")
    return Shared(ids, warnings)


def _rubric_key(row: Row) -> str:
    return json.dumps([[v["criterion"], v["weight"]] for v in row["verdicts"]])
