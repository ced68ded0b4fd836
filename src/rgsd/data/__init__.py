"""Rubric data: rows of published datasets and of our own schema, read as `Example`s and split.

    loaded = load("train.jsonl")                # or a folder, a .parquet file, "owner/name", "bundled:medicine"
    parts = split(loaded.examples, held_out=300, seed=0)

A row is never repaired and never dropped silently. It becomes an example, or a `Problem` that names its file, row and
field.
"""

from rgsd.data.loading import Loaded, Problem, bundled, load
from rgsd.data.schemas import SCHEMAS, Schema
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
