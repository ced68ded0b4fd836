"""`rgsd grpo --config RECIPE.yaml`: the GRPO baseline on the same data."""

from __future__ import annotations

from rgsd.cli.parsing import Command
from rgsd.cli.train import TRAINING_SETTINGS, run

COMMAND = Command(
    name="grpo",
    summary="train the baseline: TRL's GRPOTrainer with a judge's rubric score as its reward",
    settings=("rgsd.training.grpo:RubricGRPOConfig", *TRAINING_SETTINGS),
    examples=("rgsd grpo --config recipes/grpo.yaml", "rgsd grpo --config recipes/grpo.yaml --judge openai/gpt-5.4"),
)


def main(argv: list[str]) -> int:
    """Train with GRPO and evaluate as `rgsd train` does."""
    return run(COMMAND, argv)
