"""HealthBench Professional (OpenAI).

{id, conversation: {messages: [{role, content}]}, rubric_items: [{criterion_text, points}],
 use_case, type, difficulty, specialty, physician_response}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.rubrics import Criterion, Example, Message

NAME = "healthbench_professional"
SUMMARY = "HealthBench Professional: conversation, rubric_items with signed points, a physician's response"


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "rubric_items" in row


def criterion(value: Any, field: str) -> Criterion:
    """Read an item {criterion_text, points}.

    Raises:
        FieldError: If a part is malformed.
    """
    return f.criterion(f.item(value, field), field, "criterion_text", "points")


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    return f.example(
        id=f.identifier(row, "id", where),
        messages=_conversation(row.get("conversation")),
        rubric=f.rubric(row.get("rubric_items"), "rubric_items", criterion),
        scoring="healthbench_professional",
        reference=f.optional_text(row, "physician_response"),
        domain=f.optional_text(row, "specialty"),
        tags=tuple(t for key in ("use_case", "type", "difficulty") for t in f.labelled(key, row.get(key))),
        metadata=f.kept(row, "canary", "canary_string"),
    )


def _conversation(value: Any) -> tuple[Message, ...]:
    """The turns, from {messages: [...]} or from a list of turns."""
    value = f.from_json(value)
    if isinstance(value, Mapping):
        return f.published_messages(value.get("messages"), "conversation.messages")
    return f.published_messages(value, "conversation")
