"""The arms to compare, cut to the prompts and the judge that they share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rgsd.errors import RunError
from rgsd.evaluation.run_ref import EvalArm, RunRef, main_arm, stored_arms
from rgsd.evaluation.samples import Sample
from rgsd.evaluation.summaries import scored_shares

ENOUGH_SCORED = 0.95
"""Share of the criteria that must be scored to compare without a warning."""
FINGERPRINTS = ("held_out_fingerprint", "train_fingerprint", "model_fingerprint")


def read_arms(refs: Sequence[RunRef], default: str | None = None) -> list[EvalArm]:
    """Read the arms to compare.

    Args:
        refs: One per arm.
        default: The arm of those that name none; None: the run's trained policy, or its only arm.

    Raises:
        RunError: For fewer than two arms, the same arm twice, a folder that is not a run, or an arm it does not have.
    """
    if len(refs) < 2:
        raise RunError(f"expected at least two runs, got {len(refs)}: rgsd compare RUN_A RUN_B (a RUN is FOLDER[:ARM])")
    arms = [_read_arm(ref, default) for ref in refs]
    labels = _labels(arms)
    if doubled := [label for label, count in Counter(labels).items() if count > 1]:
        raise RunError(f"expected different runs or arms, got {doubled[0]} twice: name another, e.g. FOLDER:base")
    return [replace(arm, label=label) for label, arm in zip(labels, arms, strict=True)]


def _read_arm(ref: RunRef, default: str | None) -> EvalArm:
    if default and not ref.arm:
        ref = replace(ref, arm=default)
    arms = stored_arms(ref)
    if len(arms) == 1:
        return arms[0]
    name = main_arm(arms[0].run, [a.name for a in arms])
    if name is None:
        raise RunError(
            f"{ref.source} has {len(arms)} arms, none of them a trained policy: {', '.join(a.name for a in arms)}. "
            f"Name one, {ref.source}:{arms[0].name}"
        )
    return next(a for a in arms if a.name == name)


def _labels(arms: Sequence[EvalArm]) -> list[str]:
    """The shortest of folder name, name:arm and path:arm that makes all labels different."""
    folders = [a.run.folder.resolve() for a in arms]
    for labels in ([f.name for f in folders], [f"{f.name}:{a.name}" for f, a in zip(folders, arms, strict=True)]):
        if len(set(labels)) == len(labels):
            return labels
    return [f"{f}:{a.name}" for f, a in zip(folders, arms, strict=True)]


def common_judges(arms: Sequence[EvalArm]) -> list[str]:
    """The judges of all arms, in the order of the first arm."""
    return [judge for judge in arms[0].by_judge if all(judge in a.by_judge for a in arms)]


def choose_judge(arms: Sequence[EvalArm], wanted: str | None = None) -> str:
    """The judge whose verdicts are compared.

    Raises:
        RunError: If no judge, or not the wanted one, judged all arms; it names the judges of each arm.
    """
    common = common_judges(arms)
    if wanted in common or (wanted is None and common):
        return wanted or common[0]
    judges = "; ".join(f"{a.label} was judged by {', '.join(map(repr, a.by_judge))}" for a in arms)
    problem = f"{wanted!r} did not judge all of the runs" if wanted else "no judge judged all of the runs"
    raise RunError(
        f"{problem}: {judges}. Verdicts of different judges are never compared: let one judge them all, "
        "rgsd compare ... --judge J"
    )


@dataclass(frozen=True, slots=True)
class Shared:
    """The prompts on which all arms were judged.

    Args:
        ids: Their examples, in the order of the first arm.
        warnings: Differences between the runs, in sentences.
    """

    ids: list[str]
    warnings: list[str]


def shared_prompts(arms: Sequence[EvalArm], judge: str) -> Shared:
    """The prompts to compare on.

    Raises:
        RunError: If there is none, or the runs score a prompt in different ways.
    """
    samples = [a.by_judge[judge] for a in arms]
    same_id = [i for i in samples[0] if all(i in by_id for by_id in samples)]
    ids = [i for i in same_id if len({by_id[i].question for by_id in samples}) == 1]
    if not ids:
        counts = ", ".join(
            f"{a.label} has {len(by_id)} (held-out fingerprint {_held_out(a) or 'unknown'})"
            for a, by_id in zip(arms, samples, strict=True)
        )
        also = f"; {len(same_id)} ids are the same, but their texts differ" if same_id else ""
        raise RunError(
            f"the runs share no prompt: {counts}{also}. Only responses to the same prompts can be compared: measure "
            "all runs on the same data, rgsd eval RUN_A RUN_B --data D --judge J"
        )
    for i in ids:
        scorings = {a.label: by_id[i].scoring for a, by_id in zip(arms, samples, strict=True)}
        if len(set(scorings.values())) > 1:
            named = ", ".join(f"{label}: {scoring}" for label, scoring in scorings.items())
            raise RunError(
                f"prompt {i!r} is scored in different ways ({named}): measure the runs again on the same data"
            )
    return Shared(ids, [*_data_warnings(arms, samples, same_id, ids), *_coverage_warnings(arms, judge, ids)])


def _held_out(arm: EvalArm) -> str | None:
    return arm.run.meta.get("held_out_fingerprint")


def _data_warnings(
    arms: Sequence[EvalArm], samples: Sequence[Mapping[str, Sample]], same_id: Sequence[str], ids: Sequence[str]
) -> list[str]:
    warnings = []
    if len(ids) < len(same_id):
        warnings.append(f"{len(same_id) - len(ids)} prompts have the same id but different texts: they are left out.")
    prints = {a.label: _held_out(a) for a in arms}
    if len(set(prints.values()) - {None}) > 1:
        named = ", ".join(f"{label}: {p}" for label, p in prints.items())
        warnings.append(f"The held-out data differ ({named}): only the prompts that all runs share are compared.")
    if differing := sum(len({_rubric_key(by_id[i]) for by_id in samples}) > 1 for i in ids):
        warnings.append(
            f"The rubrics of {differing} of {len(ids)} shared prompts differ between the runs: their scores are not "
            "fully comparable, and only criteria of the same text count as won or lost."
        )
    return warnings


def _coverage_warnings(arms: Sequence[EvalArm], judge: str, ids: Sequence[str]) -> list[str]:
    warnings = []
    for arm in arms:
        by_id = arm.by_judge[judge]
        share = scored_shares([by_id[i] for i in ids])["criteria_share"] or 0.0
        if share < ENOUGH_SCORED:
            warnings.append(f"{arm.label}: only {100 * share:.1f} % of the criteria were scored by {judge}.")
        if len(by_id) > len(ids):
            warnings.append(f"{arm.label}: {len(by_id) - len(ids)} of its {len(by_id)} prompts are not in every run.")
    return warnings


def _rubric_key(sample: Sample) -> str:
    return json.dumps([[v.criterion, v.weight] for v in sample.verdicts])
