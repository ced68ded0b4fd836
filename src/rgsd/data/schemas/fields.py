"""Helpers to read the fields of a row, and to refuse malformed ones.

All schemas use them, so that all errors have the same form: what was got, what was expected, and what to do. They raise
`FieldError`, which `rgsd.data.load` turns into a `Problem` with the file and the row.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any

from rgsd.errors import DataError
from rgsd.rubrics import WEIGHT_SIZES, Criterion, Example, Message, Rubric

Row = Mapping[str, Any]
"""A row, as read from JSON, parquet or `datasets`."""

ROLES = ("system", "user", "assistant", "tool", "developer")
"""Roles of turns that `rgsd.rubrics.Example` accepts."""


@dataclass(frozen=True, slots=True)
class Where:
    """The place of a row: the name of its file, and its number counted from 1 (in a .jsonl file, its line)."""

    file: str
    row: int

    @property
    def default_id(self) -> str:
        """The id of a row without one: unique within a load, and it shows where the row is."""
        return f"{self.file}#{self.row}"


class FieldError(Exception):
    """A value that cannot be used. Private to `rgsd.data`.

    Args:
        field: Path of the field in the row, for example `rubric[2].weight`; empty for the row as a whole.
        message: What was got, what was expected, and what to do.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def refuse(field: str, got: Any, expected: str, remedy: str) -> FieldError:
    """Build the error for a value, in the form that all errors of the package have."""
    return FieldError(field, f"got {describe(got)}, expected {expected}: {remedy}")


def describe(value: Any) -> str:
    """Describe a value in a few words, for an error."""
    if value is None:
        return "nothing"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with keys {', '.join(map(str, list(value)[:8]))}" if value else "an empty object"
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any) -> Any:
    """Convert a value to JSON types: numpy arrays and scalars, tuples, dates and decimals."""
    if value is None or isinstance(value, str | bool | int | float):
        # numpy's float64 and str_ are subclasses of float and str, but their `repr` differs.
        item = getattr(value, "item", None)
        return item() if callable(item) else value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    # Duck typing, to avoid an import of numpy.
    to_list = getattr(value, "tolist", None)
    return plain(to_list()) if callable(to_list) else value


def compact(value: Any) -> Any:
    """Remove missing values, with which parquet fills the unused fields of a struct."""
    if isinstance(value, Mapping):
        return {k: compact(v) for k, v in value.items() if not is_missing(v)}
    if isinstance(value, list):
        return [compact(v) for v in value]
    return value


def is_missing(value: Any) -> bool:
    """Whether a value is missing: None, or NaN, which pandas uses instead."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def record(row: Any) -> dict[str, Any]:
    """Convert a row to a plain dict.

    Raises:
        FieldError: If the row is not an object.
    """
    if not isinstance(row, Mapping):
        raise refuse("", row, "an object with named fields", "write each row as one JSON object")
    return plain(row)


def from_json(value: Any) -> Any:
    """Parse a string that holds a JSON list or object. Any other value is returned unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return plain(json.loads(value))
    except (ValueError, RecursionError):
        return value


def optional_text(row: Row, key: str, field: str | None = None) -> str | None:
    """Read a string; None if it is missing or blank.

    Raises:
        FieldError: If the value is not a string.
    """
    value = row.get(key)
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise refuse(field or key, value, "a string or nothing", f"write {key!r} as a string, or leave it out")
    return value if value.strip() else None


def text(row: Row, key: str, field: str | None = None) -> str:
    """Read a non-empty string.

    Raises:
        FieldError: If the value is missing, blank or not a string.
    """
    value = row.get(key)
    if is_missing(value) or not isinstance(value, str) or not value.strip():
        got = None if is_missing(value) else value
        raise refuse(field or key, got, "a non-empty string", f"fill in {key!r}, or remove the row")
    return value


def identifier(row: Row, key: str, where: Where) -> str:
    """Read the row's id, or make one from its place.

    Raises:
        FieldError: If the id is neither a string nor a whole number.
    """
    value = row.get(key)
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return where.default_id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise refuse(key, value, "a string", f"write {key!r} as a string, or leave it out")
    return str(value)


def weight(item: Row, key: str, field: str) -> float:
    """Read a criterion's weight.

    Raises:
        FieldError: If it is missing, not a number, not finite, zero, or outside `WEIGHT_SIZES`.
    """
    value = item.get(key)
    expected = "a finite number other than 0"
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(field, value, expected, "write the weight as a number, negative for a pitfall")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number == 0:
        raise refuse(field, value, expected, "give the criterion a weight (negative for a pitfall), or remove it")
    least, most = WEIGHT_SIZES
    if not least <= abs(number) <= most:
        raise refuse(field, value, f"{expected}, {least:g} to {most:g} in size", "scale the weights of the rubric")
    return number


def mapping(row: Row, key: str, field: str | None = None) -> dict[str, Any]:
    """Read an object, which may be stored as a JSON string.

    Raises:
        FieldError: If it is missing or not an object.
    """
    value = from_json(row.get(key))
    if not isinstance(value, Mapping):
        raise refuse(field or key, value, "an object", f"fill in {key!r} as the schema defines it, or remove the row")
    return dict(value)


def optional_mapping(row: Row, key: str, field: str | None = None) -> dict[str, Any]:
    """Read an object; empty if it is missing.

    Raises:
        FieldError: If the value is not an object.
    """
    value = row.get(key)
    if is_missing(value) or value == "":
        return {}
    return mapping(row, key, field)


def rubric(value: Any, field: str, read_item: Callable[[Any, str], Criterion]) -> Rubric:
    """Read a rubric from a list of criteria.

    Args:
        value: The list, or a JSON string that holds it.
        field: Path of the list, for errors.
        read_item: Reads an item, given its value and its path.

    Raises:
        FieldError: If the list is missing, empty or not a list, or an item is malformed.
    """
    return Rubric(tuple(read_item(item, f"{field}[{number}]") for number, item in enumerate(items(value, field))))


def criterion(
    item: Row,
    field: str,
    text_key: str,
    weight_key: str | None = None,
    *,
    title: str | None = None,
    tags: tuple[str, ...] = (),
    check: dict[str, Any] | None = None,
) -> Criterion:
    """Build a criterion from an item.

    Args:
        item: The item.
        field: Path of the item, for errors.
        text_key: Key of the criterion's text.
        weight_key: Key of its weight; None for a weight of 1.
        title, tags, check: As in `Criterion`.

    Raises:
        FieldError: If the text or the weight is malformed.
    """
    weighed = 1.0 if weight_key is None else weight(item, weight_key, f"{field}.{weight_key}")
    return Criterion(text(item, text_key, f"{field}.{text_key}"), weighed, title, tags, check)


def items(value: Any, field: str) -> list[Any]:
    """Read a list of criteria, which may be stored as a JSON string, without reading its items.

    Raises:
        FieldError: If it is missing, empty or not a list.
    """
    value = from_json(value)
    if not isinstance(value, list) or not value:
        got = None if is_missing(value) else value
        raise refuse(field, got, "a list of at least one criterion", "give the prompt a rubric, or remove the row")
    return value


def item(value: Any, field: str) -> dict[str, Any]:
    """Read an item of a list of criteria as a dict.

    Raises:
        FieldError: If it is not an object.
    """
    value = from_json(value)
    if not isinstance(value, Mapping):
        raise refuse(field, value, "an object with the criterion's fields", "write each criterion as an object")
    return dict(value)


def tags(value: Any, field: str) -> tuple[str, ...]:
    """Read tags from a list of strings, or from an object as "key:value". Empty ones are left out.

    Raises:
        FieldError: If the value is neither.
    """
    if is_missing(value) or value == "":
        return ()
    if isinstance(value, Mapping):
        return tuple(f"{k}:{_tag(v)}" for k, v in value.items() if _tag(v))
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise refuse(field, value, "a list of strings", "write the tags as a list of strings, or leave them out")
    return tuple(v for v in value if v.strip())


def _tag(value: Any) -> str:
    value = jsonable(value)
    if value is None or value in ("", {}, []):
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def labelled(label: str, value: Any) -> tuple[str, ...]:
    """The tag `label:value`; none if the value is missing or blank."""
    return () if is_missing(value) or str(value).strip() == "" else (f"{label}:{value}",)


def user_turn(row: Row, key: str) -> tuple[Message, ...]:
    """Read a prompt with a single user turn.

    Raises:
        FieldError: If the text is missing or blank.
    """
    return ({"role": "user", "content": text(row, key)},)


def messages(value: Any, field: str) -> tuple[Message, ...]:
    """Read a conversation that ends with a user turn. A string is a single user turn.

    Raises:
        FieldError: If a turn is malformed.
    """
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value:
        got = None if is_missing(value) else value
        remedy = "give the row a prompt, or remove it"
        raise refuse(field, got, "a string, or a list of {role, content} with at least one turn", remedy)
    turns = tuple(_turn(turn, f"{field}[{number}]") for number, turn in enumerate(value))
    _check_last(turns, field)
    return turns


def published_messages(value: Any, field: str) -> tuple[Message, ...]:
    """Like `messages`, for schemas whose turns may be stored as a JSON string.

    Raises:
        FieldError: If a turn is malformed.
    """
    decoded = from_json(value)
    # A question can itself be JSON, so only a list of turns is decoded.
    is_turns = isinstance(decoded, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in decoded)
    return messages(decoded if is_turns else value, field)


def _check_last(turns: tuple[Message, ...], field: str) -> None:
    last = f"{field}[{len(turns) - 1}]"
    if turns[-1]["role"] != "user":
        remedy = "the model answers the last user turn: remove the turns after it, or the row"
        raise refuse(f"{last}.role", turns[-1]["role"], "'user' in the last turn", remedy)
    if not turns[-1]["content"].strip():
        raise refuse(f"{last}.content", "", "a non-empty string", "fill in the user's turn, or remove the row")


def _turn(turn: Any, field: str) -> Message:
    if not isinstance(turn, Mapping):
        raise refuse(field, turn, "a turn {role, content}", "write each turn as an object with a role and a content")
    role = turn.get("role")
    if role not in ROLES:
        raise refuse(f"{field}.role", role, f"one of {', '.join(ROLES)}", "rename the role")
    return {"role": role, "content": _content(turn.get("content"), f"{field}.content")}


def _content(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    expected = 'a string, or a list of {"type": "text", "text": ...} parts'
    if not isinstance(value, list) or not value:
        raise refuse(
            field, value, expected, "only text can be trained on: write the turn as a string, or remove the row"
        )
    parts = [_part(part, f"{field}[{number}]", expected) for number, part in enumerate(value)]
    # A line break keeps the last word of a part apart from the first word of the next.
    return "\n".join(parts)


def _part(part: Any, field: str, expected: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise refuse(field, kind, expected, "only text can be trained on: remove the part, or the row")


def kept(row: Row, *keys: str) -> dict[str, Any]:
    """The named fields that the row has, in JSON types, for `Example.metadata`."""
    values = {key: jsonable(row[key]) for key in keys if key in row}
    return {key: value for key, value in values.items() if value not in (None, "", [], {})}


def jsonable(value: Any) -> Any:
    """Replace what JSON cannot hold: non-finite numbers by None, other objects by their string."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items() if not is_missing(v)}
    if isinstance(value, list):
        return [jsonable(v) for v in value]
    if is_missing(value) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, str | bool | int | float) else str(value)


def check_keys(row: Row, known: Iterable[str], field: str = "") -> None:
    """Refuse an unknown key, and suggest a similar known one.

    Raises:
        FieldError: For the first unknown key whose value is not missing.
    """
    known = list(known)
    for key, value in row.items():
        if key in known or is_missing(value):
            continue
        close = difflib.get_close_matches(key.casefold(), known, n=1, cutoff=0.6)
        remedy = f"did you mean {close[0]!r}?" if close else "move it into 'metadata' of the row, or remove it"
        path = f"{field}.{key}" if field else key
        raise FieldError(path, f"got the unknown key {key!r}, expected one of {', '.join(known)}: {remedy}")


def example(**fields: Any) -> Example:
    """Build an `Example`.

    Raises:
        FieldError: If the fields do not make a valid example; it is about the row as a whole.
    """
    try:
        return Example(**fields)
    except DataError as error:
        raise FieldError("", str(error)) from None
