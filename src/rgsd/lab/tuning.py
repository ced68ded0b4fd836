"""Chooses settings on the development prompts, with equally many trials for each command.

A baseline that was never tuned is no baseline. The held-out prompts play no part in the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsd.files import atomic_write
from rgsd.lab.grid import Grid, LabArm
from rgsd.lab.measurements import LabResults

TUNED = "tuned.yaml"


@dataclass(frozen=True)
class Choice:
    """The best value of one command's setting.

    Args:
        command: "train", "grpo" or "sft".
        setting: Its name.
        value: The best of the values tried: highest mean satisfaction, the smaller one if two are equal.
        scores: Value -> mean satisfaction on the development prompts, for all values tried.
    """

    command: str
    setting: str
    value: Any
    scores: dict[Any, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{value:g}: {score:.3f}" for value, score in self.scores.items())
        return f"{self.command}: {self.setting} {self.value:g} (tried {tried})"


def choose(results: LabResults, grid: Grid, trials: Mapping[str, Sequence[LabArm]]) -> list[Choice]:
    """The best value for each command.

    Args:
        results: Measurements of all trials.
        grid: The grid, whose `tune` names the settings.
        trials: Its trials, by command.
    """
    choices = []
    for command, arms in trials.items():
        (setting,) = grid.tune[command]
        scores = {arm.settings[setting]: results.mean(arm.name).mean for arm in arms}
        best = max(sorted(scores), key=lambda value: scores[value])
        choices.append(Choice(command, setting, best, scores))
    return choices


def write(folder: Path, choices: Sequence[Choice], n_prompts: int, seeds: Sequence[int]) -> Path:
    """Write tuned.yaml, a grid file whose settings apply to all arms of each command."""
    lines = [
        f"# Chosen by `rgsd lab --tune true` on {n_prompts} development prompts, seeds {', '.join(map(str, seeds))}.",
        *(f"# {choice}" for choice in choices),
        "settings:",
        *(f"  {c.command}: {{{c.setting}: {_yaml(c.value)}}}" for c in choices),
    ]
    atomic_write(folder / TUNED, "\n".join(lines) + "\n")
    return folder / TUNED


def _yaml(value: float) -> str:
    # YAML reads 1e-05 as text: its floats need a point.
    text = repr(float(value)) if isinstance(value, float) else str(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
