"""The comparison in sentences and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from rgsd.evaluation.conclusions import Conclusion, conclude, describe, is_enough, is_shown, points, verdict_sentence
from rgsd.evaluation.summaries import MOST_PAIRS, gains_view, score_cells, tokens_cell
from rgsd.progress import say

MOST_GROUPS = 8
"""Groups of criteria shown of each table; the JSON holds all."""


def sentences(table: Mapping[str, Any]) -> list[str]:
    """The result of a comparison in plain words."""
    lines = [f"Warning: {w}" for w in table["warnings"]]
    lines.append(f"Judge: {table['judge']}; {table['n_shared_prompts']:,} shared prompts.")
    for difference in table["differences"]:
        lines += _difference_sentences(difference)
    for second in table["second_judges"]:
        lines += _second_sentences(second, table)
    return lines


def _difference_sentences(table: Mapping[str, Any]) -> list[str]:
    a, b, gain = table["against"], table["run"], table["difference"]
    if gain is None:
        return [f"{b} and {a} share no prompt that was scored in both."]
    lines = [verdict_sentence(b, a, gain)]
    c = table["criteria"]
    lines.append(
        f"  Criteria: {c['won']:,} won and {c['lost']:,} lost of {c['n']:,} (net {c['net']:+,}; sign test over "
        f"prompts p = {c['p']:.2g}). Prompts: {table['prompts']['won']:,} won, {table['prompts']['lost']:,} lost, "
        f"{table['prompts']['tied']:,} tied (p = {table['prompts']['p']:.2g})."
    )
    groups = [g for g in table["criteria_by_tag"] if g["net"]]
    if groups:
        best = [f"{g['group']} ({g['net']:+,})" for g in groups[:3] if g["net"] > 0]
        worst = [f"{g['group']} ({g['net']:+,})" for g in groups[::-1][:3] if g["net"] < 0]
        parts = [f"gained most in {', '.join(best)}"] if best else []
        parts += [f"lost most in {', '.join(worst)}"] if worst else []
        clear = sum(g["p_holm"] < 0.05 for g in groups)
        verdict = f"{clear} of {len(table['criteria_by_tag'])} tags are significant after Holm's correction (p < 0.05)"
        if conclude(gain) is Conclusion.TOO_FEW:
            verdict = f"{Conclusion.TOO_FEW} whether in any tag by more than chance"
        lines.append(f"  By tag it {' and '.join(parts)}; {verdict}.")
    return [*lines, *_length_sentences(table)]


def _length_sentences(table: Mapping[str, Any]) -> list[str]:
    a, b, gain, length = table["against"], table["run"], table["difference"], table["length"]
    inflation, controlled = length["tokens"], length["controlled"]
    if inflation["value"] is None:
        inflation = length["characters"]
    if inflation["value"] is None:
        return []
    start = f"  Length: {b}'s responses are {inflation['value']:.2f} times as long as {a}'s"
    if inflation["low"] is not None:
        start += f" ({inflation['low']:.2f} to {inflation['high']:.2f})"
    at_equal = controlled["difference"]
    if at_equal["value"] is None:
        return [f"{start}. The difference at equal length is unknown: {at_equal['note']}."]
    end = f"At equal length the difference is {points(at_equal)}"
    if controlled["is_extrapolated"]:
        end += ", extrapolated: all responses differ in length in the same direction"
    if at_equal["low"] is None or not is_shown(gain):
        return [f"{start}. {end}."]
    if conclude(at_equal) is not conclude(gain):
        return [f"{start}. {end}: {conclude(at_equal)}, so length may account for the difference."]
    return [f"{start}. {end}: the conclusion stays the same."]


def _second_sentences(second: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    agreement = second["agreement"]
    if not agreement["n"]:
        return [f"Second judge {second['judge']}: it and {table['judge']} have no verdict on the same response."]
    kappa, f1 = agreement["kappa"], agreement["balanced_f1"]
    lines = [
        f"Second judge {second['judge']}: the same verdict on {100 * agreement['raw']['value']:.1f} % of "
        f"{agreement['n']:,} criteria; Cohen's kappa {describe(kappa)}, balanced F1 {describe(f1)}. It says met in "
        f"{100 * second['met_share']['second']:.1f} %, {table['judge']} in {100 * second['met_share']['first']:.1f} %."
    ]
    if second["n_other_response"]:
        lines.append(f"  {second['n_other_response']} of its samples are about other responses and are left out.")
    if second["rankings"] is None:
        return [*lines, "  No prompt was scored by both judges in all runs: the ranking cannot be compared."]
    order = " > ".join(second["rankings"][second["judge"]])
    if not is_enough(second["n_prompts"]):
        lines.append(f"  It ranks them {order} ({second['n_prompts']:,} prompts): {Conclusion.TOO_FEW} if that holds.")
    elif second["is_ranking_kept"]:
        lines.append(f"  The ranking survives it: {order} ({second['n_prompts']:,} prompts).")
    else:
        before = " > ".join(second["rankings"][table["judge"]])
        lines.append(f"  The ranking does not survive it: {order}, where {table['judge']} has {before}.")
    for d in second["differences"]:
        first, other = conclude(d["first"]), conclude(d["second"])
        if first is other:
            verdict = first if first is Conclusion.TOO_FEW else f"{first} under both judges"
        else:
            verdict = f"{other} under it, {first} under {table['judge']}"
        lines.append(
            f"  {d['run']} against {d['against']}: {points(d['second'])} under it, {points(d['first'])} under "
            f"{table['judge']}: {verdict}."
        )
    return lines


def show(table: Mapping[str, Any]) -> None:
    """Print a comparison: the runs, the criteria and prompts won and lost, and what it says."""
    console = Console(width=118)
    first = table["runs"][0]["run"]
    differences = {d["run"]: d for d in table["differences"]}
    view = Table(title=f"{table['n_shared_prompts']:,} shared prompts, judge: {table['judge']}")
    columns = ("run", "score", "95 % interval", f"minus {first}", "95 % interval", "coverage", "tokens")
    for column in (*columns, "at equal length"):
        view.add_column(column, justify="left" if column == "run" else "right")
    for run in table["runs"]:
        s, d = run["summary"], differences.get(run["run"])
        gain = d["difference"] if d else None
        equal = d["length"]["controlled"]["difference"] if d else None
        view.add_row(
            run["run"],
            *score_cells(s["score"]),
            f"{gain['mean']:+.3f}" if gain else "",
            f"{gain['low']:+.3f} to {gain['high']:+.3f}" if gain else "",
            f"{100 * s['coverage']:.0f} %",
            tokens_cell(s["mean_tokens"]),
            f"{equal['value']:+.3f}" if equal and equal["value"] is not None else "",
        )
    console.print(view)
    pairs = {f"{d['run']} - {d['against']}": d["gains_by_tag"] for d in table["differences"][:MOST_PAIRS]}
    if any(len(gains) > 1 for gains in pairs.values()):
        console.print(gains_view(pairs))
    for d in table["differences"]:
        for key, title in (("criteria_by_tag", "criterion tag"), ("criteria_by_text", "recurring criterion")):
            if any(g["won"] or g["lost"] for g in d[key]):
                console.print(_groups_view(d, key, title))
        if d["prompts"]["most_won"] or d["prompts"]["most_lost"]:
            console.print(_prompts_view(d))
    for sentence in table["sentences"]:
        say(sentence)


def _groups_view(d: Mapping[str, Any], key: str, title: str) -> Table:
    groups = d[key]
    most = sorted(groups, key=lambda g: (-abs(g["net"]), g["p"], g["group"]))[:MOST_GROUPS]
    rest = f"; the {len(most)} that moved most of {len(groups)}" if len(groups) > len(most) else ""
    view = Table(title=f"{d['run']} against {d['against']}, by {title}{rest}")
    for column in (title, "won", "lost", "net", "of", "p", "p (Holm)"):
        view.add_column(column, justify="left" if column == title else "right")
    for g in sorted(most, key=lambda g: (-g["net"], g["p"], g["group"])):
        name = _short(g["group"], 64) + (" [pitfall]" if g.get("is_pitfall") else "")
        numbers = (g["won"], g["lost"], f"{g['net']:+,}", g["n"], f"{g['p']:.2g}", f"{g['p_holm']:.2g}")
        view.add_row(name.replace("[", "\\["), *map(str, numbers))
    return view


def _prompts_view(d: Mapping[str, Any]) -> Table:
    view = Table(title=f"{d['run']} against {d['against']}: the prompts most won and most lost")
    for column in ("prompt", "question", "before", "after", "difference"):
        view.add_column(column, justify="left" if column in ("prompt", "question") else "right")
    for p in [*d["prompts"]["most_won"], *d["prompts"]["most_lost"][::-1]]:
        cells = (_short(p["example_id"], 24), _short(p["question"] or "", 52))
        view.add_row(
            *(c.replace("[", "\\[") for c in cells),
            f"{p['before']:.3f}",
            f"{p['after']:.3f}",
            f"{p['difference']:+.3f}",
        )
    return view


def _short(text: str, most: int) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."
