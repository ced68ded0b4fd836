"""The check of a judge in sentences and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rgsd.evaluation.conclusions import Conclusion, conclude, describe, points
from rgsd.progress import say

SIGNS = ("all", "positive", "pitfall", "unstated")
"""Groups of criteria by the sign of their weight."""
SHOWN_GROUPS = 12
"""Categories or tags in a printed table, the largest first."""
ENOUGH_SCORED = 0.95
"""Share of the criteria that must be scored to report without a warning."""
EFFECTS = {
    "positive": ("gives points unearned", "withholds points"),
    "pitfall": ("takes points off unjustly", "lets pitfalls pass"),
}
"""What a false positive and a false negative do to a score, by the sign of the weight."""


def sentences(table: Mapping[str, Any]) -> list[str]:
    """The result of a check in plain words."""
    lines = []
    ties = f"; {table['n_ties']:,} criteria on which people tie are excluded" if table["n_ties"] else ""
    for mode in table["modes"]:
        a = mode["agreement"]
        lines.append(
            f"{mode['judge']} agrees with the people on {_percent(a['raw'])} of {a['n']:,} criteria; Cohen's kappa "
            f"{describe(a['kappa'])}, balanced F1 {describe(a['balanced_f1'])}{ties}."
        )
        if mode["n_several"]:
            lines.append(_against_people(mode))
        lines += _by_sign(mode)
        if mode["unscored_share"] > 1 - ENOUGH_SCORED:
            reasons = ", ".join(f"{count} {problem}" for problem, count in mode["unscored"].items())
            lines.append(
                f"It left {100 * mode['unscored_share']:.1f} % of the criteria unscored ({reasons}). The figures cover "
                "the rest, which may be easier."
            )
    lines += [_between_sentence(difference, table) for difference in table["between"]]
    lines += [f"Mode {mode} failed: {error}" for mode, error in table["failures"].items()]
    return lines


def _against_people(mode: Mapping[str, Any]) -> str:
    difference = mode["minus_people"]["raw"]
    start = (
        f"On {mode['n_several']:,} criteria that several people judged, it agrees with one person on "
        f"{_percent(mode['pairwise']['raw'])}, and two people with each other on "
        f"{_percent(mode['people_pairwise']['raw'])}"
    )
    if difference["low"] is None:
        return f"{start}."
    ends = {
        Conclusion.BETTER: "it agrees with people more than they do with each other",
        Conclusion.WORSE: "it is below the ceiling set by people",
        Conclusion.NOT_SHOWN: "no difference is shown between it and one more person",
        Conclusion.TOO_FEW: str(Conclusion.TOO_FEW),
    }
    return f"{start} (judge minus people: {points(difference)}): {ends[conclude(difference)]}."


def _by_sign(mode: Mapping[str, Any]) -> list[str]:
    lines = []
    for sign, name in (("positive", "criteria of positive weight"), ("pitfall", "pitfalls")):
        rates = mode["error_rates"][sign]
        if rates["n_met"] + rates["n_not_met"] == 0:
            continue
        effect = EFFECTS[sign]
        lines.append(
            f"On {name} it says met where people do not in {_percent(rates['false_positive'])} of "
            f"{rates['n_not_met']:,} ({effect[0]}), and not met where people say met in "
            f"{_percent(rates['false_negative'])} of {rates['n_met']:,} ({effect[1]})."
        )
    return lines


def _between_sentence(between: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    shares = {mode["mode"]: mode["met_share"] for mode in table["modes"]}
    people = table["modes"][0]["people_met_share"]
    d = between["met_share_difference"]
    match conclude(d):
        case Conclusion.BETTER | Conclusion.WORSE as way:
            tendency = f"{between['first'] if way is Conclusion.BETTER else between['other']} is stricter"
        case Conclusion.NOT_SHOWN:
            tendency = "no difference in strictness is shown"
        case too_few:
            tendency = f"{too_few} which mode is stricter"
    closer = {Conclusion.BETTER: between["other"], Conclusion.WORSE: between["first"]}.get(
        conclude(between["balanced_f1_difference"])
    )
    better = f" {closer} is closer to the people." if closer else ""
    first, other, agreement = between["first"], between["other"], between["agreement"]
    return (
        f"In mode {first} it says met in {_percent(shares[first])}, in mode {other} in {_percent(shares[other])}, "
        f"people in {_percent(people)}; {other} minus {first} on the same criteria: {points(d)}: {tendency}.{better} "
        f"The two modes agree on {_percent(agreement['raw'])} (kappa {describe(agreement['kappa'])}): never mix their "
        "scores."
    )


def _percent(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "an undefined share"
    if estimate["low"] is None:
        return f"{100 * estimate['value']:.1f} %"
    return f"{100 * estimate['value']:.1f} % ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def show(table: Mapping[str, Any]) -> None:
    """Print a check: the modes, their errors by sign, the largest categories or tags, and the sentences."""
    console = Console(width=118)
    view = _view("Judge against people (95 % interval over prompts)", "", *(m["mode"] for m in table["modes"]))
    lines: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("criteria compared", lambda m: f"{m['n_compared']:,}"),
        ("agreement with the majority", lambda m: _percent(m["agreement"]["raw"])),
        ("Cohen's kappa", lambda m: _short(m["agreement"]["kappa"])),
        ("balanced F1", lambda m: _short(m["agreement"]["balanced_f1"])),
    ]
    if any(m["n_several"] for m in table["modes"]):
        lines += [
            ("agreement with one person", lambda m: _percent(m["pairwise"]["raw"])),
            ("  balanced F1", lambda m: _short(m["pairwise"]["balanced_f1"])),
            ("two people with each other", lambda m: _percent(m["people_pairwise"]["raw"])),
            ("  balanced F1", lambda m: _short(m["people_pairwise"]["balanced_f1"])),
        ]
    for sign in SIGNS:
        if all(m["error_rates"][sign]["n_met"] + m["error_rates"][sign]["n_not_met"] == 0 for m in table["modes"]):
            continue
        lines += [
            (f"false positives, {sign}", lambda m, s=sign: _rate(m["error_rates"][s], "false_positive")),
            (f"false negatives, {sign}", lambda m, s=sign: _rate(m["error_rates"][s], "false_negative")),
        ]
    lines += [
        ("says met", lambda m: _percent(m["met_share"])),
        ("people say met", lambda m: _percent(m["people_met_share"])),
        ("unscored", lambda m: f"{100 * m['unscored_share']:.1f} %"),
        ("requests (from the cache)", lambda m: f"{m['usage']['calls']:,} ({m['usage']['cached']:,})"),
        ("US dollars", lambda m: "unknown" if m["usage"]["price"] is None else f"{m['usage']['price']:.4f}"),
    ]
    for name, cell in lines:
        view.add_row(name, *(cell(m) for m in table["modes"]))
    console.print(view)
    for key, title in (("by_category", "category"), ("by_tag", "criterion tag")):
        if table["modes"][0][key]:
            console.print(_group_view(table["modes"], key, title))
    for sentence in table["sentences"]:
        say(sentence)


def _rate(rates: Mapping[str, Any], name: str) -> str:
    return "-" if rates[name]["value"] is None else _percent(rates[name])


def _short(estimate: Mapping[str, Any]) -> str:
    return "-" if estimate["value"] is None else describe(estimate)


def _group_view(modes: Sequence[Mapping[str, Any]], key: str, title: str) -> Table:
    groups = modes[0][key]
    largest = sorted(groups, key=lambda g: (-groups[g]["n"], g))[:SHOWN_GROUPS]
    rest = f"; the {len(largest)} largest of {len(groups)}" if len(groups) > len(largest) else ""
    view = _view(f"By {title}{rest}", title, "criteria", *(f"{m['mode']}: balanced F1" for m in modes))
    for name in largest:
        cells = [_short(m[key][name]["balanced_f1"]) if name in m[key] else "-" for m in modes]
        view.add_row(name, f"{groups[name]['n']:,}", *cells)
    return view


def _view(title: str, first: str, *columns: str) -> Table:
    view = Table(title=title)
    view.add_column(first)
    for column in columns:
        view.add_column(column, justify="right")
    return view
