"""Checks for the files of a run folder. A run folder is untrusted: every line is checked before anything reads it.

A line is one JSON object without NaN or infinities, with no number above `LARGEST`, at most `DEEPEST` levels deep.
Known fields must have their types; unknown fields pass, since nothing shows them. The formats of samples and stored
responses are in `rgsd.evaluation`, beside the types that read them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1e15
"""Largest absolute value of a number in a run's files."""
DEEPEST = 30
"""Most levels of nesting."""
LONGEST_NUMBER = 400
"""Most digits of a number. Python takes quadratic time to read a long integer."""


MAX_YAML_BYTES = 1_000_000
"""Largest YAML file."""
MAX_YAML_VALUES = 100_000
"""Most values in a YAML file, each alias counted as what it stands for."""


class BadRow(ValueError):
    """What is wrong with a line or a file. The caller adds where it is."""


Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def is_grade(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_weight(value: Any) -> bool:
    return is_number(value) and value != 0


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_EXPECTED: dict[Check, str] = {
    is_number: f"a number of at most {LARGEST:g}",
    is_count: "a whole number of at least 0",
    is_text: "a string",
    is_object: "an object",
    is_list: "a list",
    are_texts: "a list of strings",
    is_grade: "a number in [0, 1]",
    is_weight: f"a number other than 0, of at most {LARGEST:g}",
    is_flag: "true or false",
}

Fields = dict[str, tuple[Check, bool]]
"""Field name -> its check, and whether the field is required."""

USAGE: Fields = dict.fromkeys(
    ("calls", "cached", "prompt_tokens", "completion_tokens", "seconds", "price"), (is_number, False)
)
"""What judging cost, as `rgsd.judges.Usage`."""
_TOKEN_MAP: Fields = {"example_id": (is_text, False), "policy": (is_text, False), "tokens": (is_list, False)}
_RECORD: Fields = {
    "status": (is_text, False),
    "started": (is_text, False),
    "command": (is_text, False),
    "commit": (is_text, False),
    "device": (is_text, False),
    "seconds": (is_number, False),
    "rollouts_per_step": (is_count, False),
    "versions": (is_object, False),
    "conditioned_responses": (is_object, False),
    "recurrence": (is_object, False),
    "resumed": (is_list, False),
    "roles": (is_object, False),
    "kind": (is_text, False),
    "lineage": (is_list, False),
    "best": (is_object, False),
    "steps": (is_count, False),
    "warnings": (is_list, False),
}
_BEST: Fields = {
    "step": (is_count, True),
    "metric": (is_text, True),
    "value": (is_number, True),
    "n_prompts": (is_count, True),
    "is_loaded": (is_flag, False),
}
_WARNING: Fields = {"step": (is_count, True), "kind": (is_text, True), "text": (is_text, True)}
_ANCESTOR: Fields = dict.fromkeys(("run", "id", "kind", "weights"), (is_text, True))
_CONDITIONED: Fields = {"n_sampled": (is_count, False), "n_tokens": (is_count, False)}
_RECURRENCE: Fields = {"weight_share": (is_grade, False)}
_SETTINGS: Fields = {
    "seed": (is_count, False),
    "per_device_train_batch_size": (is_count, False),
    "gradient_accumulation_steps": (is_count, False),
    "models": (is_list, False),
    "templates": (is_list, False),
    "criteria_tags": (are_texts, False),
    "chat_template_kwargs": (is_object, False),
    "max_completion_length": (is_count, False),
    "max_criteria": (is_count, False),
    **dict.fromkeys(("beta", "clip_threshold", "loss_temperature", "temperature", "held_out"), (is_number, False)),
    **dict.fromkeys(("mask_thinking", "show_weights", "trust_remote_code"), (is_flag, False)),
    **dict.fromkeys(
        (
            "privileged_context",
            "template",
            "clip",
            "dtype",
            "model_name_or_path",
            "model_revision",
            "data",
            "think_open_tag",
            "think_close_tag",
        ),
        (is_text, False),
    ),
}
_METRICS = frozenset({"loss", "divergence", "response_length", "step_time", "reward"})
_METRIC_GROUPS = ("seconds/", "judge/", "completions/")


def check_row(row: dict[str, Any], name: str) -> None:
    """Check a row of metrics.jsonl, rollouts.jsonl or explanations.jsonl; rows of other files pass.

    Args:
        row: As `loads` reads it. Null values of metrics.jsonl, which were logged as NaN, are removed from it.
        name: The file.

    Raises:
        BadRow: Naming the field.
    """
    if name == "rollouts.jsonl":
        check(row, {"usage": (is_object, False)})
        check(row.get("usage") or {}, USAGE, "usage.")
    elif name == "explanations.jsonl":
        check(row, _TOKEN_MAP)
    elif name == "metrics.jsonl":
        for key in [key for key, value in row.items() if value is None]:
            del row[key]
        check(row, {"step": (is_count, False)})
        # TRL logs more fields than rgsd reads: those need not be numbers, but no number may exceed the limit.
        is_read = {key for key in row if key.startswith(_METRIC_GROUPS) or key in _METRICS}
        numbers = {key for key, value in row.items() if isinstance(value, int | float) and not is_flag(value)}
        check(row, dict.fromkeys(is_read | numbers, (is_number, False)))


def check_record(meta: Any, settings: Any) -> None:
    """Check run.json and config.yaml.

    Raises:
        BadRow: Naming the file and the field.
    """
    for name, value, fields in (("run.json", meta, _RECORD), ("config.yaml", settings, _SETTINGS)):
        if value is None and name == "config.yaml":
            continue  # an empty file has no settings
        if not isinstance(value, Mapping):
            raise BadRow(f"{name} must hold an object, got {type(value).__name__}")
        check(value, fields, f"{name}: ")
    check(meta.get("conditioned_responses") or {}, _CONDITIONED, "run.json: conditioned_responses.")
    for ancestor in meta.get("lineage") or []:
        if not is_object(ancestor):
            raise BadRow(f"run.json: lineage must be a list of objects, got {_shortened(ancestor)} in it")
        check(ancestor, _ANCESTOR, "run.json: lineage.")
    check(meta.get("recurrence") or {}, _RECURRENCE, "run.json: recurrence.")
    if meta.get("best") is not None:
        check(meta["best"], _BEST, "run.json: best.")
    for warning in meta.get("warnings") or []:
        if not is_object(warning):
            raise BadRow(f"run.json: warnings must be a list of objects, got {_shortened(warning)} in it")
        check(warning, _WARNING, "run.json: warnings.")


def check(row: Mapping[str, Any], fields: Fields, prefix: str = "") -> None:
    """Check the types of a row's known fields.

    Args:
        row: The row.
        fields: Its known fields.
        prefix: Stands before a field's name in an error.

    Raises:
        BadRow: For the first field that is missing or has another type.
    """
    for name, (is_right, is_required) in fields.items():
        value = row.get(name)
        if value is None:
            if is_required:
                raise BadRow(f"{prefix}{name} is missing: it must be {_EXPECTED[is_right]}")
        elif not is_right(value):
            raise BadRow(f"{prefix}{name} must be {_EXPECTED[is_right]}, got {_shortened(value)}")


def loads(text: bytes | str, *, lenient: bool = False) -> Any:
    """Parse JSON, with limits, and refuse repeated keys.

    Args:
        text: In UTF-8. Halves of surrogate pairs pass, since a model can write one.
        lenient: Read NaN and infinities as null instead of refusing them.

    Raises:
        BadRow: If the text is not JSON, or exceeds a limit.
    """

    def constant(name: str) -> None:
        if not lenient:
            raise BadRow(f"{name} is not a JSON number")

    def number(digits: str) -> float | int:
        if len(digits) > LONGEST_NUMBER:
            raise BadRow(f"a number may have {LONGEST_NUMBER} digits, got {len(digits)}")
        value = float(digits) if any(c in digits for c in ".eE") else int(digits)
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow(f"{digits[:40]} is too large for a float")
        return value

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8", "surrogatepass")
        value = json.loads(
            decoded,
            parse_constant=constant,
            parse_float=number,
            parse_int=number,
            object_pairs_hook=unique_keys,
        )
    except RecursionError:
        raise BadRow(f"nested deeper than {DEEPEST} levels") from None
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(str(error)) from None
    _check_depth(value)
    return value


def read_yaml(path: Path) -> Any:
    """Read a YAML file, with limits. It can name a small value many times over (`*alias`), or itself.

    Raises:
        BadRow: If it is no regular file or exceeds a limit.
        OSError: If it cannot be read.
        yaml.YAMLError: If it is not YAML.
    """
    if path.exists() and not path.is_file():
        raise BadRow("it is not a regular file")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise BadRow(f"it has {size:,} bytes, {MAX_YAML_BYTES:,} are allowed")
    try:
        text = path.read_text("utf-8")
        _check_yaml(text)
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} is not UTF-8") from None
    except (ValueError, OverflowError) as error:  # e.g. a date without such a month, a number of 5000 digits
        raise BadRow(str(error)) from None


def _check_yaml(text: str) -> None:
    """Refuse YAML that is too deep or too large with its aliases written out. Parses events, without recursion."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor and size so far of each collection that is not closed
    size = 0

    def add(anchor: str | None, n: int) -> None:
        nonlocal size
        size = n
        if anchor is not None:
            sizes[anchor] = n
        if open_:
            own, so_far = open_[-1]
            open_[-1] = own, so_far + n
            size = so_far + n
        if size > MAX_YAML_VALUES:
            raise BadRow(f"it has more than {MAX_YAML_VALUES:,} values with its aliases written out")

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
            if len(open_) > DEEPEST:
                raise BadRow(f"line {event.start_mark.line + 1}: nested deeper than {DEEPEST} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            add(*open_.pop())
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(anchor == event.anchor for anchor, _ in open_):
                raise BadRow(f"line {event.start_mark.line + 1}: the alias *{event.anchor} holds itself")
            add(None, sizes.get(event.anchor, 1))
        elif isinstance(event, yaml.ScalarEvent):
            add(event.anchor, 1)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses a repeated key. JSON readers disagree about which of the two values counts.

    Raises:
        BadRow: If a key is repeated.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRow(f"the key {_shortened(repeated)} is repeated in one object")
    return unique


def _check_depth(value: Any) -> None:
    # Level by level, without recursion: the text may nest deeper than Python's stack.
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise BadRow(f"nested deeper than {DEEPEST} levels")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
