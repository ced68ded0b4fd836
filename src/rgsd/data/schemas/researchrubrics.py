"""ResearchRubrics (ScaleAI, MIT).

{prompt, sample_id, domain, rubrics: [{criterion, weight -5..5, axis}]}
"""

from __future__ import annotations

from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.rubrics import Criterion, Example

NAME = "researchrubrics"
SUMMARY = "ResearchRubrics: a prompt with signed weights from -5 to 5 and an axis each"

_OTHERS = ("prompt_id", "example_tags", "ideal_completions_data", "question", "query", "reward_model", "Rubrics")


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "rubrics" in row and "sample_id" in row and not any(k in row for k in _OTHERS)


def criterion(value: Any, field: str) -> Criterion:
    """Read an item {criterion, weight, axis}.

    Raises:
        FieldError: If a part is malformed.
    """
    item = f.item(value, field)
    axis = f.optional_text(item, "axis", f"{field}.axis")
    return f.criterion(item, field, "criterion", "weight", tags=f.labelled("axis", axis))


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    return f.example(
        id=f.identifier(row, "sample_id", where),
        messages=f.published_messages(row.get("prompt"), "prompt"),
        rubric=f.rubric(row.get("rubrics"), "rubrics", criterion),
        scoring="satisfaction",
        domain=f.optional_text(row, "domain"),
        metadata=f.kept(row, "conceptual_breadth", "logical_nesting", "exploration"),
    )
