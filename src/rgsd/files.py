"""Writing whole files: a reader, or a process that resumes after a kill, never sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgsd.errors import RunError
from rgsd.redaction import redact_known

PARTIAL = ".partial"
"""Suffix of a file that is being written."""


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and flush it to the disk. Known credentials are removed from text, not bytes.

    Raises:
        OSError: If the file cannot be written.
    """
    if isinstance(content, str):
        # A model can write half a surrogate pair, which UTF-8 cannot encode.
        content = redact_known(content).encode("utf-8", "replace")
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        # Flushed before the rename: otherwise a power failure could leave an empty file under the final name.
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write a result to a file that the user named.

    Raises:
        RunError: If the file cannot be written.
    """
    target = Path(path)
    text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, text)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}): choose another path with -o") from error
