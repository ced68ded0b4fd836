"""Rubrics as Rewards: RaR-Medicine and RaR-Science (ScaleAI).

    {question, reference_answer, question_source, rubric: [{description, title, weight}], rubric_list, rubric_count}

A description begins with its label: "Essential Criteria: ", "Important ...", "Optional ...", "Pitfall ...". The label
gives the weight of the paper's explicit score; the published number is kept in `metadata["published_weights"]`. A
pitfall's sign comes from its wording, its title and the rest of its row (see `rgsd.data.schemas.polarity` and
docs/data.md); what was decided is a tag. A pitfall without a decision is not in the rubric: `metadata["left_out"]`
lists it, and why.
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
    """One published item before its sign is known."""

    importance: str
    text: str
    title: str | None
    published: float | None
    tags: tuple[str, ...]


def _item(value: Any, field: str) -> _Item:
    """One item {description, title, weight}, or a description alone as rubric_list may have it.

    Raises:
        FieldError: naming the malformed part.
    """
    value = f.from_json(value)
    item = {"description": value} if isinstance(value, str) else f.item(value, field)
    description = f.text(item, "description", f"{field}.description")
    published = _published(item, field, needed=not isinstance(value, str))
    importance, text, tags = _importance(description, published, field)
    return _Item(importance, text, f.optional_text(item, "title", f"{field}.title"), published, tags)


def _signed(items: list[_Item], reference: str | None, field: str) -> tuple[Rubric, list[float | None], list[f.Row]]:
    """The rubric, its published numbers, and the pitfalls without a decision."""
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
        wanted = "at least one criterion that says whether meeting it is good"
        raise f.refuse(field, [item.text for item in items], wanted, "reword the pitfalls, or remove the row")
    return Rubric(tuple(kept)), weights, left_out


def parse(row: f.Row, where: f.Where) -> Example:
    """One row as an example.

    Raises:
        FieldError: naming the malformed field.
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
    """A published list as a rubric, and its metadata: "published_weights", and "left_out" when a pitfall was.

    Raises:
        FieldError: naming the malformed part, or when no criterion is left.
    """
    items = [_item(value, f"{field}[{number}]") for number, value in enumerate(f.items(value, field))]
    rubric, published, left_out = _signed(items, reference, field)
    return rubric, {"published_weights": published} | ({"left_out": left_out} if left_out else {})


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
