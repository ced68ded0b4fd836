"""The parser of all commands. A command declares its settings; a YAML recipe sets them, and flags override the recipe.

Reading order: `Command` (what a command declares and gets back), `_normalized` (how booleans and typos are handled),
`RecipeFile` (YAML with line numbers), `_help`. Nothing here imports torch before a command's settings need it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import textwrap
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, cast

from rgsd.errors import ConfigError, UsageError
from rgsd.settings import SettingInfo, settings_of

HELP_FLAGS = frozenset({"-h", "--help", "--help-all", "--help_all"})
BOOLEAN_WORDS = frozenset({"true", "false", "yes", "no", "1", "0", "t", "f", "y", "n"})


@dataclass(frozen=True)
class Positional:
    """An argument without a flag.

    Args:
        name: Its key in `Parsed.positionals`. The help shows it in capitals.
        help: One line of help.
        nargs: None for exactly one value, "?" for at most one, "+" for at least one.
    """

    name: str
    help: str
    nargs: Literal["?", "+"] | None = None

    @property
    def usage(self) -> str:
        """The argument as the usage line shows it."""
        name = self.name.upper()
        return {None: name, "?": f"[{name}]", "+": f"{name} [{name} ...]"}[self.nargs]


@dataclass(frozen=True)
class Parsed:
    """A parsed command line.

    Args:
        settings: One instance per settings class, in the order of `Command.settings`.
        positionals: Name -> value; a list for `nargs="+"`.
        given: Names of the settings that a flag or the recipe sets.
    """

    settings: tuple[Any, ...]
    positionals: dict[str, Any]
    given: frozenset[str]


@dataclass(frozen=True)
class Command:
    """The declaration of one command.

    Args:
        name: The command as typed, e.g. "eval" or "judge check".
        summary: One line for `rgsd --help`.
        settings: Settings dataclasses as "module:Class", so that declaring a command does not import them.
        positionals: Arguments without a flag, in order.
        examples: Command lines for the help.
        details: Paragraphs for the help, below the summary.
    """

    name: str
    summary: str
    settings: tuple[str, ...] = ()
    positionals: tuple[Positional, ...] = ()
    examples: tuple[str, ...] = ()
    details: str = ""

    @property
    def usage(self) -> str:
        """The usage line."""
        words = [p.usage for p in self.positionals]
        return " ".join(["rgsd", self.name, *words, "[--config FILE.yaml] [--SETTING VALUE ...]"])

    def classes(self) -> tuple[type, ...]:
        """The settings dataclasses."""
        return tuple(resolve_name(name) for name in self.settings)

    def flags(self, classes: Sequence[type] | None = None) -> dict[str, SettingInfo]:
        """Flag -> the setting that it sets, for all spellings of all flags."""
        return {flag: info for kind in classes or self.classes() for info in settings_of(kind) for flag in info.flags}

    def parse(self, argv: Sequence[str], *, recipe: RecipeFile | None = None) -> Parsed:
        """Parse a command line and its recipe.

        Prints the help and exits with code 0 for `--help` and `--help-all`.

        Args:
            argv: The command line without the command's name.
            recipe: The recipe; by default the file that `--config` names.

        Raises:
            UsageError: If a flag is unknown, a value has the wrong type, or the recipe cannot be read.
            ConfigError: If settings contradict each other.
        """
        if asked := HELP_FLAGS & set(argv):
            print(_help(self, show_inherited=not asked <= {"-h", "--help"}))
            raise SystemExit(0)
        return self._parse(argv, self.classes(), self.positionals, recipe, ignore_unknown=False)

    def peek(self, argv: Sequence[str], *classes: type) -> tuple[Any, ...]:
        """Parse only the settings of some classes, and ignore all others.

        Raises:
            UsageError: As `parse`, for these settings.
        """
        return self._parse(argv, classes, (), None, ignore_unknown=True).settings

    def _parse(
        self,
        argv: Sequence[str],
        classes: Sequence[type],
        positionals: Sequence[Positional],
        recipe: RecipeFile | None,
        *,
        ignore_unknown: bool,
    ) -> Parsed:
        from rgsd.redaction import remember_settings

        flags = self.flags(classes)
        argv, config = _without_config(argv)
        if recipe is None:
            recipe = RecipeFile.read(config) if config is not None else RecipeFile("")
        if not ignore_unknown:
            recipe.check(flags)
        words = list(_normalized(argv, flags, self, ignore_unknown=ignore_unknown))
        from_flags = {flags[f].name for w in words if (f := w.split("=")[0]) in flags}
        parser = _trl_parser(self, classes, recipe, from_flags)
        for p in positionals:
            parser.add_argument(p.name, nargs=p.nargs, metavar=p.name.upper())
        values, others = recipe.as_words(flags)
        parser.set_defaults_with_config(**others)
        try:
            *settings, unknown = parser.parse_args_into_dataclasses(
                [*values, *words], return_remaining_strings=True, look_for_args_file=False
            )
        except ConfigError:  # It is a ValueError too, and its message is already complete.
            raise
        except (TypeError, ValueError) as error:
            raise UsageError(f"the settings cannot be used: {error}") from error
        except ImportError as error:  # of a library that a setting asks for, e.g. --deepspeed
            raise UsageError(f"a setting needs a package that is not installed: {error}") from error
        if unknown and not ignore_unknown:
            raise UsageError(f"unexpected {' '.join(map(repr, unknown))}. Usage: {self.usage}")
        # argparse returns the positionals as one more namespace, after the settings.
        values_by_name = vars(settings.pop()) if positionals else {}
        for part in settings:
            remember_settings(vars(part))
        return Parsed(tuple(settings), values_by_name, frozenset(from_flags | recipe.values.keys()))


def _trl_parser(command: Command, classes: Sequence[type], recipe: RecipeFile, from_flags: set[str]) -> Any:
    """TRL's parser, but with exceptions as errors, which name the line of a recipe that caused them."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            flag = re.match(r"argument --(\w+)", message)
            name = flag[1] if flag else None
            where = f"{recipe.path}:{recipe.lines[name]}: " if name in recipe.lines and name not in from_flags else ""
            hint = f". Usage: {command.usage}" if "required" in message else ""
            raise UsageError(f"{where}{message}{hint}")

    parser = Parser(cast(Any, tuple(classes)), prog=f"rgsd {command.name}", add_help=False, allow_abbrev=False)
    for action in parser._actions:
        if getattr(action.type, "__name__", "") == "float":  # float, or TRL's parser of a number or none
            action.type = _finite(cast(Any, action.type))
    return parser


def _finite(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A setting's conversion that refuses NaN, which passes most checks of a range, and infinities."""

    def parse(text: str) -> Any:
        value = convert(text)
        if _has_nonfinite(value):
            raise ArgumentTypeError(f"expected a finite number, got {text!r}")
        return value

    parse.__name__ = "float"  # argparse names it in errors
    return parse


def _has_nonfinite(value: Any) -> bool:
    """Whether a value of a recipe holds NaN or an infinity at any depth."""
    if isinstance(value, Mapping):
        return any(map(_has_nonfinite, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_nonfinite, value))
    return isinstance(value, float) and not math.isfinite(value)


# --- The command line -----------------------------------------------------------------------------------------------


def _normalized(
    argv: Sequence[str], flags: Mapping[str, SettingInfo], command: Command, *, ignore_unknown: bool
) -> Iterator[str]:
    """Yield the command line with every boolean as `--flag=true` or `--flag=false`.

    argparse alone would read a positional after `--flag` as its value, and accept `--no_flag` only for settings whose
    default is true.
    """
    is_value = False
    for i, word in enumerate(argv):
        if is_value:
            is_value = False
            continue
        name, has_value, _ = word.partition("=")
        if not name.startswith("-") or re.fullmatch(r"-\.?\d.*", name):
            yield word
            continue
        negated = flags.get(re.sub(r"^--no[-_]", "--", name))
        info = flags.get(name)
        if info is None and negated is not None and negated.is_boolean and not has_value:
            yield f"--{negated.name}=false"
        elif info is None and not ignore_unknown:
            raise UsageError(
                f"unknown flag {name}{_nearest(name, flags)}. `rgsd {command.name} --help` lists all flags"
            )
        elif info is not None and info.is_boolean and not has_value:
            is_value = i + 1 < len(argv) and argv[i + 1].lower() in BOOLEAN_WORDS
            yield f"--{info.name}={argv[i + 1] if is_value else 'true'}"
        else:
            yield word


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    """A hint with the closest known spelling; empty if none is close."""
    close = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def recipe_file(argv: Sequence[str]) -> RecipeFile | None:
    """The recipe that a command line names with `--config`; None if it names none.

    Raises:
        UsageError: If the recipe cannot be read.
    """
    config = _without_config(argv)[1]
    return None if config is None else RecipeFile.read(config)


def _without_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The command line without `--config FILE`, and FILE. The last one counts."""
    rest, config = list(argv), None
    for i, word in reversed(list(enumerate(rest))):
        if word == "--config":
            if i + 1 == len(rest):
                raise UsageError("--config needs the path of a .yaml file")
            config = config if config is not None else rest[i + 1]
            del rest[i : i + 2]
        elif word.startswith("--config="):
            config = config if config is not None else word.partition("=")[2]
            del rest[i]
    return rest, config


# --- Recipes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecipeFile:
    """A YAML file of settings.

    Args:
        path: Path of the file, as given.
        values: Setting -> value.
        lines: Setting -> its line in the file, counted from 1.
    """

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> RecipeFile:
        """Read a recipe. As in TRL, its `env` mapping sets environment variables.

        Raises:
            UsageError: If the file is missing, or is not a YAML mapping that has each setting once.
        """
        import yaml

        from rgsd.rows import BadRow, read_yaml

        if not Path(path).is_file():
            raise UsageError(f"there is no recipe {path!r}: give --config the path of a .yaml file")
        try:
            values = read_yaml(Path(path))
            node = yaml.compose(Path(path).read_text("utf-8"), Loader=yaml.SafeLoader)
        except (OSError, BadRow) as error:
            raise UsageError(f"cannot read {path}: {error}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
            raise UsageError(f"{where}: invalid YAML: {getattr(error, 'problem', None) or error}") from error
        if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
            raise UsageError(f"{path}:1: a recipe must be a YAML mapping of `setting: value` lines")
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(f"{path}:{line}: {key.value} is set twice, first on line {lines[key.value]}")
            lines[key.value] = line
        env = values.pop("env", None) or {}
        if not isinstance(env, dict) or any(not str(k) or "=" in str(k) or "\0" in f"{k}{v}" for k, v in env.items()):
            raise UsageError(f"{path}:{lines['env']}: env must map names of environment variables to their values")
        os.environ.update({str(k): str(v) for k, v in env.items()})
        return cls(path, {str(k): v for k, v in values.items()}, lines)

    def check(self, flags: Mapping[str, SettingInfo]) -> None:
        """Raise a UsageError for a setting that the command does not have."""
        known = {info.name: info for info in flags.values()}
        for name in self.values:
            if name not in known:
                raise UsageError(
                    f"{self.path}:{self.lines.get(name, 1)}: unknown setting {name!r}{_nearest(name, known)}"
                )

    def as_words(self, flags: Mapping[str, SettingInfo]) -> tuple[list[str], dict[str, Any]]:
        """Split the values: plain ones become flags, which the parser checks, and all others become defaults."""
        known = {info.name: info for info in flags.values()}
        words, others = [], {}
        for name, value in self.values.items():
            info = known.get(name)
            if info is None:
                continue
            is_word = isinstance(value, str | int | float) and (info.is_boolean or not isinstance(value, bool))
            if is_word:
                words.append(f"--{name}={value}")
            else:
                if _has_nonfinite(value):
                    raise UsageError(
                        f"{self.path}:{self.lines.get(name, 1)}: {name} holds NaN or infinity: use finite numbers"
                    )
                others[name] = value
        return words, others


# --- Help ---------------------------------------------------------------------------------------------------------


def _help(command: Command, *, show_inherited: bool) -> str:
    """The help: summary, usage, examples, rgsd's settings by class, and TRL's settings if requested."""
    parts = [f"{command.summary[:1].upper()}{command.summary[1:]}.", f"Usage: {command.usage}"]
    parts += [_filled(text, "") for text in command.details.split("\n\n") if text]
    if command.positionals:
        parts.append("\n".join(_entry(p.name.upper(), p.help) for p in command.positionals))
    if command.examples:
        parts.append("Examples:\n" + "\n".join(f"  {line}" for line in command.examples))
    inherited: list[tuple[str, list[SettingInfo]]] = []
    for kind in command.classes():
        infos = settings_of(kind)
        own = [i for i in infos if i.is_own]
        if kind.__module__.split(".")[0] not in ("trl", "transformers"):
            title = (kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip(".")
            parts.append("\n".join([f"{title} ({kind.__name__}):", *map(_setting, own)]))
            infos = [i for i in infos if not i.is_own]
        if infos:
            inherited.append((kind.__name__, infos))
    for name, infos in inherited if show_inherited else ():
        parts.append("\n".join([f"TRL's settings in {name}:", *map(_setting, infos)]))
    if inherited and not show_inherited:
        count = sum(len(infos) for _, infos in inherited)
        parts.append(f"`rgsd {command.name} --help-all` adds the {count} settings of TRL's own classes.")
    parts.append(
        "Booleans: --flag, --flag true|false or --no_flag. --config FILE.yaml sets any of these; flags override it."
    )
    return "\n\n".join(parts)


def _setting(info: SettingInfo) -> str:
    names = ", ".join(["--" + info.name, *(f for f in info.flags if not f.startswith("--"))])
    choices = f" {{{','.join(info.choices)}}}" if info.choices else ""
    return _entry(names + choices, f"{info.help} (default: {info.default_text})".strip())


def _entry(name: str, text: str) -> str:
    return f"  {name}\n{_filled(text, '      ')}"


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(" ".join(text.split()), 110, initial_indent=indent, subsequent_indent=indent)


def quieten() -> None:
    """Silence the libraries' progress bars and warnings, unless RGSD_VERBOSE is set."""
    if os.environ.get("RGSD_VERBOSE"):
        return
    import logging
    import warnings

    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a notebook's stream has none
    if reconfigure is not None:
        reconfigure(line_buffering=True)


__all__ = ["Command", "Parsed", "Positional", "RecipeFile", "quieten", "recipe_file"]
