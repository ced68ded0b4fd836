"""The lab's arms, each a recipe for `rgsd train`, `rgsd grpo` or `rgsd sft`.

An arm is an entry of `grid.yaml`, or of a user's file of the same form. It has a command, settings of that command, and
three keys of the lab: `about` (a description), `table` (whether `rgsd lab` runs it without --full) and `world` (the
task: `think` and `generality`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rgsd.errors import ConfigError

COMMANDS = ("train", "grpo", "sft")
OWN_KEYS = frozenset({"command", "about", "table", "world"})


@dataclass(frozen=True, slots=True)
class Task:
    """The task that an arm is trained and measured on.

    Args:
        think: Whether the system message tells the model to think first.
        generality: Share of the prompts whose rubric follows the modifier; see `rgsd.lab.world.World`.
    """

    think: bool = False
    generality: float = 1.0

    @property
    def name(self) -> str:
        """The task's name in files and folders; "task" for the default."""
        parts = ["task", "think" if self.think else "", f"{self.generality:g}" if self.generality != 1 else ""]
        return "-".join(filter(None, parts))


@dataclass(frozen=True)
class LabArm:
    """A training configuration that the lab runs.

    Args:
        name: Its name in tables and its folder's name.
        command: "train", "grpo" or "sft".
        settings: All settings of that command except the data, the seed and the output folder.
        about: A line of description.
        table: Whether `rgsd lab` runs it without --full.
        task: What it is trained and measured on.
    """

    name: str
    command: str
    settings: dict[str, Any]
    about: str = ""
    table: bool = False
    task: Task = field(default_factory=Task)


def standard_grid() -> Path:
    """The file of the standard arms."""
    return Path(str(files("rgsd") / "lab" / "grid.yaml"))


def load_arms(paths: Sequence[str | Path] = ()) -> dict[str, LabArm]:
    """Load the standard arms, then those of the user's files.

    An arm of a user's file replaces a standard arm of the same name. The file may have `all` and `commands`, which
    override the standard settings for the arms of that file.

    Raises:
        ConfigError: If a file cannot be read or an arm is malformed.
    """
    base: dict[str, Any] = {"all": {}, "commands": {name: {} for name in COMMANDS}}
    arms: dict[str, LabArm] = {}
    for path in (standard_grid(), *paths):
        grid = _read(path)
        shared = {**base["all"], **grid.get("all", {})}
        commands = {name: {**base["commands"][name], **grid.get("commands", {}).get(name, {})} for name in COMMANDS}
        if path == standard_grid():
            base = {"all": shared, "commands": commands}
        for name, entry in grid["arms"].items():
            arms[str(name)] = _arm(str(name), entry, shared, commands, path)
    return arms


def _read(path: str | Path) -> dict[str, Any]:
    try:
        grid = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read arms from {path}: {error}") from error
    if not isinstance(grid, dict) or not isinstance(grid.get("arms"), dict) or not grid["arms"]:
        raise ConfigError(f"{path} needs a mapping `arms` of names to settings, and has none: see docs/LAB.md")
    if unknown := set(grid) - {"all", "commands", "arms"}:
        raise ConfigError(f"{path} has unknown keys {sorted(unknown)}, known: all, commands, arms")
    if unknown := set(grid.get("commands", {})) - set(COMMANDS):
        raise ConfigError(f"{path} has settings for unknown commands {sorted(unknown)}, known: {', '.join(COMMANDS)}")
    return grid


def _arm(name: str, entry: Any, shared: Mapping[str, Any], commands: Mapping[str, Any], path: str | Path) -> LabArm:
    where = f"arm {name!r} of {path}"
    if not isinstance(entry, dict) or entry.get("command") not in COMMANDS:
        got = entry.get("command") if isinstance(entry, dict) else entry
        raise ConfigError(f"{where}: `command` must be one of {', '.join(COMMANDS)}, got {got!r}")
    if "/" in name or name in ("", ".", ".."):
        raise ConfigError(f"{where}: the name is used for a folder, so it cannot be a path or contain a slash")
    world = entry.get("world", {})
    known = {f.name for f in dataclasses.fields(Task)}
    if not isinstance(world, dict) or set(world) - known:
        raise ConfigError(f"{where}: `world` must be a mapping with the keys {', '.join(sorted(known))}, got {world!r}")
    command = str(entry["command"])
    own = {key: value for key, value in entry.items() if key not in OWN_KEYS}
    return LabArm(
        name=name,
        command=command,
        settings={**shared, **commands[command], **own},
        about=str(entry.get("about", "")),
        table=bool(entry.get("table", False)),
        task=Task(**world),
    )
