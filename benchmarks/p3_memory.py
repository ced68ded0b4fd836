"""P3: peak resident memory. Each measurement runs in a process of its own.

loss    memory of the divergence, forward and backward, beyond its inputs: chunked, and with full logits under autograd.
        Full logits of 4,096 tokens do not fit everywhere, so they are measured at 256 and 512 tokens and extrapolated.
step    a full step of rgsd and of TRL's SDFTTrainer, on a random Llama with 0.2 billion parameters and a vocabulary of
        151,936
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks import common, p1_step
from rgsd.training.loss import DivergenceSpec, Head, chunked_divergence, divergence

VOCABULARY, TOKENS, WIDTH = 151_936, 4096, 1024


def run(quick: bool) -> dict[str, Any]:
    def loss(how: str, tokens: int, vocabulary: int = VOCABULARY) -> float:
        return common.in_a_process_of_its_own(__name__, "loss", how, tokens, vocabulary)["mib"]

    tokens = 512 if quick else TOKENS
    small, large = (64, 128) if quick else (256, 512)
    chunked = {v: loss("chunked", tokens, v) for v in ((VOCABULARY,) if quick else (32_768, 65_536, VOCABULARY))}
    full_small, full_large = loss("full", small), loss("full", large)
    full = full_small + (full_large - full_small) * (tokens - small) / (large - small)
    step = {who: common.in_a_process_of_its_own(__name__, "step", who, int(quick))["mib"] for who in ("rgsd", "sdft")}
    return {
        "setting": {"tokens": tokens, "width": WIDTH, "vocabulary": VOCABULARY},
        "loss_mib": {
            "chunked, by vocabulary": {str(v): round(m) for v, m in chunked.items()},
            f"full logits, {small} tokens": round(full_small),
            f"full logits, {large} tokens": round(full_large),
            f"full logits, {tokens} tokens (extrapolated)": round(full),
        },
        "chunked/full": round(chunked[VOCABULARY] / full, 4),
        "step_mib": {who: round(m) for who, m in step.items()},
        "step rgsd/sdft": round(step["rgsd"] / step["sdft"], 3),
        "target": "chunked/full at most 0.1 and flat as the vocabulary grows; full step at most 0.5 of SDFT's",
    }


def measure_loss(how: str, tokens: int, vocabulary: int) -> float:
    g = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(tokens, WIDTH, generator=g) for _ in range(2))
    weight = torch.empty(vocabulary, WIDTH).normal_(generator=g, std=0.03)
    hidden.requires_grad_()
    # Warm up, so that one-time allocations of libraries are not counted.
    chunked_divergence(hidden[:8], Head(weight), teacher[:8], Head(weight), DivergenceSpec()).total.backward()
    before = common.peak_mib()
    if how == "chunked":
        total = chunked_divergence(hidden, Head(weight), teacher, Head(weight), DivergenceSpec()).total
    else:
        head = Head(weight)
        total = divergence(head.logits(hidden), head.logits(teacher), DivergenceSpec()).total
    total.backward()
    return common.peak_mib() - before


def measure_step(who: str, quick: bool) -> float:
    n = 4 if quick else 8
    model = common.random_llama(vocabulary=VOCABULARY, width=896, layers=4 if quick else 8)
    make = p1_step.rgsd_step if who == "rgsd" else p1_step.sdft_step
    wanted = common.lengths(n, median=24 if quick else 56, most=48 if quick else 160)
    make(common.rows(n), wanted, model)()
    return common.peak_mib()


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "loss":
        print(json.dumps({"mib": measure_loss(rest[0], int(rest[1]), int(rest[2]))}))
    else:
        print(json.dumps({"mib": measure_step(rest[0], rest[1] == "1")}))
