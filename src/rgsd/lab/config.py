"""Settings of `rgsd lab` and `rgsd lab pretrain`."""

from __future__ import annotations

from dataclasses import dataclass

from rgsd.errors import ConfigError
from rgsd.settings import setting


@dataclass
class LabConfig:
    """Which arms the lab runs, and where the results go."""

    output_dir: str = setting("runs/lab", "Folder of the results. The same command resumes what it holds.")
    full: bool = setting(False, "Run every arm with five seeds instead of the standard table with one.")
    seeds: list[int] | None = setting(None, "Seeds; each draws its own task. Unset: 0, or 0 to 4 with --full.")
    arms: list[str] | None = setting(None, "Run only these arms. Unset: the standard table, or all with --full.")
    grid: list[str] | None = setting(None, "YAML files that add arms (docs/LAB.md).")
    workers: int | None = setting(None, "Arms trained in parallel, one core each. Unset: the number of cores.")
    overwrite: bool = setting(False, "Delete earlier results and start again.")

    def __post_init__(self) -> None:
        if self.seeds and (len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0):
            raise ConfigError(f"seeds must be distinct and at least 0, got {self.seeds}")


@dataclass
class PretrainConfig:
    """How the lab's model is pretrained."""

    output_dir: str = setting("runs/nano", "Folder for weights, tokenizer and scores: new or empty.")
    seed: int = setting(0, "Seed of weights, conversations and batches. The shipped model uses 0.")
    steps: int | None = setting(None, "Optimizer steps. Unset: as many as for the shipped model.")
    n_prompts: int | None = setting(None, "Evaluate on this many held-out prompts. Unset: all.")
