"""The lab's table, results page and picture. All of them are computed from the results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rgsd.files import atomic_write, write_json
from rgsd.lab.claims import Finding, findings
from rgsd.lab.grid import LabArm
from rgsd.lab.measurements import LabResults, SeedInterval
from rgsd.lab.picture import picture
from rgsd.runs import RESULTS

PAGE, PICTURE = "RESULTS.md", "lab.svg"
COSTS = ("rollouts", "rollout_tokens", "judge_calls", "seconds")


def write(folder: Path, results: LabResults, arms: Sequence[LabArm], record: Mapping[str, Any]) -> list[Finding]:
    """Write results.json, RESULTS.md and lab.svg, and return the decided claims.

    Args:
        folder: The lab's folder.
        results: All measurements.
        arms: The arms that were run.
        record: The content of lab.json.
    """
    decided = findings(results)
    table = {
        "levels": {a: {m: _plain(results.mean(a, m)) for m in results.bench.measures} for a in results.arms},
        "costs": {a: {what: results.cost(a, what) for what in COSTS} for a in results.arms},
        "claims": [{**asdict(f.claim), "difference": _plain(f.difference), "verdict": f.verdict} for f in decided],
    }
    write_json(folder / RESULTS, table)
    atomic_write(folder / PAGE, page(results, arms, decided, record))
    atomic_write(folder / PICTURE, picture(results))
    return decided


def show(results: LabResults, decided: Sequence[Finding], folder: Path) -> None:
    """Print the table and the claims."""
    seeds = "over seeds and prompts" if results.bench.shares_prompts else "over seeds"
    over = seeds if results.n_seeds > 1 else "over prompts of one seed, without the randomness of training"
    view = Table(title=f"{results.split.capitalize()} rubric satisfaction (95 % interval {over})")
    columns = [m for m, measure in results.bench.measures.items() if measure.printed and m != "satisfaction"]
    headings = ["arm", "score", "95 % interval", *(results.bench.measures[m].heading for m in columns)]
    for heading in (*headings, "rollouts", "judge calls", "seconds"):
        view.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in results.arms:
        costs = (f"{results.cost(arm, what):,.0f}" for what in ("rollouts", "judge_calls", "seconds"))
        view.add_row(arm, *_cells(results, arm, columns), *costs)
    Console(width=120).print(view)
    for finding in decided:
        d = finding.difference
        print(f"  {finding.verdict:>14}: {finding.claim.text} ({d.mean:+.3f}, {d.low:+.3f} to {d.high:+.3f})")
    print(f"Page: {folder.resolve() / PAGE}\nPicture: {folder.resolve() / PICTURE}")


def _cells(results: LabResults, arm: str, columns: Sequence[str]) -> list[str]:
    """Satisfaction with its interval, then other measures."""
    score = results.mean(arm)
    values = (results.bench.measures[m].format(results.mean(arm, m).mean) for m in columns)
    return [f"{score.mean:.3f}", _range(score), *values]


def _plain(interval: SeedInterval) -> dict[str, Any]:
    """As JSON, which has no NaN."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(interval).items()}


def _range(interval: SeedInterval, sign: str = "") -> str:
    return f"{interval.low:{sign}.3f} to {interval.high:{sign}.3f}"


def page(results: LabResults, arms: Sequence[LabArm], decided: Sequence[Finding], record: Mapping[str, Any]) -> str:
    """The results page, in Markdown."""
    seeds = record["seeds"]
    about = {arm.name: arm.about for arm in arms}
    caveat = "" if len(seeds) > 1 else " With one seed, the intervals do not cover the randomness of training."
    lines = [
        "# Lab results",
        "",
        f"Model {results.bench.model}; seeds {', '.join(map(str, seeds))}; commit {str(record.get('commit'))[:12]}"
        f"{' with uncommitted changes' if record.get('dirty') else ''}; {record.get('device')}, {record.get('cores')} "
        f"cores, torch {record.get('versions', {}).get('torch')}. All numbers are computed from the run folders next "
        f"to this file.{caveat}",
        "",
        "## Claims",
        "",
        "| claim | comparison | difference | 95 % interval | verdict | source |",
        "|---|---|---:|---|---|---|",
    ]
    for f in decided:
        c, d = f.claim, f.difference
        margin = f" (margin {c.margin:g})" if c.kind in ("same", "no less") else ""
        compared = f"{c.arm} - {c.other}, {results.bench.measures[c.measure].text}{margin}"
        lines.append(f"| {c.text} | {compared} | {d.mean:+.3f} | {_range(d, '+')} | **{f.verdict}** | {c.source} |")
    columns = [m for m in results.bench.measures if m != "satisfaction"]
    headings = [results.bench.measures[m].heading for m in columns]
    lines += [
        "",
        "## Arms",
        "",
        f"Greedy responses of at most {results.bench.max_new_tokens} tokens to {results.split} prompts, scored by the "
        "exact judge; means per response. Seconds are the duration of the training command, with "
        f"{record.get('workers', 1)} at a time and {record.get('threads', 1)} thread(s) each.",
        "",
        f"| arm | satisfaction | 95 % interval | {' | '.join(headings)} | rollouts | rollout tokens | judge calls | "
        "seconds | description |",
        f"|---|---:|---|{'---:|' * (len(headings) + 4)}---|",
    ]
    for arm in results.arms:
        costs = [f"{results.cost(arm, what):,.0f}" for what in COSTS]
        cells = [arm, *_cells(results, arm, columns), *costs, about.get(arm, "untrained")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![Satisfaction of each arm, and its training time]({PICTURE})", ""])
