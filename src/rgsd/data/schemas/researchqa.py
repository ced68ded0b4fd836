"""ResearchQA (MIT).

    {id, general_domain, subdomain, field, query, date, rubric: [{rubric_item, type}]}

Items have no weight. Each counts 1, and its verdict is a grade.
"""

from __future__ import annotations

from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.rubrics import Criterion, Example

NAME = "researchqa"
SUMMARY = "ResearchQA: a query with unweighted rubric items and their types"


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "rubric" in row and "reference_answer" not in row and ("general_domain" in row or "query" in row)


def criterion(value: Any, field: str) -> Criterion:
    """Read an item {rubric_item, type}; the type is a string or a list of strings.

    Raises:
        FieldError: If a part is malformed.
    """
    item = f.item(value, field)
    kinds = item.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    tags = tuple(f"type:{kind}" for kind in f.tags(kinds, f"{field}.type"))
    return f.criterion(item, field, "rubric_item", tags=tags)


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    return f.example(
        id=f.identifier(row, "id", where),
        messages=f.user_turn(row, "query"),
        rubric=f.rubric(row.get("rubric"), "rubric", criterion),
        scoring="researchqa",
        domain=f.optional_text(row, "general_domain"),
        tags=f.labelled("subdomain", row.get("subdomain")) + f.labelled("field", row.get("field")),
        metadata=f.kept(row, "date"),
    )
