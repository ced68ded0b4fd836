"""`rgsd train --config RECIPE.yaml [--FIELD VALUE ...]`."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    """Train from a recipe; any field of it can be overridden by a flag."""
    from rgsd.training.config import RGSDConfig

    return run(argv, RGSDConfig, "train")


def run(argv: list[str], kind: type, command: str) -> int:
    """A command that trains: in this process, or in as many as the launcher's settings ask for."""
    quieten()
    from rgsd.training.launch import is_launched, launch, launch_config, leave_group

    settings = launch_config(argv)
    is_many = settings.accelerate_config or (settings.num_processes or 1) > 1
    if is_many and not is_launched() and "--help" not in argv and not is_dry(argv):
        return launch(settings, command, argv)
    recipe, dry = parse_all(argv, kind, command)
    if dry.dry_run:
        from rgsd.workflows.dry_run import dry_run

        dry_run(recipe, settings, device_gib=dry.device_gib)
        return 0
    from rgsd.evaluation.summaries import show_results
    from rgsd.progress import say
    from rgsd.runs import RESULTS
    from rgsd.workflows.train import train

    try:
        done = train(recipe)
    finally:
        leave_group()
    results = done.folder / RESULTS
    if results.is_file() and recipe.training.process_index == 0:
        show_results(json.loads(results.read_text("utf-8")))
    say(f"Run: {done.folder.resolve()}")
    return 0


def is_dry(argv: list[str]) -> bool:
    """Whether a command line asks for a dry run, which takes one process whatever it says of others."""
    return "--dry_run" in argv and _value_of("--dry_run", argv).lower() not in ("false", "no", "0")


def parse(argv: list[str], kind: type | None = None, command: str = "train"):
    """The recipe that a command line describes; `kind` is the trainer's settings, RGSDConfig by default.

    Raises:
        ConfigError: for a recipe that cannot be read, a field nobody knows, or settings that contradict each other.
    """
    return parse_all(argv, kind, command)[0]


def parse_all(argv: list[str], kind: type | None = None, command: str = "train"):
    """The recipe, and whether it is only to be tried out.

    Raises:
        ConfigError: as `parse`.
    """
    from trl import ModelConfig

    from rgsd.data.config import DataConfig
    from rgsd.evaluation.config import EvalConfig
    from rgsd.judges import JudgeConfig
    from rgsd.training.config import RGSDConfig
    from rgsd.training.launch import LaunchConfig
    from rgsd.workflows.dry_run import DryRunConfig
    from rgsd.workflows.train import Recipe

    parts = (kind or RGSDConfig, ModelConfig, DataConfig, EvalConfig, JudgeConfig, LaunchConfig, DryRunConfig)
    training, model, data, evaluation, judge, _, dry = parse_into(parts, argv, command)
    return Recipe(model=model, data=data, evaluation=evaluation, training=training, judge=judge), dry


def parse_into(parts: tuple[type, ...], argv: list[str], command: str) -> tuple[Any, ...]:
    """YAML and flags into dataclasses, the first of which is the trainer's and the second TRL's `ModelConfig`.

    Raises:
        ConfigError: as `parse`.
    """
    from rgsd.errors import ConfigError

    parsed = parse_plain(parts, argv, command)
    training, model = parsed[:2]
    if model.model_name_or_path is None:
        raise ConfigError("which model? Set model_name_or_path to a hub id, a folder, a .gguf file or `embedded`")
    if not training.output_dir or training.output_dir == "trainer_output":
        training.output_dir = f"runs/{command}"
    return parsed


def parse_plain(parts: tuple[type, ...], argv: list[str], command: str) -> tuple[Any, ...]:
    """YAML and flags into dataclasses.

    Raises:
        ConfigError: as `parse`.
    """
    import yaml
    from trl import TrlParser

    from rgsd.errors import ConfigError
    from rgsd.redaction import remember_settings

    if "--config" in argv and not Path(_value_of("--config", argv)).is_file():
        raise ConfigError(f"there is no recipe {_value_of('--config', argv)!r}: give the path of a .yaml file")
    try:
        parsed = TrlParser(parts, prog=f"rgsd {command}").parse_args_and_config(argv)  # pyright: ignore
    except ConfigError:
        raise
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe or its flags cannot be used: {error}") from error
    for part in parsed:
        remember_settings(vars(part))
    return parsed


def split_names(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the rest."""
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:first], argv[first:]


def _value_of(flag: str, argv: list[str]) -> str:
    position = argv.index(flag) + 1
    return argv[position] if position < len(argv) else ""


def quieten() -> None:
    """Libraries' chatter off; RGSD_VERBOSE=1 leaves it on."""
    if os.environ.get("RGSD_VERBOSE"):
        return
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore
