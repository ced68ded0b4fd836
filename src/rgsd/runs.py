"""A run's folder: what was asked, on what, with what, and what came of it.

RUN/
  config.yaml      every setting, resolved; `rgsd train --config RUN/config.yaml` repeats the run
  run.json         status, command, versions, commit, fingerprints of data and model, times
  split.json       ids of the training and held-out prompts
  metrics.jsonl    one line a logged step
  responses.jsonl  every generated response of the evaluation, by arm
  rollouts.jsonl   GRPO: every rollout with its reward and verdicts
  samples.jsonl    one line a response of the evaluation, with its verdicts
  results.json     the table: rows with value, interval, n, seed and provenance
  explanations.jsonl  token maps that `rgsd explain --keep true` left, for the report
  adapter/         the trained LoRA adapter, or model/ the whole trained model; tokenizer with it
  checkpoint-N/    to resume from
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

try:
    import fcntl
except ImportError:  # no advisory locks on this system: keep to one process a run
    fcntl = None

from rgsd.errors import RunError
from rgsd.redaction import redact_arguments, redact_known, without_credentials

CONFIG, RECORD, SPLIT = "config.yaml", "run.json", "split.json"
METRICS, SAMPLES, RESULTS = "metrics.jsonl", "samples.jsonl", "results.json"
RESPONSES, ROLLOUTS = "responses.jsonl", "rollouts.jsonl"
LOCK = ".lock"
ADAPTER, MODEL = "adapter", "model"
PACKAGES = ("rgsd", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


@dataclass
class Run:
    """An open run folder. `meta` is run.json, `settings` is config.yaml."""

    folder: Path
    meta: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.meta |= facts
        _write(self.folder / RECORD, json.dumps(self.meta, indent=2, default=str) + "\n")

    def discard(self) -> None:
        """Remove the folder of a run that never got as far as a response or a step."""
        if not any((self.folder / name).exists() for name in (METRICS, SAMPLES)) and not self.meta.get("resumed"):
            _let_go(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to one of the .jsonl files, on the disk when this returns. Half a line that a killed process left
        at the end is cut off first."""
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        with (self.folder / name).open("ab+") as file:
            _cut_torn_line(file)
            file.write(redact_known(lines).encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, value: Any) -> None:
        """Write one of the .json files whole."""
        _write(self.folder / name, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of the .jsonl files; none when it is not there. Half a line at its end, as a killed process
        leaves it, is not a row.

        Raises:
            RunError: for a broken line before the last.
        """
        path = self.folder / name
        if not path.is_file():
            return []
        rows = []
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                rows.append(json.loads(line.decode("utf-8", "surrogatepass")))
            except ValueError as error:
                raise RunError(f"{path}, line {number} is not a row ({error}): remove that line, and go on") from error
        return rows


def create_run(
    folder: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False
) -> Run:
    """Open a new run folder, or with `resume` an unfinished one.

    Raises:
        RunError: when the folder holds a run and neither `overwrite` nor `resume` was given, when it holds something
            else, or when it cannot be written.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file: output_dir must be a folder")
    if (path / RECORD).is_file() and (resume or overwrite):
        hold(path)
    is_run = (path / RECORD).is_file()
    if path.is_dir() and any(path.iterdir()) and not is_run:
        raise RunError(f"{path} holds files that are not a run's: choose another output_dir")
    if is_run and resume:
        run = open_run(path)
        run.settings = dict(settings)
        run.note(status="running", resumed=[*run.meta.get("resumed", []), _now()])
        return run
    if is_run and not overwrite:
        status = open_run(path).meta.get("status")
        raise RunError(
            f"{path} holds a run ({status}): choose another output_dir, "
            "or say --overwrite to replace it, or --resume_from_checkpoint to go on with it"
        )
    if is_run:
        _let_go(path)
        shutil.rmtree(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        hold(path)
        _write(path / CONFIG, yaml.safe_dump(_plain(without_credentials(settings)), sort_keys=True, allow_unicode=True))
    except OSError as error:
        raise RunError(f"cannot write the run folder {path}: {error.strerror}. Choose another output_dir") from error
    run = Run(path, {}, dict(settings))
    run.note(status="running", started=_now(), command=_command(), **environment())
    return run


def open_run(folder: str | Path, *, finished: bool = False) -> Run:
    """Read a run folder.

    Raises:
        RunError: when it is not one, or `finished` is wanted and it is not.
    """
    path = Path(folder)
    if not (path / RECORD).is_file():
        raise RunError(f"{path} is not a run folder (it has no {RECORD}): give the folder that `rgsd train` printed")
    try:
        meta = json.loads((path / RECORD).read_text("utf-8"))
        settings = yaml.safe_load((path / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read as a run: {error}") from error
    if finished and meta.get("status") != "finished":
        raise RunError(
            f"the run in {path} is {meta.get('status')!r}, not finished: "
            "go on with it (`rgsd train --config ... --resume_from_checkpoint true`) first"
        )
    return Run(path, meta, settings)


_HELD: dict[Path, IO[str]] = {}
"""The run folders that this process writes to. A lock goes with its process, however that ends."""


def hold(path: Path) -> None:
    """Make this process the only one that writes to a run folder.

    Raises:
        RunError: when another process does.
    """
    if fcntl is None or path.resolve() in _HELD:
        return
    file = (path / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise RunError(
            f"another process (pid {holder}) is writing to {path}: wait until it has ended, or choose another "
            "output_dir"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _HELD[path.resolve()] = file


def _let_go(path: Path) -> None:
    file = _HELD.pop(path.resolve(), None)
    if file is not None:
        file.close()


def _cut_torn_line(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    position = end
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        file.truncate(position)
    file.seek(0, os.SEEK_END)


def environment() -> dict[str, Any]:
    """Versions, machine and commit, as they are now."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        **_commit(),
    }


def _commit() -> dict[str, Any]:
    """The commit of the code that runs, when it runs from a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(status.strip())}


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *redact_arguments(sys.argv[1:])])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _plain(value: Any) -> Any:
    """The value as YAML's safe types."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    return (
        value if value is None or isinstance(value, str | int | float | bool) else str(getattr(value, "value", value))
    )


def write_json(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write a table whole, where a person wants it.

    Raises:
        RunError: when the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        Path(path).write_text(redact_known(text), "utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}): choose another --output") from error


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(redact_known(text), "utf-8")
    partial.replace(path)
