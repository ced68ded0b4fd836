"""Settings of the data, and the training and held-out examples that they select."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rgsd import data as rubric_data
from rgsd.errors import ConfigError, DataError
from rgsd.progress import say
from rgsd.rubrics import Example
from rgsd.settings import setting


@dataclass
class DataConfig:
    """Which prompts and rubrics to use, and how to split them."""

    data: str = setting("bundled", "Rubric data: a .json, .jsonl or .parquet file, a folder, a hub id, or `bundled`.")
    schema: str | None = setting(None, "Schema of the data. Unset: detected from the rows.")
    data_split: str | None = setting(None, "Split of a hub dataset, e.g. `train`.")
    skip_bad_rows: bool = setting(False, "List invalid rows and skip them instead of stopping.")
    held_out: float = setting(0.2, "Prompts held out for the evaluation: a share below 1, or a count.")
    held_out_tags: list[str] | None = setting(
        None,
        "Hold out the examples with one of these tags instead of a seeded split, for data with a fixed split.",
    )
    near_duplicates: str = setting(
        "drop",
        "What to do, with held_out_tags, with training prompts that nearly repeat a held-out prompt: drop them from "
        "training, keep them, or refuse to start. A seeded split never separates near-duplicates.",
        choices=["drop", "keep", "refuse"],
    )
    split_seed: int = setting(0, "Seed of the split into training and held-out prompts.")
    max_train_prompts: int | None = setting(
        None, "Train on at most this many prompts, sampled with split_seed. Unset: all."
    )
    development: float = setting(
        0.0,
        "Prompts set aside for development, out of those that are not held out: a share below 1, or a count. They are "
        "not trained on; eval_strategy scores them during training.",
    )
    development_tags: list[str] | None = setting(
        None, "Set aside the examples with one of these tags instead, for data with a fixed split."
    )
    max_development_prompts: int | None = setting(
        None, "Score at most this many development prompts, sampled with split_seed. Unset: all."
    )

    def __post_init__(self) -> None:
        if self.development < 0 or (self.development > 1 and self.development % 1):
            raise ConfigError(f"development must be a share from 0 to 1 or a whole number, got {self.development:g}")
        if self.development and self.development_tags:
            raise ConfigError(
                f"development is {self.development:g} and development_tags are {self.development_tags}: set one of them"
            )
        if self.max_development_prompts is not None:
            if self.max_development_prompts < 1:
                raise ConfigError(f"max_development_prompts must be at least 1, got {self.max_development_prompts}")
            if not self.has_development:
                raise ConfigError(
                    "max_development_prompts is set, but there are no development prompts: set development or "
                    "development_tags too"
                )

    @property
    def has_development(self) -> bool:
        """Whether prompts are set aside for development."""
        return bool(self.development or self.development_tags)


@dataclass(frozen=True)
class DataSplit:
    """The sides of a split, disjoint by prompt.

    Args:
        train: The training examples.
        held_out: The held-out examples. `train` has no near-duplicate of them, unless `near_duplicates` is "keep".
        near_duplicates: What was found and done, for run.json: groups, prompts, dropped ids, first groups; the same
            for the development prompts under `development`.
        development: The examples that are scored during training. What holds for `held_out` holds for them.
    """

    train: list[Example]
    held_out: list[Example]
    near_duplicates: dict[str, Any] = field(default_factory=dict)
    development: list[Example] = field(default_factory=list)


def load(data: DataConfig) -> rubric_data.Loaded:
    """Read the data, and list the rows that were skipped.

    Raises:
        DataError: If the data cannot be read.
    """
    loaded = rubric_data.load(data.data, schema=data.schema, split=data.data_split, skip_bad_rows=data.skip_bad_rows)
    if loaded.problems:
        say(f"Skipped {len(loaded.problems)} bad rows:")
        for problem in loaded.problems:
            say(f"  {problem}")
    return loaded


def load_by_id(data: DataConfig) -> dict[str, Example]:
    """All examples of the data by id, before any split.

    Raises:
        DataError: If the data cannot be read.
    """
    return {e.id: e for e in load(data).examples}


def load_split(data: DataConfig, *, holds_out: bool = True, max_held_out: int | None = None) -> DataSplit:
    """Read the data and split it into training, development and held-out examples, disjoint by prompt and by
    near-duplicates.

    Args:
        data: The data and its split.
        holds_out: Whether held-out examples are needed; if not, and `held_out` is 0, none are held out.
        max_held_out: At most this many held-out examples, sampled with `split_seed`; None: all.

    Raises:
        ConfigError: If tags leave a side empty or an example on two sides, or `near_duplicates` is "refuse" and there
            are some.
        DataError: If the data cannot be read or split.
    """
    if data.near_duplicates not in ("drop", "keep", "refuse"):
        raise ConfigError(f"near_duplicates must be drop, keep or refuse, got {data.near_duplicates!r}")
    loaded = load(data)
    unique = rubric_data.deduplicate(loaded.examples)
    if unique.dropped:
        say(f"Dropped {len(unique.dropped)} examples with a repeated prompt")
    _check_tags(unique.examples, data)
    if data.held_out == 0 and not holds_out:
        sides = DataSplit(list(unique.examples), [])
    else:
        sides = _split_by_tags(unique.examples, data) if data.held_out_tags else _seeded_split(unique.examples, data)
    if data.has_development:
        sides = _set_development_aside(sides, data)
    if sides.held_out or sides.development:
        development = f", {len(sides.development)} development" if data.has_development else ""
        say(
            f"Data: {data.data} ({loaded.schema}), {len(sides.train)} training{development} and {len(sides.held_out)} "
            "held-out prompts"
        )
    return dataclasses.replace(
        sides,
        train=rubric_data.subset(sides.train, data.max_train_prompts, data.split_seed),
        held_out=rubric_data.subset(sides.held_out, max_held_out, data.split_seed),
        development=rubric_data.subset(sides.development, data.max_development_prompts, data.split_seed),
    )


def _check_tags(examples: Sequence[Example], data: DataConfig) -> None:
    """Refuse examples that are to be held out and scored during training."""
    development, held_out = set(data.development_tags or ()), set(data.held_out_tags or ())
    both = [e.id for e in examples if development & set(e.tags) and held_out & set(e.tags)]
    if both:
        raise ConfigError(
            f"{len(both)} examples have one of development_tags and one of held_out_tags ({', '.join(both[:5])}): held-"
            "out prompts are evaluated once, at the end, so choose tags that no example shares"
        )


def _seeded_split(examples: Sequence[Example], data: DataConfig) -> DataSplit:
    share = data.held_out
    parts = rubric_data.split(examples, held_out=share if share < 1 else int(share), seed=data.split_seed)
    if parts.groups:
        say(f"Near-duplicates: {_groups_in_words(parts.groups)}; each group is on one side of the split")
    requested = round(share * len(examples)) if share < 1 else int(share)
    if len(parts.held_out) < requested:
        say(f"Held out {len(parts.held_out)} prompts, not {requested}: no group of near-duplicates fits the rest")
    return DataSplit(list(parts.train), list(parts.held_out), _near_duplicate_facts(parts.groups, "grouped"))


def _split_by_tags(examples: Sequence[Example], data: DataConfig) -> DataSplit:
    return DataSplit(*_apart(examples, data, data.held_out_tags or (), "held-out"))


def _set_development_aside(sides: DataSplit, data: DataConfig) -> DataSplit:
    """Take the development examples out of the training examples, as held-out ones are taken out of all."""
    if data.development_tags:
        train, aside, facts = _apart(sides.train, data, data.development_tags, "development")
    else:
        share = data.development
        try:
            parts = rubric_data.split(sides.train, share if share < 1 else int(share), seed=data.split_seed)
        except DataError as error:
            raise ConfigError(
                f"development is {share:g}, of {len(sides.train)} prompts that are not held out, and no such part can "
                "be set aside: at least one prompt must be, one be left to train on, and groups of near-duplicates "
                f"stay whole ({len(rubric_data.near_duplicates(sides.train))} here). Change development, or add prompts"
            ) from error
        train, aside = list(parts.train), list(parts.held_out)
        facts = _near_duplicate_facts(parts.groups, "grouped")
    known = sides.near_duplicates | {"development": facts}
    return dataclasses.replace(sides, train=train, development=aside, near_duplicates=known)


def _apart(
    examples: Sequence[Example], data: DataConfig, tags: Sequence[str], side: str
) -> tuple[list[Example], list[Example], dict[str, Any]]:
    """Training examples, those with one of the tags, and what was done about near-duplicates between the two.

    Args:
        examples: All of them.
        data: For its `near_duplicates`.
        tags: Of the examples that are not trained on.
        side: What these are called: "held-out" or "development".
    """
    wanted = set(tags)
    aside = [e for e in examples if wanted & set(e.tags)]
    train_set = [e for e in examples if not wanted & set(e.tags)]
    leaks = rubric_data.leaks(train_set, aside)
    if leaks.groups:
        problem = f"{len(leaks.train)} training prompts nearly repeat {side} ones: {_groups_in_words(leaks.groups)}"
        if data.near_duplicates == "refuse":
            raise ConfigError(f"{problem}. Remove them from the data, or set near_duplicates to drop or keep")
        action = "dropped from training" if data.near_duplicates == "drop" else f"kept: {side} scores include them"
        say(f"Near-duplicates: {problem}; {action}")
    dropped = {e.id for e in leaks.train} if data.near_duplicates == "drop" else set()
    train_set = [e for e in train_set if e.id not in dropped]
    if not aside or not train_set:
        known = sorted({t for e in examples for t in e.tags})
        but = f", after {len(dropped)} near-duplicates of {side} prompts were dropped" if dropped else ""
        raise ConfigError(
            f"{side.replace('-', '_')}_tags {sorted(wanted)} leave {len(train_set)} training and {len(aside)} {side} "
            f"prompts{but}: both sides need at least one. The tags of the data are {known[:20]}"
        )
    facts = _near_duplicate_facts(leaks.groups, data.near_duplicates)
    return train_set, aside, facts | {"dropped": [e.id for e in leaks.train if e.id in dropped]}


_LISTED_GROUPS = 3


def _groups_in_words(groups: Sequence[rubric_data.NearDuplicates]) -> str:
    prompts = sum(len(group.examples) for group in groups)
    first = "; ".join(
        f"{' ~ '.join(e.id for e in group.examples[:4])}{' ~ ...' if len(group.examples) > 4 else ''} "
        f"({', '.join(group.why)})"
        for group in groups[:_LISTED_GROUPS]
    )
    return f"{len(groups)} groups of {prompts} prompts, e.g. {first}"


def _near_duplicate_facts(groups: Sequence[rubric_data.NearDuplicates], rule: str) -> dict[str, Any]:
    return {
        "rule": rule,
        "groups": len(groups),
        "prompts": sum(len(group.examples) for group in groups),
        "first": [{"ids": [e.id for e in g.examples[:10]], "why": list(g.why)} for g in groups[:10]],
    }
