"""Several training runs in a row from one recipe, for example RGSD and then GRPO.

Each run starts from the trained policy of the run before.

RUN/
  1-train/     a run folder, as `rgsd train` writes it
  2-grpo/      another one, whose base model is the policy of 1-train
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rgsd.errors import ConfigError, RunError
from rgsd.models.lineage import ancestors
from rgsd.progress import say
from rgsd.runs import RECORD, Run, open_run
from rgsd.workflows.control import check_control
from rgsd.workflows.opening import changed_settings
from rgsd.workflows.recipe import Recipe
from rgsd.workflows.train import train


@dataclass(frozen=True)
class Stage:
    """One of the runs.

    Args:
        command: The command: train, grpo or sft.
        recipe: The settings. `train_stages` sets the folder, and the model of all stages but the first.
    """

    command: str
    recipe: Recipe


def train_stages(stages: Sequence[Stage]) -> list[Run]:
    """Train the stages in order, in the output folder of the first one.

    With `resume_from_checkpoint`, finished stages are kept, and an unfinished one resumes from its checkpoint.

    Raises:
        ConfigError: If there are several processes.
        RunError: If a finished stage has other settings now, or started from another policy.
    """
    root = Path(str(stages[0].recipe.training.output_dir))
    resume = bool(stages[0].recipe.training.resume_from_checkpoint)
    if stages[0].recipe.training.world_size > 1:
        raise ConfigError(
            "stages train in one process: for several, run each stage as a separate command, with "
            "--model_name_or_path set to the folder of the stage before"
        )
    for stage in stages:
        if stage.recipe.evaluation.control:
            check_control(stage.recipe)  # before the first stage trains for nothing
    done: list[Run] = []
    for number, stage in enumerate(stages, start=1):
        recipe, folder = stage.recipe, root / f"{number}-{stage.command}"
        recipe.training.output_dir = str(folder)
        if done:
            recipe.model.model_name_or_path = str(done[-1].folder)
        say(f"Stage {number} of {len(stages)}: rgsd {stage.command}, in {folder}")
        if resume and _is_finished(folder):
            _check_same(folder, recipe, done[-1] if done else None)
            say(f"{folder} is finished and kept")
            done.append(open_run(folder))
            continue
        if not (folder / RECORD).is_file():
            recipe.training.resume_from_checkpoint = None
        done.append(train(recipe))
        gc.collect()  # The trainer and its model are in reference cycles, and the next stage needs their memory.
    return done


def _is_finished(folder: Path) -> bool:
    return (folder / RECORD).is_file() and open_run(folder).meta.get("status") == "finished"


def _check_same(folder: Path, recipe: Recipe, before: Run | None) -> None:
    """Check that a finished stage has the settings of the recipe and started from the stage before.

    Raises:
        RunError: If something differs; it names what.
    """
    remedy = "train all stages again with --overwrite, or choose another output_dir"
    if changed := changed_settings(recipe, folder):
        differing = ", ".join(f"{c.setting} is {c.new!r} and was {c.old!r}" for c in changed)
        raise RunError(f"the finished stage {folder} has other settings ({differing}): restore them, or {remedy}")
    line = ancestors(open_run(folder))
    if before is not None and (not line or line[0].id != before.meta.get("id")):
        raise RunError(f"the finished stage {folder} did not start from the run in {before.folder}: {remedy}")


__all__ = ["Stage", "train_stages"]
