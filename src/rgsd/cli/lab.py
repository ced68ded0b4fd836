"""`rgsd lab [pretrain] [--full true] [--FIELD VALUE ...]`: the paper's comparisons in minutes, with an exact judge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rgsd.settings import setting


@dataclass
class LabConfig:
    """What the laboratory runs, and where to."""

    out: str = setting("runs/lab", "Folder of the laboratory's run. The same command goes on with what it holds.")
    full: bool = setting(False, "Run every arm, with five seeds, rather than the standard table with one.")
    seeds: list[int] | None = setting(None, "Seeds; each is a task of its own. Unset: 0, or 0 to 4 with --full.")
    arms: list[str] | None = setting(None, "Run these arms alone. Unset: the standard table, or all with --full.")
    grid: list[str] | None = setting(None, "Files with arms of your own (docs/LAB.md), run beside the others.")
    workers: int | None = setting(None, "Arms trained at a time, on one core each. Unset: as many as cores.")
    overwrite: bool = setting(False, "Begin anew.")


@dataclass
class PretrainConfig:
    """How the nano model is made again."""

    out: str = setting("runs/nano", "Folder for weights, tokenizer and figures; new or empty.")
    seed: int = setting(0, "Seed of weights, conversations and batches. The shipped model's is 0.")
    steps: int | None = setting(None, "Optimizer steps. Unset: those of the shipped model.")
    n_prompts: int | None = setting(None, "Measure on so many held-out prompts. Unset: all.")


def main(argv: list[str]) -> int:
    """Run the laboratory, or make its model anew."""
    from rgsd.cli.train import parse_plain, quieten

    quieten()
    if argv and argv[0] == "pretrain":
        (settings,) = parse_plain((PretrainConfig,), argv[1:], "lab pretrain")
        return _pretrain(settings)
    (settings,) = parse_plain((LabConfig,), argv, "lab")
    return _lab(settings)


def _lab(settings: LabConfig) -> int:
    from rgsd.errors import ConfigError
    from rgsd.lab import page
    from rgsd.lab.claims import Figures, read
    from rgsd.lab.grid import load_arms
    from rgsd.lab.running import LAB, jobs_of, run_lab

    known = load_arms(settings.grid or ())
    own = set(known) - set(load_arms())
    if settings.arms and (unknown := set(settings.arms) - set(known)):
        raise ConfigError(f"unknown arms {sorted(unknown)}, known: {', '.join(known)}")
    wanted = settings.arms or [n for n, a in known.items() if settings.full or a.table or n in own]
    arms = [known[n] for n in known if n in wanted]
    seeds = settings.seeds or (list(range(5)) if settings.full else [0])
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds are {seeds}: different whole numbers from 0 on are wanted")
    folder = run_lab(settings.out, arms, seeds, workers=settings.workers, overwrite=settings.overwrite)
    figures = Figures([m for job in jobs_of(folder, arms, seeds) for m in read(job)])
    found = page.write(folder, figures, arms, json.loads((folder / LAB).read_text("utf-8")))
    page.show(figures, found, folder)
    return 0


def _pretrain(settings: PretrainConfig) -> int:
    from rgsd.lab import nano
    from rgsd.lab.figures import Figures, compare

    rebuilt = nano.pretrain(settings.out, seed=settings.seed, steps=settings.steps, n_prompts=settings.n_prompts)
    for name, arm in rebuilt.arms.items():
        print(f"  {name}: satisfaction {arm.satisfaction:.3f}, false claims {100 * arm.false_share:.0f} %")
    result = compare(rebuilt, Figures.read(nano.model_folder()))
    print("\n".join(result.lines))
    print(f"Model: {Path(settings.out).resolve()}")
    return 0 if result.matches else 1
