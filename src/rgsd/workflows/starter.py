"""`rgsd init`: a commented recipe and example rubrics to start from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rgsd.errors import RunError
from rgsd.settings import setting

FILES = ("recipe.yaml", "rubrics.jsonl", "rubrics-judged.jsonl")
"""The recipe; five prompts whose criteria have programmatic checks; the same prompts without checks."""
PLACEHOLDER = "FOLDER"


@dataclass
class InitConfig:
    """Whether existing files may be replaced."""

    overwrite: bool = setting(False, "Replace files that exist.")


def start(folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write the starter files.

    Args:
        folder: Created if needed. The recipe's paths start with this path, as given.
        overwrite: Replace existing files.

    Returns:
        The paths of the files.

    Raises:
        RunError: If one of the files exists, in which case nothing is written, or if the folder cannot be written.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file: name a folder, e.g. rgsd init my-rubrics")
    existing = [name for name in FILES if (target / name).exists()]
    if existing and not overwrite:
        raise RunError(
            f"{target} already has {', '.join(existing)}, and nothing was written: choose another folder, or replace "
            "them with --overwrite"
        )
    source = resources.files("rgsd.data") / "bundled" / "starter"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            # The recipe has its paths in double quotes, where YAML escapes backslashes and quotes.
            escaped = target.as_posix().replace("\\", "\\\\").replace('"', '\\"')
            text = (source / name).read_text("utf-8").replace(PLACEHOLDER, escaped)
            (target / name).write_text(text, "utf-8")
    except OSError as error:
        raise RunError(f"cannot write to {target}: {error.strerror}. Choose another folder") from error
    return [target / name for name in FILES]
