"""Rubrics as Rewards: RaR-Medicine and RaR-Science (ScaleAI).

    {question, reference_answer, question_source, rubric: [{description, title, weight}], rubric_list, rubric_count}

A description begins with its label: "Essential Criteria: ", "Important ...", "Optional ...", "Pitfall ...". The label
gives the weight of the paper's explicit score; the published number is kept in `metadata["published_weights"]`. How a
pitfall is worded decides its sign (see `rgsd.datasets._polarity` and docs/data.md); what was decided is a tag.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from rgsd.datasets import _fields as f
from rgsd.datasets import _polarity
from rgsd.rubrics import Criterion, Example

NAME = "rar"
SUMMARY = "RaR-Medicine and RaR-Science: question, reference answer, labelled criteria, pitfalls' polarity read"

EXPLICIT_WEIGHTS = {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": 0.9}
"""Label -> weight in the paper's explicit score."""

_LABEL = re.compile(r"\s*(?P<word>[A-Za-z]+)\s+criteri(?:a|on)\s*[:.\u2013\u2014-]\s*", re.IGNORECASE)


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    if not ("rubric" in row or "rubric_list" in row):
        return False
    return any(k in row for k in ("reference_answer", "question_source", "rubric_list", "rubric_count"))


def criterion(value: Any, field: str) -> Criterion:
    """One item {description, title, weight}, or a description alone as rubric_list may have it.

    Raises:
        FieldError: naming the malformed part.
    """
    value = f.from_json(value)
    item = {"description": value} if isinstance(value, str) else f.item(value, field)
    description = f.text(item, "description", f"{field}.description")
    published = _published(item, field, needed=not isinstance(value, str))
    importance, text, tags = _importance(description, published, field)
    sign = 1.0
    if importance == "pitfall":
        sign, tag = _polarity_of(text, published)
        tags += (tag,)
    title = f.optional_text(item, "title", f"{field}.title")
    return Criterion(text=text, weight=sign * EXPLICIT_WEIGHTS[importance], title=title, tags=tags)


def parse(row: f.Row, where: f.Where) -> Example:
    """One row as an example.

    Raises:
        FieldError: naming the malformed field.
    """
    row = f.record(row)
    key = "rubric_list" if f.is_missing(row.get("rubric")) and "rubric_list" in row else "rubric"
    source = f.optional_text(row, "question_source")
    return f.example(
        id=f.identifier(row, "id", where),
        messages=f.user_turn(row, "question"),
        rubric=f.rubric(row.get(key), key, criterion),
        scoring="rar_explicit",
        reference=f.optional_text(row, "reference_answer"),
        domain="medicine" if source and "medical" in source.casefold() else None,
        metadata=f.kept(row, "question_source") | {"published_weights": published_weights(row.get(key))},
    )


def published_weights(items: Any) -> list[float | None]:
    """The published numbers, one a criterion; None where an item has none."""
    decoded = [f.from_json(item) for item in f.from_json(items)]
    return [item.get("weight") if isinstance(item, dict) else None for item in decoded]


def _published(item: f.Row, field: str, *, needed: bool) -> float | None:
    return f.weight(item, "weight", f"{field}.weight") if needed or "weight" in item else None


def _importance(description: str, published: float | None, field: str) -> tuple[str, str, tuple[str, ...]]:
    """Label, text without it, and tags.

    Some criteria of RaR-Science have no label, and a few of RaR-Medicine a misspelt one
    ("Esssential"). A near miss is read as the label it misses. Without one, the published number decides by the
    generator's own scale (5 essential, 3 and 4 important, 1 and 2 optional, negative a pitfall), and a tag says so.
    """
    found = _LABEL.match(description)
    text = description[found.end() :].strip() if found else description.strip()
    if not text:
        raise f.refuse(f"{field}.description", description, "a criterion after its label", "write the criterion")
    near = difflib.get_close_matches(found["word"].casefold(), EXPLICIT_WEIGHTS, n=1, cutoff=0.75) if found else []
    if near:
        return near[0], text, (f"importance:{_checked(near[0], published, field)}",)
    if published is None:
        wanted = '"Essential Criteria: ", "Important ...", "Optional ..." or "Pitfall ..." at its beginning'
        raise f.refuse(f"{field}.description", description, wanted, "add the label, or a weight")
    importance = _by_weight(published)
    return importance, text, (f"importance:{importance}", "importance:assumed")


def _checked(importance: str, published: float | None, field: str) -> str:
    if importance != "pitfall" and published is not None and published < 0:
        wanted = f"a positive number under the label {importance!r}"
        raise f.refuse(f"{field}.weight", published, wanted, "correct the sign, or label it a pitfall")
    return importance


def _by_weight(published: float) -> str:
    if published < 0:
        return "pitfall"
    return "essential" if published >= 5 else "important" if published >= 3 else "optional"


def _polarity_of(text: str, published: float | None) -> tuple[float, str]:
    """Sign and tag of a pitfall: by its wording, else by the published sign, else as a bad act."""
    reading = _polarity.read(text)
    if reading is not None:
        return (1.0 if reading == "avoid" else -1.0), f"polarity:{reading}"
    return (1.0 if published is not None and published > 0 else -1.0), "polarity:assumed"
