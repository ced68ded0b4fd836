"""P5: padding as a share of the computed tokens, at log-normal lengths like those of the published datasets.

`rgsd.models.batching.partition` cuts the rows of a step into micro-batches, by the student's lengths and by the
teacher's. A micro-batch with much padding runs in several passes (`slices`). The comparison takes the rows in their
original order and pads each micro-batch to its longest row.
"""

from __future__ import annotations

from typing import Any

import torch

from rgsd.models.batching import partition, slices

SETTINGS = [(16, 4), (32, 4), (32, 8), (64, 8), (64, 16), (256, 32)]
"""Rows per step, and micro-batches per step."""


def run(quick: bool) -> dict[str, Any]:
    steps = 20 if quick else 200
    g = torch.Generator().manual_seed(0)
    results = {}
    for rows, groups in SETTINGS:
        ours = plain = real = 0
        for _ in range(steps):
            # Tokens of prompt, rubric and response in rows like RubricHub's: medians 90, 350 and 400.
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
    return {"results": results, "target": "at most 0.05 of the computed tokens"}


def _drawn(g: torch.Generator, n: int, median: float, sigma: float) -> torch.Tensor:
    return ((torch.randn(n, generator=g) * sigma).exp() * median).round().clamp(8, 4096).int()
