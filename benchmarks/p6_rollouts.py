"""P6: rollouts by rgsd's decode loop against transformers' `generate`, on a CPU, SmolLM2-135M in float32.

    ended     responses end by themselves: temperature 0.8, at most 128 tokens. `generate` takes the prompts in batches
              sorted by length, and a batch takes as long as its longest response.
    full      one batch in which no response ends early, so only the engine counts.

Both run the same merged model. Tokens per second count the tokens up to a response's end.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks import common
from rgsd.data import load
from rgsd.models.kernels import decoding
from rgsd.prompts.messages import student_messages


def run(quick: bool) -> dict[str, Any]:
    model, tokenizer = common.model(), common.tokenizer()
    model.eval()
    most = 24 if quick else 128
    results: dict[str, Any] = {}
    examples = load("bundled").examples
    for rows in (8,) if quick else (8, 16, 32):
        n = rows if quick else max(32, rows)
        ids = common.tokenized(tokenizer, [student_messages(e) for e in examples[:n]])
        for kind, prompts, ends in (("ended", ids, [tokenizer.eos_token_id]), ("full", ids[:rows], None)):
            config = GenerationConfig(
                max_new_tokens=most if kind == "ended" else min(most, 64),
                do_sample=True,
                temperature=0.8,
                top_k=0,
                top_p=1.0,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                disable_compile=True,
            )
            results[f"{kind}, {rows} at once"] = _compared(model, prompts, config, rows, rounds=1 if quick else 3)
    return {
        "results": results,
        "target": "at least 1.5 times the tokens per second of generate",
    }


def _compared(model: Any, prompts: list[list[int]], config: GenerationConfig, rows: int, *, rounds: int) -> Any:
    model.generation_config.eos_token_id = config.eos_token_id
    counts: dict[str, list[int]] = {"rgsd": [], "transformers": []}
    seeds = iter(range(10**6))

    def ours() -> dict[str, float]:
        torch.manual_seed(next(seeds))
        at = time.perf_counter(), time.process_time()
        what = decoding.decoding_settings(model, config)
        assert what is not None
        draws_BT = torch.rand(len(prompts), what.max_new_tokens, dtype=torch.float64)
        with decoding.ready(model, rows):
            out = decoding.decode(model, prompts, what, rows=rows, draws=lambda i: draws_BT[i])
        return _per_token(at, "rgsd", sum(map(len, out)))

    def theirs() -> dict[str, float]:
        torch.manual_seed(next(seeds))
        at = time.perf_counter(), time.process_time()
        ordered, n = sorted(prompts, key=len), 0
        for start in range(0, len(ordered), rows):
            n += _generated(model, ordered[start : start + rows], config)
        return _per_token(at, "transformers", n)

    def _per_token(at: tuple[float, float], who: str, n: int) -> dict[str, float]:
        counts[who].append(n)
        return {"wall": (time.perf_counter() - at[0]) / n, "cpu": (time.process_time() - at[1]) / n}

    timed = common.alternate({"rgsd": ours, "transformers": theirs}, rounds=rounds)
    return {
        "prompts": len(prompts),
        "tokens": counts,
        "tokens_per_second": {who: round(1 / timed[who]["wall"], 1) for who in timed},
        "faster": common.ratios(timed, "transformers", "rgsd"),
    }


def _generated(model: Any, prompts: list[list[int]], config: GenerationConfig) -> int:
    """Number of response tokens, each up to and including its end."""
    width = max(map(len, prompts))
    ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = config.eos_token_id or []
    return sum(next((k + 1 for k, t in enumerate(row) if t in ends), len(row)) for row in out)
