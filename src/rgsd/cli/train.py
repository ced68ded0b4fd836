"""`rgsd train --config RECIPE.yaml`, and what `rgsd grpo` and `rgsd sft` share with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rgsd.cli import stages
from rgsd.cli.parsing import HELP_FLAGS, Command, RecipeFile, quieten, recipe_file

if TYPE_CHECKING:
    from rgsd.workflows.recipe import Recipe

TRAINING_SETTINGS = (
    "trl:ModelConfig",
    "rgsd.data.config:DataConfig",
    "rgsd.evaluation.config:EvalConfig",
    "rgsd.judges:JudgeConfig",
    "rgsd.training.launch:LaunchConfig",
    "rgsd.workflows.dry_run:DryRunConfig",
)
"""Settings of every command that trains, after those of its trainer."""

COMMAND = Command(
    name="train",
    summary="train a model on rubric data with RGSD and evaluate it on held-out prompts",
    settings=("rgsd.training.config:RGSDConfig", *TRAINING_SETTINGS),
    examples=(
        "rgsd train --config recipes/demo.yaml",
        "rgsd train --config recipes/paper.yaml --data my_rubrics.jsonl --output_dir runs/mine",
        "rgsd train --config recipes/paper.yaml --dry_run",
        "rgsd train --config recipes/paper.yaml --accelerate_config fsdp2",
        "rgsd train --config recipes/rgsd_then_grpo.yaml",
    ),
    details="`model_name_or_path` may be a run's folder: training then starts from its trained policy. A recipe with "
    "`stages` trains several runs in a row (docs/training.md).",
)


def main(argv: list[str]) -> int:
    """Train with RGSD, or the stages of a recipe; any setting of the recipe can be overridden by a flag."""
    recipe = None if HELP_FLAGS & set(argv) else recipe_file(argv)
    if recipe is not None and stages.STAGES in recipe.values:
        return stages.run(recipe, argv, parse_all)
    return run(COMMAND, argv)


def run(command: Command, argv: Sequence[str]) -> int:
    """Train in this process, or in as many as the launch settings ask for."""
    code = _launch_if_asked(command, argv)
    if code is not None:
        return code
    recipe, launch, dry = parse_all(argv, command)
    quieten()
    if dry.dry_run:
        from rgsd.workflows.dry_run import dry_run

        dry_run(recipe, launch, device_gib=dry.device_gib)
        return 0
    import json

    from rgsd.evaluation.summaries import show_results
    from rgsd.progress import say
    from rgsd.runs import REPORT, RESULTS
    from rgsd.training.launch import leave_group
    from rgsd.workflows.train import train

    try:
        done = train(recipe)
    finally:
        leave_group()
    results = done.folder / RESULTS
    if results.is_file() and recipe.training.process_index == 0:
        show_results(json.loads(results.read_text("utf-8")))
    say(f"Run: {done.folder.resolve()}")
    if recipe.evaluation.report and recipe.training.process_index == 0:
        say(f"Report: {(done.folder / REPORT).resolve()}")
    return 0


def parse_recipe(argv: Sequence[str], command: Command = COMMAND) -> Recipe:
    """The recipe that a command line describes.

    Raises:
        ConfigError: for settings that cannot be parsed or contradict each other.
    """
    return parse_all(argv, command)[0]


def parse_all(argv: Sequence[str], command: Command, recipe: RecipeFile | None = None) -> tuple[Recipe, Any, Any]:
    """The recipe, the launch settings and the dry-run settings; from `recipe`, or the file that `--config` names.

    Raises:
        ConfigError: as `parse_recipe`.
    """
    training, model, data, evaluation, judge, launch, dry = command.parse(argv, recipe=recipe).settings
    check_model(training, model, command.name)
    from rgsd.workflows.recipe import Recipe

    return Recipe(model=model, data=data, evaluation=evaluation, training=training, judge=judge), launch, dry


def check_model(training: Any, model: Any, command: str) -> None:
    """Require a model, and replace TRL's default output folder by runs/COMMAND.

    Raises:
        ConfigError: If no model is named.
    """
    from rgsd.errors import ConfigError

    if model.model_name_or_path is None:
        raise ConfigError("model_name_or_path is unset: give a hub id, a folder, a .gguf file or `embedded`")
    if not training.output_dir or training.output_dir == "trainer_output":
        training.output_dir = f"runs/{command}"


def _launch_if_asked(command: Command, argv: Sequence[str]) -> int | None:
    """Start the processes that the launch settings ask for, and return their exit code; None for a single process.

    Only those settings are parsed here: building the trainer's config would initialize this process's device.
    """
    from rgsd.training.launch import LaunchConfig, is_launched, launch

    if HELP_FLAGS & set(argv) or is_launched():
        return None
    (settings,) = command.peek(argv, LaunchConfig)
    if not (settings.accelerate_config or (settings.num_processes or 1) > 1):
        return None
    from rgsd.workflows.dry_run import DryRunConfig

    (dry,) = command.peek(argv, DryRunConfig)
    if dry.dry_run:
        return None
    quieten()
    return launch(settings, command.name, argv)
