"""Load rows as examples: detect the schema, parse every row, and list the rows that cannot be used."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from itertools import chain, islice
from pathlib import Path

from rgsd.data import reading
from rgsd.data.reading import RawRow
from rgsd.data.schemas import SCHEMAS, jsonl
from rgsd.data.schemas.fields import FieldError, Row, Where, describe
from rgsd.errors import DataError
from rgsd.rubrics import Example

SAMPLED_ROWS = 20
"""Rows that decide the schema."""

LISTED_PROBLEMS = 20
"""Problems to list in the error of a load."""

BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used, and why.

    Args:
        file: Name of the file, or the hub id.
        row: Number of the row, counted from 1; in a .jsonl file, its line.
        field: Path of the field, for example `rubric[2].weight`; empty for the row as a whole.
        message: What was got, what was expected, and what to do.
    """

    file: str
    row: int
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}, row {self.row}"
        return f"{place}, field {self.field}: {self.message}" if self.field else f"{place}: {self.message}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of a load. No row is lost: `n_rows == len(examples) + len(problems)`.

    Args:
        examples: The examples, in the order of the rows.
        schema: Name of the schema.
        n_rows: Number of rows, usable or not.
        problems: One per row that was skipped.
        files: Names of the files, in order.
    """

    examples: tuple[Example, ...] = field(repr=False)
    schema: str
    n_rows: int
    problems: tuple[Problem, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Source:
    rows: Iterator[RawRow]
    files: tuple[str, ...]


def load(
    source: str | Path,
    schema: str | None = None,
    split: str | None = None,
    config: str | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
) -> Loaded:
    """Read a dataset.

    Args:
        source: A .json file (a list of rows, or an object with one list), a .jsonl or .parquet file, a folder of such
            files (read in alphabetical order), a hub id `owner/name` or `owner/name:path/of/file.parquet`, `"bundled"`,
            or `"bundled:medicine"`.
        schema: A name in `SCHEMAS`; by default detected from the rows' keys.
        split: Split of a hub dataset.
        config: Configuration of a hub dataset.
        skip_bad_rows: Skip rows that cannot be used and list them in `Loaded.problems`, instead of raising an error.
        limit: Read at most this many rows, usable or not.

    Raises:
        DataError: If the source cannot be read, its schema cannot be detected, or a row cannot be used; with
            `skip_bad_rows`, if no row can.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise DataError(f"got limit={limit!r}, expected a whole number of at least 1: leave it out to read every row")
    if schema is not None and schema not in SCHEMAS:
        raise DataError(_unknown_schema(schema))
    opened = _open(source, split, config)
    rows = islice(opened.rows, limit) if limit else opened.rows
    sample, rows = _peek(rows)
    reader = _RowReader(schema or _detect(source, sample), check_others=schema is None)
    for raw in rows:
        reader.add(raw)
    return _finished(source, reader, opened.files, skip_bad_rows)


def bundled(domain: str | None = None) -> Loaded:
    """Load the data that comes with the package.

    Args:
        domain: One of its domains, for example "medicine"; all of them by default.

    Raises:
        DataError: If there is no such domain.
    """
    return load(BUNDLED if domain is None else f"{BUNDLED}:{domain}", schema=jsonl.NAME)


def _finished(source: str | Path, reader: _RowReader, files: tuple[str, ...], skip_bad_rows: bool) -> Loaded:
    problems = reader.problems
    if problems and not (skip_bad_rows and reader.examples):
        raise DataError(_bad_rows(source, problems, reader.n_rows, skip_bad_rows))
    return Loaded(
        examples=tuple(reader.examples),
        schema=reader.name,
        n_rows=reader.n_rows,
        problems=tuple(problems),
        files=files,
    )


def _bad_rows(source: str | Path, problems: list[Problem], n_rows: int, skip_bad_rows: bool) -> str:
    listed = "\n".join(f"  {problem}" for problem in problems[:LISTED_PROBLEMS])
    more = len(problems) - LISTED_PROBLEMS
    rest = f"\n  ... and {more} more" if more > 0 else ""
    remedy = "correct the rows, or skip and list them with skip_bad_rows=True"
    if skip_bad_rows:
        remedy = "no usable row is left: correct the rows, or name another schema"
    return f"{source}: {len(problems)} of {n_rows} rows cannot be used:\n{listed}{rest}\n{remedy}"


class _RowReader:
    """Parses rows one by one, and collects examples and problems."""

    def __init__(self, name: str, *, check_others: bool) -> None:
        self.name = name
        self.n_rows = 0
        self.examples: list[Example] = []
        self.problems: list[Problem] = []
        self._schema = SCHEMAS[name]
        self._others = [s for s in SCHEMAS.values() if name != s.NAME] if check_others else []
        self._places: dict[str, str] = {}

    def add(self, raw: RawRow) -> None:
        """Parse a row. A bad row becomes a problem."""
        self.n_rows += 1
        try:
            self.examples.append(self._parse(raw))
        except FieldError as error:
            self.problems.append(Problem(raw.file, raw.row, error.field, error.message))

    def _parse(self, raw: RawRow) -> Example:
        if raw.error is not None:
            raise FieldError("", raw.error)
        self._check_schema(raw.value)
        try:
            example = self._schema.parse(raw.value, Where(raw.file, raw.row))
        except RecursionError:
            raise FieldError("", "got a row that is nested too deeply, expected a flat row: flatten it") from None
        except DataError as error:
            raise FieldError("", str(error)) from None
        self._check_id(example.id, f"{raw.file}, row {raw.row}")
        return example

    def _check_schema(self, row: object) -> None:
        """Refuse a row of another schema. This schema might parse it partly, and give a wrong example."""
        if not isinstance(row, Mapping) or self._schema.matches(row):
            return
        for other in self._others:
            if other.matches(row):
                expected = f"one of schema {self.name!r} like the rows before it"
                remedy = f"move it to a separate file, or pass schema={self.name!r} to read it anyway"
                raise FieldError("", f"got a row of schema {other.NAME!r}, expected {expected}: {remedy}")

    def _check_id(self, id_: str, place: str) -> None:
        first = self._places.setdefault(id_, place)
        if first != place:
            message = f"got the id {id_!r}, which {first} already has, expected unique ids"
            raise FieldError("id", f"{message}: rename one of them, or remove the row")


def _peek(rows: Iterator[RawRow]) -> tuple[list[Row], Iterator[RawRow]]:
    """The first rows that are objects, and an iterator over all rows from the start."""
    buffered: list[RawRow] = []
    sample: list[Row] = []
    for raw in rows:
        buffered.append(raw)
        if isinstance(raw.value, Mapping):
            sample.append(raw.value)
        if len(sample) == SAMPLED_ROWS:
            break
    return sample, chain(buffered, rows)


def _detect(source: str | Path, sample: list[Row]) -> str:
    if not sample:
        # No row is an object. Any schema lists them all as bad rows.
        return next(iter(SCHEMAS))
    counts = {name: sum(schema.matches(row) for row in sample) for name, schema in SCHEMAS.items()}
    matching = [name for name, count in counts.items() if count]
    if len(matching) == 1:
        return matching[0]
    keys = sorted({str(key) for row in sample for key in row})
    listed = " and ".join(f"{name} ({counts[name]} rows)" for name in matching)
    got = f"they match the schemas {listed}" if matching else "they match no known schema"
    known = "\n".join(f"  {name}: {schema.SUMMARY}" for name, schema in SCHEMAS.items())
    remedy = "choose one with schema=" if matching else "convert them to the schema 'rgsd', or pass schema="
    raise DataError(
        f"{source}: the first {len(sample)} rows have the keys {', '.join(keys[:30])}; {got}, expected exactly one: "
        f"{remedy}. Known:\n{known}"
    )


def _unknown_schema(name: str) -> str:
    close = difflib.get_close_matches(name, SCHEMAS, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ": leave it out to detect the schema"
    return f"got schema={name!r}, expected one of {', '.join(SCHEMAS)}{hint}"


def _open(source: str | Path, split: str | None, config: str | None) -> _Source:
    if not isinstance(source, str | Path):
        raise DataError(f"got {describe(source)} as a source, expected a path, a hub id or 'bundled': pass a string")
    name = str(source)
    is_bundled = name == BUNDLED or name.startswith(f"{BUNDLED}:")
    path = Path(source).expanduser()
    # A mistyped path below a folder that is here, or a file's name: a stranger could own the hub id of that spelling.
    is_path = Path(name.partition(":")[0]).parent.exists() or (
        path.suffix.lower() in reading.SUFFIXES and ":" not in name
    )
    is_hub = not (is_bundled or is_path) and isinstance(source, str) and reading.is_hub_id(name)
    if (split or config) and not is_hub:
        raise DataError(f"{name}: split and config are for hub datasets, got a local source: leave them out")
    if is_hub:
        return _Source(reading.hub_rows(name, split, config), (name,))
    if not is_bundled and not path.exists():
        expected = f"a {' or '.join(reading.SUFFIXES)} file, a folder of them, a hub id owner/name, or 'bundled'"
        hub = "the hub is not asked for a name that is a path here: " if reading.is_hub_id(name) else ""
        raise DataError(
            f"{name}: got neither an existing path nor a hub id, expected {expected}: {hub}check the spelling"
        )
    files: Iterable[Traversable] = _bundled_files(name) if is_bundled else reading.local_files(path)
    files = list(files)
    return _Source(chain.from_iterable(map(reading.file_rows, files)), tuple(f.name for f in files))


def _bundled_files(name: str) -> list[Traversable]:
    folder = importlib.resources.files("rgsd.data") / "bundled"
    entries = folder.iterdir() if folder.is_dir() else ()
    files = {p.name.removesuffix(".jsonl"): p for p in entries if p.name.endswith(".jsonl")}
    if not files:
        raise DataError("the package has no bundled data: reinstall rgsd, or name a file")
    if name == BUNDLED:
        return [files[domain] for domain in sorted(files)]
    domain = name.partition(":")[2]
    if domain not in files:
        known = ", ".join(sorted(files))
        raise DataError(f"got the bundled domain {domain!r}, expected one of {known}: pick one, or 'bundled' for all")
    return [files[domain]]
