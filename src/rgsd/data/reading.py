"""Read raw rows, with their places, from files, folders and the hub. Nothing here knows a schema.

A row that cannot be read is yielded with its error, so that it is counted. A file that cannot be read raises a
`DataError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from rgsd.errors import DataError
from rgsd.rows import unique_keys

SUFFIXES = (".json", ".jsonl", ".parquet")
"""Suffixes of files with rows."""

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[\w./=-]+))?")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row with its place, and its value or the reason why it could not be read."""

    file: str
    row: int
    value: Any = None
    error: str | None = None


def is_hub_id(source: str) -> bool:
    """Whether a source has the form of a hub id: `owner/name` or `owner/name:path/in/the/repository.parquet`."""
    return _HUB_ID.fullmatch(source) is not None


def local_files(path: Path) -> list[Path]:
    """The files to read at a path: the file itself, or a folder's files in alphabetical order.

    Raises:
        DataError: If no file has a known suffix.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
        if files:
            return files
        names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DataError(f"{path}: got a folder with {names}, expected {' or '.join(SUFFIXES)} files: name another one")
    if path.suffix.lower() not in SUFFIXES:
        got = f"a file with the suffix {path.suffix!r}"
        raise DataError(f"{path}: got {got}, expected {' or '.join(SUFFIXES)}: convert or rename the file")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: got a pipe or device, expected a regular file: write the rows to a file first")
    return [path]


def file_rows(path: Traversable) -> Iterator[RawRow]:
    """Read the rows of one file.

    Raises:
        DataError: If the file cannot be read or has no rows.
    """
    suffix = Path(path.name).suffix.lower()
    reader = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[suffix]
    count = 0
    try:
        for count, row in enumerate(reader(path), 1):  # noqa: B007 - the count is used after the loop
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot read the file ({error}): check its name and permissions") from error
    if not count:
        raise DataError(f"{path}: got a file without rows, expected at least one: remove the file, or add rows")


def loads(text: str) -> Any:
    """Parse JSON, and refuse an object with a repeated key, whose first value Python would drop silently.

    Raises:
        ValueError: If the text is not JSON, or has a repeated key.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _jsonl_rows(path: Traversable) -> Iterator[RawRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _line(path.name, number, line)


def _line(file: str, number: int, line: bytes) -> RawRow:
    try:
        return RawRow(file, number, value=loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        got = f"got bytes that are not UTF-8 (at byte {error.start + 1} of the line), expected UTF-8 text"
        return RawRow(file, number, error=f"{got}: save the file as UTF-8, or remove the line")
    except ValueError as error:
        got = f"got a line that is not JSON ({error}), expected one JSON object per line"
        return RawRow(file, number, error=f"{got}: correct the line, or remove it")


def _json_rows(path: Traversable) -> Iterator[RawRow]:
    data = path.read_bytes().removeprefix(_BOM)
    if not data.strip():
        return
    try:
        value = loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8"
        raise DataError(f"{path}: got bytes that are not UTF-8 (at byte {error.start + 1}): {remedy}") from None
    except ValueError as error:
        remedy = "correct it, or rename it to .jsonl if it has one object per line"
        raise DataError(f"{path}: got a file that is not JSON ({error}), expected a list of rows: {remedy}") from None
    for number, row in enumerate(_row_list(value, path), 1):
        yield RawRow(path.name, number, value=row)


def _row_list(value: Any, path: Traversable) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):
        # A wrapper such as {"data": [...]} has exactly one list. A single row has lists too, but also a prompt.
        lists = {key: v for key, v in value.items() if isinstance(v, list)}
        if len(lists) == 1 and not {"prompt", "question", "query", "prompt_0", "conversation"} & set(value):
            return next(iter(lists.values()))
        got = f"one object with the keys {', '.join(list(value)[:8])}"
    else:
        got = f"a value of type {type(value).__name__}"
    expected = "a list of rows, or an object with one list of rows in it"
    raise DataError(f"{path}: got {got}, expected {expected}: wrap the rows in [ ]")


def _parquet_rows(path: Traversable) -> Iterator[RawRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: parquet files need pyarrow ({error}): pip install pyarrow") from error
    number = 0
    try:
        # Small batches, because rows can be large: RubricHub's hold each rubric three times.
        for batch in pq.ParquetFile(str(path)).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(path.name, number, value=row)
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot read the file as parquet ({error}): download it again") from error


def hub_rows(
    source: str, split: str | None, config: str | None, load_dataset: Callable[..., Any] | None = None
) -> Iterator[RawRow]:
    """Read the rows of a dataset on the hub.

    Args:
        source: `owner/name`, or `owner/name:path` for one file of the repository.
        split: Name of the split; optional if there is only one.
        config: Name of the configuration; optional if there is only one.
        load_dataset: Function that loads the dataset; `datasets.load_dataset` by default.

    Raises:
        DataError: If the dataset cannot be loaded, or has several splits or configurations and none is named.
    """
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None:
        raise DataError(f"got {source!r}, expected a hub id, owner/name or owner/name:path/of/file.parquet")
    data = _fetch(hub_id["name"], hub_id["file"], split, config, load_dataset or _load_dataset())
    file = source
    if isinstance(data, Mapping):
        if len(data) != 1:
            raise DataError(f"{source}: got the splits {', '.join(map(str, data))}, expected one: pass split=")
        split, data = next(iter(data.items()))
    if split:
        file = f"{source}/{split}"
    number = 0
    for number, row in enumerate(data, 1):
        yield RawRow(file, number, value=row)
    if not number:
        raise DataError(f"{file}: got a dataset without rows, expected at least one: choose another split")


def _load_dataset() -> Callable[..., Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"hub datasets need the datasets library ({error}): pip install datasets") from error
    return load_dataset


def _library_errors() -> tuple[type[Exception], ...]:
    try:
        from datasets.exceptions import DatasetsError
    except ImportError:
        return ()
    return (DatasetsError,)


def _fetch(name: str, file: str | None, split: str | None, config: str | None, load_dataset: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"name": config, "split": split}
    if file:
        options["data_files"] = file
    try:
        return load_dataset(name, **{key: value for key, value in options.items() if value is not None})
    # OSError: no such dataset, no network, or no access. ValueError: no such split or configuration.
    except (OSError, ValueError, *_library_errors()) as error:
        remedy = "check the id, the split and the configuration, or download the file and name its path"
        raise DataError(f"{name}: cannot load the dataset from the hub ({error}): {remedy}") from error
