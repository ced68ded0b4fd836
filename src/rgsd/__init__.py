"""rgsd: post-train language models on rubrics, without a verifier (Rubric-Guided Self-Distillation, arXiv 2606.12507).

from rgsd import RGSDConfig, RGSDTrainer, load

trainer = RGSDTrainer("Qwen/Qwen2.5-3B-Instruct", args=RGSDConfig(output_dir="run"), train_dataset=load(path).examples)
trainer.train()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgsd.data import load
    from rgsd.rubrics import Criterion, Example, Rubric, Verdict
    from rgsd.training.config import RGSDConfig
    from rgsd.training.trainer import RGSDTrainer

_HOMES = {
    "Criterion": "rgsd.rubrics",
    "Example": "rgsd.rubrics",
    "RGSDConfig": "rgsd.training.config",
    "RGSDTrainer": "rgsd.training.trainer",
    "Rubric": "rgsd.rubrics",
    "Verdict": "rgsd.rubrics",
    "load": "rgsd.data",
}

__all__ = ["Criterion", "Example", "RGSDConfig", "RGSDTrainer", "Rubric", "Verdict", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only when they are asked for.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rgsd' has no attribute {name!r}")
