"""`rgsd grpo --config RECIPE.yaml [--FIELD VALUE ...]`: the peer, judge-based GRPO, on the same data."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Train with TRL's GRPOTrainer, a judge's rubric score as its reward; measure as `rgsd train` does."""
    from rgsd.cli.train import run
    from rgsd.training.grpo import RubricGRPOConfig

    return run(argv, RubricGRPOConfig, "grpo")
