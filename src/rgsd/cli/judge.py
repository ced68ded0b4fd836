"""`rgsd judge check LABELLED --judge J [--judge_FIELD VALUE ...]`: a judge against human verdicts."""

from __future__ import annotations

import argparse
import sys

USAGE = """usage: rgsd judge check LABELLED --judge J [--modes batched,per_criterion] [--max_prompts N] [--seed S]
                        [--output FILE.json] [--judge_FIELD VALUE ...]

LABELLED holds human verdicts: HealthBench's meta-evaluation (.jsonl), a .csv or .jsonl with prompt, response, criterion
and met (also weight, id, category, tags, rater), or rows of a run's samples.jsonl with "human" beside each "met".
"""


def main(argv: list[str]) -> int:
    """Run a subcommand of `rgsd judge`; 2 for one that is not known."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not argv or argv[0] != "check":
        got = f"unknown subcommand {argv[0]!r}, known: check" if argv else "no subcommand, known: check"
        print(f"rgsd judge: {got}\n\n{USAGE}", file=sys.stderr)
        return 2
    return _check(argv[1:])


def _check(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rgsd judge check", usage=USAGE.removeprefix("usage: "), allow_abbrev=False)
    parser.add_argument("labelled", help="the file of human verdicts")
    parser.add_argument("--modes", default="batched,per_criterion", help="how the judge is asked, one or both")
    parser.add_argument("--max_prompts", type=int, help="check on so many prompts, drawn by the seed; unset: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the bootstrap")
    parser.add_argument("--output", help="write everything to this .json file")
    args, rest = parser.parse_known_args(argv)
    if any(word.split("=")[0] == "--judge_mode" for word in rest):
        parser.error("the judge is asked as --modes says: name the mode there, not as --judge_mode")
    from rgsd.cli.train import parse_plain
    from rgsd.errors import JudgeError
    from rgsd.evaluation.agreement import check_file, show
    from rgsd.judges import JudgeConfig
    from rgsd.runs import write_json

    (config,) = parse_plain((JudgeConfig,), rest, "judge check")
    table = check_file(args.labelled, config, modes=args.modes.split(","), max_prompts=args.max_prompts, seed=args.seed)
    show(table)
    if args.output:
        write_json(args.output, table)
        print(f"Everything: {args.output}")
    if table["failures"]:
        raise JudgeError(f"the judge failed in mode {', '.join(table['failures'])}; what the other mode gave is above")
    return 0
