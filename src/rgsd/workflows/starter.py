"""`rgsd init`: a commented recipe and rubrics of one's own to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rgsd.errors import RunError
from rgsd.settings import setting

FILES = ("recipe.yaml", "rubrics.jsonl", "rubrics-judged.jsonl")
"""What is written: the recipe; five prompts whose criteria have checks; the same without, for an LLM judge."""
PLACEHOLDER = "FOLDER"


@dataclass
class InitConfig:
    """Whether existing files may be replaced."""

    overwrite: bool = setting(False, "Replace files that exist.")


def start(folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write the files.

    Args:
        folder: made where it is not there; the recipe's paths begin with it as it is given.
        overwrite: replace files that are there.

    Returns:
        their paths.

    Raises:
        RunError: when one of them is there already, and nothing is written; or when the folder cannot be written.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file: name a folder, e.g. rgsd init my-rubrics")
    there = [name for name in FILES if (target / name).exists()]
    if there and not overwrite:
        raise RunError(
            f"{target} has {', '.join(there)} already, and nothing was written: choose another folder, or say "
            "--overwrite true to replace them"
        )
    source = resources.files("rgsd.data") / "bundled" / "starter"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            # As YAML writes it between double quotes.
            escaped = target.as_posix().replace("\\", "\\\\").replace('"', '\\"')
            text = (source / name).read_text("utf-8").replace(PLACEHOLDER, escaped)
            (target / name).write_text(text, "utf-8")
    except OSError as error:
        raise RunError(f"cannot write into {target}: {error.strerror}. Choose another folder") from error
    return [target / name for name in FILES]
