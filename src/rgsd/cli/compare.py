"""`rgsd compare RUN_A RUN_B [...]`: which run scores higher, by how much, and whether another judge agrees."""

from __future__ import annotations

import shlex

from rgsd.cli.parsing import Command, Positional
from rgsd.errors import UsageError

COMMAND = Command(
    name="compare",
    summary="compare runs prompt by prompt and criterion by criterion, with a second judge if you name one",
    settings=("rgsd.evaluation.compare.config:CompareConfig", "rgsd.judges:JudgeConfig"),
    positionals=(Positional("run", "FOLDER or FOLDER:ARM; the first is the baseline of the others", "+"),),
    examples=(
        "rgsd compare runs/grpo runs/mine",
        "rgsd compare runs/grpo runs/mine --judge anthropic/claude-opus-4-1 -o comparison.json",
    ),
    details="Compares all runs with the first, on the prompts that all of them share and by a judge that scored all of "
    "them. With --judge, that judge scores the stored responses too; the runs keep its verdicts, so it never "
    "scores a response twice.",
)


def main(argv: list[str]) -> int:
    """Compare runs; exit code 0 for any outcome."""
    parsed = COMMAND.parse(argv)
    settings, judge = parsed.settings
    unused = sorted(name for name in parsed.given if name.startswith("judge_"))
    if unused and "judge" not in parsed.given:
        raise UsageError(f"{', '.join(f'--{n}' for n in unused)} configures a judge: name one with --judge")
    from rgsd.evaluation.compare import SecondJudge, compare_runs, show
    from rgsd.files import write_json

    table = compare_runs(
        parsed.positionals["run"],
        arm=settings.arm,
        by=settings.by,
        judge2=settings.judge2,
        second=SecondJudge(judge, settings.data, settings.schema) if "judge" in parsed.given else None,
        seed=settings.seed,
        command=shlex.join(["rgsd", "compare", *argv]),
    )
    show(table)
    if settings.output:
        write_json(settings.output, table)
        print(f"Comparison: {settings.output}")
    return 0
