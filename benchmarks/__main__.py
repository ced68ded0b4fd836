"""Runs benchmarks and stores their results: `python -m benchmarks [NAME ...] [--quick] [--out FILE] [--tables]`."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

NAMES = ["p1_step", "p2_update", "p3_memory", "p4_grpo", "p5_padding", "p6_rollouts", "growth"]
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round: checks that it runs")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results.json", help="results file; other benchmarks in it are kept"
    )
    parser.add_argument(
        "--tables", action="store_true", help="only write the tables of docs/BENCHMARKS.md from stored results"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    from benchmarks import common, tables

    kept = json.loads(chosen.out.read_text()) if chosen.out.is_file() else {}
    for name in [] if chosen.tables else chosen.names or NAMES:
        print(f"{name} ...", flush=True)
        machine, started = common.machine(), time.time()
        result = importlib.import_module(f"benchmarks.{name}").run(chosen.quick)
        kept[name] = {
            "machine": machine,
            "at": time.strftime("%Y-%m-%d", time.gmtime(started)),
            "quick": chosen.quick,
            "took": round(time.time() - started, 1),
            **result,
        }
        chosen.out.write_text(json.dumps(kept, indent=1) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1), flush=True)
    tables.write(kept, HERE.parent / "docs" / "BENCHMARKS.md", HERE.parent / "docs")


if __name__ == "__main__":
    main()
