"""Recipes with `stages`: settings that all stages share, and for each stage its command and its own settings.

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
"""Settings that no stage has of its own: where it lies, and what it starts from."""


def run(recipe: RecipeFile, argv: Sequence[str], parse: Parse) -> int:
    """Train the stages of a recipe, and print a table for each."""
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
    """The stages of a recipe, each parsed by its own command. Flags apply to every stage.

    Raises:
        UsageError: for a malformed list of stages, or a setting that a stage's command does not have.
        ConfigError: for settings that contradict each other.
    """
    from rgsd.workflows.stages import Stage

    where = f"{recipe.path}:{recipe.lines.get(STAGES, 1)}"
    shared = {name: value for name, value in recipe.values.items() if name != STAGES}
    found = []
    for number, entry in enumerate(_entries(recipe.values[STAGES], where), start=1):
        name = str(entry.pop("command"))
        lines = {key: line for key, line in recipe.lines.items() if key not in entry}
        own = RecipeFile(f"{recipe.path}, stage {number}", {**shared, **entry}, lines)
        one, launch, dry = parse(argv, import_module(f"rgsd.cli.{name}").COMMAND, own)
        if dry.dry_run or launch.accelerate_config or (launch.num_processes or 1) > 1:
            raise UsageError(
                f"{where}: stages have no dry run and train in one process: give each stage a command of its own"
            )
        found.append(Stage(name, one))
    return found


def _entries(value: Any, where: str) -> list[dict[str, Any]]:
    """The list of stages, each a mapping with a known command.

    Raises:
        UsageError: naming what is wrong.
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
                f"{where}: stage {number} sets {', '.join(sorted(taken))}: set it once, outside the stages. A stage "
                "lies in a folder of that output_dir, and starts from the stage before it"
            )
    return [dict(entry) for entry in value]
