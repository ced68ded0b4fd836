"""Real run folders for the report's tests: RGSD and GRPO on a tiny model, over data that try to break a page."""

import json
from pathlib import Path

import yaml
from conftest import tiny_model

from rgsd.cli import main

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too' <!-- {{ 7 * 7 }} \u2028"


def make_data(path: Path) -> Path:
    """Ten prompts with checks; prompts and criteria hold markup."""
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
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_data(folder / "data.jsonl")
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "held_out": 4,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "output_dir": str(folder / "rgsd"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "learning_rate": 0.01,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    (folder / "rgsd.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(folder / "rgsd.yaml")]) == 0
    grpo = recipe | {"output_dir": str(folder / "grpo"), "num_generations": 4, "per_device_train_batch_size": 4}
    (folder / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    assert main(["grpo", "--config", str(folder / "grpo.yaml")]) == 0
    return folder
