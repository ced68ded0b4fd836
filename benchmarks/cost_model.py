"""The tables of docs/SCALE.md: `python -m benchmarks.cost_model` prints them, `--write` puts them into the document."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rgsd.workflows.costs import GIB, PAPERS_DATA, PAPERS_MODELS, Hardware, Layout, Work, memory, run_cost, work_of

DOCUMENT = Path(__file__).parent.parent / "docs" / "SCALE.md"
DEVICES = (1, 8, 64)


def layout_of(model: str, **changes: object) -> Layout:
    """The recipe of recipes/paper/ for a model, with prompts of 512 and 2,048 tokens."""
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
    """GiB a device of each model in each layout; what does not fit 80 GB (74.5 GiB) is marked."""
    lines = ["| layout | " + " | ".join(PAPERS_MODELS) + " |", "|---|" + "---:|" * len(PAPERS_MODELS)]
    for name, changes in LAYOUTS:
        totals = [sum(memory(shape, layout_of(m, **changes)).values()) / GIB for m, shape in PAPERS_MODELS.items()]
        lines.append(f"| {name} | " + " | ".join(f"{t:.0f}" + (" (no)" if t > 74.5 else "") for t in totals) + " |")
    return "\n".join(lines)


def cost_table(domain: str) -> str:
    """Tokens, FLOPs, bytes, hours and dollars of one epoch."""
    columns = (
        "model, method, devices, tokens sampled, FLOPs, bytes moved, judge calls, rollout h, judge h, training h, all h"
    )
    head = "| " + " | ".join([*columns.split(", "), "dollars, devices", "dollars, judge"]) + " |"
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


def assumptions() -> str:
    """Every assumed number, from the fields themselves."""
    work, hardware = Work(), Hardware()
    named = {**{f"work.{k}": getattr(work, k) for k in work.__dataclass_fields__}}
    named |= {f"hardware.{k}": getattr(hardware, k) for k in hardware.__dataclass_fields__}
    named.pop("work.prompts")
    return "\n".join(["| assumed | value |", "|---|---:|", *(f"| `{k}` | {v} |" for k, v in named.items())])


def tables() -> dict[str, str]:
    """Each table by the name of its place in the document."""
    return {"memory": memory_table(), "assumptions": assumptions(), **{d: cost_table(d) for d in PAPERS_DATA}}


def filled(text: str) -> str:
    """The document with its tables made anew, between `<!-- NAME -->` and `<!-- end NAME -->`."""
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
