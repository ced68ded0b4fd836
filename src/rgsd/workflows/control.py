"""The mismatched control ("twin") of a run: the same recipe, but each prompt has another prompt's rubric.

Its run is in RUN/control.
A gain alone does not show that the right rubric mattered, because a model learns recurring criteria from any rubric.
The difference between the trained policy and its twin is what the right rubric added.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError
from rgsd.evaluation.responses import stored_responses
from rgsd.evaluation.samples import Sample, by_arm, read_samples
from rgsd.evaluation.summaries import results
from rgsd.inference import ResponseKey
from rgsd.progress import say
from rgsd.prompts.messages import SHOWS_RUBRIC
from rgsd.rubrics import Example
from rgsd.runs import CONTROL_ARM, RESPONSES, RESULTS, SAMPLES, SPLIT, TRAINED_CONTROL, TWIN, Run, open_run, read_json
from rgsd.workflows.recipe import Recipe


def check_control(recipe: Recipe) -> None:
    """Check that a run can have a control.

    Raises:
        ConfigError: If the run has no teacher, no rubric or no evaluation.
    """
    remedy = "leave out --control"
    if recipe.kind == "grpo":
        raise ConfigError(f"control trains a twin whose teacher sees another prompt's rubric; GRPO has none: {remedy}")
    context = recipe.training.prompt_settings().privileged_context
    if context in ("mismatched", "none"):
        raise ConfigError(
            f"control compares the right rubric with another prompt's, but with privileged_context {context!r} the "
            f"teacher does not see the right one: set --privileged_context rubric, or {remedy}"
        )
    if context not in SHOWS_RUBRIC:
        raise ConfigError(
            f"control compares the right rubric with another prompt's, but with privileged_context {context!r} the "
            f"teacher sees no rubric: set --privileged_context rubric or both, or {remedy}"
        )
    if not recipe.evaluation.evaluate:
        raise ConfigError(f"control needs the evaluation that evaluate=false switches off: set --evaluate, or {remedy}")


def check_control_prompts(examples: Sequence[Example]) -> None:
    """Refuse a control whose twin could not be shown another prompt's rubric.

    Raises:
        ConfigError: For fewer than two training prompts.
    """
    if len(examples) < 2:
        raise ConfigError(
            f"control shows each training prompt the rubric of another, which takes at least 2 training prompts, got "
            f"{len(examples)}: add prompts, hold out fewer, or leave out --control"
        )


def twin_of(recipe: Recipe) -> Recipe:
    """The recipe of the twin. Call this before a trainer changes the recipe's settings."""
    twin = copy.deepcopy(recipe)
    training: Any = twin.training
    training.output_dir = f"{recipe.training.output_dir}/{TWIN}"
    training.privileged_context = "mismatched"
    training.resume_from_checkpoint = True if training.resume_from_checkpoint else None
    training.push_to_hub = False
    if hasattr(training, "teacher_contrast"):
        training.teacher_contrast = 0.0  # its teacher has no right rubric to set against another
    if training.run_name:
        training.run_name = f"{training.run_name}-{TWIN}"
    # The mismatched context shows no reference.
    twin.evaluation.self_written_references = False
    twin.evaluation.control = twin.evaluation.report = twin.evaluation.overwrite = False
    return twin


def reuse_base(
    right: Run, twin: Run, arm: str, examples: Sequence[Example], keys: Sequence[ResponseKey], judge: str
) -> list[Sample]:
    """Copy the base policy's responses and samples from the run that the twin controls, to avoid paying twice.

    Args:
        right: The run that the twin controls.
        twin: The twin's run.
        arm: Arm of the base policy.
        examples: The held-out examples.
        keys: What each response depends on, in the order of the examples.
        judge: The judge whose samples to copy.

    Returns:
        One sample per example; empty if any response has another key or was not judged.
    """
    wanted = {e.id: asdict(key) for e, key in zip(examples, keys, strict=True)}
    responses = stored_responses(right, arm)
    samples = {s.example_id: s for s in read_samples(right) if s.arm == arm and s.judge == judge}
    if any(i not in samples or i not in responses or responses[i].key != key for i, key in wanted.items()):
        say(f"{arm} is left out of the control's evaluation: the run that it controls has no samples to reuse")
        return []
    copied = stored_responses(twin, arm)
    twin.append(RESPONSES, [responses[i].to_row() for i in wanted if i not in copied])
    judged = {s.example_id for s in read_samples(twin) if s.arm == arm and s.judge == judge}
    twin.append(SAMPLES, [samples[i].to_row() for i in wanted if i not in judged])
    return [samples[i] for i in wanted]


def write_results(run: Run, judge: str, seed: int) -> None:
    """Write the table of a run again, now with its twin. Reads both from their folders."""
    twin = open_run(run.twin)
    run.note(
        roles=run.roles | {CONTROL_ARM: TRAINED_CONTROL},
        control={"folder": TWIN, "id": twin.meta.get("id"), "status": twin.meta.get("status")},
    )
    order = {i: n for n, i in enumerate(_held_out(run.folder))}
    samples = by_arm(s for s in read_samples(run) if s.judge == judge and s.example_id in order)
    if "trained" not in samples:
        return
    # A resumed evaluation stores its samples in another order, and the bootstrap depends on the order.
    arms = {arm: sorted(own, key=lambda s: order[s.example_id]) for arm, own in samples.items()}
    run.write(RESULTS, results(arms, run, seed, judge=judge, control=twin))


def _held_out(folder: Path) -> list[str]:
    return read_json(folder / SPLIT)["held_out"]
