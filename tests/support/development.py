"""Data with training, development and held-out prompts of its own tags, for a world of `support.killing`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.killing import make_world

TOPICS = (
    "cough",
    "fever",
    "rash",
    "sprain",
    "burn",
    "migraine",
    "insomnia",
    "nausea",
    "cramp",
    "sting",
    "gout",
    "cut",
)
SPLITS = ("train",) * 6 + ("dev",) * 4 + ("held-out",) * 2


def make_split_world(folder: Path, tokenizer: Any, *, checked: bool = True, **settings: Any) -> Path:
    """A model, twelve prompts (six to train on, four for development, two held out) and a recipe; its path."""
    path = make_world(
        folder,
        tokenizer,
        **{"held_out_tags": ["split:held-out"], "development_tags": ["split:dev"], "learning_rate": 0.05, **settings},
    )
    rows = []
    for number, (topic, side) in enumerate(zip(TOPICS, SPLITS, strict=True)):
        # Letters that a random model writes at times: scores differ between steps.
        checks = [{"any": [letter]} for letter in ("e", "st", "r")] if checked else [None] * 3
        weights = (5, 3, -2)
        criteria = [
            {"criterion": f"Names {n} for a {topic}.", "weight": w} | ({"check": c} if c else {})
            for n, (w, c) in enumerate(zip(weights, checks, strict=True))
        ]
        rows.append({"id": f"r{number}", "prompt": f"{topic}?", "rubric": criteria, "tags": [f"split:{side}"]})
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path
