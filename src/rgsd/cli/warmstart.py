"""`rgsd warmstart --config RECIPE.yaml`: supervised warm start of a small base model."""

from __future__ import annotations

from rgsd.cli.parsing import Command, quieten
from rgsd.cli.train import check_model

COMMAND = Command(
    name="warmstart",
    summary="before RGSD: teach a small base model, supervised, to follow a rubric in its prompt",
    settings=(
        "trl:SFTConfig",
        "trl:ModelConfig",
        "rgsd.data.config:DataConfig",
        "rgsd.workflows.warmstart:WarmStartConfig",
    ),
    examples=("rgsd warmstart --config recipes/warmstart.yaml",),
)


def main(argv: list[str]) -> int:
    """Train on pairs built from references and checks; `rgsd export` then writes the model that RGSD starts from."""
    training, model, data, settings = COMMAND.parse(argv).settings
    check_model(training, model, COMMAND.name)
    quieten()
    from rgsd.workflows.warmstart import warm_start

    run = warm_start(training, model, data, settings)
    print(f"Run: {run.folder.resolve()}")
    return 0
