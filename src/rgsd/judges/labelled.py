"""Criteria that people have judged, out of files.

Four forms are read, told apart by their fields:

    HealthBench's meta-evaluation (OpenAI simple-evals, `..._oss_meta_eval.jsonl`), a line a criterion of a response:
        {prompt: [{role, content}], completion, rubric, binary_labels: [bool], anonymized_physician_ids: [str],
         category, prompt_id, completion_id, canary}
    a .csv (or .tsv), and a .jsonl or .json with the same names, a row a person's verdict:
        prompt, response, criterion, met (true/false, 1/0, yes/no); may have weight, id, category, tags, rater
    rows of a run's samples.jsonl, each verdict with a "human" beside the judge's "met" (a verdict, a list of them, or
        null where nobody looked); or rows whose "judge" begins with "human", the verdicts then being that person's

Rows about the same criterion of the same response are several people's verdicts on it.
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
"""What a user's own file must have."""
LISTED_PROBLEMS = 5
HUMAN = "human"

_YES = frozenset({"true", "1", "1.0", "yes", "y", "met"})
_NO = frozenset({"false", "0", "0.0", "no", "n", "not met", "unmet"})
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Labelled:
    """One criterion of one response, with people's verdicts on it.

    Args:
        messages: the conversation; its last turn is the user's.
        response: what was judged.
        criterion: its text.
        labels: one verdict a person, at least one.
        raters: who gave them, in the same order; empty texts where the file does not say.
        weight: None where the file does not say.
        category: e.g. HealthBench's cluster, or a domain.
        tags: of the criterion.
        where: file and line.
        prompt_key: what items about the same prompt share; they are resampled together.
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
        """What more than half of the people said; None for a tie."""
        yes = sum(self.labels)
        return None if 2 * yes == len(self.labels) else 2 * yes > len(self.labels)

    @property
    def sign(self) -> str:
        """`positive`, `pitfall`, or `unstated` where the file gives no weight."""
        return "unstated" if self.weight is None else "pitfall" if self.weight < 0 else "positive"


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """What a file of human verdicts holds.

    Args:
        items: a criterion of a response each.
        form: which of the forms it was: `healthbench_meta`, `table` or `samples`.
        n_without_label: verdicts of samples rows that nobody looked at.
    """

    items: tuple[Labelled, ...]
    form: str
    n_without_label: int = 0


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """All labelled criteria of one response, as an example that a judge can be asked about.

    Args:
        example: its rubric has one criterion an item, in their order.
        response: the response.
        positions: which items of the set they are.
    """

    example: Example
    response: str
    positions: tuple[int, ...]


class _Bad(Exception):
    """A row that cannot be used: what was got, what was wanted, what to do."""


def read_labelled(path: str | Path) -> LabelledSet:
    """Read a file of human verdicts.

    Raises:
        DataError: when it cannot be read, holds no verdict of a person, or a row cannot be used; the first such rows
            are named with line, what was got, what was wanted and the remedy.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: got the suffix {path.suffix!r}, wanted one of {', '.join(SUFFIXES)}: convert the file"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of human verdicts: check its path")
    items: list[Labelled] = []
    problems: list[str] = []
    form, without = "", 0
    try:
        for where, value in _rows(path):
            try:
                if isinstance(value, _Bad):
                    raise value
                row = _record(value)
                form = form or ("table" if path.suffix.lower() in (".csv", ".tsv") else _form(row))
                found, unlabelled = _READERS[form](row, f"{path.name}, {where}")
                items += found
                without += unlabelled
            except _Bad as bad:
                problems.append(f"{path.name}, {where}: {bad}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: the file cannot be read ({error}): save it as UTF-8, and check its quotes") from error
    merged = _merged(items, problems)
    if problems:
        more = f"\n  and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
        listed = "".join(f"\n  {p}" for p in problems[:LISTED_PROBLEMS])
        raise DataError(f"{len(problems)} row{'s'[: len(problems) - 1]} of {path.name} cannot be used:{listed}{more}")
    if not merged:
        raise DataError(
            f"{path}: got {without} criteria, none with a verdict of a person, wanted at least one: add "
            '"human": true or false beside "met" in the verdicts, or give a .csv with the columns ' + ", ".join(COLUMNS)
            if without
            else f"{path}: got a file without a row, wanted at least one: fill it, or name another"
        )
    return LabelledSet(tuple(merged), form, without)


def _merged(items: Sequence[Labelled], problems: list[str]) -> list[Labelled]:
    """Several people's verdicts on the same criterion of the same response as one item."""
    found: dict[tuple[str, str, str], Labelled] = {}
    for item in items:
        key = (item.prompt_key, item.response, item.criterion)
        first = found.get(key)
        if first is None:
            found[key] = item
            continue
        if first.sign != item.sign:
            problems.append(
                f"{item.where}: got weight {item.weight}, wanted {first.weight} as in {first.where}, which is about "
                "the same criterion of the same response: correct one of them"
            )
            continue
        found[key] = replace(first, labels=first.labels + item.labels, raters=first.raters + item.raters)
    return list(found.values())


def group(items: Sequence[Labelled]) -> list[LabelledResponse]:
    """The items by response, so that a judge reads each response once with all its labelled criteria.

    Weights that the file does not give are 1: no judge sees them, and no score is taken here.
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


# Rows of files.


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place; a line that is not JSON comes as what is wrong with it."""
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
        if isinstance(value, _Bad):
            raise DataError(f"{path}: {value}")
        if not isinstance(value, list):
            raise DataError(f"{path}: got {_described(value)}, wanted a list of rows: wrap them in [ ], or use .jsonl")
        for number, row in enumerate(value, 1):
            yield f"row {number}", row


def _json(text: str) -> Any:
    try:
        return loads(text)
    except BadRow as error:
        return _Bad(f"got text that is not JSON ({error}), wanted one JSON object: correct it, or remove it")


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a response may be longer than csv's 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            if missing := [c for c in COLUMNS if c not in reader.fieldnames]:
                raise DataError(f"{path}: {_missing(missing, reader.fieldnames)}")
            end = reader.line_num
            for row in reader:
                # A quoted field may span lines: the row begins after the last one's end.
                start, end = end + 1, reader.line_num
                if None in row:
                    extra = len(row.pop(None))  # pyright: ignore
                    yield (
                        f"line {start}",
                        _Bad(
                            f"got {extra} fields more than there are columns, wanted {len(reader.fieldnames)}: put "
                            "texts that hold the separator in double quotes"
                        ),
                    )
                else:
                    yield f"line {start}", {k: v for k, v in row.items() if v not in (None, "")} | _empty(row)
    finally:
        csv.field_size_limit(before)


def _empty(row: Mapping[str, Any]) -> dict[str, Any]:
    """A response may be empty; every other empty field is as good as absent."""
    return {"response": ""} if row.get("response") == "" else {}


def _missing(missing: Sequence[str], there: Sequence[str]) -> str:
    hints = [f"{near[0]!r} for {name!r}?" for name in missing if (near := difflib.get_close_matches(name, there, 1))]
    hint = f" Did you mean {' '.join(hints)}" if hints else ""
    return (
        f"got the columns {', '.join(there) or 'none'}, wanted {', '.join(COLUMNS)}: name "
        f"{', '.join(missing)} in the first line.{hint}"
    )


# A row.


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _Bad(f"got {_described(value)}, wanted an object with named fields: write each row as one JSON object")
    return dict(value)


def _form(row: Mapping[str, Any]) -> str:
    if "binary_labels" in row:
        return "healthbench_meta"
    if "verdicts" in row:
        return "samples"
    if missing := [c for c in COLUMNS if c not in row]:
        raise _Bad(
            _missing(missing, list(map(str, row))).replace("columns", "fields").replace(" in the first line", "")
        )
    return "table"


def _healthbench(row: Mapping[str, Any], where: str) -> tuple[list[Labelled], int]:
    labels = row.get("binary_labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(v, bool) for v in labels):
        raise _Bad(f"binary_labels: got {_described(labels)}, wanted a list of true and false: correct or remove it")
    raters = row.get("anonymized_physician_ids") or [""] * len(labels)
    if not isinstance(raters, list) or len(raters) != len(labels):
        raise _Bad(
            f"anonymized_physician_ids: got {_described(raters)}, wanted one for each of {len(labels)} binary_labels: "
            "correct it, or leave it out"
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
        raise _Bad(f"verdicts: got {_described(verdicts)}, wanted a list of objects as samples.jsonl has it")
    judge = str(row.get("judge") or "")
    # Rows keep the last turn alone; whoever has the whole conversation may put it beside.
    messages = _messages(row.get("messages") or row.get("question"))
    response = _text(row, "judged_text" if "judged_text" in row else "response", may_be_empty=True)
    items, without = [], 0
    for number, verdict in enumerate(verdicts):
        field = f"verdicts[{number}]"
        label = verdict.get("met") if judge.startswith(HUMAN) else verdict.get(HUMAN)
        labels = [v for v in (label if isinstance(label, list) else [label]) if v is not None]
        if not labels:
            without += 1
            continue
        items.append(
            Labelled(
                messages=messages,
                response=response,
                criterion=_text(verdict, "criterion", field=f"{field}.criterion"),
                labels=tuple(_verdict(v, f"{field}.{HUMAN}") for v in labels),
                raters=(judge,) * len(labels) if judge.startswith(HUMAN) else ("",) * len(labels),
                weight=_weight(verdict.get("weight")),
                category=_optional(row, "domain"),
                tags=_tags(verdict.get("tags"), f"{field}.tags"),
                where=where,
            )
        )
    return items, without


_READERS = {"healthbench_meta": _healthbench, "table": _table, "samples": _samples}


# A field.


def _messages(value: Any) -> tuple[Message, ...]:
    """A conversation: a list of turns, the same as JSON text, or one user turn as a text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        found = _json(value)
        value = found if isinstance(found, list) else value
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    wanted = "a text, or a list of {role, content} that ends with the user's turn"
    if not isinstance(value, list) or not value:
        raise _Bad(f"prompt: got {_described(value)}, wanted {wanted}: fill it in, or remove the row")
    turns = []
    for turn in value:
        role = turn.get("role") if isinstance(turn, Mapping) else None
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise _Bad(f"prompt: got the turn {_described(turn)}, wanted {wanted}: correct it, or remove the row")
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        last = f"a last turn of role {turns[-1]['role']!r} with {len(turns[-1]['content'].strip())} characters"
        raise _Bad(f"prompt: got {last}, wanted {wanted}: correct it, or remove the row")
    return tuple(turns)


def _text(row: Mapping[str, Any], key: str, *, may_be_empty: bool = False, field: str | None = None) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise _Bad(f"{field or key}: got {_described(value)}, wanted a text: fill it in, or remove the row")
    return value


def _tags(value: Any, field: str) -> tuple[str, ...]:
    """A list of texts, or one text with commas between the tags."""
    if not value:
        return ()
    if isinstance(value, str):
        return tuple(tag.strip() for tag in value.split(","))
    if not are_texts(value):
        raise _Bad(f"{field}: got {_described(value)}, wanted a list of texts: correct it, or leave it out")
    return tuple(value)


def _optional(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    return None if value is None or not str(value).strip() else str(value)


def _verdict(value: Any, field: str) -> bool:
    word = "" if value is None else str(value).strip().lower()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise _Bad(
        f"{field}: got {_described(value)}, wanted true or false (or 1/0, yes/no): correct it, or remove the row where "
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
        raise _Bad(
            f"weight: got {_described(value)}, wanted a finite number other than 0, at most {LARGEST:g}, negative for "
            "a pitfall: correct it, or leave it empty"
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
