"""`rgsd lab [pretrain]`: the paper's comparisons in minutes, scored by an exact judge."""

from __future__ import annotations

from typing import Any

from rgsd.cli.parsing import Command, quieten

COMMAND = Command(
    name="lab",
    summary="run the paper's comparisons on a tiny model in minutes on a CPU, with an exact judge",
    settings=("rgsd.lab.config:LabConfig",),
    examples=("rgsd lab", "rgsd lab --full --output_dir runs/lab-full", "rgsd lab --grid my-arms.yaml --arms my-arm"),
    details="`rgsd lab pretrain` trains the lab's model again from nothing and compares it with the one that ships.",
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
    return _pretrain(settings) if is_pretraining else _lab(settings)


def _lab(settings: Any) -> int:
    import json

    from rgsd.errors import ConfigError
    from rgsd.lab import page
    from rgsd.lab.grid import load_arms
    from rgsd.lab.measurements import LabResults, read_measurements
    from rgsd.lab.running import LAB, jobs_of, run_lab

    known = load_arms(settings.grid or ())
    own = set(known) - set(load_arms())
    if settings.arms and (unknown := set(settings.arms) - set(known)):
        raise ConfigError(f"unknown arms {sorted(unknown)}, known: {', '.join(known)}")
    chosen = settings.arms or [n for n, a in known.items() if settings.full or a.table or n in own]
    arms = [known[n] for n in known if n in chosen]
    seeds = settings.seeds or (list(range(5)) if settings.full else [0])
    folder = run_lab(settings.output_dir, arms, seeds, workers=settings.workers, overwrite=settings.overwrite)
    results = LabResults([m for job in jobs_of(folder, arms, seeds) for m in read_measurements(job)])
    decided = page.write(folder, results, arms, json.loads((folder / LAB).read_text("utf-8")))
    page.show(results, decided, folder)
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
