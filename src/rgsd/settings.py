"""Settings dataclasses: fields with their help, and what the command line and the docs read from them."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from rgsd.errors import ConfigError


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: The default. A list becomes a default factory.
        help: The help, shown by `--help` and in docs/settings.md.
        metadata: `choices` (allowed values) or `aliases` (further flags, e.g. ["-o"]).
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SettingInfo:
    """One field of a settings class, as the command line and the docs show it.

    Args:
        name: The field's name.
        help: Its help; empty if the field has none.
        default_text: Its default in words; "unset" for None and "".
        choices: Allowed values; empty if any value of the type is allowed.
        is_boolean: Whether its type is `bool` or `bool | None`.
        is_own: Whether the class declares it, instead of inheriting it.
        flags: All its spellings on the command line.
    """

    name: str
    help: str
    default_text: str
    choices: tuple[str, ...]
    is_boolean: bool
    is_own: bool
    flags: tuple[str, ...]


def settings_of(kind: type) -> list[SettingInfo]:
    """The settings of a dataclass, in the order of its fields."""
    hints = get_type_hints(kind)
    own = inspect.get_annotations(kind)
    infos = []
    for f in fields(kind):
        if not f.init:
            continue
        spellings = dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}", *f.metadata.get("aliases", ())])
        hint = hints[f.name]
        infos.append(
            SettingInfo(
                name=f.name,
                help=f.metadata.get("help", ""),
                default_text=_default_text(f),
                choices=tuple(map(str, f.metadata.get("choices", ()))),
                is_boolean=hint is bool or set(get_args(hint)) == {bool, type(None)},
                is_own=f.name in own,
                flags=tuple(spellings),
            )
        )
    return infos


def _default_text(f: Any) -> str:
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    if value is None or value == "" or value is MISSING:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """Read a setting whose value is an object, its JSON, or None.

    Raises:
        ConfigError: If it is anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name} must be a JSON object such as '{{}}', got {value!r}: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value
