"""Remove duplicate prompts, and split examples without separating groups of near-duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rgsd.data.similarity import NearDuplicates, near_duplicates
from rgsd.errors import DataError
from rgsd.rubrics import Example


@dataclass(frozen=True, slots=True)
class Deduplicated:
    """Examples with distinct prompts.

    Args:
        examples: The first example of each prompt, in the order of the input.
        dropped: The other examples, in the order of the input.
    """

    examples: tuple[Example, ...] = field(repr=False)
    dropped: tuple[Example, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Split:
    """A split whose sides share no prompt and no group of near-duplicates. Each side keeps the order of the input.

    Args:
        train: Training examples.
        held_out: Held-out examples.
        dropped: Examples with a repeated prompt, which are on neither side.
        groups: Groups of near-duplicates, each on one side.
    """

    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)
    dropped: tuple[Example, ...] = field(default=(), repr=False)
    groups: tuple[NearDuplicates, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Leaks:
    """Near-duplicates of held-out prompts among the training prompts.

    Args:
        groups: Groups with members on both sides.
        train: Their members among the training examples, in the order of the input.
    """

    groups: tuple[NearDuplicates, ...] = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)


def deduplicate(examples: Iterable[Example]) -> Deduplicated:
    """Keep the first example of each prompt. Prompts that differ only in white space or case count as equal."""
    kept: dict[str, Example] = {}
    dropped: list[Example] = []
    for example in examples:
        if kept.setdefault(example.prompt_key, example) is not example:
            dropped.append(example)
    return Deduplicated(tuple(kept.values()), tuple(dropped))


def split(examples: Iterable[Example], held_out: int | float, seed: int) -> Split:
    """Hold out examples, without separating near-duplicate prompts.

    Repeated prompts are dropped, and near-duplicates are grouped (`near_duplicates`). A hash of the seed and of one
    prompt of each group orders the groups, and the first groups that fit are held out. The split does not depend on the
    order of the input, and rows added later move few of the others. A group that does not fit goes to training, so
    fewer prompts than requested are held out if groups are large.

    Args:
        examples: All examples.
        held_out: Number of prompts (an int), or their share (a float between 0 and 1).
        seed: Seed of the split.

    Raises:
        DataError: If a side would be empty, or `held_out` is neither a count nor a share.
    """
    unique = deduplicate(examples)
    count = _count(held_out, len(unique.examples))
    groups = near_duplicates(unique.examples)
    chosen = _choose(unique.examples, groups, count, seed)
    if not chosen:
        raise DataError(
            f"got held_out={held_out!r}, which is {count} prompts, but each of the {len(groups)} groups of "
            "near-duplicates is larger: hold out more prompts, or remove near-duplicates"
        )
    return Split(
        train=tuple(e for e in unique.examples if e.prompt_key not in chosen),
        held_out=tuple(e for e in unique.examples if e.prompt_key in chosen),
        dropped=unique.dropped,
        groups=groups,
    )


def leaks(train: Sequence[Example], held_out: Sequence[Example]) -> Leaks:
    """Find the groups of near-duplicates that a given split separates."""
    is_held_out = {e.id for e in held_out}
    groups = tuple(
        group
        for group in near_duplicates([*train, *held_out])
        if 0 < sum(e.id in is_held_out for e in group.examples) < len(group.examples)
    )
    members = {e.id for group in groups for e in group.examples}
    return Leaks(groups, tuple(e for e in train if e.id in members))


def _choose(examples: Sequence[Example], groups: Sequence[NearDuplicates], count: int, seed: int) -> set[str]:
    """The prompt keys to hold out: whole groups, at most `count` prompts."""
    grouped = {e.prompt_key for group in groups for e in group.examples}
    units = [[e] for e in examples if e.prompt_key not in grouped] + [list(group.examples) for group in groups]
    # A single member ranks its group. With the lowest rank of all members, large groups would be held out more often.
    units.sort(key=lambda unit: _rank(seed, min(unit, key=lambda e: e.prompt_key)))
    chosen: set[str] = set()
    for unit in units:
        if len(chosen) + len(unit) <= count:
            chosen |= {e.prompt_key for e in unit}
    return chosen


def subset(examples: Sequence[Example], n: int | None, seed: int) -> list[Example]:
    """Sample at most `n` examples by a hash of the seed and the prompt. They keep the order of the input.

    The first rows would be no sample, because files are often sorted by domain. A larger `n` adds to the sample of a
    smaller one.

    Args:
        examples: Examples with distinct prompts.
        n: Size of the sample; None for all.
        seed: Seed of the sample.

    Raises:
        DataError: If `n` is below 1.
    """
    if n is None or n >= len(examples):
        return list(examples)
    if n < 1:
        raise DataError(f"got a sample of {n} prompts, expected at least 1: leave the setting out to use all prompts")
    # The salt makes the sample independent of the split, which uses the same seed.
    ranked = sorted(examples, key=lambda e: hashlib.sha256(f"subset {seed}\n{e.prompt_key}".encode()).digest())
    chosen = {e.prompt_key for e in ranked[:n]}
    return [e for e in examples if e.prompt_key in chosen]


def _rank(seed: int, example: Example) -> bytes:
    return hashlib.sha256(f"{seed}\n{example.prompt_key}".encode()).digest()


def _count(held_out: int | float, n_prompts: int) -> int:
    if isinstance(held_out, bool) or not isinstance(held_out, int | float):
        raise DataError(f"got held_out={held_out!r}, expected a count (int) or a share (float between 0 and 1)")
    if isinstance(held_out, float) and not 0 < held_out < 1:
        raise DataError(f"got held_out={held_out!r}, expected a share between 0 and 1, or a whole number as a count")
    count = held_out if isinstance(held_out, int) else round(held_out * n_prompts)
    if not 0 < count < n_prompts:
        got = f"held_out={held_out!r}, which is {count} of {n_prompts} prompts"
        raise DataError(f"got {got}, expected at least one prompt on each side: change held_out, or add prompts")
    return count
