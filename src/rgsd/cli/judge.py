"""`rgsd judge check LABELLED --judge J`: compare a judge with human verdicts."""

from __future__ import annotations

from rgsd.cli.parsing import HELP_FLAGS, Command, Positional
from rgsd.errors import JudgeError, UsageError

COMMAND = Command(
    name="judge check",
    summary="compare a judge's verdicts with human verdicts",
    settings=("rgsd.evaluation.agreement:AgreementConfig", "rgsd.judges:JudgeConfig"),
    positionals=(Positional("labelled", "file of human verdicts"),),
    examples=("rgsd judge check labelled.jsonl --judge openai/gpt-5.4 --max_prompts 200",),
    details="LABELLED is HealthBench's meta-evaluation (.jsonl); a .csv or .jsonl with prompt, response, criterion "
    "and met (also weight, id, category, tags, rater); or rows of a run's samples.jsonl with `human` next to `met`.",
)


def main(argv: list[str]) -> int:
    """Run `rgsd judge check`, the only subcommand."""
    if argv[:1] != ["check"] and not HELP_FLAGS & set(argv):
        got = f"unknown subcommand {argv[0]!r}" if argv else "no subcommand"
        raise UsageError(f"{got}, known: check. Usage: {COMMAND.usage}")
    parsed = COMMAND.parse(argv[1:] if argv[:1] == ["check"] else argv)
    if "judge_mode" in parsed.given:
        raise UsageError("--judge_mode has no effect here: choose the modes to check with --modes")
    from rgsd.evaluation.agreement import check_file
    from rgsd.evaluation.agreement_words import show
    from rgsd.files import write_json

    settings, judge = parsed.settings
    table = check_file(
        parsed.positionals["labelled"],
        judge,
        modes=settings.modes,
        max_prompts=settings.max_prompts,
        seed=settings.seed,
    )
    show(table)
    if settings.output:
        write_json(settings.output, table)
        print(f"Agreement: {settings.output}")
    if failed := table["failures"]:
        raise JudgeError(f"the judge failed in mode {', '.join(failed)}; the results of the other mode are above")
    return 0
