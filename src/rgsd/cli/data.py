"""`rgsd data PATH`: summarize a rubric file."""

from __future__ import annotations

from rgsd.cli.parsing import Command, Positional

COMMAND = Command(
    name="data",
    summary="summarize a rubric file and show one example as the student and the teacher read it",
    settings=("rgsd.workflows.inspect_data:InspectConfig",),
    positionals=(Positional("path", "a .json, .jsonl or .parquet file, a folder, a hub id, or `bundled`"),),
    examples=("rgsd data my_rubrics.jsonl", "rgsd data bundled --template cover --show_weights"),
)


def main(argv: list[str]) -> int:
    """Print the summary; exit code 1 when no example has the id asked for."""
    parsed = COMMAND.parse(argv)
    from rgsd.workflows.inspect_data import inspect_data

    return 0 if inspect_data(parsed.positionals["path"], *parsed.settings) else 1
