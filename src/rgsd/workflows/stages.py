"""Several training runs in a row, each from the trained policy of the one before: RGSD, then GRPO, from one recipe.

RUN/
  1-train/     a run's folder, as `rgsd train` writes it
  2-grpo/      another, whose base model is the policy of 1-train
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
from rgsd.workflows.opening import changed_settings
from rgsd.workflows.recipe import Recipe
from rgsd.workflows.train import train


@dataclass(frozen=True)
class Stage:
    """One of the runs.

    Args:
        command: of the product: train, grpo or sft.
        recipe: its settings. `train_stages` decides its folder, and its model unless it is the first.
    """

    command: str
    recipe: Recipe


def train_stages(stages: Sequence[Stage]) -> list[Run]:
    """Train the stages in their order, under the first one's output folder.

    With `resume_from_checkpoint`, a finished stage is not repeated, an unfinished one goes on from its checkpoint, and
    the others start.

    Raises:
        ConfigError: for several processes.
        RunError: when a finished stage has other settings now, or started from another policy.
    """
    root = Path(str(stages[0].recipe.training.output_dir))
    resume = bool(stages[0].recipe.training.resume_from_checkpoint)
    if stages[0].recipe.training.world_size > 1:
        raise ConfigError(
            "stages train in one process: with several, run each stage as a command of its own, the second with "
            "--model_name_or_path set to the first one's folder"
        )
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
        gc.collect()  # the trainer and its model are in cycles; the next stage wants their memory
    return done


def _is_finished(folder: Path) -> bool:
    return (folder / RECORD).is_file() and open_run(folder).meta.get("status") == "finished"


def _check_same(folder: Path, recipe: Recipe, before: Run | None) -> None:
    """Require a finished stage to be what the recipe asks for now.

    Raises:
        RunError: naming what differs.
    """
    remedy = "train all stages again with --overwrite, or choose another output_dir"
    if changed := changed_settings(recipe, folder):
        differing = ", ".join(f"{c.setting} is {c.new!r} and was {c.old!r}" for c in changed)
        raise RunError(f"the finished stage {folder} has other settings ({differing}): restore them, or {remedy}")
    line = ancestors(open_run(folder))
    if before is not None and (not line or line[0].id != before.meta.get("id")):
        raise RunError(f"the finished stage {folder} did not start from the run in {before.folder}: {remedy}")


__all__ = ["Stage", "train_stages"]
