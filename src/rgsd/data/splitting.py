"""Taking duplicate prompts out, and holding prompts out by groups of near-duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rgsd.data.similarity import NearDuplicates, near_duplicates
from rgsd.errors import DataError
from rgsd.rubrics import Example


@dataclass(frozen=True, slots=True)
class Deduplicated:
    """Examples with one a prompt, and those that were left out for it.

    Args:
        examples: the first of each prompt, in the order of the input.
        dropped: the others, in the order of the input.
    """

    examples: tuple[Example, ...] = field(repr=False)
    dropped: tuple[Example, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Split:
    """Two sides that share no prompt and no group of near-duplicates, each in the order of the input.

    Args:
        train: what is trained on.
        held_out: what is not.
        dropped: duplicates of a prompt, which are on neither side.
        groups: the near-duplicates, each group whole on one side.
    """

    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)
    dropped: tuple[Example, ...] = field(default=(), repr=False)
    groups: tuple[NearDuplicates, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Leaks:
    """Near-duplicates of held-out prompts among training prompts.

    Args:
        groups: the groups with members on both sides.
        train: their training members, in the order of the input.
    """

    groups: tuple[NearDuplicates, ...] = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)


def deduplicate(examples: Iterable[Example]) -> Deduplicated:
    """Keep the first example of each prompt; white space and case do not make prompts differ."""
    kept: dict[str, Example] = {}
    dropped: list[Example] = []
    for example in examples:
        if kept.setdefault(example.prompt_key, example) is not example:
            dropped.append(example)
    return Deduplicated(tuple(kept.values()), tuple(dropped))


def split(examples: Iterable[Example], held_out: int | float, seed: int) -> Split:
    """Hold examples out, by group of near-duplicate prompts.

    Duplicate prompts are taken out first, and near-duplicates are grouped (see `near_duplicates`). A hash of the seed
    and a prompt of the group orders the groups; the lowest that fit are held out. The order of the input does not
    matter, and rows added later move few of the others. A group larger than the room left is trained on, so the
    held-out side can be smaller than asked where groups are large.

    Args:
        examples: all of them.
        held_out: how many (an int), or which share (a float between 0 and 1) of the prompts.
        seed: another seed, another split.

    Raises:
        DataError: when a side would be empty, or `held_out` is neither.
    """
    unique = deduplicate(examples)
    count = _count(held_out, len(unique.examples))
    groups = near_duplicates(unique.examples)
    chosen = _choose(unique.examples, groups, count, seed)
    if not chosen:
        raise DataError(
            f"got held_out={held_out!r}, room for {count} prompts, but each of the {len(groups)} groups of "
            "near-duplicates is larger: hold more out, or remove near-duplicates"
        )
    return Split(
        train=tuple(e for e in unique.examples if e.prompt_key not in chosen),
        held_out=tuple(e for e in unique.examples if e.prompt_key in chosen),
        dropped=unique.dropped,
        groups=groups,
    )


def leaks(train: Sequence[Example], held_out: Sequence[Example]) -> Leaks:
    """What a fixed split lets through: groups of near-duplicates with members on both sides."""
    is_held_out = {e.id for e in held_out}
    groups = tuple(
        group
        for group in near_duplicates([*train, *held_out])
        if 0 < sum(e.id in is_held_out for e in group.examples) < len(group.examples)
    )
    straddling = {e.id for group in groups for e in group.examples}
    return Leaks(groups, tuple(e for e in train if e.id in straddling))


def _choose(examples: Sequence[Example], groups: Sequence[NearDuplicates], count: int, seed: int) -> set[str]:
    """The prompt keys to hold out: whole groups, `count` prompts at most."""
    grouped = {e.prompt_key for group in groups for e in group.examples}
    units = [[e] for e in examples if e.prompt_key not in grouped] + [list(group.examples) for group in groups]
    # One member ranks its group: the lowest rank of them all would draw large groups to the held-out side.
    units.sort(key=lambda unit: _rank(seed, min(unit, key=lambda e: e.prompt_key)))
    chosen: set[str] = set()
    for unit in units:
        if len(chosen) + len(unit) <= count:
            chosen |= {e.prompt_key for e in unit}
    return chosen


def subset(examples: Sequence[Example], n: int | None, seed: int) -> list[Example]:
    """At most `n` of the examples, chosen by a hash of the seed and the prompt, in the order of the input.

    Files are often sorted by domain, so the first rows are not a sample. A larger `n` keeps what a smaller one chose.

    Args:
        examples: one a prompt.
        n: how many; None for all.
        seed: another seed, another subset.

    Raises:
        DataError: when `n` is below 1.
    """
    if n is None or n >= len(examples):
        return list(examples)
    if n < 1:
        raise DataError(f"got a subset of {n} prompts, wanted at least 1: leave the setting out to take all of them")
    # Salted: ranks that decided the split must not decide the subset of one of its sides too.
    ranked = sorted(examples, key=lambda e: hashlib.sha256(f"subset {seed}\n{e.prompt_key}".encode()).digest())
    chosen = {e.prompt_key for e in ranked[:n]}
    return [e for e in examples if e.prompt_key in chosen]


def _rank(seed: int, example: Example) -> bytes:
    return hashlib.sha256(f"{seed}\n{example.prompt_key}".encode()).digest()


def _count(held_out: int | float, n_prompts: int) -> int:
    if isinstance(held_out, bool) or not isinstance(held_out, int | float):
        raise DataError(f"got held_out={held_out!r}, wanted a count (int) or a share (float between 0 and 1)")
    if isinstance(held_out, float) and not 0 < held_out < 1:
        raise DataError(f"got held_out={held_out!r}, wanted a share between 0 and 1, or a whole number as a count")
    count = held_out if isinstance(held_out, int) else round(held_out * n_prompts)
    if not 0 < count < n_prompts:
        got = f"held_out={held_out!r}, which holds {count} of {n_prompts} prompts out"
        raise DataError(f"got {got}, wanted at least one prompt on either side: change held_out, or add prompts")
    return count
