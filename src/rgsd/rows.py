"""What a run folder's files may hold. A run folder is untrusted: every line is checked before anything reads it.

A line is one JSON object without NaN, infinities or numbers beyond `LARGEST`, nested at most `DEEPEST` levels, whose
known fields have their types. Unknown fields pass: they are shown nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 1e15
"""Largest size of a number in a run's files."""
DEEPEST = 30
LONGEST_NUMBER = 400
"""Digits of a number that are read."""


class BadRow(ValueError):
    """What is wrong with a line or a file, without its place."""


Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_grade(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_weight(value: Any) -> bool:
    return _is_number(value) and value != 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


KINDS: dict[Check, str] = {
    _is_number: f"a number of at most {LARGEST:g}",
    _is_count: "a whole number, zero or more",
    _is_text: "a text",
    _is_object: "an object",
    _is_list: "a list",
    _are_texts: "a list of texts",
    _is_grade: "a number in [0, 1]",
    _is_weight: f"a number other than 0, of at most {LARGEST:g}",
    _is_flag: "true or false",
}

Fields = dict[str, tuple[Check, bool]]
"""Name -> its check, and whether it must be there and not null."""

USAGE: Fields = dict.fromkeys(
    ("calls", "cached", "prompt_tokens", "completion_tokens", "seconds", "price"), (_is_number, False)
)
VERDICT: Fields = {
    "criterion": (_is_text, True),
    "weight": (_is_weight, True),
    "tags": (_are_texts, False),
    "met": (_is_flag, False),
    "grade": (_is_grade, False),
    "reason": (_is_text, False),
}
SAMPLE: Fields = {
    "arm": (_is_text, False),
    "example_id": (_is_text, False),
    "scoring": (_is_text, False),
    "verdicts": (_is_list, False),
    "score": (_is_number, False),
    "coverage": (_is_grade, False),
    "question": (_is_text, False),
    "response": (_is_text, False),
    "judged_text": (_is_text, False),
    "judge": (_is_text, False),
    "domain": (_is_text, False),
    "tags": (_are_texts, False),
    "n_tokens": (_is_count, False),
    "is_truncated": (_is_flag, False),
    "problem": (_is_text, False),
    "usage": (_is_object, False),
}
RESPONSE: Fields = {
    "arm": (_is_text, False),
    "example_id": (_is_text, False),
    "text": (_is_text, False),
    "n_tokens": (_is_count, False),
}
TOKEN_MAP: Fields = {"example_id": (_is_text, False), "policy": (_is_text, False), "tokens": (_is_list, False)}
RECORD: Fields = {
    "status": (_is_text, False),
    "started": (_is_text, False),
    "command": (_is_text, False),
    "commit": (_is_text, False),
    "device": (_is_text, False),
    "seconds": (_is_number, False),
    "rollouts_per_step": (_is_count, False),
    "versions": (_is_object, False),
    "conditioned_responses": (_is_object, False),
    "resumed": (_is_list, False),
}
SAMPLED: Fields = {"n_sampled": (_is_count, False), "n_tokens": (_is_count, False)}
SETTINGS: Fields = {
    "seed": (_is_count, False),
    "per_device_train_batch_size": (_is_count, False),
    "gradient_accumulation_steps": (_is_count, False),
    "models": (_is_list, False),
    "templates": (_is_list, False),
    "privileged_context": (_is_text, False),
}


def check_row(row: dict[str, Any], name: str) -> None:
    """Hold a row of one of a run's .jsonl files to the types of its known fields.

    Args:
        row: as `loads` reads it. Values of metrics.jsonl that are null (NaN, as logged) are taken out of it.
        name: of the file; rows of an unknown file pass.

    Raises:
        BadRow: naming the field.
    """
    if name == "samples.jsonl":
        check(row, SAMPLE)
        for number, entry in enumerate(row.get("verdicts") or ()):
            if not isinstance(entry, Mapping):
                raise BadRow(f"verdicts[{number}] is {_shown(entry)}, an object is wanted")
            check(entry, VERDICT, f"verdicts[{number}].")
        check(row.get("usage") or {}, USAGE, "usage.")
    elif name == "rollouts.jsonl":
        check(row, {"usage": (_is_object, False)})
        check(row.get("usage") or {}, USAGE, "usage.")
    elif name == "responses.jsonl":
        check(row, RESPONSE)
    elif name == "explanations.jsonl":
        check(row, TOKEN_MAP)
    elif name == "metrics.jsonl":
        for key in [key for key, value in row.items() if value is None]:
            del row[key]
        check(row, {"step": (_is_count, False)})
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGEST:
                raise BadRow(f"{key} is {value:.4g}, {KINDS[_is_number]} is wanted")
            if key.startswith(("seconds/", "judge/", "completions/")) or key in METRICS:
                check(row, {key: (_is_number, False)})


METRICS = frozenset({"loss", "divergence", "response_length", "step_time", "reward"})


def check_record(meta: Any, settings: Any) -> None:
    """What run.json and config.yaml hold.

    Raises:
        BadRow: naming the file and the field.
    """
    for name, value, fields in (("run.json", meta, RECORD), ("config.yaml", settings, SETTINGS)):
        if value is None and name == "config.yaml":
            continue  # an empty file: no settings
        if not isinstance(value, Mapping):
            raise BadRow(f"{name} holds {type(value).__name__}, an object is wanted")
        check(value, fields, f"{name}: ")
    check(meta.get("conditioned_responses") or {}, SAMPLED, "run.json: conditioned_responses.")


def check(row: Mapping[str, Any], fields: Fields, prefix: str = "") -> None:
    """Hold a row's known fields to their types.

    Raises:
        BadRow: for the first one that is missing or of another type.
    """
    for name, (is_right, is_needed) in fields.items():
        value = row.get(name)
        if value is None:
            if is_needed:
                raise BadRow(f"{prefix}{name} is missing, {KINDS[is_right]} is wanted")
        elif not is_right(value):
            raise BadRow(f"{prefix}{name} is {_shown(value)}, {KINDS[is_right]} is wanted")


def loads(text: bytes | str, *, lenient: bool = False) -> Any:
    """JSON with limits.

    Args:
        text: in UTF-8; halves of surrogate pairs pass, since a model may write one.
        lenient: read NaN and infinities as null, instead of refusing them.

    Raises:
        BadRow: when it is no JSON, or beyond the limits.
    """

    def constant(name: str) -> None:
        if not lenient:
            raise BadRow(f"it holds {name}, which is no JSON number")

    def number(digits: str) -> float | int:
        if len(digits) > LONGEST_NUMBER:
            raise BadRow(f"it holds a number of {len(digits)} digits")
        value = float(digits) if any(c in digits for c in ".eE") else int(digits)
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow(f"it holds {digits[:40]}, which no float can hold")
        return value

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8", "surrogatepass")
        found = json.loads(decoded, parse_constant=constant, parse_float=number, parse_int=number)
    except RecursionError:
        raise BadRow(f"it is nested deeper than {DEEPEST} levels (recursion)") from None
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} is not utf-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(str(error)) from None
    _check_depth(found)
    return found


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise BadRow(f"it is nested deeper than {DEEPEST} levels")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
