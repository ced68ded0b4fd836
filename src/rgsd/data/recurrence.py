"""How much of a data set's rubric weight recurs across prompts.

A criterion recurs if another prompt's rubric has it too, with the same sign and the same or nearly the same text. A
model can learn such a criterion from any prompt's rubric, so gains on it do not show that the right rubric mattered. It
is an upper bound: where other rubrics penalise the same thing, no rubric but the right one teaches it.
"Nearly the same" follows the rule for near-duplicate prompts (`close_texts.py`): one changed word makes a short
criterion another one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rgsd.data.similarity import Links, NearDuplicates, near_duplicates, tokens
from rgsd.rubrics import Example

LISTED = 5
"""Most frequent recurring criteria that are listed."""


@dataclass(frozen=True, slots=True)
class RecurringCriterion:
    """A criterion that several prompts' rubrics have.

    Args:
        text: Its most frequent wording.
        is_pitfall: Whether its weight is negative.
        n_prompts: Prompts whose rubrics have it.
        weight_share: Its share of all rubric weight, in [0, 1].
    """

    text: str
    is_pitfall: bool
    n_prompts: int
    weight_share: float


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What recurs in a data set.

    Args:
        weight_share: Share of all rubric weight, as absolute values, on recurring criteria; None without a criterion.
        criteria: The recurring criteria, the most frequent first.
    """

    weight_share: float | None
    criteria: tuple[RecurringCriterion, ...]

    def to_row(self) -> dict[str, Any]:
        """As run.json and the summary of the data hold it."""
        first = [
            {"criterion": c.text, "is_pitfall": c.is_pitfall, "prompts": c.n_prompts, "weight_share": c.weight_share}
            for c in self.criteria[:LISTED]
        ]
        return {"weight_share": self.weight_share, "criteria": len(self.criteria), "first": first}


def recurrence(examples: Sequence[Example], groups: Sequence[NearDuplicates] | None = None) -> Recurrence:
    """Find the criteria that recur across prompts.

    Args:
        examples: The data. Copies of a prompt, exact or near, count as one prompt.
        groups: `near_duplicates` of the examples, where they are known.
    """
    prompt_of = _prompts(examples, near_duplicates(examples) if groups is None else groups)
    wordings: defaultdict[tuple[tuple[str, ...], bool], Counter[str]] = defaultdict(Counter)
    prompts: defaultdict[tuple[tuple[str, ...], bool], set[int]] = defaultdict(set)
    weights: defaultdict[tuple[tuple[str, ...], bool], list[float]] = defaultdict(list)
    folded: dict[str, tuple[str, ...]] = {}
    for example, prompt in zip(examples, prompt_of, strict=True):
        for criterion in example.rubric:
            text = criterion.text
            if text not in folded:
                # Text without a token, such as one emoji, is compared as it is.
                folded[text] = tokens(text) or (text,)
            key = (folded[text], criterion.is_pitfall)
            wordings[key][text] += 1
            prompts[key].add(prompt)
            weights[key].append(abs(criterion.weight))
    total = math.fsum(w for own in weights.values() for w in own)
    if not total:
        return Recurrence(None, ())
    recurring = []
    for keys in _alike(list(weights)):
        n_prompts = len(set().union(*(prompts[key] for key in keys)))
        if n_prompts > 1:
            weight = math.fsum(w for key in keys for w in weights[key])
            text = sum((wordings[key] for key in keys), Counter()).most_common(1)[0][0]
            recurring.append(RecurringCriterion(text, keys[0][1], n_prompts, weight / total))
    recurring.sort(key=lambda c: (-c.n_prompts, -c.weight_share, c.text))
    return Recurrence(min(1.0, math.fsum(c.weight_share for c in recurring)), tuple(recurring))


def in_words(row: dict[str, Any]) -> str:
    """`Recurrence.to_row` in a sentence; empty when there is no criterion."""
    share = row.get("weight_share")
    if share is None:
        return ""
    if not share:
        return "no criterion recurs across prompts"
    percent = f"{share:.0%}".replace("%", " %") if share >= 0.005 else "less than 1 %"
    return f"{percent} of the rubric weight recurs across prompts: a model can learn up to that share from any rubric"


def _prompts(examples: Sequence[Example], groups: Sequence[NearDuplicates]) -> list[int]:
    """A number for each example's prompt, the same for copies."""
    first: dict[str, int] = {}
    for group in groups:
        number = min(first.setdefault(e.prompt_key, len(first)) for e in group.examples)
        first.update((e.prompt_key, number) for e in group.examples)
    return [first.setdefault(e.prompt_key, len(examples) + i) for i, e in enumerate(examples)]


def _alike(keys: list[tuple[tuple[str, ...], bool]]) -> Iterator[list[tuple[tuple[str, ...], bool]]]:
    """The criteria in groups of the same sign and nearly the same text."""
    from rgsd.data.close_texts import close_pairs  # imports numpy, which most users of rgsd.data do not need

    links = Links(len(keys))

    def needs_no_comparison(i: int, j: int) -> bool:
        return keys[i][1] != keys[j][1] or links.root(i) == links.root(j)

    for i, j in close_pairs([text for text, _ in keys], needs_no_comparison):
        links.join(i, j, "close text")
    yield from ([keys[i] for i in group] for group in links.groups())
