"""The lab's table, results page and picture. All of them are computed from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rgsd.files import atomic_write, write_json
from rgsd.lab.claims import Finding, findings
from rgsd.lab.grid import LabArm
from rgsd.lab.measurements import MEASURES, LabResults, SeedInterval
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
        "levels": {a: {m: asdict(results.mean(a, m)) for m in MEASURES} for a in results.arms},
        "costs": {a: {what: results.cost(a, what) for what in COSTS} for a in results.arms},
        "claims": [{**asdict(f.claim), "difference": asdict(f.difference), "verdict": f.verdict} for f in decided],
    }
    write_json(folder / RESULTS, table)
    atomic_write(folder / PAGE, page(results, arms, decided, record))
    atomic_write(folder / PICTURE, picture(results))
    return decided


def show(results: LabResults, decided: Sequence[Finding], folder: Path) -> None:
    """Print the table and the claims."""
    over = "over seeds" if results.n_seeds > 1 else "over prompts of one seed, without the randomness of training"
    view = Table(title=f"Held-out rubric satisfaction (95 % interval {over})")
    headings = (
        "arm",
        "score",
        "95 % interval",
        "tokens",
        "to the point",
        "false",
        "rollouts",
        "judge calls",
        "seconds",
    )
    for heading in headings:
        view.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in results.arms:
        view.add_row(arm, *_cells(results, arm))
    Console(width=110).print(view)
    for finding in decided:
        d = finding.difference
        print(f"  {finding.verdict:>14}: {finding.claim.text} ({d.mean:+.3f}, {d.low:+.3f} to {d.high:+.3f})")
    print(f"Page: {folder.resolve() / PAGE}\nPicture: {folder.resolve() / PICTURE}")


def _cells(results: LabResults, arm: str) -> list[str]:
    score = results.mean(arm)
    return [
        f"{score.mean:.3f}",
        _range(score),
        f"{results.mean(arm, 'tokens').mean:.0f}",
        f"{100 * results.mean(arm, 'to_the_point').mean:.0f} %",
        f"{100 * results.mean(arm, 'false_share').mean:.0f} %",
        *(f"{results.cost(arm, what):,.0f}" for what in ("rollouts", "judge_calls", "seconds")),
    ]


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
        f"Seeds {', '.join(map(str, seeds))}; commit {str(record.get('commit'))[:12]}"
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
        lines.append(
            f"| {c.text} | {c.arm} - {c.other}, {MEASURES[c.measure]}{margin} | {d.mean:+.3f} | {_range(d, '+')} | "
            f"**{f.verdict}** | {c.source} |"
        )
    lines += [
        "",
        "## Arms",
        "",
        "Greedy responses to held-out prompts, scored by the exact judge. Tokens and facts are means per response. "
        "Seconds are the duration of the training command on one core.",
        "",
        "| arm | satisfaction | 95 % interval | tokens | facts | to the point | false | mentions rubric | rollouts | "
        "rollout tokens | judge calls | seconds | description |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for arm in results.arms:
        score, interval, tokens, to_the_point, false, rollouts, calls, seconds = _cells(results, arm)
        cells = [
            arm, score, interval, tokens, f"{results.mean(arm, 'stated').mean:.1f}", to_the_point, false,
            f"{100 * results.mean(arm, 'names_rubric').mean:.0f} %", rollouts,
            f"{results.cost(arm, 'rollout_tokens'):,.0f}", calls, seconds, about.get(arm, "untrained"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![Satisfaction of each arm, and its training time]({PICTURE})", ""])
