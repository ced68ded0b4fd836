"""The export of RubricHub's synthesis pipeline.

{question, id, rubrics: [{criterion, points}]}
"""

from __future__ import annotations

from rgsd.data.schemas import fields as f
from rgsd.data.schemas import rubrichub
from rgsd.rubrics import Example

NAME = "rubrichub_synthesis"
SUMMARY = "RubricHub's synthesis export: a question with criteria and points"


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "question" in row and "rubrics" in row and "prompt_id" not in row


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    return f.example(
        id=f.identifier(row, "id", where),
        messages=f.user_turn(row, "question"),
        rubric=f.rubric(row.get("rubrics"), "rubrics", rubrichub.criterion),
        scoring="rubrichub",
    )
