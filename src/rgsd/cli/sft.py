"""`rgsd sft --config RECIPE.yaml`: the off-policy control on the same data."""

from __future__ import annotations

from rgsd.cli.parsing import Command
from rgsd.cli.train import TRAINING_SETTINGS, run

COMMAND = Command(
    name="sft",
    summary="train the off-policy control: SFT on the responses of the model that sees the rubric",
    settings=("rgsd.training.sft:RubricSFTConfig", *TRAINING_SETTINGS),
    examples=("rgsd sft --config recipes/demo.yaml --output_dir runs/sft",),
)


def main(argv: list[str]) -> int:
    """Train with TRL's SFTTrainer and evaluate as `rgsd train` does."""
    return run(COMMAND, argv)
