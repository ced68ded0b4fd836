"""`rgsd compare RUN_A RUN_B [RUN_C ...]`: what won, by how much, and whether another judge says the same."""

from __future__ import annotations

import argparse
import shlex

USAGE = """rgsd compare RUN_A RUN_B [RUN_C ...] [--arm ARM] [--by JUDGE] [--judge2 JUDGE ...]
                    [--second_judge J [--judge_FIELD VALUE ...] [--data D]] [--seed S] [--output FILE.json]

RUN is a run's folder, or FOLDER:ARM for another arm than `trained`. All are compared with the first, on the prompts
that they share and by the judge that judged all of them. With --second_judge, J judges the stored responses too
(its settings as in `rgsd eval`, e.g. --judge_api_base URL); its rows are kept in the runs and judged once."""


def main(argv: list[str]) -> int:
    """Compare runs; exit code 0 whatever came out."""
    parser = argparse.ArgumentParser(prog="rgsd compare", usage=USAGE, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="FOLDER or FOLDER:ARM; the first is the one to beat")
    parser.add_argument("--arm", help="arm of the runs that name none; unset: `trained`, or the only one")
    parser.add_argument("--by", metavar="JUDGE", help="compare by this judge's rows; unset: the first that all have")
    parser.add_argument("--judge2", nargs="+", default=[], metavar="JUDGE", help="second judges, by name; unset: all")
    parser.add_argument("--second_judge", metavar="J", help="let this judge judge the stored responses too")
    parser.add_argument("--data", help="rubric data for it, where they no longer lie where the run says")
    parser.add_argument("--schema", help="schema of --data; unset: recognised")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--output", help="write everything to this .json file")
    args, rest = parser.parse_known_args(argv)
    if rest and not args.second_judge:
        parser.error(f"unknown: {' '.join(rest)} (settings of a judge need --second_judge)")
    from rgsd.evaluation.compare import SecondJudge, compare_runs, show
    from rgsd.runs import write_json

    second = None
    if args.second_judge:
        from rgsd.cli.train import parse_plain
        from rgsd.judges import JudgeConfig

        (config,) = parse_plain((JudgeConfig,), ["--judge", args.second_judge, *rest], "compare")
        second = SecondJudge(config, args.data, args.schema)
    table = compare_runs(
        args.runs,
        arm=args.arm,
        by=args.by,
        judge2=args.judge2,
        second=second,
        seed=args.seed,
        command=shlex.join(["rgsd", "compare", *argv]),
    )
    show(table)
    if args.output:
        write_json(args.output, table)
        print(f"Everything: {args.output}")
    return 0
