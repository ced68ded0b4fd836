"""`rgsd sft --config RECIPE.yaml [--FIELD VALUE ...]`: the off-policy control, on the same data."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Fine-tune on the conditioned base model's own responses with TRL's SFTTrainer; measure as `rgsd train` does."""
    from rgsd.cli.train import run
    from rgsd.training.sft import RubricSFTConfig

    return run(argv, RubricSFTConfig, "sft")
