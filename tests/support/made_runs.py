"""Real run folders for report tests: RGSD and GRPO on a tiny model, with data that try to break a page."""

import json
from pathlib import Path

from conftest import write_recipes

from rgsd.cli import main

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too' <!-- {{ 7 * 7 }} \u2028"


def make_data(path: Path) -> Path:
    """Ten prompts with checks; prompts and criteria contain markup."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"What helps with a cough number {i}? {HOSTILE if i % 2 else ''}",
            "rubric": [
                {"criterion": "Has an early letter.", "weight": 5, "check": {"regex": "[a-h]"}, "tags": ["advice"]},
                {"criterion": f"Recommends <b>syrup</b> {i}.", "weight": -2, "check": {"regex": "[n-z]"}},
            ],
        }
        for i in range(10)
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def make_runs(folder: Path, tokenizer) -> Path:
    """FOLDER with model/, data.jsonl, and the finished runs rgsd/ and grpo/."""
    write_recipes(folder, tokenizer, run="rgsd")
    make_data(folder / "data.jsonl")
    assert main(["train", "--config", str(folder / "recipe.yaml")]) == 0
    assert main(["grpo", "--config", str(folder / "grpo.yaml")]) == 0
    return folder
