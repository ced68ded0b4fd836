"""Rows of published rubric datasets, and of our own, as `Example`s.

    loaded = load("train.jsonl")                # or a folder, a .parquet, "owner/name", "bundled:medicine"
    sides = split(loaded.examples, held_out=300, seed=0)

One small module a schema, each with NAME, SUMMARY, `matches(row)` and `parse(row, where)`; `SCHEMAS` lists them. A row
is never repaired and never dropped silently: it becomes an example, or a `Problem` that names its file, row and field.
"""

from __future__ import annotations

from pathlib import Path

from rgsd.data import loading as _loading
from rgsd.data.loading import BUNDLED, Loaded, Problem, Schema
from rgsd.data.schemas import (
    healthbench,
    healthbench_professional,
    jsonl,
    prbench,
    rar,
    researchqa,
    researchrubrics,
    rubrichub,
    rubrichub_synthesis,
    verl,
)
from rgsd.data.schemas.fields import Where
from rgsd.data.similarity import NearDuplicates, near_duplicates
from rgsd.data.splitting import Deduplicated, Leaks, Split, deduplicate, leaks, split, subset
from rgsd.data.summary import describe, summarise

__all__ = [
    "SCHEMAS",
    "Deduplicated",
    "Leaks",
    "Loaded",
    "NearDuplicates",
    "Problem",
    "Schema",
    "Split",
    "Where",
    "bundled",
    "deduplicate",
    "describe",
    "leaks",
    "load",
    "near_duplicates",
    "split",
    "subset",
    "summarise",
]

# The order is the one in which errors list them; no row fits two (a test holds every pair to it).
_MODULES: tuple[Schema, ...] = (
    jsonl,
    rubrichub,
    rubrichub_synthesis,
    rar,
    healthbench,
    healthbench_professional,
    researchqa,
    prbench,
    researchrubrics,
    verl,
)

SCHEMAS: dict[str, Schema] = {module.NAME: module for module in _MODULES}
"""Name -> the schema's module."""


def load(
    source: str | Path,
    schema: str | None = None,
    split: str | None = None,
    config: str | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
) -> Loaded:
    """Read a dataset.

    Args:
        source: a .json file (a list of rows, or an object with one list), a .jsonl or .parquet file, a folder of such
            files (read in the order of their names), a hub id `owner/name` or `owner/name:path/of/file.parquet`,
            `"bundled"`, or `"bundled:medicine"`.
        schema: a name of `SCHEMAS`; recognised from the rows' keys by default.
        split: which split of a hub dataset.
        config: which configuration of a hub dataset.
        skip_bad_rows: leave rows that cannot be used out, and list them in `Loaded.problems`, where otherwise they are
            an error.
        limit: read this many rows at most, usable or not.

    Raises:
        DataError: when the source cannot be read, its schema cannot be told, a row cannot be used, or with
            `skip_bad_rows` none can.
    """
    return _loading.load(
        source, SCHEMAS, schema=schema, split=split, config=config, skip_bad_rows=skip_bad_rows, limit=limit
    )


def bundled(domain: str | None = None) -> Loaded:
    """The data that come with the package.

    Args:
        domain: one of them, e.g. "medicine"; all of them by default.

    Raises:
        DataError: when there is no such domain.
    """
    return load(BUNDLED if domain is None else f"{BUNDLED}:{domain}", schema=jsonl.NAME)
