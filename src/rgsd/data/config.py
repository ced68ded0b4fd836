"""Settings of the data, and the training and held-out examples that they select."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rgsd import data as rubric_data
from rgsd.errors import ConfigError
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


@dataclass(frozen=True)
class DataSplit:
    """The examples that a run uses.

    Args:
        train: The training examples.
        held_out: The held-out examples. `train` has no near-duplicate of them, unless `near_duplicates` is "keep".
        near_duplicates: What was found and done, for run.json: groups, prompts, dropped ids, first groups.
    """

    train: list[Example]
    held_out: list[Example]
    near_duplicates: dict[str, Any] = field(default_factory=dict)


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
    """Read the data and split it into training and held-out examples, disjoint by prompt and by near-duplicates.

    Args:
        data: The data and its split.
        holds_out: Whether held-out examples are needed; if not, and `held_out` is 0, all examples are for training.
        max_held_out: At most this many held-out examples, sampled with `split_seed`; None: all.

    Raises:
        ConfigError: If `held_out_tags` leave a side empty, or `near_duplicates` is "refuse" and there are some.
        DataError: If the data cannot be read or split.
    """
    if data.near_duplicates not in ("drop", "keep", "refuse"):
        raise ConfigError(f"near_duplicates must be drop, keep or refuse, got {data.near_duplicates!r}")
    loaded = load(data)
    unique = rubric_data.deduplicate(loaded.examples)
    if unique.dropped:
        say(f"Dropped {len(unique.dropped)} examples with a repeated prompt")
    if data.held_out == 0 and not holds_out:
        return DataSplit(rubric_data.subset(unique.examples, data.max_train_prompts, data.split_seed), [])
    parts = _split_by_tags(unique.examples, data) if data.held_out_tags else _seeded_split(unique.examples, data)
    n_train, n_held_out = len(parts.train), len(parts.held_out)
    say(f"Data: {data.data} ({loaded.schema}), {n_train} training and {n_held_out} held-out prompts")
    return dataclasses.replace(
        parts,
        train=rubric_data.subset(parts.train, data.max_train_prompts, data.split_seed),
        held_out=rubric_data.subset(parts.held_out, max_held_out, data.split_seed),
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
    tags = set(data.held_out_tags or ())
    held_out = [e for e in examples if tags & set(e.tags)]
    train_set = [e for e in examples if not tags & set(e.tags)]
    leaks = rubric_data.leaks(train_set, held_out)
    if leaks.groups:
        problem = f"{len(leaks.train)} training prompts nearly repeat held-out ones: {_groups_in_words(leaks.groups)}"
        if data.near_duplicates == "refuse":
            raise ConfigError(f"{problem}. Remove them from the data, or set near_duplicates to drop or keep")
        action = "dropped from training" if data.near_duplicates == "drop" else "kept: held-out scores include them"
        say(f"Near-duplicates: {problem}; {action}")
    dropped = {e.id for e in leaks.train} if data.near_duplicates == "drop" else set()
    train_set = [e for e in train_set if e.id not in dropped]
    if not held_out or not train_set:
        known = sorted({t for e in examples for t in e.tags})
        but = f", after {len(dropped)} near-duplicates of held-out prompts were dropped" if dropped else ""
        raise ConfigError(
            f"held_out_tags {sorted(tags)} leave {len(train_set)} training and {len(held_out)} held-out prompts{but}: "
            f"both sides need at least one. The tags of the data are {known[:20]}"
        )
    facts = _near_duplicate_facts(leaks.groups, data.near_duplicates)
    return DataSplit(train_set, held_out, facts | {"dropped": [e.id for e in leaks.train if e.id in dropped]})


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
