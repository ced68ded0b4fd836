"""Our own schema: one JSON object per line.

    {"id"?: str, "prompt": str or [{"role", "content"}, ...],
     "rubric": [{"criterion": str, "weight"?: number, "check"?: {...}, "tags"?: [str], "title"?: str}, ...],
     "reference"?: str, "domain"?: str, "scoring"?: str, "tags"?: [str], "metadata"?: {}}

Unlike the published schemas, it is strict: an unknown key is an error, because it is usually a typo.
"""

from __future__ import annotations

import difflib
from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.errors import DataError
from rgsd.rubrics import SCORINGS, Criterion, Example, checks

NAME = "rgsd"
SUMMARY = "our own: prompt, rubric with weights, checks and tags, reference, domain, scoring, metadata"

KEYS = ("id", "prompt", "rubric", "reference", "domain", "scoring", "tags", "metadata")
CRITERION_KEYS = ("criterion", "weight", "check", "tags", "title")

# Keys that mark a row of a published schema.
_FOREIGN = (
    *("Rubrics", "rubrics", "reward_model", "prompt_id", "sample_id", "rubric_items", "rubric_list", "rubric_count"),
    *("question", "question_source", "reference_answer", "query", "general_domain", "prompt_0", "task"),
)


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys. A typo in "rubric" is accepted here, so that `parse` can report it."""
    if any(key in row for key in _FOREIGN):
        return False
    if "rubric" in row:
        return True
    return "prompt" in row and bool(difflib.get_close_matches("rubric", map(str, row), cutoff=0.75))


def criterion(value: Any, field: str) -> Criterion:
    """Read an item of the rubric.

    Raises:
        FieldError: If a part is malformed.
    """
    item = f.item(value, field)
    f.check_keys(item, CRITERION_KEYS, field)
    return f.criterion(
        item,
        field,
        "criterion",
        None if item.get("weight") is None else "weight",
        title=f.optional_text(item, "title", f"{field}.title"),
        tags=_tags(item.get("tags"), f"{field}.tags"),
        check=_check(item.get("check"), f"{field}.check"),
    )


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    f.check_keys(row, KEYS)
    return f.example(
        id=f.identifier(row, "id", where),
        messages=f.messages(row.get("prompt"), "prompt"),
        rubric=f.rubric(row.get("rubric"), "rubric", criterion),
        scoring=_scoring(row),
        reference=f.optional_text(row, "reference"),
        domain=f.optional_text(row, "domain"),
        tags=_tags(row.get("tags"), "tags"),
        metadata=f.jsonable(f.optional_mapping(row, "metadata")),
    )


def _check(value: Any, field: str) -> dict[str, Any] | None:
    if f.is_missing(value):
        return None
    check = f.compact(value)
    try:
        checks.validate(check)
    except DataError as error:
        raise f.FieldError(field, f"{error}: correct the check, or leave it out") from None
    return check


def _tags(value: Any, field: str) -> tuple[str, ...]:
    # `f.tags` also accepts an object, for published schemas.
    if isinstance(value, dict):
        raise f.refuse(field, value, "a list of strings", 'write ["key:value", ...]')
    return f.tags(value, field)


def _scoring(row: f.Row) -> str:
    name = f.optional_text(row, "scoring")
    if name is None:
        return "satisfaction"
    if name not in SCORINGS:
        close = difflib.get_close_matches(name, SCORINGS, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "choose one of them, or leave it out"
        raise f.refuse("scoring", name, f"one of {', '.join(SCORINGS)}", remedy)
    return name
