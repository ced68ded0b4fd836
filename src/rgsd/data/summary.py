"""Summarize loaded data in numbers and lines of text."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rgsd.data.loading import LISTED_PROBLEMS, Loaded
from rgsd.data.recurrence import in_words, recurrence
from rgsd.data.similarity import NearDuplicates, near_duplicates
from rgsd.data.splitting import deduplicate
from rgsd.rubrics import Criterion, Example

_TOP_DOMAINS = 10
_LISTED_IDS = 10
_LISTED_GROUPS, _LISTED_MEMBERS, _LISTED_CHARACTERS = 5, 3, 100


def summarise(loaded: Loaded) -> dict[str, Any]:
    """Summarize loaded data in JSON types.

    Lengths and counts are given as {"min", "median", "max"}; shares are in [0, 1].
    """
    examples = loaded.examples
    criteria = [criterion for example in examples for criterion in example.rubric]
    distinct = deduplicate(examples).examples
    groups = near_duplicates(distinct)
    return {
        "schema": loaded.schema,
        "files": list(loaded.files),
        "rows": loaded.n_rows,
        "examples": len(examples),
        "scoring": _counts(e.scoring for e in examples),
        "criteria": {"total": len(criteria), "per_example": _spread([len(e.rubric) for e in examples])},
        "weights": _weights(criteria),
        "polarity": _counts(t for c in criteria for t in c.tags if t.startswith("polarity:")),
        "left_out": _left_out(examples),
        "checks": {"criteria_share": _share(c.check is not None for c in criteria)}
        | {"examples_share": _share(e.rubric.is_checkable for e in examples)},
        "prompt_characters": _spread([len(_prompt(e)) for e in examples]),
        "prompt_words": _spread([len(_prompt(e).split()) for e in examples]),
        "turns": _spread([len(e.messages) for e in examples]),
        "references": sum(e.reference is not None for e in examples),
        "domains": _counts((e.domain or "(none)" for e in examples), top=_TOP_DOMAINS),
        "duplicates": _duplicates(examples),
        "near_duplicates": _near_duplicates(groups),
        "recurrence": recurrence(distinct, groups).to_row(),
        "problems": {"count": len(loaded.problems), "first": [str(p) for p in loaded.problems[:LISTED_PROBLEMS]]},
    }


def describe(loaded: Loaded) -> str:
    """The summary as lines of text."""
    summary = summarise(loaded)
    weights, checks, duplicates = summary["weights"], summary["checks"], summary["duplicates"]
    left_out, near = summary["left_out"], summary["near_duplicates"]
    lines = [
        ("files", ", ".join(summary["files"]) or "none"),
        ("schema", f"{summary['schema']}, scored by {_named(summary['scoring']) or 'nothing'}"),
        ("rows", f"{summary['rows']:,}: {summary['examples']:,} examples, {summary['problems']['count']:,} bad rows"),
        ("criteria", f"{summary['criteria']['total']:,}, {_range(summary['criteria']['per_example'])} per example"),
        ("weights", f"{weights['positive']:,} positive, {weights['negative']:,} negative, {_range(weights)}"),
        ("polarity", _named(summary["polarity"])),
        ("left out", f"{left_out['count']:,} pitfalls of unknown polarity" if left_out["count"] else ""),
        (
            "checks",
            f"{checks['criteria_share']:.0%} of criteria; all criteria of {checks['examples_share']:.0%} of examples",
        ),
        ("prompts", f"{_range(summary['prompt_words'])} words, {_range(summary['prompt_characters'])} characters"),
        ("turns", f"{_range(summary['turns'])} per prompt"),
        ("references", f"{summary['references']:,}"),
        ("domains", _named(summary["domains"])),
        ("duplicates", f"{duplicates['count']:,} repeated prompts{_among(duplicates['first_ids'])}"),
        ("near", _near_in_words(near)),
        ("recurrence", in_words(summary["recurrence"])),
    ]
    text = [f"{name:<11} {value}" for name, value in lines if value]
    text += [f"left out: {item['id']}: {item['criterion']} ({item['why']})" for item in left_out["first"]]
    text += [f"near-duplicates ({', '.join(group['why'])}): {' | '.join(group['prompts'])}" for group in near["first"]]
    text += [_recurring_line(criterion) for criterion in summary["recurrence"]["first"]]
    return "\n".join([*text, *(f"bad row: {problem}" for problem in summary["problems"]["first"])])


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _range(spread: dict[str, Any]) -> str:
    if spread["min"] is None:
        return "none"
    median = f" (median {spread['median']:g})" if "median" in spread else ""
    return f"{spread['min']:g} to {spread['max']:g}{median}"


def _among(ids: list[str]) -> str:
    return f", for example {', '.join(ids)}" if ids else ""


def _weights(criteria: Sequence[Criterion]) -> dict[str, Any]:
    weights = [c.weight for c in criteria]
    return {
        "positive": sum(w > 0 for w in weights),
        "negative": sum(w < 0 for w in weights),
        "min": min(weights, default=None),
        "max": max(weights, default=None),
    }


def _left_out(examples: Sequence[Example]) -> dict[str, Any]:
    """Criteria that are neither shown nor scored, because it is unknown whether meeting them is good."""
    items = [{"id": e.id, **item} for e in examples for item in e.metadata.get("left_out") or () if _is_item(item)]
    return {"count": len(items), "why": _counts(i["why"] for i in items), "first": items[:LISTED_PROBLEMS]}


def _is_item(item: object) -> bool:
    return isinstance(item, dict) and {"criterion", "why"} <= set(item)


def _duplicates(examples: Sequence[Example]) -> dict[str, Any]:
    dropped = deduplicate(examples).dropped
    return {"count": len(dropped), "first_ids": [e.id for e in dropped[:_LISTED_IDS]]}


def _near_duplicates(groups: Sequence[NearDuplicates]) -> dict[str, Any]:
    """Groups of prompts that a split keeps on one side. Repeated prompts are counted in `_duplicates`."""
    return {
        "groups": len(groups),
        "prompts": sum(len(group.examples) for group in groups),
        "first": [
            {"why": list(group.why), "prompts": [_line(e) for e in group.examples[:_LISTED_MEMBERS]]}
            for group in groups[:_LISTED_GROUPS]
        ],
    }


def _near_in_words(near: dict[str, Any]) -> str:
    return f"{near['groups']:,} groups of near-duplicates, {near['prompts']:,} prompts" if near["groups"] else ""


def _recurring_line(criterion: dict[str, Any]) -> str:
    sign = "pitfall" if criterion["is_pitfall"] else "criterion"
    text = textwrap.shorten(criterion["criterion"], _LISTED_CHARACTERS, placeholder=" ...")
    return f"recurring {sign}: {text} ({criterion['prompts']:,} prompts, {criterion['weight_share']:.1%} of the weight)"


def _line(example: Example) -> str:
    return f"{example.id}: {textwrap.shorten(_prompt(example), _LISTED_CHARACTERS, placeholder=' ...')}"


def _prompt(example: Example) -> str:
    return "\n".join(message["content"] for message in example.messages)


def _spread(numbers: Sequence[int]) -> dict[str, float | int | None]:
    if not numbers:
        return {"min": None, "median": None, "max": None}
    return {"min": min(numbers), "median": statistics.median(numbers), "max": max(numbers)}


def _counts(names: Iterable[str], top: int | None = None) -> dict[str, int]:
    return dict(Counter(names).most_common(top))


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0
