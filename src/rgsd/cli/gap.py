"""`rgsd gap MODEL [DATA] [--judge J] [--FIELD VALUE ...]`: before training, will it pay?"""

from __future__ import annotations

import json

USAGE = """usage: rgsd gap MODEL [DATA] [--judge J] [--config FILE.yaml] [--FIELD VALUE ...]

Scores MODEL alone, with each prompt's rubric and with another prompt's, under each template; takes the divergence
between teacher and student; and says whether training will pay, and with which template and settings.
"""


def main(argv: list[str]) -> int:
    """Measure the conditioning gap of a model on rubric data."""
    from rgsd.cli.train import parse_plain, quieten, split_names
    from rgsd.data.config import DataConfig
    from rgsd.evaluation.config import MeasureConfig
    from rgsd.evaluation.gap import GapConfig, gap, show_gap
    from rgsd.judges import JudgeConfig
    from rgsd.runs import RESULTS

    names, flags = split_names(argv)
    if "--help" in flags or "-h" in flags:
        print(USAGE)
    elif len(names) not in (1, 2):
        print(USAGE)
        return 2
    quieten()
    if len(names) == 2:
        flags = ["--data", names[1], *flags]
    data, judge, settings, gap_settings = parse_plain((DataConfig, JudgeConfig, MeasureConfig, GapConfig), flags, "gap")
    run = gap(names[0], data, judge, settings, gap_settings)
    show_gap(json.loads((run.folder / RESULTS).read_text("utf-8")))
    print(f"Run: {run.folder.resolve()}")
    return 0
