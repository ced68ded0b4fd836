"""`rgsd init [FOLDER]`: a recipe and rubrics of one's own to begin with."""

from __future__ import annotations

import argparse
import shlex


def main(argv: list[str]) -> int:
    """Write a recipe and rubric files, and say what comes next."""
    parser = argparse.ArgumentParser(
        prog="rgsd init",
        description="Write a commented recipe and five prompts with rubrics, to be replaced by your own.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", default="my-rubrics", help="where to; unset: my-rubrics")
    parser.add_argument("--overwrite", choices=["true", "false"], default="false", help="replace files that are there")
    args = parser.parse_args(argv)
    from rgsd.workflows.starter import start

    recipe, rubrics, judged = start(args.folder, overwrite=args.overwrite == "true")
    print(f"{recipe}  everything about one run, with comments")
    print(f"{rubrics}  five prompts with criteria that a program checks: replace them by your own")
    print(f"{judged}  the same without checks, for an LLM judge")
    run = shlex.quote(str(recipe.parent / "run"))
    print("\nNext:")
    print(f"  rgsd data {shlex.quote(str(rubrics))}")
    print(f"  rgsd train --config {shlex.quote(str(recipe))}")
    print(f"  rgsd report {run} -o report.html")
    return 0
