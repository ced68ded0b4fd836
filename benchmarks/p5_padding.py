"""P5: padding, as a share of the tokens computed, at a log-normal spread of lengths like the published sets'.

Rows of a step are cut into micro-batches by `rgsd.models.batching.partition`, the student's by its lengths and the
teacher's
by its own, and one that pads much is read in several passes (`slices`). Beside it: the same rows in the order in which
they come, padded to the longest of a micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch

from rgsd.models.batching import partition, slices

SETTINGS = [(16, 4), (32, 4), (32, 8), (64, 8), (64, 16), (256, 32)]
"""Rows of a step, and its micro-batches."""


def run(quick: bool) -> dict[str, Any]:
    steps = 20 if quick else 200
    g = torch.Generator().manual_seed(0)
    results = {}
    for rows, groups in SETTINGS:
        ours = plain = real = 0
        for _ in range(steps):
            # Prompt, rubric and response of RubricHub-like rows, in tokens: medians 90, 350 and 400.
            response = _drawn(g, rows, 400, 0.5)
            student = response + _drawn(g, rows, 90, 0.6)
            teacher = student + _drawn(g, rows, 350, 0.4)
            for lengths in (student.tolist(), teacher.tolist()):
                real += sum(lengths)
                for group in partition(lengths, groups):
                    own = [lengths[i] for i in group]
                    ours += sum(len(own[cut]) * max(own[cut]) for cut in slices(own))
                size = rows // groups
                plain += sum(size * max(lengths[k : k + size]) for k in range(0, rows, size))
        results[f"{rows} rows in {groups}"] = {
            "padded_share": round(1 - real / ours, 4),
            "in_order": round(1 - real / plain, 4),
        }
    return {"results": results, "target": "0.05 or less of the tokens computed"}


def _drawn(g: torch.Generator, n: int, median: float, sigma: float) -> torch.Tensor:
    return ((torch.randn(n, generator=g) * sigma).exp() * median).round().clamp(8, 4096).int()
