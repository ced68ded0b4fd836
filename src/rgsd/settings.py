"""What the dataclasses of settings share: a field with its help, and values that may come as JSON."""

from __future__ import annotations

import json
from dataclasses import field
from typing import Any

from rgsd.errors import ConfigError


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its default and its `help`, of which the command line and the docs are made."""
    return field(default=default, metadata={"help": help, **metadata})


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """A setting that is an object, or its JSON, or unset.

    Raises:
        ConfigError: when it is none of these.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name} is not JSON ({error}): an object is wanted, e.g. '{{}}'") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} is {type(value).__name__}, a JSON object is wanted")
    return value
