"""`rgsd init [FOLDER]`: write a recipe and rubrics to start from."""

from __future__ import annotations

import shlex

from rgsd.cli.parsing import Command, Positional

COMMAND = Command(
    name="init",
    summary="write a commented recipe and example rubrics to start from",
    settings=("rgsd.workflows.starter:InitConfig",),
    positionals=(Positional("folder", "folder to write to, created if needed (default: my-rubrics)", "?"),),
    examples=("rgsd init my-rubrics", "rgsd train --config my-rubrics/recipe.yaml"),
)


def main(argv: list[str]) -> int:
    """Write the files and print the commands to run next."""
    parsed = COMMAND.parse(argv)
    from rgsd.workflows.starter import start

    (settings,) = parsed.settings
    recipe, rubrics, judged = start(parsed.positionals["folder"] or "my-rubrics", overwrite=settings.overwrite)
    print(f"{recipe}  settings of one run, with comments")
    print(f"{rubrics}  five prompts whose criteria have programmatic checks: replace them with your own")
    print(f"{judged}  the same prompts without checks, for an LLM judge")
    run = shlex.quote(str(recipe.parent / "run"))
    print("\nNext:")
    print(f"  rgsd data {shlex.quote(str(rubrics))}")
    print(f"  rgsd train --config {shlex.quote(str(recipe))}")
    print(f"  rgsd report {run} -o report.html")
    return 0
