"""HealthBench (OpenAI, MIT), with its _hard and _consensus files.

{prompt_id, prompt: [{role, content}], rubrics: [{criterion, points, tags: ["axis:accuracy", ...]}],
 example_tags, ideal_completions_data, canary}
"""

from __future__ import annotations

from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.rubrics import Criterion, Example

NAME = "healthbench"
SUMMARY = "HealthBench, _hard and _consensus: prompt, rubrics with points from -10 to 10 and tags"


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "rubrics" in row and any(k in row for k in ("prompt_id", "example_tags", "ideal_completions_data"))


def criterion(value: Any, field: str) -> Criterion:
    """Read an item {criterion, points, tags}.

    Raises:
        FieldError: If a part is malformed.
    """
    item = f.item(value, field)
    return f.criterion(item, field, "criterion", "points", tags=f.tags(item.get("tags"), f"{field}.tags"))


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    The canary goes into the metadata, which no prompt contains.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    ideal = f.optional_mapping(row, "ideal_completions_data")
    return f.example(
        id=f.identifier(row, "prompt_id", where),
        messages=f.published_messages(row.get("prompt"), "prompt"),
        rubric=f.rubric(row.get("rubrics"), "rubrics", criterion),
        scoring="healthbench",
        reference=f.optional_text(ideal, "ideal_completion", "ideal_completions_data.ideal_completion"),
        domain="medicine",
        tags=f.tags(row.get("example_tags"), "example_tags"),
        metadata=f.kept(row, "canary") | f.kept(ideal, "ideal_completions_group"),
    )
