"""`rgsd eval MODEL [MODEL ...]`: score models and runs on rubric data."""

from __future__ import annotations

from rgsd.cli.parsing import Command, Positional, quieten

COMMAND = Command(
    name="eval",
    summary="score models and runs on rubric data with programmatic checks or an LLM judge",
    settings=(
        "rgsd.evaluation.config:MeasureConfig",
        "rgsd.data.config:DataConfig",
        "rgsd.judges:JudgeConfig",
    ),
    positionals=(Positional("model", "a model, or a run's folder; the first is the baseline of the others", "+"),),
    examples=(
        "rgsd eval runs/mine:base runs/mine --judge openai/gpt-5.4",
        "rgsd eval Qwen/Qwen2.5-3B-Instruct --data my_rubrics.jsonl --judge openai/gpt-5.4",
    ),
    details="MODEL is a hub id, a folder, a .gguf file, a run's folder, or, with --backend server, the server's name "
    "for its model. RUN:base is the model that a run started from. MODEL+rubric sees each prompt's rubric, "
    "MODEL+mismatched another prompt's. When a run is named, --data defaults to its held-out prompts.",
)


def main(argv: list[str]) -> int:
    """Score each model and print the table."""
    parsed = COMMAND.parse(argv)
    quieten()
    import json

    from rgsd.evaluation.evaluate import evaluate_models
    from rgsd.evaluation.summaries import show_results
    from rgsd.runs import RESULTS

    settings, data, judge = parsed.settings
    run = evaluate_models(parsed.positionals["model"], data, judge, settings)
    show_results(json.loads((run.folder / RESULTS).read_text("utf-8")))
    print(f"Run: {run.folder.resolve()}")
    return 0
