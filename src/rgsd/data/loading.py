"""From raw rows to examples: recognising the schema, parsing every row, and listing what could not be used."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from rgsd.data import reading as _reading
from rgsd.data.reading import RawRow
from rgsd.data.schemas.fields import FieldError, Row, Where, describe
from rgsd.errors import DataError
from rgsd.rubrics import Example

SAMPLED_ROWS = 20
"""How many rows recognition looks at."""

LISTED_PROBLEMS = 20
"""How many problems the error of a load names."""

BUNDLED = "bundled"


class Schema(Protocol):
    """What a schema's module has."""

    @property
    def NAME(self) -> str:
        """What the schema is called."""
        ...

    @property
    def SUMMARY(self) -> str:
        """The schema in one line."""
        ...

    def matches(self, row: Row) -> bool:
        """Whether a row has this schema's keys."""
        ...

    def parse(self, row: Row, where: Where) -> Example:
        """One row as an example; raises FieldError for a malformed one."""
        ...


Schemas = Mapping[str, Schema]


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used, and why.

    Args:
        file: the file's name, or the hub id.
        row: its number, from 1; in a .jsonl file, its line.
        field: the offending field's path, e.g. `rubric[2].weight`; empty for the row as a whole.
        message: what was got, what was wanted, what to do.
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
    """What a load gave. Always `n_rows == len(examples) + len(problems)`: no row is lost.

    Args:
        examples: in the order of the rows.
        schema: the name of the schema they were read by.
        n_rows: rows read, usable or not.
        problems: one for each row that was left out.
        files: the files read, in order.
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
    schemas: Schemas,
    *,
    schema: str | None = None,
    split: str | None = None,
    config: str | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
) -> Loaded:
    """See `rgsd.data.load`, which passes the registry of schemas in."""
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise DataError(f"got limit={limit!r}, wanted a whole number of at least 1: leave it out to read every row")
    if schema is not None and schema not in schemas:
        raise DataError(_unknown_schema(schema, schemas))
    found = _open(source, split, config)
    rows = islice(found.rows, limit) if limit else found.rows
    sample, rows = _peek(rows)
    name = schema or _recognise(source, sample, schemas)
    reader = _RowReader(schemas, name, check_others=schema is None)
    for raw in rows:
        reader.add(raw)
    return _finished(source, reader, found.files, skip_bad_rows)


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
    remedy = "correct the rows, or pass skip_bad_rows=True to leave them out and have them listed"
    if skip_bad_rows:
        remedy = "no row is left: correct them, or name another schema"
    return f"{source}: {len(problems)} of {n_rows} rows cannot be used:\n{listed}{rest}\n{remedy}"


class _RowReader:
    """Parses rows one by one, and keeps examples, problems and the ids that were seen."""

    def __init__(self, schemas: Schemas, name: str, *, check_others: bool) -> None:
        self.name = name
        self.n_rows = 0
        self.examples: list[Example] = []
        self.problems: list[Problem] = []
        self._schema = schemas[name]
        self._others = [s for s in schemas.values() if name != s.NAME] if check_others else []
        self._places: dict[str, str] = {}

    def add(self, raw: RawRow) -> None:
        """Parse one row; a bad one becomes a problem."""
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
            raise FieldError("", "got a row nested too deeply to read, wanted a plain row: flatten it") from None
        except DataError as error:
            raise FieldError("", str(error)) from None
        self._check_id(example.id, f"{raw.file}, row {raw.row}")
        return example

    def _check_schema(self, row: object) -> None:
        """A row of another schema in the midst of this one's: parsing it by this one could half succeed."""
        if not isinstance(row, Mapping) or self._schema.matches(row):
            return
        for other in self._others:
            if other.matches(row):
                wanted = f"one of schema {self.name!r} like the rows before it"
                remedy = f"move it to a file of its own, or pass schema={self.name!r} to read it so all the same"
                raise FieldError("", f"got a row of schema {other.NAME!r}, wanted {wanted}: {remedy}")

    def _check_id(self, id_: str, place: str) -> None:
        first = self._places.setdefault(id_, place)
        if first != place:
            message = f"got the id {id_!r}, which {first} has already, wanted ids that differ"
            raise FieldError("id", f"{message}: rename one of them, or remove the row")


def _peek(rows: Iterator[RawRow]) -> tuple[list[Row], Iterator[RawRow]]:
    """The first object rows, and an iterator that still gives every row from the start."""
    buffered: list[RawRow] = []
    sample: list[Row] = []
    for raw in rows:
        buffered.append(raw)
        if isinstance(raw.value, Mapping):
            sample.append(raw.value)
        if len(sample) == SAMPLED_ROWS:
            break
    return sample, chain(buffered, rows)


def _recognise(source: str | Path, sample: list[Row], schemas: Schemas) -> str:
    if not sample:
        # Not one object among the rows: any schema will list them as the bad rows they are.
        return next(iter(schemas))
    fits = {name: sum(schema.matches(row) for row in sample) for name, schema in schemas.items()}
    fitting = [name for name, count in fits.items() if count]
    if len(fitting) == 1:
        return fitting[0]
    keys = sorted({str(key) for row in sample for key in row})
    seen = f"the keys {', '.join(keys[:30])}"
    counts = " and ".join(f"{name} ({fits[name]} rows)" for name in fitting)
    got = f"they fit the schemas {counts}" if fitting else "they fit no known schema"
    known = "\n".join(f"  {name}: {schema.SUMMARY}" for name, schema in schemas.items())
    remedy = "pass schema= to choose" if fitting else "convert them to the schema 'rgsd', or pass schema="
    raise DataError(
        f"{source}: the first {len(sample)} rows have {seen}; {got}, wanted exactly one: {remedy}. Known:\n{known}"
    )


def _unknown_schema(name: str, schemas: Schemas) -> str:
    near = difflib.get_close_matches(name, schemas, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ": leave it out to have it recognised"
    return f"got schema={name!r}, wanted one of {', '.join(schemas)}{hint}"


def _open(source: str | Path, split: str | None, config: str | None) -> _Source:
    if not isinstance(source, str | Path):
        raise DataError(f"got {describe(source)} as a source, wanted a path, a hub id or 'bundled': pass a text")
    name = str(source)
    is_bundled = name == BUNDLED or name.startswith(f"{BUNDLED}:")
    path = Path(source).expanduser()
    is_hub = not is_bundled and not path.exists() and isinstance(source, str) and _reading.is_hub_id(name)
    if (split or config) and not is_hub:
        raise DataError(f"{name}: split and config choose within a hub dataset, got a local source: name the file")
    if is_hub:
        return _Source(_reading.hub_rows(name, split, config), (name,))
    if not is_bundled and not path.exists():
        wanted = f"a {' or '.join(_reading.SUFFIXES)} file, a folder of them, a hub id owner/name, or 'bundled'"
        raise DataError(f"{name}: there is no such path, and it is no hub id; wanted {wanted}: check the spelling")
    files: Iterable[Traversable] = _bundled_files(name) if is_bundled else _reading.local_files(path)
    files = list(files)
    return _Source(chain.from_iterable(map(_reading.file_rows, files)), tuple(f.name for f in files))


def _bundled_files(name: str) -> list[Traversable]:
    folder = importlib.resources.files("rgsd.data") / "bundled"
    entries = folder.iterdir() if folder.is_dir() else ()
    found = {p.name.removesuffix(".jsonl"): p for p in entries if p.name.endswith(".jsonl")}
    if not found:
        raise DataError("the package has no bundled data: install rgsd again, or name a file")
    if name == BUNDLED:
        return [found[domain] for domain in sorted(found)]
    domain = name.partition(":")[2]
    if domain not in found:
        known = ", ".join(sorted(found))
        raise DataError(f"got the bundled domain {domain!r}, wanted one of {known}: pick one, or 'bundled' for all")
    return [found[domain]]
