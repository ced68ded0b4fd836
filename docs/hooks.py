"""mkdocs hook: settings tables, generated from the dataclass fields that the commands read."""

from __future__ import annotations

import re
from pkgutil import resolve_name
from typing import Any

from rgsd.settings import settings_of

_TABLE = re.compile(r"<!-- settings: ([\w.]+) -->")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put a table in place of each `<!-- settings: module.Class -->`."""
    return _TABLE.sub(lambda match: settings_table(match[1]), markdown)


def settings_table(path: str) -> str:
    """The fields that a settings class declares itself, with their defaults and help."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for info in settings_of(resolve_name(":".join(path.rsplit(".", 1)))):
        if info.is_own and info.help:
            default = "unset" if info.default_text == "unset" else f"`{_cell(info.default_text)}`"
            rows.append(f"| `{info.name}` | {default} | {_cell(info.help)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
