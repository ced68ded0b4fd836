"""Rubrics as Rewards: RaR-Medicine and RaR-Science (ScaleAI).

    {question, reference_answer, question_source, rubric: [{description, title, weight}], rubric_list, rubric_count}

A description starts with its label: "Essential Criteria: ", "Important ...", "Optional ...", "Pitfall ...". The label
decides the weight, as in the paper's explicit score; the published number is kept in `metadata["published_weights"]`.
The sign of a pitfall is derived from its wording, its title and the rest of its row (`rgsd.data.schemas.polarity`,
docs/data.md), and a tag records it. A pitfall whose sign cannot be decided is left out of the rubric;
`metadata["left_out"]` lists it with the reason.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.data.schemas import polarity as _polarity
from rgsd.rubrics import Criterion, Example, Rubric

NAME = "rar"
SUMMARY = "RaR-Medicine and RaR-Science: question, reference answer, labelled criteria, pitfalls' polarity read"

EXPLICIT_WEIGHTS = {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": 0.9}
"""Label -> weight in the paper's explicit score."""

_SIGNS = {"avoid": 1.0, "commit": -1.0}
_LABEL = re.compile(r"\s*(?P<word>[A-Za-z]+)\s+criteri(?:a|on)\s*[:.\u2013\u2014-]\s*", re.IGNORECASE)


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    if not ("rubric" in row or "rubric_list" in row):
        return False
    return any(k in row for k in ("reference_answer", "question_source", "rubric_list", "rubric_count"))


@dataclass(frozen=True, slots=True)
class _Item:
    """A published item whose sign is not decided yet."""

    importance: str
    text: str
    title: str | None
    published: float | None
    tags: tuple[str, ...]


def _item(value: Any, field: str) -> _Item:
    """Read an item {description, title, weight}, or a plain description, as in rubric_list.

    Raises:
        FieldError: If a part is malformed.
    """
    value = f.from_json(value)
    item = {"description": value} if isinstance(value, str) else f.item(value, field)
    description = f.text(item, "description", f"{field}.description")
    published = _published(item, field, needed=not isinstance(value, str))
    importance, text, tags = _importance(description, published, field)
    return _Item(importance, text, f.optional_text(item, "title", f"{field}.title"), published, tags)


def _signed(items: list[_Item], reference: str | None, field: str) -> tuple[Rubric, list[float | None], list[f.Row]]:
    """The rubric, its published weights, and the pitfalls whose sign cannot be decided."""
    row = _polarity.Row.of((item.text for item in items if item.importance != "pitfall"), reference)
    kept: list[Criterion] = []
    weights: list[float | None] = []
    left_out: list[f.Row] = []
    for item in items:
        sign, tags = 1.0, item.tags
        if item.importance == "pitfall":
            decision = _polarity.decide(item.text, item.title, row)
            if decision not in _SIGNS:
                left_out.append({"criterion": item.text, "title": item.title, "why": decision})
                continue
            sign, tags = _SIGNS[decision], (*tags, f"polarity:{decision}")
        kept.append(Criterion(item.text, sign * EXPLICIT_WEIGHTS[item.importance], item.title, tags))
        weights.append(item.published)
    if not kept:
        expected = "at least one criterion of known polarity"
        raise f.refuse(field, [item.text for item in items], expected, "reword the pitfalls, or remove the row")
    return Rubric(tuple(kept)), weights, left_out


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    key = "rubric_list" if f.is_missing(row.get("rubric")) and "rubric_list" in row else "rubric"
    source = f.optional_text(row, "question_source")
    reference = f.optional_text(row, "reference_answer")
    rubric, metadata = read_rubric(row.get(key), key, reference)
    return f.example(
        id=f.identifier(row, "id", where),
        messages=f.user_turn(row, "question"),
        rubric=rubric,
        scoring="rar_explicit",
        reference=reference,
        domain="medicine" if source and "medical" in source.casefold() else None,
        metadata=f.kept(row, "question_source") | metadata,
    )


def read_rubric(value: Any, field: str, reference: str | None) -> tuple[Rubric, dict[str, Any]]:
    """Turn a published list into a rubric and its metadata ("published_weights", and "left_out" if a pitfall was).

    Raises:
        FieldError: If a part is malformed, or no criterion is left.
    """
    items = [_item(value, f"{field}[{number}]") for number, value in enumerate(f.items(value, field))]
    rubric, published, left_out = _signed(items, reference, field)
    return rubric, {"published_weights": published} | ({"left_out": left_out} if left_out else {})


def _published(item: f.Row, field: str, *, needed: bool) -> float | None:
    return f.weight(item, "weight", f"{field}.weight") if needed or "weight" in item else None


def _importance(description: str, published: float | None, field: str) -> tuple[str, str, tuple[str, ...]]:
    """The label, the text without it, and tags.

    Some criteria of RaR-Science have no label, and a few of RaR-Medicine have a misspelled one ("Esssential"), which is
    read as the label it resembles. Without a label, the published weight decides, by the scale that the generator was
    given (5 essential, 3 and 4 important, 1 and 2 optional, negative a pitfall), and the tag "importance:assumed" is
    added.
    """
    label = _LABEL.match(description)
    text = description[label.end() :].strip() if label else description.strip()
    if not text:
        raise f.refuse(f"{field}.description", description, "a criterion after its label", "write the criterion")
    close = difflib.get_close_matches(label["word"].casefold(), EXPLICIT_WEIGHTS, n=1, cutoff=0.75) if label else []
    if close:
        return close[0], text, (f"importance:{_checked(close[0], published, field)}",)
    if published is None:
        expected = '"Essential Criteria: ", "Important ...", "Optional ..." or "Pitfall ..." at its beginning'
        raise f.refuse(f"{field}.description", description, expected, "add the label, or a weight")
    importance = _by_weight(published)
    return importance, text, (f"importance:{importance}", "importance:assumed")


def _checked(importance: str, published: float | None, field: str) -> str:
    if importance != "pitfall" and published is not None and published < 0:
        expected = f"a positive number under the label {importance!r}"
        raise f.refuse(f"{field}.weight", published, expected, "correct the sign, or label it a pitfall")
    return importance


def _by_weight(published: float) -> str:
    if published < 0:
        return "pitfall"
    return "essential" if published >= 5 else "important" if published >= 3 else "optional"
