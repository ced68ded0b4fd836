"""`rgsd gap MODEL --data D`: estimate before training what RGSD can gain."""

from __future__ import annotations

from rgsd.cli.parsing import Command, Positional, quieten

COMMAND = Command(
    name="gap",
    summary="before training: measure how much a model gains from seeing the rubric",
    settings=(
        "rgsd.evaluation.gap:GapConfig",
        "rgsd.evaluation.config:MeasureConfig",
        "rgsd.data.config:DataConfig",
        "rgsd.judges:JudgeConfig",
    ),
    positionals=(Positional("model", "a hub id, a folder or a .gguf file"),),
    examples=("rgsd gap Qwen/Qwen2.5-3B-Instruct --data my_rubrics.jsonl --judge openai/gpt-5.4",),
    details="Scores MODEL alone, with each prompt's rubric and with another prompt's, under each template. Measures "
    "the divergence between teacher and student. Recommends whether to train, and with which template and settings.",
)


def main(argv: list[str]) -> int:
    """Measure the conditioning gap and print the recommendation."""
    parsed = COMMAND.parse(argv)
    quieten()
    import json

    from rgsd.evaluation.gap import gap, show_gap
    from rgsd.runs import RESULTS

    gap_settings, settings, data, judge = parsed.settings
    run = gap(parsed.positionals["model"], data, judge, settings, gap_settings)
    show_gap(json.loads((run.folder / RESULTS).read_text("utf-8")))
    print(f"Run: {run.folder.resolve()}")
    return 0
