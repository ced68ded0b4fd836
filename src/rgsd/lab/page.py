"""The laboratory's table, page and picture, made from its figures; nothing in them is written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rgsd.lab.claims import MEASURES, Figures, Finding, Spread, findings
from rgsd.lab.grid import Arm
from rgsd.runs import RESULTS

PAGE, PICTURE = "RESULTS.md", "lab.png"


def write(folder: Path, figures: Figures, arms: Sequence[Arm], record: dict[str, Any]) -> list[Finding]:
    """results.json, RESULTS.md and lab.png into the laboratory's folder; returns the claims, decided."""
    found = findings(figures)
    levels = {a: {m: asdict(figures.level(a, m)) for m in MEASURES} for a in figures.arms}
    costs = {
        a: {w: figures.cost(a, w) for w in ("rollouts", "rollout_tokens", "judge_calls", "seconds")} for a in levels
    }
    value = {
        "levels": levels,
        "costs": costs,
        "claims": [{**asdict(f.claim), "difference": asdict(f.difference), "verdict": f.verdict} for f in found],
    }
    (folder / RESULTS).write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    (folder / PAGE).write_text(page(figures, arms, found, record), "utf-8")
    draw(folder / PICTURE, figures)
    return found


def show(figures: Figures, found: Sequence[Finding], folder: Path) -> None:
    """Print the table and the claims."""
    n_seeds = max(len(figures.of(a)) for a in figures.arms)
    over = "over seeds" if n_seeds > 1 else "over prompts; one seed, so nothing about the chance of training"
    view = Table(title=f"Held-out rubric satisfaction (95 % interval {over})")
    for column in (
        "arm",
        "score",
        "95 % interval",
        "tokens",
        "to the point",
        "false",
        "rollouts",
        "judge calls",
        "seconds",
    ):
        view.add_column(column, justify="left" if column == "arm" else "right")
    for arm in figures.arms:
        view.add_row(arm, *_cells(figures, arm))
    Console(width=110).print(view)
    for finding in found:
        print(f"  {finding.verdict:>14}: {finding.claim.text} ({_signed(finding.difference)})")
    print(f"Page: {folder.resolve() / PAGE}\nPicture: {folder.resolve() / PICTURE}")


def _cells(figures: Figures, arm: str) -> list[str]:
    level = figures.level(arm)
    return [
        f"{level.mean:.3f}",
        f"{level.low:.3f} to {level.high:.3f}",
        f"{figures.level(arm, 'tokens').mean:.0f}",
        f"{100 * figures.level(arm, 'to_the_point').mean:.0f} %",
        f"{100 * figures.level(arm, 'false_share').mean:.0f} %",
        *(f"{figures.cost(arm, what):,.0f}" for what in ("rollouts", "judge_calls", "seconds")),
    ]


def _signed(spread: Spread) -> str:
    return f"{spread.mean:+.3f}, {spread.low:+.3f} to {spread.high:+.3f}"


def page(figures: Figures, arms: Sequence[Arm], found: Sequence[Finding], record: dict[str, Any]) -> str:
    """The page of results, in Markdown."""
    seeds = record["seeds"]
    about = {arm.name: arm.about for arm in arms}
    few = "" if len(seeds) > 1 else " With one seed the intervals know nothing of the chance of the training."
    lines = [
        "# Results of the laboratory",
        "",
        f"Seeds {', '.join(map(str, seeds))}; commit {str(record.get('commit'))[:12]}"
        f"{' with changes' if record.get('dirty') else ''}; {record.get('device')}, {record.get('cores')} cores, torch "
        f"{record.get('versions', {}).get('torch')}. Every figure is computed from the run folders beside this file."
        f"{few}",
        "",
        "## Claims",
        "",
        "| claim | what is compared | difference | 95 % interval | verdict | source |",
        "|---|---|---:|---|---|---|",
    ]
    for f in found:
        c, d = f.claim, f.difference
        within = f" (margin {c.margin:g})" if c.kind in ("same", "no less") else ""
        lines.append(
            f"| {c.text} | {c.arm} - {c.other}, {MEASURES[c.measure]}{within} | {d.mean:+.3f} | "
            f"{d.low:+.3f} to {d.high:+.3f} | **{f.verdict}** | {c.source} |"
        )
    lines += [
        "",
        "## Arms",
        "",
        "Greedy responses to held-out prompts, exact judge. Tokens and facts are of a response; seconds are of the "
        "training command on one core.",
        "",
        "| arm | satisfaction | 95 % interval | tokens | facts | to the point | false | speaks of rubric | rollouts | "
        "rollout tokens | judge calls | seconds | what it is |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for arm in figures.arms:
        score, between, tokens, to_point, false, n_rollouts, calls, seconds = _cells(figures, arm)
        lines.append(
            f"| {arm} | {score} | {between} | {tokens} | {figures.level(arm, 'stated').mean:.1f} | {to_point} | "
            f"{false} | {100 * figures.level(arm, 'names_rubric').mean:.0f} % | {n_rollouts} | "
            f"{figures.cost(arm, 'rollout_tokens'):,.0f} | {calls} | {seconds} | {about.get(arm, 'untrained')} |"
        )
    return "\n".join([*lines, "", f"![Satisfaction of each arm, and what it cost]({PICTURE})", ""])


def draw(path: Path, figures: Figures) -> None:
    """The picture: satisfaction with its interval, an arm a line; and satisfaction over seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(reversed(figures.arms))
    levels = [figures.level(a) for a in arms]
    height = 1.6 + 0.28 * len(arms)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, height), width_ratios=(3, 2), layout="constrained")
    colour = {
        a: "#888888" if a.startswith("base") else "#c2571a" if "grpo" in a or "judge" in a else "#1f6f8b" for a in arms
    }
    for i, (arm, level) in enumerate(zip(arms, levels, strict=True)):
        left.plot([level.low, level.high], [i, i], color=colour[arm], linewidth=2, alpha=0.6)
        left.plot(level.mean, i, "o", color=colour[arm], markersize=6)
        left.annotate(
            f"{level.mean:.2f}", (level.mean, i), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7
        )
        if figures.cost(arm, "seconds"):
            x = figures.cost(arm, "seconds")
            right.plot(x, level.mean, "o", color=colour[arm], markersize=6)
            right.annotate(arm, (x, level.mean), xytext=(5, 3), textcoords="offset points", fontsize=7)
    left.set_yticks(range(len(arms)), arms, fontsize=8)
    left.set_xlim(min(0.0, *(v.low for v in levels)), 1.05)
    left.set_xlabel("held-out rubric satisfaction, 95 % interval")
    left.grid(axis="x", alpha=0.3)
    right.set_xscale("log")
    right.set_ylim(0, 1.05)
    right.set_xlabel("seconds of training, one core (log scale)")
    right.set_ylabel("satisfaction")
    right.grid(alpha=0.3)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)
    plt.close(fig)
