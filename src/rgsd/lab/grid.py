"""The lab's arms, each a recipe for `rgsd train`, `rgsd grpo` or `rgsd sft`.

An arm is an entry of a bench's grid file (`grid.yaml`, `embedded.yaml`), or of a user's file of the same form. It has
a command, settings of that command, and four keys of the lab: `about` (a description), `table` (whether `rgsd lab` runs
it without --full), `after` (the arm whose trained policy it starts from) and `world` (the task: `think` and
`generality`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rgsd.errors import ConfigError
from rgsd.rows import BadRow, read_yaml

COMMANDS = ("train", "grpo", "sft")
OWN_KEYS = frozenset({"command", "about", "table", "world", "after"})
SECTIONS = ("all", "commands", "arms", "settings", "tune", "seconds")
"""Sections of a grid file. `settings` may stand alone; the others of a user's file apply to its own arms."""


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
        after: The arm whose trained policy it starts from; empty for the untrained model.
    """

    name: str
    command: str
    settings: dict[str, Any]
    about: str = ""
    table: bool = False
    task: Task = field(default_factory=Task)
    after: str = ""


@dataclass(frozen=True)
class Grid:
    """A bench's arms.

    Args:
        arms: By name, the standard ones first.
        shared: Settings that every arm of the standard grid has.
        tune: Command -> the values to try on the development prompts, by setting.
        seconds: Measured durations, from which `rgsd.lab.running` estimates the time.
        own: Names of the arms that the user's files define.
    """

    arms: dict[str, LabArm]
    shared: dict[str, Any]
    tune: dict[str, dict[str, list[Any]]]
    seconds: dict[str, float]
    own: frozenset[str] = frozenset()

    def chosen(self, names: Collection[str] | None, *, full: bool) -> list[LabArm]:
        """The named arms, in the grid's order; by default those of the table and the user's own, or all with `full`.
        An arm that another one starts from comes with it.

        Raises:
            ConfigError: For an unknown name.
        """
        if unknown := set(names or ()) - set(self.arms):
            raise ConfigError(f"unknown arms {sorted(unknown)}, known: {', '.join(self.arms)}")
        wanted = set(names or (n for n, arm in self.arms.items() if full or arm.table or n in self.own))
        left = list(wanted)
        while left:
            before = self.arms[left.pop()].after
            if before and before not in wanted:
                wanted.add(before)
                left.append(before)
        return [arm for name, arm in self.arms.items() if name in wanted]

    def trials(self) -> dict[str, list[LabArm]]:
        """The arms to compare on the development prompts, by command: `rgsd`, `grpo` and `sft`, each with the values of
        `tune` in turn."""
        found: dict[str, list[LabArm]] = {}
        for command, settings in self.tune.items():
            plain = self.arms["rgsd" if command == "train" else command]
            found[command] = [
                dataclasses.replace(
                    plain,
                    name=f"tune-{plain.name}-{value:g}",
                    settings={**plain.settings, setting: value},
                    about=f"{setting} {value:g}",
                )
                for setting, values in settings.items()
                for value in values
            ]
        return found


def standard_grid(name: str = "grid.yaml") -> Path:
    """A file of standard arms: grid.yaml for the nano world, embedded.yaml for the bundled data."""
    return Path(str(files("rgsd") / "lab" / name))


def load_arms(paths: Sequence[str | Path] = ()) -> dict[str, LabArm]:
    """The arms of the nano world's grid and of the user's files (`load_grid`)."""
    return load_grid(paths).arms


def load_grid(
    paths: Sequence[str | Path] = (), *, standard: Path | None = None, settings: Mapping[str, Any] | None = None
) -> Grid:
    """Load the standard arms, then those of the user's files.

    An arm of a user's file replaces a standard arm of the same name. The file may have `all` and `commands`, which
    override the standard settings for the arms of that file, and `settings`, which overrides them for all arms. What an
    arm sets itself always holds.

    Args:
        paths: The user's files.
        standard: The bench's file; by default that of the nano world.
        settings: Like `settings` of a file, stronger than all of them: SETTING or COMMAND.SETTING -> value.

    Raises:
        ConfigError: If a file cannot be read or an arm is malformed.
    """
    standard = standard or standard_grid()
    grids = [(path, _read(path)) for path in (standard, *paths)]
    first = grids[0][1]
    over = _overrides([grid.get("settings", {}) for _, grid in grids], settings or {})
    arms: dict[str, LabArm] = {}
    for path, grid in grids:
        shared = {**first["all"], **grid.get("all", {}), **over["all"]}
        commands = {
            name: {
                **first.get("commands", {}).get(name, {}),
                **grid.get("commands", {}).get(name, {}),
                **over["all"],
                **over[name],
            }
            for name in COMMANDS
        }
        for name, entry in grid.get("arms", {}).items():
            arms[str(name)] = _arm(str(name), entry, shared, commands, path)
    for arm in arms.values():
        _check_start(arm, arms)
    own = frozenset(str(name) for _, grid in grids[1:] for name in grid.get("arms", {}))
    tune, seconds = ({**first.get(s, {}), **{k: v for _, g in grids for k, v in g.get(s, {}).items()}} for s in _MERGED)
    _check_tune(tune, standard)
    return Grid(arms, {**first["all"], **over["all"]}, tune, seconds, own)


_MERGED = ("tune", "seconds")


def _overrides(of_files: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Command, or "all" -> settings."""
    found: dict[str, dict[str, Any]] = {name: {} for name in ("all", *COMMANDS)}
    for settings in of_files:
        for command, values in settings.items():
            found[command] |= values
    for name, value in given.items():
        command, _, setting = name.rpartition(".")
        if command and command not in COMMANDS:
            raise ConfigError(f"--settings {name}: the command must be one of {', '.join(COMMANDS)}, got {command!r}")
        found[command or "all"][setting] = value
    return found


def _read(path: str | Path) -> dict[str, Any]:
    try:
        grid = read_yaml(Path(path))
    except (OSError, BadRow, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read arms from {path}: {error}") from error
    if not isinstance(grid, dict) or not (grid.get("arms") or grid.get("settings")):
        raise ConfigError(f"{path} needs a mapping `arms` of names to settings, and has none: see docs/LAB.md")
    if unknown := set(grid) - set(SECTIONS):
        raise ConfigError(f"{path} has unknown keys {sorted(unknown)}, known: {', '.join(SECTIONS)}")
    for section, value in grid.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{section} of {path} must be a mapping, got {value!r:.100}")
    for section, known in (("commands", COMMANDS), ("settings", ("all", *COMMANDS)), ("tune", COMMANDS)):
        if unknown := set(grid.get(section, {})) - set(known):
            raise ConfigError(f"{path} has {section} for unknown commands {sorted(unknown)}, known: {', '.join(known)}")
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
        after=str(entry.get("after", "")),
    )


def _check_start(arm: LabArm, arms: Mapping[str, LabArm]) -> None:
    """Raise a ConfigError unless the arm that an arm starts from exists, has the same task, and ends somewhere."""
    seen = [arm.name]
    while arm.after:
        if arm.after not in arms:
            raise ConfigError(f"arm {arm.name!r} starts after {arm.after!r}, which is no arm; known: {', '.join(arms)}")
        if arm.after in seen:
            raise ConfigError(f"arms start after each other in a circle: {' after '.join([*seen, arm.after])}")
        if arms[arm.after].task != arm.task:
            raise ConfigError(f"arm {arm.name!r} must have the same `world` as {arm.after!r}, from which it starts")
        arm = arms[arm.after]
        seen.append(arm.name)


def _check_tune(tune: Mapping[str, Any], path: Path) -> None:
    """Raise a ConfigError unless every command tries one setting, and all try equally many values."""
    counts = set()
    for command, settings in tune.items():
        values = list(settings.values()) if isinstance(settings, dict) else []
        if len(values) != 1 or not isinstance(values[0], list) or not values[0]:
            raise ConfigError(f"tune of {path}: {command} must have one setting with a list of values, got {settings}")
        counts.add(len(values[0]))
    if len(counts) > 1:
        raise ConfigError(
            f"tune of {path}: every command must try equally many values, got {sorted(counts)}: a baseline with fewer "
            "trials is no baseline"
        )
