"""The laboratory's arms: what each is, as a recipe of `rgsd train`, `grpo` or `sft`.

An arm is an entry of `grid.yaml`, or of a file of the user's own with the same form: a command, settings of that
command, and three words of the laboratory's: `about`, `table` (whether `rgsd lab` runs it without --full) and `world`
(`think`, `generality`: which task it is trained and measured on).
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
        think: whether the model is told to think first.
        generality: the share of prompts whose rubric follows the modifier, see `rgsd.lab.world.World`.
    """

    think: bool = False
    generality: float = 1.0

    @property
    def name(self) -> str:
        """For files and folders."""
        return "-".join(
            ["task", *(["think"] if self.think else []), *([f"{self.generality:g}"] if self.generality != 1 else [])]
        )


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        name: of its folder, and in tables.
        command: of the product: train, grpo or sft.
        settings: of that command; all of them but the data, the seed and the folder.
        about: a line for the reader.
        table: whether `rgsd lab` runs it without --full.
        task: what it is trained and measured on.
    """

    name: str
    command: str
    settings: dict[str, Any]
    about: str = ""
    table: bool = False
    task: Task = field(default_factory=Task)


def standard_grid() -> Path:
    """The file of the arms that this package brings."""
    return Path(str(files("rgsd") / "lab" / "grid.yaml"))


def load_arms(paths: Sequence[str | Path] = ()) -> dict[str, Arm]:
    """The arms of this package, then those of the user's files, which may replace some of them by name.

    A file of one's own has `arms`, and may have `all` and `commands`, which are laid over this package's.

    Raises:
        ConfigError: for a file that cannot be read, or an arm that is malformed, naming both.
    """
    base: dict[str, Any] = {"all": {}, "commands": {name: {} for name in COMMANDS}}
    arms: dict[str, Arm] = {}
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
        raise ConfigError(f"the arms of {path} cannot be read: {error}") from error
    if not isinstance(grid, dict) or not isinstance(grid.get("arms"), dict) or not grid["arms"]:
        raise ConfigError(f"{path} has no arms: a mapping `arms:` of names to settings is wanted, see docs/LAB.md")
    if unknown := set(grid) - {"all", "commands", "arms"}:
        raise ConfigError(f"{path} has {sorted(unknown)}, known are all, commands and arms")
    if unknown := set(grid.get("commands", {})) - set(COMMANDS):
        raise ConfigError(f"{path} has settings for the commands {sorted(unknown)}, known: {', '.join(COMMANDS)}")
    return grid


def _arm(name: str, entry: Any, shared: Mapping[str, Any], commands: Mapping[str, Any], path: str | Path) -> Arm:
    where = f"arm {name!r} of {path}"
    if not isinstance(entry, dict) or entry.get("command") not in COMMANDS:
        got = entry.get("command") if isinstance(entry, dict) else entry
        raise ConfigError(f"{where}: `command` is {got!r}, one of {', '.join(COMMANDS)} is wanted")
    if "/" in name or name in ("", ".", ".."):
        raise ConfigError(f"{where}: its name becomes a folder's, so it cannot hold a slash")
    world = entry.get("world", {})
    known = {f.name for f in dataclasses.fields(Task)}
    if not isinstance(world, dict) or set(world) - known:
        raise ConfigError(f"{where}: `world` is {world!r}, a mapping with {', '.join(sorted(known))} is wanted")
    command = str(entry["command"])
    own = {key: value for key, value in entry.items() if key not in OWN_KEYS}
    return Arm(
        name=name,
        command=command,
        settings={**shared, **commands[command], **own},
        about=str(entry.get("about", "")),
        table=bool(entry.get("table", False)),
        task=Task(**world),
    )
