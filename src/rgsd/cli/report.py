"""`rgsd report RUN [RUN ...] -o report.html`: what runs show, on one page."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    """Write one page about one run or several; exit code 0 whatever came out."""
    parser = argparse.ArgumentParser(
        prog="rgsd report",
        description="One HTML page about runs of `rgsd train`, `grpo`, `eval` or `gap`. It holds everything that it "
        "shows and loads nothing. Several runs are set against the first, on the prompts that they share.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument(
        "-o", "--output", help="the page, or a .json file for the numbers alone; unset: RUN/report.html"
    )
    args = parser.parse_args(argv)
    from rgsd.errors import RunError
    from rgsd.report import read, report_page, write_page
    from rgsd.report.page import as_json, is_a_report
    from rgsd.runs import write_json

    facts = read(args.runs)
    output = Path(args.output or Path(args.runs[0]) / "report.html")
    if output.is_file() and not is_a_report(output):
        raise RunError(f"{output} is there already, and is no report: choose another output (-o)")
    if output.suffix == ".json":
        write_json(str(output), as_json(facts))
    else:
        write_page(output, report_page(facts), overwrite=True)
    print(f"Report: {output.resolve()}")
    return 0
