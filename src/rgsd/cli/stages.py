"""Recipes with `stages`: settings that all stages share, and the command and settings of each stage.

output_dir: runs/both
data: my_rubrics.jsonl
stages:
  - {command: train, max_steps: 200}
  - {command: grpo, max_steps: 60, num_generations: 16}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rgsd.cli.parsing import Command, RecipeFile, quieten
from rgsd.errors import UsageError

if TYPE_CHECKING:
    from rgsd.workflows.recipe import Recipe
    from rgsd.workflows.stages import Stage

Parse = Callable[[Sequence[str], Command, RecipeFile], "tuple[Recipe, Any, Any]"]
"""A command line and a recipe -> the recipe, the launch settings and the dry-run settings."""

STAGES = "stages"
COMMANDS = ("train", "grpo", "sft")
SET_BY_ORDER = ("output_dir", "model_name_or_path")
"""Settings that the order of the stages decides: a stage's folder, and the model that it starts from."""


def run(recipe: RecipeFile, argv: Sequence[str], parse: Parse) -> int:
    """Train the stages of a recipe, and print the table of each."""
    stages = stages_of(recipe, argv, parse)
    quieten()
    import json

    from rgsd.evaluation.summaries import show_results
    from rgsd.progress import say
    from rgsd.runs import RESULTS
    from rgsd.workflows.stages import train_stages

    runs = train_stages(stages)
    for done in runs:
        if (done.folder / RESULTS).is_file():
            say(f"{done.folder.name}:")
            show_results(json.loads((done.folder / RESULTS).read_text("utf-8")))
    say(f"Runs: {', '.join(str(done.folder.resolve()) for done in runs)}")
    return 0


def stages_of(recipe: RecipeFile, argv: Sequence[str], parse: Parse) -> list[Stage]:
    """Parse the stages of a recipe, each by its own command. Flags apply to all stages.

    Raises:
        UsageError: If the list of stages is malformed, or a stage's command does not have a setting.
        ConfigError: If settings contradict each other.
    """
    from rgsd.workflows.stages import Stage

    where = f"{recipe.path}:{recipe.lines.get(STAGES, 1)}"
    shared = {name: value for name, value in recipe.values.items() if name != STAGES}
    parsed = []
    for number, entry in enumerate(_entries(recipe.values[STAGES], where), start=1):
        name = str(entry.pop("command"))
        lines = {key: line for key, line in recipe.lines.items() if key not in entry}
        own = RecipeFile(f"{recipe.path}, stage {number}", {**shared, **entry}, lines)
        stage_recipe, launch, dry = parse(argv, import_module(f"rgsd.cli.{name}").COMMAND, own)
        if dry.dry_run or launch.accelerate_config or (launch.num_processes or 1) > 1:
            raise UsageError(
                f"{where}: stages train in one process and have no dry run: run each stage as a separate command"
            )
        parsed.append(Stage(name, stage_recipe))
    return parsed


def _entries(value: Any, where: str) -> list[dict[str, Any]]:
    """Check the list of stages: each must be a mapping with a known command.

    Raises:
        UsageError: If the list is malformed.
    """
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise UsageError(f"{where}: stages must be a list of mappings, each with a command, got {value!r:.100}")
    for number, entry in enumerate(value, start=1):
        if entry.get("command") not in COMMANDS:
            raise UsageError(
                f"{where}: the command of stage {number} must be one of {', '.join(COMMANDS)}, "
                f"got {entry.get('command')!r}"
            )
        if taken := set(entry) & set(SET_BY_ORDER):
            raise UsageError(
                f"{where}: stage {number} sets {', '.join(sorted(taken))}: set it once, outside the stages. Each stage "
                "has a folder in output_dir and starts from the policy of the stage before"
            )
    return [dict(entry) for entry in value]
