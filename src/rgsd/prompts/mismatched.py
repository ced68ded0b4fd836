"""The mismatched control: which example's rubric is shown with each prompt, so that none is shown with its own."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from rgsd.errors import ConfigError
from rgsd.prompts.rendering import folded
from rgsd.rubrics import Example, Rubric

MAX_LISTED = 5
"""How many example ids an error lists at most. It counts all of them."""


def derangement(examples: Sequence[Example], seed: int) -> list[int]:
    """For each example, the index of the example whose rubric is shown in its place.

    Every rubric is used exactly once, and none by its own prompt, by a copy of that prompt (see `Example.prompt_key`),
    or by an example with the same criteria. The result depends only on the examples, their order and the seed. The time
    is linear, except for one sort.

    Args:
        examples: The examples, at least two.
        seed: Picks one of the possible results. Zero or more.

    Raises:
        ConfigError: If there are fewer than two examples, the seed is invalid, or more than half of the examples share
            their prompts or criteria with each other.
    """
    if not is_whole(seed, at_least=0):
        raise ConfigError(f"seed must be a whole number of 0 or more, got {seed!r}")
    n = len(examples)
    if n < 2:
        raise ConfigError(
            f"privileged_context 'mismatched' needs at least 2 examples, got {n}: each is shown the rubric of another"
        )
    groups = _tied(examples)
    largest = max(len(group) for group in groups)
    if 2 * largest > n:
        tied = next(group for group in groups if len(group) == largest)
        raise ConfigError(
            f"{largest} of {n} examples share their prompt or their criteria, so not all of them can be shown another "
            f"rubric (first: {listed([examples[i].id for i in tied])}): remove the copies, or add examples"
        )
    rng = random.Random(seed)
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    order = [i for group in groups for i in group]
    # Each group is contiguous, so a shift by the size of the largest moves every example out of its own group. It needs
    # room for that, which is why no group may hold more than half of the examples.
    chosen = [0] * n
    for at, i in enumerate(order):
        chosen[i] = order[(at + largest) % n]
    return chosen


def _tied(examples: Sequence[Example]) -> list[list[int]]:
    """Groups of indices that share their prompt or their criteria, in order of first appearance.

    Ties chain: if A shares its prompt with B, and B its criteria with C, all three are one group.
    """
    # Union-find with path halving.
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, ...], int] = {}
    for i, example in enumerate(examples):
        for key in (("prompt", example.prompt_key), ("criteria", *_criteria_key(example.rubric))):
            # The smaller root becomes the parent, so the root of a group is its first index.
            a, b = sorted((root(i), root(first.setdefault(key, i))))
            parent[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(len(examples)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _criteria_key(rubric: Rubric) -> Iterable[str]:
    return sorted(folded(c.text) for c in rubric)


def is_whole(value: object, at_least: int) -> bool:
    """Whether a value is an integer, and no boolean, of at least this size."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def listed(ids: Sequence[str]) -> str:
    """The first ids, for an error."""
    return ", ".join(ids[:MAX_LISTED]) + (", ..." if len(ids) > MAX_LISTED else "")
