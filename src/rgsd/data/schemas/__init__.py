"""The schemas: one module per published schema, which turns a row into an `Example`.

Each module has NAME, SUMMARY, `matches(row)` and `parse(row, where)`; `SCHEMAS` lists them.
"""

from __future__ import annotations

from typing import Protocol

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
from rgsd.data.schemas.fields import Row, Where
from rgsd.rubrics import Example


class Schema(Protocol):
    """What the module of a schema provides."""

    @property
    def NAME(self) -> str:
        """Name of the schema."""
        ...

    @property
    def SUMMARY(self) -> str:
        """A line of description."""
        ...

    def matches(self, row: Row) -> bool:
        """Whether a row has this schema's keys."""
        ...

    def parse(self, row: Row, where: Where) -> Example:
        """Turn a row into an example; raises FieldError if it is malformed."""
        ...


# Errors list the schemas in this order. No row matches two of them; a test checks every pair.
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

__all__ = ["SCHEMAS", "Schema"]
