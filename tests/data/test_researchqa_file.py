"""ResearchQA's real validation split, if it lies next to the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rgsd.data import load, split, summarise

SHARED = Path(os.environ.get("RGSD_SHARED") or Path(__file__).parents[3] / "shared")
FILE = SHARED / "data" / "researchqa_valid.json"

pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason="ResearchQA's validation split is not beside the repository: set RGSD_SHARED"
)


def test_every_row_loads():
    loaded = load(FILE)
    assert loaded.schema == "researchqa"
    assert (loaded.n_rows, len(loaded.examples), loaded.problems) == (703, 703, ())
    summary = summarise(loaded)
    assert summary["criteria"] == {"total": 5230, "per_example": {"min": 4, "median": 8, "max": 8}}
    assert summary["duplicates"]["count"] == 0
    assert summary["scoring"] == {"researchqa": 703}
    assert sum(summary["domains"].values()) == 703


def test_three_hundred_are_held_out():
    sides = split(load(FILE).examples, 300, seed=0)
    assert (len(sides.train), len(sides.held_out), len(sides.dropped)) == (403, 300, 0)
