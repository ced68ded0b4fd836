"""`rgsd eval MODEL [MODEL ...] [--data D] [--judge J] [--FIELD VALUE ...]`."""

from __future__ import annotations

import json

USAGE = """usage: rgsd eval MODEL [MODEL ...] [--data D] [--judge J] [--config FILE.yaml] [--FIELD VALUE ...]

MODEL is a hub id, a folder, a .gguf file, a run's folder, or with --backend server what the server calls its model;
RUN:base is the model that a run was trained from, and MODEL+rubric is shown each prompt's rubric (+mismatched: another
prompt's). Beside a run, --data defaults to the run's own held-out prompts.
"""


def main(argv: list[str]) -> int:
    """Measure models on rubric data; the first one is what the others are compared with."""
    from rgsd.cli.train import parse_plain, quieten, split_names
    from rgsd.data.config import DataConfig
    from rgsd.evaluation.config import MeasureConfig
    from rgsd.evaluation.evaluate import evaluate_models
    from rgsd.evaluation.summaries import show_results
    from rgsd.judges import JudgeConfig
    from rgsd.runs import RESULTS

    names, flags = split_names(argv)
    if "--help" in flags or "-h" in flags:
        print(USAGE)
    elif not names:
        print(USAGE)
        return 2
    quieten()
    data, judge, settings = parse_plain((DataConfig, JudgeConfig, MeasureConfig), flags, "eval")
    run = evaluate_models(names, data, judge, settings)
    show_results(json.loads((run.folder / RESULTS).read_text("utf-8")))
    print(f"Run: {run.folder.resolve()}")
    return 0
