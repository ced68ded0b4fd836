"""`rgsd warmstart --config RECIPE.yaml`: a supervised warm start for models too small to follow a rubric."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Train on pairs made of references and checks; `rgsd export` then writes the model that RGSD starts from."""
    from trl import ModelConfig, SFTConfig

    from rgsd.cli.train import parse_into, quieten
    from rgsd.data.config import DataConfig
    from rgsd.workflows.warmstart import WarmStartConfig, warm_start

    quieten()
    run = warm_start(*parse_into((SFTConfig, ModelConfig, DataConfig, WarmStartConfig), argv, "warmstart"))
    print(f"Run: {run.folder.resolve()}")
    return 0
