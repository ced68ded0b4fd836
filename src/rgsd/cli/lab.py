"""`rgsd lab [pretrain]`: the paper's comparisons in minutes, scored by an exact judge."""

from __future__ import annotations

from typing import Any

from rgsd.cli.parsing import Command, quieten

COMMAND = Command(
    name="lab",
    summary="run the paper's comparisons on a tiny model in minutes on a CPU, with an exact judge",
    settings=("rgsd.lab.config:LabConfig",),
    examples=(
        "rgsd lab",
        "rgsd lab --full --output_dir runs/lab-full",
        "rgsd lab --grid my-arms.yaml --arms my-arm",
        "rgsd lab --model embedded-warm --tune",
        "rgsd lab --model embedded-warm --grid runs/lab-embedded-warm-tune/tuned.yaml",
    ),
    details="With --model, the same comparisons run on a real model and the bundled prompts, in hours.\n\n"
    "`rgsd lab pretrain` trains the lab's model again from nothing and compares it with the one that ships.",
)
PRETRAIN = Command(
    name="lab pretrain",
    summary="train the lab's model from nothing and compare it with the one that ships",
    settings=("rgsd.lab.config:PretrainConfig",),
    examples=("rgsd lab pretrain --output_dir runs/nano",),
)


def main(argv: list[str]) -> int:
    """Run the lab's arms, or train its model again."""
    is_pretraining = argv[:1] == ["pretrain"]
    command, argv = (PRETRAIN, argv[1:]) if is_pretraining else (COMMAND, argv)
    (settings,) = command.parse(argv).settings
    quieten()
    if is_pretraining:
        return _pretrain(settings)
    from rgsd.lab.session import run_session

    run_session(settings)
    return 0


def _pretrain(settings: Any) -> int:
    from pathlib import Path

    from rgsd.lab import nano
    from rgsd.lab.nano_scores import NanoScores, compare

    rebuilt = nano.pretrain(settings.output_dir, seed=settings.seed, steps=settings.steps, n_prompts=settings.n_prompts)
    for name, scores in rebuilt.arms.items():
        print(f"  {name}: satisfaction {scores.satisfaction:.3f}, false claims {100 * scores.false_share:.0f} %")
    result = compare(rebuilt, NanoScores.read(nano.model_folder()))
    print("\n".join(result.lines))
    print(f"Model: {Path(settings.output_dir).resolve()}")
    return 0 if result.matches else 1
