"""ResearchQA (MIT).

    {id, general_domain, subdomain, field, query, date, rubric: [{rubric_item, type}]}

Items carry no weight: each counts 1, and its verdict is a grade.
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
    """One item {rubric_item, type}; the type is a text or a list of them.

    Raises:
        FieldError: naming the malformed part.
    """
    item = f.item(value, field)
    kinds = item.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return Criterion(
        text=f.text(item, "rubric_item", f"{field}.rubric_item"),
        tags=tuple(f"type:{kind}" for kind in f.tags(kinds, f"{field}.type")),
    )


def parse(row: f.Row, where: f.Where) -> Example:
    """One row as an example.

    Raises:
        FieldError: naming the malformed field.
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
