"""`rgsd data PATH [--schema NAME]`: what a rubric file holds."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Print the summary of a rubric file and one example as student and teacher will read it."""
    from rgsd import data as datasets
    from rgsd.prompts.messages import PromptSettings, student_messages, teacher_messages, template_names

    parser = argparse.ArgumentParser(prog="rgsd data", description="Tell what a rubric file holds.")
    parser.add_argument("path", help="a .json, .jsonl or .parquet file, a folder, a hub id, or `bundled`")
    parser.add_argument("--schema", choices=sorted(datasets.SCHEMAS), help="unset: recognised from the rows")
    parser.add_argument("--split", help="split of a hub dataset")
    parser.add_argument("--skip_bad_rows", action="store_true", help="list bad rows and go on")
    parser.add_argument("--example", help="id of the example to show; unset: the first")
    parser.add_argument("--template", default="paper", help=f"{', '.join(template_names())}, or a .jinja file")
    parser.add_argument("--show_weights", action="store_true", help="show the weights to the teacher")
    args = parser.parse_args(argv)

    loaded = datasets.load(args.path, schema=args.schema, split=args.split, skip_bad_rows=args.skip_bad_rows)
    print(datasets.describe(loaded))
    chosen = [e for e in loaded.examples if args.example in (None, e.id)]
    if not chosen:
        print(f"\nNo example has the id {args.example!r}.")
        return 1
    example = chosen[0]
    print(f"\nExample {example.id}, as the student reads it:")
    _show(student_messages(example))
    print("\nThe same, as the teacher reads it:")
    _show(teacher_messages(example, PromptSettings(template=args.template, show_weights=args.show_weights)))
    return 0


def _show(messages: list[dict[str, str]]) -> None:
    for message in messages:
        print(f"  [{message['role']}]")
        print("\n".join(f"    {line}" for line in message["content"].splitlines()))
