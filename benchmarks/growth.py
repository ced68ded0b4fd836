"""How a step's time and memory grow with prompts, response length, rubric length, vocabulary and model size.

Each point runs in a process of its own: a random Llama with LoRA takes one warm-up step and one timed step. The slope
is that of a line through the logarithms: 1 is proportional, 0 is flat.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from benchmarks import common, p1_step

BASE = {"prompts": 4, "response": 64, "rubric": 128, "vocabulary": 49_152, "layers": 8}
AXES = {
    "prompts": (2, 4, 8, 16),
    "response": (32, 64, 128, 256),
    "rubric": (128, 256, 512, 1024),
    "vocabulary": (49_152, 98_304, 196_608),
    "layers": (4, 8, 16, 32),
}


def run(quick: bool) -> dict[str, Any]:
    results = {}
    for axis, values in AXES.items():
        points = []
        for value in values[:2] if quick else values:
            setting = {**BASE, axis: value}
            points.append({"at": value, **common.in_a_process_of_its_own(__name__, json.dumps(setting))})
        results[axis] = {
            "points": points,
            "slope": {kind: round(_slope(points, kind), 2) for kind in ("cpu", "wall", "mib")},
        }
    return {"results": results, "setting": BASE}


def _slope(points: list[dict[str, float]], kind: str) -> float:
    """Slope of a least-squares line through the logarithms."""
    x, y = ([math.log(p[name]) for p in points] for name in ("at", kind))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def point(setting: dict[str, int]) -> dict[str, float]:
    """Time and memory of one step. `rubric` is the number of tokens that the teacher reads besides the question."""
    rows = common.rows(setting["prompts"])
    for row in rows:
        question = row["prompt"][-1]["content"]
        # " a" is one token, so n of them make a rubric of n tokens.
        row["teacher_prompt"] = [{"role": "user", "content": question + " a" * setting["rubric"]}]
    model = common.random_llama(vocabulary=setting["vocabulary"], layers=setting["layers"])
    step = p1_step.rgsd_step(rows, [setting["response"]] * len(rows), model)
    step()
    return {**{k: round(v, 4) for k, v in step().items()}, "mib": round(common.peak_mib())}


if __name__ == "__main__":
    print(json.dumps(point(json.loads(sys.argv[1]))))
