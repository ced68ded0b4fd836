"""Open the folder of a training run, either a new one or one to resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rgsd.errors import RunError
from rgsd.progress import say
from rgsd.redaction import without_credentials
from rgsd.runs import DEVELOPMENT, METRICS, RECORD, ROLLOUTS, Run, create_run, open_run
from rgsd.training.changes import PROCESSES, Change, allowed_changes, recorded
from rgsd.training.checkpoints import agree_on_checkpoint, list_checkpoints, step_of, trim_lines
from rgsd.workflows.recipe import Recipe

_LATER = frozenset({"control", "report"})
"""Settings that change nothing in what a finished half has done."""


@dataclass(frozen=True)
class OpenedRun:
    """A run's folder, ready to be written to.

    Args:
        run: The folder.
        changes: Settings that differ from those that a resumed run had so far.
    """

    run: Run
    changes: list[Change] = field(default_factory=list)

    @property
    def has_other_held_out_prompts(self) -> bool:
        """Whether a change of settings selects other prompts for the evaluation."""
        return any(c.setting in ("max_eval_prompts", "evaluate") for c in self.changes)

    def check_unchanged(self, fingerprints: Mapping[str, str]) -> None:
        """Check that a resumed run still has the data, the model and the template that it started with.

        Raises:
            RunError: If fingerprints differ; it names each of them.
        """
        meta = self.run.meta
        differing = [name for name, value in fingerprints.items() if meta.get(name, value) != value]
        if meta.get("resumed") and differing:
            changed = ", ".join(f"{name} was {meta[name]} and is now {fingerprints[name]}" for name in differing)
            raise RunError(
                f"cannot resume {self.run.folder}: {changed}. Restore the data, model and template that the run "
                "started with, or start again with --overwrite"
            )

    def record_changes(self, step: int) -> None:
        """Store changed settings with the step from which they apply."""
        listed = ", ".join(f"{c.setting} from {c.old!r} to {c.new!r}" for c in self.changes)
        say(f"Settings changed after step {step}: {listed}")
        # run.json first: after a kill between the two writes, the next resume finds the same change and does not
        # record it a second time.
        self.run.note(changes=recorded(self.run.meta.get("changes", []), self.changes, step))
        self.run.write_settings()


def open_training_run(recipe: Recipe) -> OpenedRun:
    """Create the run's folder, or reopen it to resume.

    Raises:
        RunError: If the folder cannot be used, or a setting changed that a resumed run must keep.
    """
    resume = bool(recipe.training.resume_from_checkpoint)
    folder = Path(str(recipe.training.output_dir))
    is_finished = (folder / RECORD).is_file() and open_run(folder).meta.get("status") == "finished"
    if resume and is_finished and not list_checkpoints(folder):
        raise RunError(
            f"the run in {folder} is finished and has no checkpoint to resume from: start again with --overwrite, or "
            "choose another output_dir"
        )
    if not recipe.is_main:
        return OpenedRun(Run(folder, {}, recipe.settings()))
    # Compare first: create_run overwrites the settings in the folder.
    changed = changed_settings(recipe, folder) if resume and (folder / RECORD).is_file() else []
    run = create_run(folder, recipe.settings(), overwrite=recipe.evaluation.overwrite, resume=resume)
    return OpenedRun(run, changed)


def is_half_finished(recipe: Recipe) -> bool:
    """Whether a resumed recipe with a control, or its twin, is trained and evaluated already. Every process calls it.

    Raises:
        RunError: If a setting changed that a resumed run must keep.
    """
    if not recipe.training.resume_from_checkpoint:
        return False
    state = PartialState()
    answer = [_is_half_finished(recipe) if state.is_main_process else False]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]


def _is_half_finished(recipe: Recipe) -> bool:
    folder = Path(str(recipe.training.output_dir))
    if not (folder / RECORD).is_file():
        return False
    meta = open_run(folder).meta
    if not meta.get("half_finished", meta.get("status") == "finished"):
        return False
    return all(change.setting in _LATER for change in changed_settings(recipe, folder))


def reopen_finished_half(recipe: Recipe) -> Run:
    """The run of a half that `is_half_finished`, to write its results again."""
    folder = Path(str(recipe.training.output_dir))
    if not recipe.is_main:
        return Run(folder, {}, recipe.settings())
    opened = OpenedRun(create_run(folder, recipe.settings(), resume=True), changed_settings(recipe, folder))
    opened.run.note(half_finished=True)
    say(f"Trained and evaluated already: {folder}")
    if opened.changes:
        steps = [row["step"] for row in opened.run.read_lines(METRICS)]
        opened.record_changes(max(steps, default=0))
    return opened.run


def changed_settings(recipe: Recipe, folder: Path) -> list[Change]:
    """Find the settings that differ from those of the run in the folder.

    Raises:
        RunError: for a setting that a run must keep.
    """
    old, n_processes = open_run(folder), recipe.training.world_size
    kind = old.meta.get("kind", recipe.kind)
    if kind != recipe.kind:
        raise RunError(
            f"{folder} holds a run of kind {kind!r}, this is {recipe.kind!r}: choose another output_dir, or replace "
            "the run with --overwrite"
        )
    return allowed_changes(
        old.settings | {PROCESSES: old.meta.get(PROCESSES, n_processes)},
        without_credentials(recipe.settings()) | {PROCESSES: n_processes},
        recipe.defaults(),
        kind=kind,
        run=str(folder),
    )


def checkpoint_to_resume(run: Run, args: Any) -> Path | None:
    """Find the checkpoint that training resumes from; None to start with the first step.

    Removes log rows after the checkpoint, because training repeats their steps.
    """
    if not args.resume_from_checkpoint:
        return None
    checkpoint = agree_on_checkpoint(args.output_dir, args.resume_from_checkpoint)
    step = 0 if checkpoint is None else step_of(checkpoint)
    if args.process_index == 0:
        # `train_runtime` marks the summary that a finished run logs last.
        trim_lines(run.folder / METRICS, lambda row: row["step"] <= step and "train_runtime" not in row)
        trim_lines(run.folder / ROLLOUTS, lambda row: (row["step"] or 0) < step)
        trim_lines(run.folder / DEVELOPMENT, lambda row: row["step"] <= step)
    say(f"Resuming from {checkpoint.name}" if checkpoint else "No complete checkpoint: starting from the first step")
    return checkpoint
