"""Reads files of human verdicts, against which `rgsd judge check` compares a judge.

There are four forms, told apart by their fields:

    HealthBench's meta-evaluation (OpenAI simple-evals, `..._oss_meta_eval.jsonl`), one line per judged criterion:
        {prompt: [{role, content}], completion, rubric, binary_labels: [bool], anonymized_physician_ids: [str],
         category, prompt_id, completion_id, canary}
    a .csv or .tsv, or a .jsonl or .json with the same fields, one row per verdict of a person:
        prompt, response, criterion, met (true/false, 1/0, yes/no); optionally weight, id, category, tags, rater
    rows of a run's samples.jsonl, with a "human" next to the judge's "met" in each verdict (a verdict, a list of them,
        or null if nobody looked); or rows whose "judge" starts with "human", whose verdicts are then that person's

Rows about the same criterion of the same response are the verdicts of several people on it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rgsd.errors import DataError
from rgsd.rows import LARGEST, BadRow, are_texts, is_weight, loads
from rgsd.rubrics import Criterion, Example, Message, Rubric

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
COLUMNS = ("prompt", "response", "criterion", "met")
"""The fields that a user's own file must have."""
MAX_LISTED = 5
"""How many unusable rows an error lists at most."""
HUMAN = "human"
"""The field of a human verdict, and the start of a human judge's name."""

_YES = frozenset({"true", "1", "1.0", "yes", "y", "met"})
_NO = frozenset({"false", "0", "0.0", "no", "n", "not met", "unmet"})
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Labelled:
    """One criterion of one response, with the verdicts of people on it.

    Args:
        messages: The conversation, which ends with the user's turn.
        response: The response that was judged.
        criterion: The text of the criterion.
        labels: One verdict per person, at least one.
        raters: The persons, in the same order, or "" if the file does not say.
        weight: The weight, or None if the file does not say.
        category: E.g. HealthBench's cluster, or a domain.
        tags: The tags of the criterion.
        where: File and line.
        prompt_key: Equal for items about the same prompt, which are resampled together.
    """

    messages: tuple[Message, ...]
    response: str
    criterion: str
    labels: tuple[bool, ...]
    raters: tuple[str, ...] = ()
    weight: float | None = None
    category: str | None = None
    tags: tuple[str, ...] = ()
    where: str = ""
    prompt_key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        turns = json.dumps([[m["role"], m["content"]] for m in self.messages])
        object.__setattr__(self, "prompt_key", hashlib.sha256(turns.encode()).hexdigest()[:16])

    @property
    def majority(self) -> bool | None:
        """The verdict of more than half of the people, or None for a tie."""
        yes = sum(self.labels)
        return None if 2 * yes == len(self.labels) else 2 * yes > len(self.labels)

    @property
    def sign(self) -> str:
        """`positive`, `pitfall`, or `unstated` if the file gives no weight."""
        return "unstated" if self.weight is None else "pitfall" if self.weight < 0 else "positive"


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """The contents of a file of human verdicts.

    Args:
        items: One per criterion of a response.
        form: The form of the file: `healthbench_meta`, `table` or `samples`.
        n_without_label: Verdicts in rows of samples that nobody looked at.
    """

    items: tuple[Labelled, ...]
    form: str
    n_without_label: int = 0


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """All labelled criteria of one response, as an example for a judge.

    Args:
        example: Its rubric has one criterion per item, in order.
        response: The response.
        positions: The positions of these items in the set.
    """

    example: Example
    response: str
    positions: tuple[int, ...]


class _UnusableRow(Exception):
    """A row that cannot be used: what was got, what was expected, what to do."""


def read_labelled(path: str | Path) -> LabelledSet:
    """Read a file of human verdicts.

    Raises:
        DataError: If it cannot be read, has no verdict of a person, or has rows that cannot be used. The first such
            rows are named with their lines, what was got, what was expected and the remedy.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: expected a suffix out of {', '.join(SUFFIXES)}, got {path.suffix!r}: convert the file"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file: check the path")
    items: list[Labelled] = []
    problems: list[str] = []
    form, n_without_label = "", 0
    try:
        for where, value in _rows(path):
            try:
                if isinstance(value, _UnusableRow):
                    raise value
                row = _record(value)
                form = form or ("table" if path.suffix.lower() in (".csv", ".tsv") else _form(row))
                row_items, n_unlabelled = _READERS[form](row, f"{path.name}, {where}")
                items += row_items
                n_without_label += n_unlabelled
            except _UnusableRow as bad:
                problems.append(f"{path.name}, {where}: {bad}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as UTF-8, and check its quotes") from error
    # Conflicts between rows are reported together with the unusable rows.
    merged = _merged(items, problems)
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        listed = "".join(f"\n  {p}" for p in problems[:MAX_LISTED])
        raise DataError(f"{len(problems)} row{'s'[: len(problems) - 1]} of {path.name} cannot be used:{listed}{more}")
    if not merged:
        raise DataError(
            f"{path}: none of {n_without_label} criteria has a verdict of a person, expected at least one: add "
            '"human": true or false next to "met" in the verdicts, or use a .csv with the columns ' + ", ".join(COLUMNS)
            if n_without_label
            else f"{path} has no rows, expected at least one: fill it, or use another file"
        )
    return LabelledSet(tuple(merged), form, n_without_label)


def _merged(items: Sequence[Labelled], problems: list[str]) -> list[Labelled]:
    """Merge items about the same criterion of the same response into one."""
    merged: dict[tuple[str, str, str], Labelled] = {}
    for item in items:
        key = (item.prompt_key, item.response, item.criterion)
        first = merged.get(key)
        if first is None:
            merged[key] = item
            continue
        if first.sign != item.sign:
            problems.append(
                f"{item.where}: expected weight {first.weight} as in {first.where}, which has the same criterion and "
                f"response, got {item.weight}: correct one of them"
            )
            continue
        merged[key] = replace(first, labels=first.labels + item.labels, raters=first.raters + item.raters)
    return list(merged.values())


def group(items: Sequence[Labelled]) -> list[LabelledResponse]:
    """Group items by response, so that a judge reads each response once, with all its labelled criteria.

    Weights that the file does not give become 1. That changes nothing: judges see no weights, and no score is computed.
    """
    positions: dict[tuple[str, str], list[int]] = {}
    for i, item in enumerate(items):
        positions.setdefault((item.prompt_key, item.response), []).append(i)
    return [
        LabelledResponse(
            example=Example(
                id=f"{prompt_key}-{number}",
                messages=items[at[0]].messages,
                rubric=Rubric(tuple(Criterion(items[i].criterion, items[i].weight or 1.0) for i in at)),
            ),
            response=response,
            positions=tuple(at),
        )
        for number, ((prompt_key, response), at) in enumerate(positions.items())
    ]


# --- Files --------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place. For a line that is not JSON, the row is a `_UnusableRow`."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _table_rows(path)
    elif suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _json(line)
    else:
        value = _json(path.read_text("utf-8-sig"))
        if isinstance(value, _UnusableRow):
            raise DataError(f"{path}: {value}")
        if not isinstance(value, list):
            raise DataError(
                f"{path}: expected a list of rows, got {_described(value)}: wrap them in [ ], or use .jsonl"
            )
        for number, row in enumerate(value, 1):
            yield f"row {number}", row


def _json(text: str) -> Any:
    try:
        return loads(text)
    except BadRow as error:
        return _UnusableRow(f"expected a JSON object, got text that is not JSON ({error}): correct it, or remove it")


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a response may be longer than csv's 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = max(",;\t", key=header.count)  # spreadsheets in many languages export with semicolons
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            if missing := [c for c in COLUMNS if c not in reader.fieldnames]:
                raise DataError(f"{path}: {_missing(missing, reader.fieldnames)}")
            end = reader.line_num
            for row in reader:
                # A quoted field may span lines, so the row starts after the last one's end.
                start, end = end + 1, reader.line_num
                if None in row:
                    extra = len(row.pop(None))  # pyright: ignore
                    yield (
                        f"line {start}",
                        _UnusableRow(
                            f"expected {len(reader.fieldnames)} fields, got {extra} more: put texts that contain the "
                            "separator in double quotes"
                        ),
                    )
                else:
                    yield f"line {start}", {k: v for k, v in row.items() if v not in (None, "")} | _empty(row)
    finally:
        csv.field_size_limit(before)


def _empty(row: Mapping[str, Any]) -> dict[str, Any]:
    """The empty fields of a row that count: a response may be empty, any other empty field is missing."""
    return {"response": ""} if row.get("response") == "" else {}


def _missing(missing: Sequence[str], there: Sequence[str]) -> str:
    hints = [f"{near[0]!r} for {name!r}?" for name in missing if (near := difflib.get_close_matches(name, there, 1))]
    hint = f" Did you mean {' '.join(hints)}" if hints else ""
    return (
        f"expected the columns {', '.join(COLUMNS)}, got {', '.join(there) or 'none'}: name "
        f"{', '.join(missing)} in the first line.{hint}"
    )


# --- Rows ---------------------------------------------------------------------------------------------------------


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _UnusableRow(
            f"expected an object with named fields, got {_described(value)}: write each row as one JSON object"
        )
    return dict(value)


def _form(row: Mapping[str, Any]) -> str:
    if "binary_labels" in row:
        return "healthbench_meta"
    if "verdicts" in row:
        return "samples"
    if missing := [c for c in COLUMNS if c not in row]:
        raise _UnusableRow(
            _missing(missing, list(map(str, row))).replace("columns", "fields").replace(" in the first line", "")
        )
    return "table"


def _healthbench(row: Mapping[str, Any], where: str) -> tuple[list[Labelled], int]:
    labels = row.get("binary_labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(v, bool) for v in labels):
        raise _UnusableRow(
            f"binary_labels: expected a list of true and false, got {_described(labels)}: correct or remove it"
        )
    raters = row.get("anonymized_physician_ids") or [""] * len(labels)
    if not isinstance(raters, list) or len(raters) != len(labels):
        raise _UnusableRow(
            f"anonymized_physician_ids: expected one for each of {len(labels)} binary_labels, got "
            f"{_described(raters)}: correct or remove it"
        )
    item = Labelled(
        messages=_messages(row.get("prompt")),
        response=_text(row, "completion", may_be_empty=True),
        criterion=_text(row, "rubric"),
        labels=tuple(labels),
        raters=tuple(map(str, raters)),
        category=_optional(row, "category"),
        where=where,
    )
    return [item], 0


def _table(row: Mapping[str, Any], where: str) -> tuple[list[Labelled], int]:
    item = Labelled(
        messages=_messages(row.get("prompt")),
        response=_text(row, "response", may_be_empty=True),
        criterion=_text(row, "criterion"),
        labels=(_verdict(row.get("met"), "met"),),
        raters=(_optional(row, "rater") or "",),
        weight=_weight(row.get("weight")),
        category=_optional(row, "category"),
        tags=_tags(row.get("tags"), "tags"),
        where=where,
    )
    return [item], 0


def _samples(row: Mapping[str, Any], where: str) -> tuple[list[Labelled], int]:
    verdicts = row.get("verdicts")
    if not isinstance(verdicts, list) or not all(isinstance(v, Mapping) for v in verdicts):
        raise _UnusableRow(
            f"verdicts: expected a list of objects as in samples.jsonl, got {_described(verdicts)}: correct it"
        )
    judge = str(row.get("judge") or "")
    # Rows of samples.jsonl store only the last turn. A user may add the full conversation.
    messages = _messages(row.get("messages") or row.get("question"))
    response = _text(row, "judged_text" if "judged_text" in row else "response", may_be_empty=True)
    items, n_without_label = [], 0
    for number, verdict in enumerate(verdicts):
        name = f"verdicts[{number}]"
        label = verdict.get("met") if judge.startswith(HUMAN) else verdict.get(HUMAN)
        labels = [v for v in (label if isinstance(label, list) else [label]) if v is not None]
        if not labels:
            n_without_label += 1
            continue
        items.append(
            Labelled(
                messages=messages,
                response=response,
                criterion=_text(verdict, "criterion", field=f"{name}.criterion"),
                labels=tuple(_verdict(v, f"{name}.{HUMAN}") for v in labels),
                raters=(judge,) * len(labels) if judge.startswith(HUMAN) else ("",) * len(labels),
                weight=_weight(verdict.get("weight")),
                category=_optional(row, "domain"),
                tags=_tags(verdict.get("tags"), f"{name}.tags"),
                where=where,
            )
        )
    return items, n_without_label


_READERS = {"healthbench_meta": _healthbench, "table": _table, "samples": _samples}


# --- Fields -------------------------------------------------------------------------------------------------------


def _messages(value: Any) -> tuple[Message, ...]:
    """A conversation, given as a list of turns, as JSON of one, or as the text of a single user turn."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        turns = _json(value)
        value = turns if isinstance(turns, list) else value
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    expected = "expected a text, or a list of {role, content} that ends with the user's turn"
    if not isinstance(value, list) or not value:
        raise _UnusableRow(f"prompt: {expected}, got {_described(value)}: fill it in, or remove the row")
    turns = []
    for turn in value:
        role = turn.get("role") if isinstance(turn, Mapping) else None
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise _UnusableRow(f"prompt: {expected}, got the turn {_described(turn)}: correct it, or remove the row")
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        last = f"a last turn of role {turns[-1]['role']!r} with {len(turns[-1]['content'].strip())} characters"
        raise _UnusableRow(f"prompt: {expected}, got {last}: correct it, or remove the row")
    return tuple(turns)


def _text(row: Mapping[str, Any], key: str, *, may_be_empty: bool = False, field: str | None = None) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise _UnusableRow(f"{field or key}: expected a text, got {_described(value)}: fill it in, or remove the row")
    return value


def _tags(value: Any, field: str) -> tuple[str, ...]:
    """The tags in a field: a list of texts, or one text with commas between them."""
    if not value:
        return ()
    if isinstance(value, str):
        return tuple(tag.strip() for tag in value.split(","))
    if not are_texts(value):
        raise _UnusableRow(f"{field}: expected a list of texts, got {_described(value)}: correct it, or leave it out")
    return tuple(value)


def _optional(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    return None if value is None or not str(value).strip() else str(value)


def _verdict(value: Any, field: str) -> bool:
    text = "" if value is None else str(value).strip().lower()
    if text in _YES:
        return True
    if text in _NO:
        return False
    raise _UnusableRow(
        f"{field}: expected true or false (or 1/0, yes/no), got {_described(value)}: correct it, or remove a row that "
        "nobody decided"
    )


def _weight(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not is_weight(number):
        raise _UnusableRow(
            f"weight: expected a finite number other than 0, at most {LARGEST:g} and negative for a pitfall, got "
            f"{_described(value)}: correct it, or leave it empty"
        )
    return number


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str) and not value.strip():
        return "an empty text"
    if isinstance(value, Mapping):
        return f"an object with keys {', '.join(map(str, list(value)[:8])) or 'none'}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
