"""PRBench (ScaleAI, CC-BY-4.0).

    {task, turns, field, topic, expert, prompt_0, response_0, prompt_1, ...,
     rubric: [{id, title, annotations: {criteria_category, criteria_description, weight_class, <class>_weight}}]}

An annotation has a weight column for every class, and some hold older values. Only the column of its own
weight_class counts.
"""

from __future__ import annotations

import re
from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.rubrics import Criterion, Example, Message

NAME = "prbench"
SUMMARY = "PRBench: prompt_0, response_0, ... turns, and a rubric whose weight is in its class's column"

_PROMPT = re.compile(r"prompt_(\d+)")


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "rubric" in row and ("prompt_0" in row or ("task" in row and "turns" in row))


def criterion(value: Any, field: str) -> Criterion:
    """Read an item {id, title, annotations}.

    Raises:
        FieldError: If a part is malformed.
    """
    item = f.item(value, field)
    field = f"{field}.annotations"
    notes = f.mapping(item, "annotations", field)
    weight_class = f.text(notes, "weight_class", f"{field}.weight_class")
    category = f.optional_text(notes, "criteria_category", f"{field}.criteria_category")
    return Criterion(
        text=f.text(notes, "criteria_description", f"{field}.criteria_description"),
        weight=_weight(notes, weight_class, field),
        title=f.optional_text(item, "title"),
        tags=f.labelled("category", category) + f.labelled("class", weight_class),
    )


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    return f.example(
        id=f.identifier(row, "task", where),
        messages=_turns(row),
        rubric=f.rubric(row.get("rubric"), "rubric", criterion),
        scoring="prbench",
        domain=f.optional_text(row, "field"),
        tags=f.labelled("topic", row.get("topic")) + f.labelled("expert", row.get("expert")),
        metadata=f.kept(row, "turns"),
    )


def _weight(notes: f.Row, weight_class: str, field: str) -> float:
    columns = {_folded(k.removesuffix("_weight")): k for k in notes if k.endswith("_weight")}
    column = columns.get(_folded(weight_class))
    if column is None:
        known = ", ".join(sorted(columns)) or "none"
        message = f"got the class {weight_class!r}, expected one that has a <class>_weight column (these have: {known})"
        raise f.FieldError(f"{field}.weight_class", f"{message}: correct the class, or add its weight")
    weight = f.weight(notes, column, f"{field}.{column}")
    if "detrimental" in _folded(weight_class):
        # A detrimental criterion costs points, whether its column holds -5 or 5.
        return -abs(weight)
    if weight < 0:
        expected = f"a positive number, since the class is {weight_class!r}"
        raise f.refuse(f"{field}.{column}", weight, expected, "correct the sign, or the class")
    return weight


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()


def _turns(row: f.Row) -> tuple[Message, ...]:
    """prompt_0, response_0, prompt_1, ... up to the last prompt. A response to that is not part of the prompt."""
    numbers = [int(m[1]) for key in row if (m := _PROMPT.fullmatch(key)) and f.optional_text(row, key)]
    last = max(numbers, default=0)
    turns: list[Message] = []
    for number in range(last + 1):
        turns.append({"role": "user", "content": _prompt(row, number)})
        if number < last:
            turns.append({"role": "assistant", "content": f.text(row, f"response_{number}")})
    _check_count(row.get("turns"), last + 1)
    return tuple(turns)


def _prompt(row: f.Row, number: int) -> str:
    """A user turn, after the reference texts that were shown with it."""
    texts = f.tags(row.get(f"reference_texts_{number}"), f"reference_texts_{number}")
    return "\n\n".join([*texts, f.text(row, f"prompt_{number}")])


def _check_count(turns: Any, n_prompts: int) -> None:
    if f.is_missing(turns):
        return
    if isinstance(turns, bool) or not isinstance(turns, int | float) or turns != n_prompts:
        remedy = "add the missing prompt_N, or correct the count"
        raise f.refuse("turns", turns, f"{n_prompts}, the number of prompts in the row", remedy)
