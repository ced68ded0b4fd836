"""`rgsd report RUN [...] -o report.html`: one HTML page about runs."""

from __future__ import annotations

from pathlib import Path

from rgsd.cli.parsing import Command, Positional

COMMAND = Command(
    name="report",
    summary="write one HTML page about runs: results, curves, cost, criteria, responses side by side",
    settings=("rgsd.report.config:ReportConfig",),
    positionals=(Positional("run", "folder of a run of train, grpo, sft, eval or gap, finished or not", "+"),),
    examples=("rgsd report runs/mine -o report.html", "rgsd report runs/grpo runs/mine -o comparison.html"),
    details="The page is self-contained and loads nothing from the network. Several runs are compared with the first, "
    "on the prompts that they share.",
)


def main(argv: list[str]) -> int:
    """Write the page; exit code 0 for any outcome."""
    parsed = COMMAND.parse(argv)
    from rgsd.errors import RunError
    from rgsd.files import write_json
    from rgsd.report import read, report_page, write_page
    from rgsd.report.page import as_json, is_a_report

    (settings,) = parsed.settings
    runs = parsed.positionals["run"]
    facts = read(runs)
    output = Path(settings.output or Path(runs[0]) / "report.html")
    if output.is_file() and not is_a_report(output):
        raise RunError(f"{output} exists and is not a report: choose another file with -o")
    if output.suffix == ".json":
        write_json(str(output), as_json(facts))
    else:
        write_page(output, report_page(facts), overwrite=True)
    print(f"Report: {output.resolve()}")
    return 0
