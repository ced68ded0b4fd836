"""What the site is made of besides its pages: tables of settings, from the fields that the commands read."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

_TABLE = re.compile(r"<!-- settings: ([\w.]+) -->")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put a table in place of each `<!-- settings: module.Class -->`."""
    return _TABLE.sub(lambda match: settings_table(match[1]), markdown)


def settings_table(path: str) -> str:
    """The fields that a dataclass declares itself, with their defaults and help."""
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name in kind.__annotations__ and "help" in field.metadata:
            rows.append(f"| `{field.name}` | {_default(field)} | {_cell(field.metadata['help'])} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
    else:
        value = field.default
    if value is None:
        return "unset"
    return f"`{_cell(str(value).lower() if isinstance(value, bool) else str(value))}`" if value != "" else "unset"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
