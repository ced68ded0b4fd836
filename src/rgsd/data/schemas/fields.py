"""Reading one field of a row, or refusing it by name.

Every schema's `parse` is written in these helpers, so that a bad value is refused in one voice: what was got, what was
wanted, what to do. `FieldError` stays inside the package: `load` turns it into a `Problem` with its file and row.
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
"""One row, as JSON, parquet or `datasets` gives it."""

ROLES = ("system", "user", "assistant", "tool", "developer")
"""The roles a turn may have; the ones `rgsd.rubrics.Example` accepts."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row stands: its file's name, and its number counted from 1 (in a .jsonl file, its line)."""

    file: str
    row: int

    @property
    def default_id(self) -> str:
        """The id of a row that brings none: unique within a load, and it leads back to the row."""
        return f"{self.file}#{self.row}"


class FieldError(Exception):
    """A value that cannot be used. Private to `rgsd.data`.

    Args:
        field: its path in the row, e.g. `rubric[2].weight`; empty for the row as a whole.
        message: what was got, what was wanted, what to do.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def refuse(field: str, got: Any, wanted: str, remedy: str) -> FieldError:
    """The error for one value, in the package's one form."""
    return FieldError(field, f"got {describe(got)}, wanted {wanted}: {remedy}")


def describe(value: Any) -> str:
    """A value in a few words, short enough for one line of an error."""
    if value is None:
        return "nothing"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with keys {', '.join(map(str, list(value)[:8]))}" if value else "an empty object"
    if isinstance(value, str) and not value.strip():
        return "an empty text"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any) -> Any:
    """A value in plain Python: numpy arrays and scalars, tuples, dates and decimals become what JSON would hold."""
    if value is None or isinstance(value, str | bool | int | float):
        # numpy's float64 and str_ are subclasses; exact types keep `repr` and JSON clean.
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
    # Duck-typed, so that numpy is never imported here.
    to_list = getattr(value, "tolist", None)
    return plain(to_list()) if callable(to_list) else value


def compact(value: Any) -> Any:
    """A plain value without the nothings that parquet fills a struct's unused fields with."""
    if isinstance(value, Mapping):
        return {k: compact(v) for k, v in value.items() if not is_missing(v)}
    if isinstance(value, list):
        return [compact(v) for v in value]
    return value


def is_missing(value: Any) -> bool:
    """Whether a value stands for "not there": None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def record(row: Any) -> dict[str, Any]:
    """The row as a plain dict.

    Raises:
        FieldError: when the row is not an object.
    """
    if not isinstance(row, Mapping):
        raise refuse("", row, "an object with named fields", "write each row as one JSON object")
    return plain(row)


def from_json(value: Any) -> Any:
    """The value behind a text that holds a JSON list or object, the value itself otherwise."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return plain(json.loads(value))
    except (ValueError, RecursionError):
        return value


def optional_text(row: Row, key: str, field: str | None = None) -> str | None:
    """The text under a key; None when it is missing or blank.

    Raises:
        FieldError: when it is there and not a text.
    """
    value = row.get(key)
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise refuse(field or key, value, "a text or nothing", f"write {key!r} as a text, or leave it out")
    return value if value.strip() else None


def text(row: Row, key: str, field: str | None = None) -> str:
    """The text under a key.

    Raises:
        FieldError: when it is missing, blank or not a text.
    """
    value = row.get(key)
    if is_missing(value) or not isinstance(value, str) or not value.strip():
        got = None if is_missing(value) else value
        raise refuse(field or key, got, "a text that is not empty", f"fill {key!r} in, or remove the row")
    return value


def identifier(row: Row, key: str, where: Where) -> str:
    """The row's own id under a key, or one made from where it stands.

    Raises:
        FieldError: when the id is neither a text nor a whole number.
    """
    value = row.get(key)
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return where.default_id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise refuse(key, value, "a text", f"write {key!r} as a text, or leave it out to get one made")
    return str(value)


def weight(item: Row, key: str, field: str, default: float | None = None) -> float:
    """A criterion's weight.

    Raises:
        FieldError: when it is missing without a default, not a number, not finite, zero, or of an absurd size.
    """
    value = item.get(key)
    if value is None and default is not None:
        return default
    wanted = "a finite number other than 0"
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(field, value, wanted, "write the weight as a number, negative for a pitfall")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number == 0:
        raise refuse(field, value, wanted, "give the criterion a weight (negative for a pitfall), or remove it")
    least, most = WEIGHT_SIZES
    if not least <= abs(number) <= most:
        raise refuse(field, value, f"{wanted}, {least:g} to {most:g} in size", "scale the weights of the rubric")
    return number


def mapping(row: Row, key: str, field: str | None = None) -> dict[str, Any]:
    """The object under a key, which may stand there as JSON text.

    Raises:
        FieldError: when it is missing or not an object.
    """
    value = from_json(row.get(key))
    if not isinstance(value, Mapping):
        raise refuse(field or key, value, "an object", f"fill {key!r} in as the schema has it, or remove the row")
    return dict(value)


def optional_mapping(row: Row, key: str, field: str | None = None) -> dict[str, Any]:
    """The object under a key; empty when it is missing.

    Raises:
        FieldError: when it is there and not an object.
    """
    value = row.get(key)
    if is_missing(value) or value == "":
        return {}
    return mapping(row, key, field)


def rubric(value: Any, field: str, one: Callable[[Any, str], Criterion]) -> Rubric:
    """A list of published criteria as a rubric.

    Args:
        value: the list; JSON text holding one is read too.
        field: its path, for errors.
        one: reads one item, given the item and its path.

    Raises:
        FieldError: when it is missing, empty or not a list, or an item is refused.
    """
    return Rubric(tuple(one(item, f"{field}[{number}]") for number, item in enumerate(items(value, field))))


def items(value: Any, field: str) -> list[Any]:
    """A published list of criteria, not yet read; JSON text holding one is read too.

    Raises:
        FieldError: when it is missing, empty or not a list.
    """
    value = from_json(value)
    if not isinstance(value, list) or not value:
        got = None if is_missing(value) else value
        raise refuse(field, got, "a list of at least one criterion", "give the prompt a rubric, or remove the row")
    return value


def item(value: Any, field: str) -> dict[str, Any]:
    """One criterion of a published list, as a dict.

    Raises:
        FieldError: when it is not an object.
    """
    value = from_json(value)
    if not isinstance(value, Mapping):
        raise refuse(field, value, "an object with the criterion's fields", "write each criterion as an object")
    return dict(value)


def tags(value: Any, field: str) -> tuple[str, ...]:
    """Tags from a list of texts, or from an object as "key:value"; empty and missing ones are left out.

    Raises:
        FieldError: when it is neither.
    """
    if is_missing(value) or value == "":
        return ()
    if isinstance(value, Mapping):
        return tuple(f"{k}:{_tag(v)}" for k, v in value.items() if _tag(v))
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise refuse(field, value, "a list of texts", "write the tags as a list of texts, or leave them out")
    return tuple(v for v in value if v.strip())


def _tag(value: Any) -> str:
    value = jsonable(value)
    if value is None or value in ("", {}, []):
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def labelled(label: str, value: Any) -> tuple[str, ...]:
    """The tag `label:value`, or none when the value is missing or blank."""
    return () if is_missing(value) or str(value).strip() == "" else (f"{label}:{value}",)


def user_turn(row: Row, key: str) -> tuple[Message, ...]:
    """A prompt that is one user turn.

    Raises:
        FieldError: when the text is missing or blank.
    """
    return ({"role": "user", "content": text(row, key)},)


def messages(value: Any, field: str) -> tuple[Message, ...]:
    """A conversation that ends with the user's turn; a plain text is one user turn.

    Raises:
        FieldError: naming the turn that is malformed.
    """
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value:
        got = None if is_missing(value) else value
        remedy = "give the row a prompt, or remove it"
        raise refuse(field, got, "a text, or a list of {role, content} with at least one turn", remedy)
    turns = tuple(_turn(turn, f"{field}[{number}]") for number, turn in enumerate(value))
    _check_last(turns, field)
    return turns


def published_messages(value: Any, field: str) -> tuple[Message, ...]:
    """Like `messages`, for schemas whose turns are sometimes stored as JSON text.

    Raises:
        FieldError: naming the turn that is malformed.
    """
    decoded = from_json(value)
    # A question may itself be a piece of JSON: only a list of turns is taken for one.
    is_turns = isinstance(decoded, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in decoded)
    return messages(decoded if is_turns else value, field)


def _check_last(turns: tuple[Message, ...], field: str) -> None:
    last = f"{field}[{len(turns) - 1}]"
    if turns[-1]["role"] != "user":
        remedy = "a model answers the user's last turn: cut the turns after it, or remove the row"
        raise refuse(f"{last}.role", turns[-1]["role"], "'user' in the last turn", remedy)
    if not turns[-1]["content"].strip():
        raise refuse(f"{last}.content", "", "a text that is not empty", "fill the user's turn in, or remove the row")


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
    wanted = 'a text, or a list of {"type": "text", "text": ...} parts'
    if not isinstance(value, list) or not value:
        raise refuse(field, value, wanted, "only text can be trained on: write the turn as a text, or remove the row")
    parts = [_part(part, f"{field}[{number}]", wanted) for number, part in enumerate(value)]
    # Parts are pieces of one turn: a line break keeps their edges from running into each other.
    return "\n".join(parts)


def _part(part: Any, field: str, wanted: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise refuse(field, kind, wanted, "only text can be trained on: remove the part, or the row")


def kept(row: Row, *keys: str) -> dict[str, Any]:
    """The named fields that are there, JSON-serialisable, for `Example.metadata`."""
    found = {key: jsonable(row[key]) for key in keys if key in row}
    return {key: value for key, value in found.items() if value not in (None, "", [], {})}


def jsonable(value: Any) -> Any:
    """A plain value with whatever JSON cannot hold replaced: NaN by nothing, other objects by their text."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items() if not is_missing(v)}
    if isinstance(value, list):
        return [jsonable(v) for v in value]
    if is_missing(value) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, str | bool | int | float) else str(value)


def check_keys(row: Row, known: Iterable[str], field: str = "") -> None:
    """Refuse a key that is not among the known ones, suggesting the nearest.

    Raises:
        FieldError: for the first unknown key whose value is not missing.
    """
    known = list(known)
    for key, value in row.items():
        if key in known or is_missing(value):
            continue
        near = difflib.get_close_matches(key.casefold(), known, n=1, cutoff=0.6)
        remedy = f"did you mean {near[0]!r}?" if near else "put it under 'metadata' of the row, or remove it"
        path = f"{field}.{key}" if field else key
        raise FieldError(path, f"got the unknown key {key!r}, wanted one of {', '.join(known)}: {remedy}")


def example(**fields: Any) -> Example:
    """Build an `Example`, turning its own refusals into a `FieldError` for the whole row.

    Raises:
        FieldError: when the pieces do not make a valid example.
    """
    try:
        return Example(**fields)
    except DataError as error:
        raise FieldError("", str(error)) from None
