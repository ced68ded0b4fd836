"""`rgsd lab`, whole: choose bench and arms, run them, read the results, write and print them."""

from __future__ import annotations

import json
from pathlib import Path

from rgsd.lab import page, tuning
from rgsd.lab.benches import DEVELOPMENT, bench_of
from rgsd.lab.config import LabConfig
from rgsd.lab.measurements import read_all
from rgsd.lab.running import LAB, jobs_of, run_lab
from rgsd.models import NANO


def run_session(settings: LabConfig) -> Path:
    """Run the lab as its settings say; returns its folder.

    Raises:
        ConfigError: For settings, grid files or arms that cannot be used. Nothing is run then.
        RunError: As `run_lab`.
    """
    bench, grid = bench_of(settings.model, settings.grid or (), settings.given_settings)
    trials = grid.trials() if settings.tune else {}
    arms = [arm for of_command in trials.values() for arm in of_command]
    arms = arms or grid.chosen(settings.arms, full=settings.full)
    split = DEVELOPMENT if settings.tune else settings.split
    seeds, folder = settings.seeds or _seeds(settings), Path(settings.output_dir or _folder(settings))
    run_lab(
        folder,
        arms,
        seeds,
        bench=bench,
        split=split,
        seconds=grid.seconds,
        workers=settings.workers,
        overwrite=settings.overwrite,
    )
    results = read_all(jobs_of(folder, arms, seeds, bench=bench, split=split))
    decided = page.write(folder, results, arms, json.loads((folder / LAB).read_text("utf-8")))
    page.show(results, decided, folder)
    if trials:
        choices = tuning.choose(results, grid, trials)
        n_prompts = len(bench.examples(seeds[0], arms[0].task, split))
        file = tuning.write(folder, choices, n_prompts, seeds)
        print("\n".join(f"  {choice}" for choice in choices))
        print(f"To use them: rgsd lab --model {settings.model} --grid {file}")
    return folder


def _seeds(settings: LabConfig) -> list[int]:
    is_nano = settings.model == NANO
    if settings.tune or (is_nano and not settings.full):
        return [0]
    return list(range(5 if is_nano else 3))


def _folder(settings: LabConfig) -> str:
    name = "runs/lab" if settings.model == NANO else f"runs/lab-{Path(settings.model).name}"
    return f"{name}-tune" if settings.tune else name
