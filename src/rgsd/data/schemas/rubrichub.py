"""RubricHub_v1 (sojuL, Apache-2.0): the RL half, RuRL/rurbichub_v1_<Domain>.parquet.

    {prompt: [{role, content}], data_source, ability, Rubrics: [{criterion, points}],
     reward_model: {style, ground_truth, rubrics: [{criterion, points, tags: {verifier, function, parameters}}]},
     extra_info}

A row has its criteria twice. The inner list is read, because only it has tags; the outer one must agree with it.
"""

from __future__ import annotations

from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.rubrics import Criterion, Example, Rubric

NAME = "rubrichub"
SUMMARY = "RubricHub_v1 (RuRL): prompt, Rubrics with positive points, reward_model with each criterion's verifier"


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "Rubrics" in row


def criterion(value: Any, field: str) -> Criterion:
    """Read an item {criterion, points, tags?}; the tags become "verifier:rule", "function:..." and "parameters:{...}".

    Raises:
        FieldError: If a part is malformed.
    """
    item = f.item(value, field)
    return f.criterion(item, field, "criterion", "points", tags=f.tags(item.get("tags"), f"{field}.tags"))


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed, or the two lists of criteria differ.
    """
    row = f.record(row)
    reward = f.optional_mapping(row, "reward_model")
    return f.example(
        id=where.default_id,
        messages=f.published_messages(row.get("prompt"), "prompt"),
        rubric=_rubric(row.get("Rubrics"), reward.get("rubrics")),
        scoring="rubrichub",
        reference=ground_truth(reward),
        domain=domain(row),
        metadata=metadata(row, reward),
    )


def ground_truth(reward: f.Row) -> str | None:
    """The reference answer of a reward_model; None if it is empty, as mostly in RubricHub, or not a string."""
    value = reward.get("ground_truth")
    return value if isinstance(value, str) and value.strip() else None


def domain(row: f.Row) -> str | None:
    """The ability, or else the data source. In lower case, since RubricHub has both "Medical" and "chat"."""
    name = f.optional_text(row, "ability") or f.optional_text(row, "data_source")
    return name.casefold() if name else None


def metadata(row: f.Row, reward: f.Row) -> dict[str, Any]:
    """The metadata: data source, ability, extra_info, and a ground truth that is not a string (parameters of a rule).

    The copies of the prompt and of the rubric in RubricHub's extra_info are left out.
    """
    extra = f.optional_mapping(row, "extra_info")
    copies = ("reward_model", "prompt", "rubrics", "Rubrics")
    own = {key: value for key, value in extra.items() if key not in copies}
    truth = {} if isinstance(reward.get("ground_truth"), str) else f.kept(reward, "ground_truth")
    return f.kept({**row, "extra_info": own}, "data_source", "ability", "extra_info") | truth


def _rubric(outer: Any, inner: Any) -> Rubric:
    inner_path = "reward_model.rubrics"
    if f.is_missing(inner):
        return f.rubric(outer, "Rubrics", criterion)
    rubric = f.rubric(inner, inner_path, criterion)
    if not f.is_missing(outer):
        _check_same(f.rubric(outer, "Rubrics", criterion), rubric, inner_path)
    return rubric


def _check_same(outer: Rubric, inner: Rubric, inner_path: str) -> None:
    remedy = 'make the two lists agree, or pass schema="verl" to read reward_model.rubrics alone'
    if len(outer) != len(inner):
        raise f.FieldError("Rubrics", f"got {len(outer)} criteria, expected the {len(inner)} of {inner_path}: {remedy}")
    for number, (a, b) in enumerate(zip(outer, inner, strict=True)):
        if (a.text, a.weight) != (b.text, b.weight):
            got = f"{a.text[:40]!r} with {a.weight:g} points"
            expected = f"{b.text[:40]!r} with {b.weight:g} points, as in {inner_path}[{number}]"
            raise f.FieldError(f"Rubrics[{number}]", f"got {got}, expected {expected}: {remedy}")
