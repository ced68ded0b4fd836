"""A run's folder: its settings, provenance, responses, verdicts and results.

RUN/
  config.yaml      every resolved setting; `rgsd train --config RUN/config.yaml` repeats the run
  run.json         status, command, versions, commit, fingerprints of data and model, times
  split.json       ids of the training and held-out prompts
  metrics.jsonl    one line per logged step
  responses.jsonl  every generated response of the evaluation, by arm
  rollouts.jsonl   GRPO: every rollout with its reward and verdicts
  samples.jsonl    one line per judged response of the evaluation (`rgsd.evaluation.samples`)
  development.jsonl  the same of the evaluations during training, with their step (`rgsd.evaluation.development`)
  set-aside.jsonl  lines of both that no longer count: other weights, settings or prompts made them
  references.jsonl references that the base model wrote for the teacher (self_written_references)
  results.json     the table: values with interval, n, seed and provenance
  explanations.jsonl  token maps that `rgsd explain --keep` stored for the report
  adapter/         the trained LoRA adapter, or model/ the whole trained model; tokenizer with it
  checkpoint-N/    a checkpoint to resume from
  control/         the run of the mismatched control (`--control`): the same recipe, with other prompts' rubrics
  report.html      the page that `--report` or `rgsd report` writes

A run that replaces another one (`--overwrite`) leaves it in place until its own start has passed every check. It then
moves the old run to RUN.replaced, and deletes it with its own first checkpoint or result. If it fails before that, the
old run comes back.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import yaml
from filelock import FileLock, Timeout

from rgsd.errors import RunError
from rgsd.files import PARTIAL, atomic_write
from rgsd.progress import say
from rgsd.provenance import command_line, environment
from rgsd.redaction import redact_known, without_credentials
from rgsd.rows import BadRow, check_record, check_row, loads, read_yaml

T = TypeVar("T")

CONFIG, RECORD, SPLIT = "config.yaml", "run.json", "split.json"
METRICS, SAMPLES, RESULTS = "metrics.jsonl", "samples.jsonl", "results.json"
RESPONSES, ROLLOUTS, DEVELOPMENT = "responses.jsonl", "rollouts.jsonl", "development.jsonl"
JUDGE_REQUESTS = "judge-requests.jsonl"
SET_ASIDE, REFERENCES = "set-aside.jsonl", "references.jsonl"
LOCK = ".lock"
ADAPTER, MODEL = "adapter", "model"
TWIN, REPORT = "control", "report.html"

_OF_A_START = frozenset({LOCK, CONFIG, CONFIG + PARTIAL, RECORD + PARTIAL})
"""Files of a start that was killed before it wrote run.json."""

BASELINE, CONDITIONED, TRAINED, CONTROL, CANDIDATE = "baseline", "conditioned", "trained", "control", "candidate"
TRAINED_CONTROL = "trained control"
"""Roles of arms in run.json (`roles`: arm -> role). Baseline: what the others are compared with. Conditioned: the same
model with the rubric or a reference in its prompt. Trained: the trained policy. Control: the same model with another
prompt's rubric, or with nothing. Candidate: any other model of an evaluation. Trained control: the policy of the
mismatched control, whose samples are in the run RUN/control."""
CONTROL_ARM = "control"
"""Name of the mismatched control's policy in the tables of the run that it controls."""

TRAINING_KINDS = ("rgsd", "grpo", "sft")
"""Kinds of runs that train, in run.json; the others evaluate."""


def conditioned_role(privileged_context: str) -> str:
    """The role of a model that sees this privileged context."""
    return CONTROL if privileged_context in ("mismatched", "none") else CONDITIONED


@dataclass
class Run:
    """An open run folder. `meta` is run.json, `settings` is config.yaml.

    Args:
        folder: The run folder.
        meta: Content of run.json.
        settings: Content of config.yaml.
        replaced: Where the replaced run waits, until this run has a checkpoint or a result.
        waiting: Name -> text of the files that cannot be written yet, because the run to replace is still in place;
            None after `begin`.
    """

    folder: Path
    meta: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    replaced: Path | None = None
    waiting: dict[str, str] | None = None

    @property
    def twin(self) -> Path:
        """Where the run of the mismatched twin is, if there is one."""
        return self.folder / TWIN

    @property
    def roles(self) -> dict[str, str]:
        """The roles of the run's arms. Older runs do not store them, and have the arms of `rgsd train`."""
        return self.meta.get("roles") or {"base": BASELINE, "base+rubric": CONDITIONED, "trained": TRAINED}

    def arm_of(self, role: str, among: Iterable[str] | None = None) -> str | None:
        """The first arm with this role, among the given arms if there are any."""
        allowed = self.roles.keys() if among is None else set(among)
        return next((a for a, r in self.roles.items() if r == role and a in allowed), None)

    def begin(self) -> None:
        """Move the run to replace aside, and take its place. Does nothing if there is none.

        Raises:
            RunError: If it cannot be moved; it is then back in its place.
        """
        if self.waiting is None:
            return
        aside = _aside(self.folder)
        try:
            if not _is_run(aside):
                self.folder.rename(aside)
            else:  # the run in the folder is itself a replacement, killed before its first checkpoint
                _delete(self.folder)
            _let_go(self.folder)
            self.folder.mkdir()
            hold(self.folder)
            self.replaced = aside
            for name, text in self.waiting.items():
                atomic_write(self.folder / name, text)
        except OSError as error:
            self._bring_back(aside)
            raise RunError(
                f"{self.folder} cannot be replaced: {error.strerror}. It is unchanged; choose another output_dir"
            ) from error
        self.waiting = None

    def settle(self) -> None:
        """Delete the replaced run, since this run has its first checkpoint or result."""
        if self.replaced is not None:
            _delete(self.replaced)
            self.replaced = None

    def discard(self) -> None:
        """Undo a failed start: bring the replaced run back, and delete a folder without rows. A failed start with rows
        is kept beside the run that came back."""
        if self.waiting is not None:
            _let_go(self.folder)
            self.waiting = None
            return
        if self.replaced is not None:
            if self._has_rows():
                failed = _unused(self.folder.with_name(self.folder.name + ".failed"))
                _let_go(self.folder)
                self.folder.rename(failed)
                say(f"The failed start is kept in {failed}")
            self._bring_back(self.replaced)
            self.replaced = None
            say(f"The previous run is back in {self.folder}")
        elif not self._has_rows() and not self.meta.get("resumed"):
            _let_go(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _has_rows(self) -> bool:
        return any((self.folder / name).exists() for name in (METRICS, SAMPLES, RESPONSES, REFERENCES))

    def _bring_back(self, aside: Path) -> None:
        if not _is_run(aside):
            return
        _let_go(self.folder)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        aside.rename(self.folder)

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.meta |= facts
        self._put(RECORD, json.dumps(self.meta, indent=2, default=str) + "\n")
        if self.meta.get("status") == "finished":
            self.begin()
            self.settle()

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to one of the .jsonl files. They are on the disk when this returns.

        Half a line that a killed process left at the end is removed first.
        """
        self.begin()
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        with (self.folder / name).open("ab+") as file:
            _mend_last_line(file)
            file.write(redact_known(lines).encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, value: Any) -> None:
        """Write one of the .json files, replacing it."""
        self._put(name, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
        if name == RESULTS:
            self.begin()
            self.settle()

    def write_settings(self) -> None:
        """Write config.yaml, without credentials."""
        settings = _plain(without_credentials(self.settings))
        self._put(CONFIG, yaml.safe_dump(settings, sort_keys=True, allow_unicode=True))

    def _put(self, name: str, text: str) -> None:
        if self.waiting is not None:
            self.waiting[name] = text
        else:
            atomic_write(self.folder / name, text)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of the .jsonl files; none if it is missing. Half a line at its end, as a killed process
        leaves it, is skipped, with a notice.

        Raises:
            RunError: For any other line that is not a row; it names the file and the line.
        """
        return list(self.iterate_lines(name))

    @overload
    def iterate_lines(self, name: str) -> Iterator[dict[str, Any]]: ...
    @overload
    def iterate_lines(self, name: str, parse: Callable[[Mapping[str, Any]], T]) -> Iterator[T]: ...
    def iterate_lines(self, name: str, parse: Callable[[Mapping[str, Any]], Any] | None = None) -> Iterator[Any]:
        """Like `read_lines`, one row at a time.

        Args:
            name: The file.
            parse: Turns a row into a value of its own type; raises BadRow if it cannot.

        Raises:
            RunError: Like `read_lines`, when the line is reached.
        """
        path = self.folder / name
        if self.waiting is not None or not path.is_file():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = _row(line, name)
                if isinstance(row, str) and not line.endswith(b"\n"):
                    _report_torn_line(path, number)
                    return
                try:
                    if isinstance(row, str):
                        raise BadRow(row)
                    check_row(row, name)
                    value = row if parse is None else parse(row)
                except BadRow as error:
                    raise RunError(
                        f"{path}, line {number}: got {_clipped(line)}, which is not a row of this file ({error}); "
                        "expected one JSON object per line, as rgsd writes it. Remove that line, or restore the file"
                    ) from error
                yield value

    def set_aside(self, name: str, is_stale: Callable[[dict[str, Any]], bool]) -> int:
        """Move rows of one of the .jsonl files to set-aside.jsonl, where nothing reads them; returns their number."""
        valid, stale = [], []
        for row in self.read_lines(name):
            (stale if is_stale(row) else valid).append(row)
        if stale:
            # Copied before they are removed: a kill between the two steps duplicates rows, but loses none.
            self.append(SET_ASIDE, [{"file": name, "row": row} for row in stale])
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in valid)
            atomic_write(self.folder / name, text.encode("utf-8", "surrogatepass"))
        return len(stale)


def create_run(
    folder: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False
) -> Run:
    """Open a new run folder, or an unfinished one with `resume`.

    With `overwrite`, the folder's run stays in place until the new run writes a row or a result, or calls `begin`.
    Until the new run has a checkpoint or a result, `discard` brings the old one back.

    Raises:
        RunError: If the folder holds a run and neither `overwrite` nor `resume` is set, if it holds something else, or
            if it cannot be written.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise RunError(f"output_dir must be a folder, but {path} is a file")
    if _is_run(path) and (resume or overwrite):
        hold(path)
    elif not _is_run(path):
        _bring_back_replaced(path)
    replaced = _aside(path) if _is_run(_aside(path)) else None
    if _is_run(path) and resume:
        run = open_run(path)
        run.settings, run.replaced = dict(settings), replaced
        run.note(status="running", resumed=[*run.meta.get("resumed", []), _now()])
        return run
    if _is_run(path) and not overwrite:
        status = open_run(path).meta.get("status")
        raise RunError(
            f"{path} holds a run ({status}): choose another output_dir, replace the run with --overwrite, or continue "
            "it with --resume_from_checkpoint"
        )
    run = Run(path, {}, dict(settings), replaced, waiting={})
    run.write_settings()
    run.note(status="running", started=_now(), command=command_line(), **environment())
    if not _is_run(path):
        _start(run)
    return run


def _start(run: Run) -> None:
    """Create the folder of a run that replaces none."""
    path = run.folder
    was_there = path.is_dir()
    if was_there and not _is_free(path):
        raise RunError(f"{path} holds files that do not belong to a run: choose another output_dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        hold(path)
        for name, text in (run.waiting or {}).items():
            atomic_write(path / name, text)
    except OSError as error:
        _let_go(path)
        if path.is_dir() and not was_there:
            shutil.rmtree(path, ignore_errors=True)
        raise RunError(
            f"cannot write the run folder {path}: {error.strerror}. Make room, or choose another output_dir"
        ) from error
    run.waiting = None


def _is_run(path: Path) -> bool:
    return (path / RECORD).is_file()


def _is_free(path: Path) -> bool:
    """Whether a folder is empty, or holds only a start that was killed before it wrote run.json."""
    names = {p.name for p in path.iterdir()}
    # A config.yaml without our lock file belongs to somebody else.
    return not names or (LOCK in names and names <= _OF_A_START)


def _aside(path: Path) -> Path:
    """Where a replaced run waits."""
    return path.with_name(path.name + ".replaced")


def _unused(path: Path) -> Path:
    """The path, with a number appended if it exists."""
    unused, number = path, 2
    while unused.exists():
        unused, number = path.with_name(f"{path.name}-{number}"), number + 1
    return unused


def _bring_back_replaced(path: Path) -> None:
    """Undo a replacement that was killed before it wrote its own run.json."""
    aside = _aside(path)
    if not _is_run(aside) or (path.is_dir() and not _is_free(path)):
        return
    hold(aside)
    if path.is_dir():
        hold(path)
        _let_go(path)
        shutil.rmtree(path)
    _let_go(aside)
    aside.rename(path)


def _delete(path: Path) -> None:
    """Remove a folder. It is renamed first, so a kill never leaves half a run under a run's name."""
    doomed = _unused(path.with_name(f".{path.name}.deleted"))
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _row(line: bytes, name: str = "") -> dict[str, Any] | str:
    """The row of a line, or why the line is not a row."""
    try:
        row = loads(line, lenient=name == METRICS)
    except BadRow as error:
        return str(error)
    return row if isinstance(row, dict) else f"expected an object, got {type(row).__name__}"


def _clipped(line: bytes, most: int = 60) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= most else text[:most] + " ...")


_REPORTED: set[tuple[Path, int]] = set()


def _report_torn_line(path: Path, number: int) -> None:
    """Say once that the last line of a file is incomplete, although several readers may meet it."""
    if (path, number) not in _REPORTED:
        _REPORTED.add((path, number))
        say(f"{path}: skipped line {number}, the last one, which a killed process left half written")


def open_run(folder: str | Path, *, finished: bool = False) -> Run:
    """Read a run folder.

    Raises:
        RunError: If it is not a run folder, or the run is not finished and `finished` is set.
    """
    path = Path(folder)
    if not (path / RECORD).is_file():
        raise RunError(f"{path} is not a run folder (it has no {RECORD}): pass the folder that `rgsd train` printed")
    try:
        meta = loads((path / RECORD).read_text("utf-8"))
        settings = read_yaml(path / CONFIG)
        check_record(meta, settings)
    except RecursionError as error:
        raise RunError(f"{path} cannot be read as a run: {CONFIG} is nested too deep") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read as a run: {error}") from error
    if finished and meta.get("status") != "finished":
        raise RunError(
            f"the run in {path} must be finished, its status is {meta.get('status')!r}: continue it first with "
            "`rgsd train --config ... --resume_from_checkpoint`"
        )
    return Run(path, meta, settings or {})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run that holds one object; {} if there is none.

    Raises:
        RunError: If it is damaged.
    """
    try:
        value = loads(path.read_bytes()) if path.exists() else {}
        if not isinstance(value, dict):
            raise BadRow(f"expected an object, got {type(value).__name__}")
    except (OSError, BadRow) as error:
        raise RunError(
            f"cannot read {path} ({error}): restore it, or delete it and repeat the command that wrote it"
        ) from error
    return value


_HELD: dict[Path, FileLock] = {}
"""Locks of the run folders that this process writes to. The system releases them when the process ends, even by
SIGKILL, so a killed run never blocks the next one."""


def hold(path: Path) -> None:
    """Make this process the only writer of a run folder.

    Raises:
        RunError: If another process is writing to it.
    """
    if path.resolve() in _HELD:
        return
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = (path / LOCK).read_text("utf-8").strip() or "unknown"
        raise RunError(
            f"another process (pid {holder}) is writing to {path}: wait until it ends, or choose another output_dir"
        ) from error
    (path / LOCK).write_text(f"{os.getpid()}\n", "utf-8")
    _HELD[path.resolve()] = lock


def _let_go(path: Path) -> None:
    """Give up the lock of a run folder, if this process holds it."""
    if lock := _HELD.pop(path.resolve(), None):
        lock.release(force=True)


def _mend_last_line(file: IO[bytes]) -> None:
    """Move to the end of the last whole line: remove half a line, and add the newline that a whole one lacks."""
    # Reads backwards in blocks: the file may be large, and its last line is short.
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
        file.seek(position)
        is_whole = isinstance(_row(file.read()), dict)
        if is_whole:
            file.write(b"\n")
        else:
            file.truncate(position)
    file.seek(0, os.SEEK_END)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _plain(value: Any) -> Any:
    """The value in YAML's safe types."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    return (
        value if value is None or isinstance(value, str | int | float | bool) else str(getattr(value, "value", value))
    )
