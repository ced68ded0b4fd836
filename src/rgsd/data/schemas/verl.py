"""The layout of verl, in which any of the published datasets may be stored.

    {prompt: [{role, content}], data_source, ability, reward_model: {ground_truth, rubrics, style}, extra_info}

The items of reward_model.rubrics have the form of some published schema. Their keys decide which schema reads them, and
the example gets the score of that dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rgsd.data.schemas import fields as f
from rgsd.data.schemas import healthbench_professional, prbench, rar, researchqa, researchrubrics, rubrichub
from rgsd.rubrics import Criterion, Example

NAME = "verl"
SUMMARY = "verl layout of any of them: prompt, data_source, reward_model.rubrics, extra_info"

_RUBRICS = "reward_model.rubrics"
Reader = Callable[[Any, str], Criterion]

# Key that identifies an item's schema -> the reader of such items, and the score of their dataset.
_BY_KEY: dict[str, tuple[Reader, str]] = {
    "criterion_text": (healthbench_professional.criterion, "healthbench_professional"),
    "rubric_item": (researchqa.criterion, "researchqa"),
    "annotations": (prbench.criterion, "prbench"),
    "weight": (researchrubrics.criterion, "satisfaction"),
}


def matches(row: f.Row) -> bool:
    """Whether a row has this schema's keys."""
    return "reward_model" in row and "Rubrics" not in row


def parse(row: f.Row, where: f.Where) -> Example:
    """Turn a row into an example.

    Raises:
        FieldError: If a field is malformed.
    """
    row = f.record(row)
    reward = f.mapping(row, "reward_model")
    items = f.from_json(reward.get("rubrics"))
    extra = f.optional_mapping(row, "extra_info")
    metadata = rubrichub.metadata(row, reward)
    reference = rubrichub.ground_truth(reward)
    if _is_rar(items):
        rubric, more = rar.read_rubric(items, _RUBRICS, reference)
        metadata, scoring = metadata | more, "rar_explicit"
    else:
        reader, scoring = _reader(items, str(row.get("data_source") or ""))
        rubric = f.rubric(items, _RUBRICS, reader)
    return f.example(
        id=f.identifier(extra, "id", where),
        messages=f.published_messages(row.get("prompt"), "prompt"),
        rubric=rubric,
        scoring=scoring,
        reference=reference,
        domain=rubrichub.domain(row),
        metadata=metadata,
    )


def _is_rar(items: Any) -> bool:
    """Whether the items are those of RaR, whose pitfalls can only be read together with the rest of the row."""
    first = f.from_json(items[0]) if isinstance(items, list) and items else None
    return isinstance(first, Mapping) and not f.is_missing(first.get("description"))


def _reader(items: Any, data_source: str) -> tuple[Reader, str]:
    first = f.from_json(items[0]) if isinstance(items, list) and items else None
    if isinstance(first, Mapping):
        for key, reader in _BY_KEY.items():
            if not f.is_missing(first.get(key)):
                return reader
    # {criterion, points, tags}: items of HealthBench and of RubricHub look alike; the data source tells them apart.
    source = data_source.casefold()
    if "healthbench" in source or "health_bench" in source:
        return rubrichub.criterion, "healthbench"
    return rubrichub.criterion, "rubrichub" if _has_verifier(first) or "rubrichub" in source else "satisfaction"


def _has_verifier(item: Any) -> bool:
    tags = item.get("tags") if isinstance(item, Mapping) else None
    return isinstance(tags, Mapping) and "verifier" in tags
