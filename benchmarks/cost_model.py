"""Prints the tables of docs/SCALE.md: `python -m benchmarks.cost_model`. With `--write`, updates the document."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rgsd.workflows.costs import GIB, PAPERS_DATA, PAPERS_MODELS, Hardware, Layout, Work, memory, run_cost, work_of

DOCUMENT = Path(__file__).parent.parent / "docs" / "SCALE.md"
DEVICES = (1, 8, 64)


def layout_of(model: str, **changes: object) -> Layout:
    """The layout of a recipe in recipes/paper/, with student prompts of 512 tokens and teacher prompts of 2,048."""
    thinking = "Thinking" in model
    rows = {"Qwen2.5-3B": 8, "Qwen2.5-7B": 4, "Qwen3-4B-T": 2, "Qwen3-8B-T": 1}[model[:10]]
    layout = Layout(
        lora_rank=32,
        rows=rows,
        rollout_rows=64,
        response=8192 if thinking else 1024,
        vllm_share=0.4 if thinking else 0.0,
        samples_here=not thinking,
    )
    return replace(layout, **changes)  # pyright: ignore[reportArgumentType]


FULL = {"lora_rank": None, "teacher_copy": True}
EIGHT, SIXTEEN = {"devices": 8, "rollout_rows": 8}, {"devices": 16, "rollout_rows": 4}
LAYOUTS = (
    ("LoRA, 1 x 80 GB", {}),
    ("LoRA, 8 x 80 GB, ddp", EIGHT),
    ("LoRA, 8 x 80 GB, fsdp2", {**EIGHT, "engine": "fsdp2"}),
    ("full, 1 x 80 GB", FULL),
    ("full, 8 x 80 GB, fsdp2", {**EIGHT, **FULL, "engine": "fsdp2"}),
    ("full, 8 x 80 GB, zero2", {**EIGHT, **FULL, "engine": "zero2"}),
    ("full, 2 nodes of 8, fsdp2", {**SIXTEEN, **FULL, "engine": "fsdp2"}),
)


def memory_table() -> str:
    """GiB per device, by layout and model. Marks what does not fit 80 GB (74.5 GiB)."""
    lines = ["| layout | " + " | ".join(PAPERS_MODELS) + " |", "|---|" + "---:|" * len(PAPERS_MODELS)]
    for name, changes in LAYOUTS:
        totals = [sum(memory(shape, layout_of(m, **changes)).values()) / GIB for m, shape in PAPERS_MODELS.items()]
        lines.append(f"| {name} | " + " | ".join(f"{t:.0f}" + (" (no)" if t > 74.5 else "") for t in totals) + " |")
    return "\n".join(lines)


def cost_table(domain: str) -> str:
    """Tokens, FLOPs, bytes, hours and dollars for one epoch."""
    columns = (
        "model", "method", "devices", "tokens sampled", "FLOPs", "bytes moved", "judge calls", "rollout h", "judge h",
        "training h", "total h", "devices, $", "judge, $",
    )  # fmt: skip
    head = "| " + " | ".join(columns) + " |"
    lines = [head, "|---|---|" + "---:|" * 11]
    for name, shape in PAPERS_MODELS.items():
        for method in ("rgsd", "grpo"):
            for devices in DEVICES:
                r = run_cost(shape, work_of(name, domain), Hardware(), devices, method=method)
                cells = [
                    name, method.upper(), str(devices), f"{r['tokens sampled']:.2g}", f"{r['FLOPs']:.2g}",
                    f"{r['bytes moved']:.2g}", f"{r['judge calls']:,.0f}", f"{r['seconds rollout'] / 3600:.1f}",
                    f"{r['seconds judge'] / 3600:.1f}", f"{r['seconds training'] / 3600:.1f}", f"{r['hours']:.1f}",
                    f"{r['dollars devices']:,.0f}", f"{r['dollars judge']:,.0f}",
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


MEANINGS = {
    "batch": "prompts per step, over all devices",
    "prompt": "tokens per prompt",
    "rubric": "tokens per rubric",
    "response": "tokens per response",
    "longest": "longest response of a step, relative to the mean; the step waits for it",
    "generations": "GRPO's responses per prompt; RGSD samples one",
    "judge_input": "tokens per judge call: the instructions",
    "judged": "tokens per judge call: the response, without reasoning",
    "judge_output": "tokens per judge call: the verdicts",
    "flops": "FLOP/s of a device, peak",
    "bandwidth": "memory bandwidth of a device, bytes/s, peak",
    "training_use": "share of the peak reached in training",
    "decoding_use": "share of the peak reached in decoding",
    "link": "bytes/s between devices",
    "dollars_an_hour": "dollars per device hour",
    "judge_dollars": "dollars per million judge tokens, input and output",
    "judge_seconds": "seconds per judge call",
    "judge_calls_at_once": "concurrent judge calls",
}
"""What each field of `Work` and `Hardware` means; a field without a meaning is an error."""


def assumptions() -> str:
    """Every assumed number, read from the fields themselves."""
    lines = ["| assumption | field | value |", "|---|---|---:|"]
    for owner, assumed in (("work", Work()), ("hardware", Hardware())):
        for name in assumed.__dataclass_fields__:
            if name != "prompts":
                value = getattr(assumed, name)
                shown = ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value:.4g}"
                lines.append(f"| {MEANINGS[name]} | `{owner}.{name}` | {shown} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Table name -> table."""
    return {"memory": memory_table(), "assumptions": assumptions(), **{d: cost_table(d) for d in PAPERS_DATA}}


def filled(text: str) -> str:
    """The document with new tables between `<!-- NAME -->` and `<!-- end NAME -->`."""
    for name, table in tables().items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        _, after = rest.split(f"<!-- end {name} -->", 1)
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end {name} -->{after}"
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8")), "utf-8")
    else:
        print("\n\n".join(f"{name}\n{table}" for name, table in tables().items()))
