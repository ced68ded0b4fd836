"""Checkpoint folders: how they are written, verified and found again.

A checkpoint is written to OUTPUT_DIR/.saving, flushed to disk, listed in a manifest, and only then renamed to
checkpoint-N. A process can be killed at any moment: a folder named checkpoint-N is always complete. The manifest holds
the size and SHA-256 of every file, so later damage is detected, and the damaged checkpoint is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock

from rgsd.errors import RunError
from rgsd.files import atomic_write
from rgsd.progress import say
from rgsd.redaction import redact_known
from rgsd.rows import BadRow, loads
from rgsd.runs import RECORD

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
SAVING = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")

# --- Reading ------------------------------------------------------------------------------------------------------


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step after which a checkpoint was saved, read from its name.

    Raises:
        RunError: If the folder is not named checkpoint-N.
    """
    match = _NAME.fullmatch(Path(checkpoint).name)
    if match is None:
        raise RunError(f"{checkpoint} is not a checkpoint: expected a folder named checkpoint-N")
    return int(match.group(1))


def problem_of(checkpoint: str | Path, *, in_full: bool = True) -> str | None:
    """The reason why a checkpoint is not complete, or None if it is.

    Args:
        checkpoint: Its folder.
        in_full: Also compare digests, which reads every byte (about 1.5 GB/s). Otherwise only names and sizes count.
    """
    folder = Path(checkpoint)
    if folder.is_symlink():
        # A link could point outside the run, at files that somebody else may change.
        return "it is a symbolic link; copy the checkpoint into the run folder instead"
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        return manifest
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    for name, (size, digest) in manifest.files.items():
        path = present.pop(name, None)
        if path is None:
            return f"{name} is missing"
        if path.is_symlink() or not path.is_file():
            return f"{name} is not a regular file"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if in_full and _digest(path) != digest:
            return f"{name} does not match its SHA-256 digest"
    # transformers picks files by name, so an added file could be loaded in place of a listed one.
    extra = sorted(name for name in present if name != MANIFEST and not name.startswith("."))
    return f"{extra[0]} was added after the checkpoint was saved" if extra else None


@dataclass(frozen=True, slots=True)
class _Manifest:
    """A checkpoint's manifest.

    Args:
        files: (bytes, SHA-256) of each file, by name.
        run: The id of the run that saved it, or None for a trainer without a run.json.
    """

    files: dict[str, tuple[int, str]]
    run: str | None


def _manifest(folder: Path) -> _Manifest | str:
    """A checkpoint's manifest, or the reason why it cannot be used."""
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    sizes = content.get("files") if isinstance(content, dict) else None
    if not isinstance(sizes, dict) or not sizes or not all(type(size) is int for size in sizes.values()):
        return f"its {MANIFEST} cannot be read (no file sizes)"
    digests = content.get("sha256")
    if not isinstance(digests, dict) or digests.keys() != sizes.keys():
        return f"its {MANIFEST} lacks the digest of a file; an earlier version of rgsd saved it"
    if content.get("step") != step_of(folder):
        return f"its {MANIFEST} is of step {content.get('step')}"
    run = content.get("run")
    return _Manifest({n: (sizes[n], str(digests[n])) for n in sizes}, None if run is None else str(run))


_DIGESTS: dict[tuple[Path, int, int, int], str] = {}
"""Digests by path, size, modification time and inode, so that a process reads each file only once."""


def _digest(path: Path) -> str:
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
    if key not in _DIGESTS:
        with path.open("rb") as file:
            _DIGESTS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _DIGESTS[key]


def run_id(output_dir: str | Path) -> str | None:
    """The id of the run in a folder, or None for a trainer started from Python, which has no run.json."""
    try:
        record = json.loads((Path(output_dir) / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    identity = record.get("id") if isinstance(record, dict) else None
    return None if identity is None else str(identity)


def _problem_in_run(checkpoint: Path, in_full: bool = True) -> str | None:
    """Like `problem_of`, for a checkpoint inside a run folder: it must also belong to that run."""
    problem = problem_of(checkpoint, in_full=in_full)
    expected = run_id(checkpoint.parent)
    if problem is None and expected is not None:
        manifest = _manifest(checkpoint)
        if isinstance(manifest, _Manifest) and manifest.run != expected:
            return f"it belongs to run {manifest.run}, this is run {expected}"
    return problem


# --- Choosing -----------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """All folders named checkpoint-N, complete or not, latest step first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(folders, key=step_of, reverse=True)


def last_complete(output_dir: str | Path, tell: Callable[[str], None] = say, *, in_full: bool = True) -> Path | None:
    """The latest complete checkpoint of a run, or None.

    Args:
        output_dir: The run folder.
        tell: Called with a line for each later checkpoint that is skipped.
        in_full: As in `problem_of`.
    """
    for candidate in list_checkpoints(output_dir):
        problem = _problem_in_run(candidate, in_full)
        if problem is None:
            return candidate
        tell(f"Skipping {candidate.name}: {problem}")
    return None


def find_checkpoint(
    output_dir: str | Path, wanted: str | bool | None, tell: Callable[[str], None] = say
) -> Path | None:
    """The checkpoint that a value of `resume_from_checkpoint` refers to.

    Args:
        output_dir: The run folder.
        wanted: A path, or true for the last complete checkpoint, or false for none. Strings of these count too.
        tell: Called with a line for each checkpoint that is skipped or cannot be verified.

    Returns:
        Its folder, or None if none is wanted, or if the last one is wanted and there is none yet.

    Raises:
        RunError: If the given path is not a complete checkpoint.
    """
    if wanted is None or wanted is False or (isinstance(wanted, str) and wanted.lower() in ("", "false", "none")):
        return None
    if wanted is True or str(wanted).lower() == "true":
        return last_complete(output_dir, tell)
    path = Path(wanted)
    if not path.is_dir():
        raise RunError(f"there is no checkpoint {wanted!r}: give a checkpoint-N folder, or true for the last one")
    step_of(path)
    is_own = path.parent.resolve() == Path(output_dir).resolve()
    problem = _problem_in_run(path) if is_own else problem_of(path)
    if problem is None:
        return path
    if path.is_symlink() or (path / MANIFEST).exists():
        raise RunError(
            f"{path} is damaged: {problem}. Resume from another checkpoint, or use --resume_from_checkpoint true for "
            "the last complete one"
        )
    # A checkpoint of plain transformers or TRL has no manifest, and is as usable as it always was.
    tell(f"{path.name} was not saved by rgsd, so it cannot be verified: {problem}")
    return path


def agree_on_checkpoint(
    output_dir: str | Path, wanted: str | bool | None, tell: Callable[[str], None] = say
) -> Path | None:
    """Like `find_checkpoint`, with the same result in every process. Every process must call it.

    The main process chooses and reads the digests; the others only make sure that they see the same folder.

    Raises:
        RunError: In every process, if the main process finds no usable checkpoint, or another does not see it.
    """
    state = PartialState()
    if state.num_processes == 1:
        return find_checkpoint(output_dir, wanted, tell)
    # An exception in one process would leave the others waiting forever, so it travels as text.
    message: list[Any] = [None, None]
    if state.is_main_process:
        try:
            message[0] = find_checkpoint(output_dir, wanted, tell)
        except RunError as error:
            message[1] = str(error)
    broadcast_object_list(message)
    chosen, problem = message
    if problem is None and chosen is not None and not state.is_main_process:
        local_problem = None if chosen.is_dir() else f"there is no {chosen}"
        if local_problem is None and (chosen / MANIFEST).exists():
            local_problem = problem_of(chosen, in_full=False)
        if local_problem is not None:
            problem = f"process {state.process_index} cannot resume from {chosen.name}: {local_problem}"
    problems = [p for p in gather_object([problem]) if p is not None]
    if problems:
        raise RunError(problems[0])
    return chosen


# --- Writing ------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, **facts: Any) -> None:
    """Flush a checkpoint's files to disk, and list their sizes and digests in its manifest, together with `facts`."""
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    files.pop(MANIFEST, None)
    for name in files:
        flush_to_disk(folder / name)
    digests = {name: _digest(folder / name) for name in files}  # cheap: the page cache still holds what was written
    manifest = {**facts, "files": files, "sha256": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    flush_to_disk(folder / MANIFEST)
    flush_to_disk(folder)


def put_in_place(staged: Path, target: Path, **facts: Any) -> None:
    """Give a staged checkpoint its manifest and its final name, replacing an older checkpoint of that step."""
    write_manifest(staged, **facts)
    old = target.with_name(f".{target.name}.old")
    # A resumed run reaches a step a second time; a damaged checkpoint of that step may still be there. rename() cannot
    # replace a folder that is not empty, so the old one steps aside first.
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    staged.rename(target)
    flush_to_disk(target.parent)  # a rename is durable only once the parent folder is
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(staged.parent, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def trim_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Atomically drop the rows of a .jsonl file that `keep` refuses, and an incomplete last line.

    Returns:
        The number of rows dropped.

    Raises:
        RunError: If a line is damaged, or lacks what `keep` looks for.
    """
    if not path.is_file():
        return 0
    kept, dropped = [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            is_dropped = bool(line) and not keep(loads(line, lenient=True))
        except (BadRow, KeyError, TypeError) as error:
            raise RunError(
                f"{path}, line {number}: {error!r}: the line is damaged. Remove it, then run the same command again"
            ) from error
        if is_dropped:
            dropped += 1
        else:
            kept.append(line + b"\n")
    atomic_write(path, b"".join(kept))
    return dropped


def append_together(path: Path, lines: str) -> None:
    """Append whole lines to a file that several processes write to."""
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("ab") as file:
        file.write(redact_known(lines).encode("utf-8", "surrogatepass"))
