"""Settings of `rgsd lab` and `rgsd lab pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from rgsd.errors import ConfigError
from rgsd.settings import setting


@dataclass
class LabConfig:
    """Which arms the lab runs, and where the results go."""

    output_dir: str | None = setting(
        None, "Folder of the results. The same command resumes what it holds. Unset: runs/lab, or runs/lab-MODEL."
    )
    model: str = setting(
        "nano", "`nano` for the made-up world, or any model for the bundled prompts, e.g. embedded-warm (docs/LAB.md)."
    )
    full: bool = setting(False, "Run every arm instead of the standard table, in the nano world with five seeds.")
    seeds: list[int] | None = setting(
        None,
        "Seeds of training; in the nano world, each draws its own task. Unset: 0 1 2, or in the nano world 0, with "
        "--full 0 to 4.",
    )
    arms: list[str] | None = setting(None, "Run only these arms. Unset: the standard table, or all with --full.")
    grid: list[str] | None = setting(None, "YAML files that add arms or change their settings (docs/LAB.md).")
    settings: list[str] | None = setting(
        None,
        "Settings for all arms, as SETTING=VALUE, or COMMAND.SETTING=VALUE for those of one command, e.g. "
        "max_steps=8 grpo.learning_rate=3.0e-4. What an arm sets itself holds.",
    )
    split: str = setting(
        "held-out",
        "Prompts to measure on. Neither are trained on. Measure held-out prompts once, when nothing will be changed.",
        choices=["held-out", "development"],
    )
    tune: bool = setting(
        False,
        "Instead of the arms, try the grid's learning rates for each command on the development prompts, and write "
        "the best ones to tuned.yaml for --grid. Seed 0 unless seeds are given.",
    )
    workers: int | None = setting(
        None, "Arms trained in parallel; they share the cores. Unset: one per core, with one thread."
    )
    overwrite: bool = setting(False, "Delete earlier results and start again.")

    def __post_init__(self) -> None:
        if self.seeds and (len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0):
            raise ConfigError(f"seeds must be distinct and at least 0, got {self.seeds}")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if self.tune and (self.arms or self.full):
            raise ConfigError("tune runs the trials of the grid, not its arms: leave out arms and full")

    @property
    def given_settings(self) -> dict[str, Any]:
        """The settings for all arms, with their values read as YAML.

        Raises:
            ConfigError: For an entry without a name or a value.
        """
        found = {}
        for entry in self.settings or ():
            name, _, text = entry.partition("=")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"settings: {entry!r} has a value that is not YAML: {error}") from error
            if not name or value is None:
                raise ConfigError(f"settings must be SETTING=VALUE, got {entry!r}")
            found[name] = value
        return found


@dataclass
class PretrainConfig:
    """How the lab's model is pretrained."""

    output_dir: str = setting("runs/nano", "Folder for weights, tokenizer and scores: new or empty.")
    seed: int = setting(0, "Seed of weights, conversations and batches. The shipped model uses 0.")
    steps: int | None = setting(None, "Optimizer steps. Unset: as many as for the shipped model.")
    n_prompts: int | None = setting(None, "Evaluate on this many held-out prompts. Unset: all.")
