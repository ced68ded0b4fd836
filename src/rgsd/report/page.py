"""Facts -> HTML: one page a file, with its styles, its script and its data inside.

Nothing that comes out of a run is trusted: the templates escape it, the script writes it as text, and the page's own
policy (Content-Security-Policy) lets it load nothing and run no script but the one whose digest it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from rgsd.errors import RunError
from rgsd.evaluation.conclusions import Conclusion, conclude
from rgsd.evaluation.samples import Sample
from rgsd.redaction import redact_known
from rgsd.report import charts
from rgsd.report.charts import Series, number
from rgsd.report.facts import MOST_GROUPS, Arm, Facts, RunFacts, cost_sentence, verdict
from rgsd.runs import BASELINE, CONDITIONED, CONTROL, TRAINED, TRAINED_CONTROL, TRAINING_KINDS

COLOURS = 8
"""Colours of the style sheet, c0 to c7."""
ROLE_COLOURS = {BASELINE: 0, CONDITIONED: 1, TRAINED: 2}
NONE = "\N{EN DASH}"
OPEN_BOX = "\N{OPEN BOX}"
PER_PAGE = 10
"""Responses on one page of the browser of responses."""

CURVES: tuple[tuple[str, str, str, bool], ...] = (
    ("Reward (rubric score)", "reward", "", False),
    ("Loss on the conditioned model's responses", "loss", "nats a token", False),
    ("Divergence from the teacher", "divergence", "nats a token", False),
    ("The same after the clip: the loss", "clipped_divergence", "nats a token", False),
    ("Tokens that the clip touched", "clipped_share", "", True),
    ("Response length", "response_length|completions/mean_length", "tokens", False),
    ("Responses cut off at the limit", "truncated_share|completions/clipped_ratio", "", True),
    ("Responses that speak of a rubric", "leak_rate", "", True),
    ("Student's entropy", "student_entropy|entropy", "nats", False),
    ("Tokens that are the teacher's first choice", "agreement", "", True),
    ("Rewards that were unscored", "unscored_share", "", True),
)
"""Title, keys of metrics.jsonl that mean the same in RGSD and GRPO, unit, and whether it is a share."""


def report_page(facts: Facts) -> str:
    """The page of one run or of several."""
    colours = _colours(facts)
    every = [a for run in facts.runs for a in run.arms]
    payload = _payload(facts, every)
    return _render(
        "report.html.jinja",
        payload,
        title=" · ".join(r.label for r in facts.runs),
        facts=facts,
        runs=[_run_view(run, colours, len(facts.runs) > 1) for run in facts.runs],
        results=_results(facts, colours),
        comparison=_comparison(facts),
        curves=_curves(facts),
        curve_colours=[(r.label, _line_colour(i)) for i, r in enumerate(facts.runs)],
        cost_sentence=cost_sentence(facts.runs),
        lengths=_lengths(facts, colours),
        n_responses=sum(len(a.samples) for a in every),
        has_maps=any(r.maps for r in facts.runs),
        many=len(facts.runs) > 1,
    )


def token_page(found: Mapping[str, Any]) -> str:
    """The page of one token map, as `rgsd.report.token_map.explain` returns it."""
    rows = [r for r in found["tokens"] if r["m"]]
    most = sorted(rows, key=lambda r: -r["d"])[:10]
    payload = {"maps": [found], "only": True}
    return _render(
        "tokens.html.jinja", payload, title=f"{found['example_id']} · {found['policy']}", map=found, most=most
    )


def is_a_report(path: Path) -> bool:
    """Whether a file is a report that was made here, page or numbers, so that making it anew loses nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return b'name="generator" content="rgsd ' in head or head.startswith(b'{\n  "runs": [')


def write_page(path: str | Path, html: str, *, overwrite: bool = False) -> Path:
    """Write a page, whole or not at all.

    Raises:
        RunError: when the file is there already, or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise RunError(f"{target} is a folder: give the page a file name, e.g. {target / 'report.html'}")
    if target.exists() and not overwrite:
        raise RunError(f"{target} is there already: choose another output, or say --overwrite true to replace it")
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A model may write half a surrogate pair, which no file in UTF-8 can hold.
        partial.write_text(redact_known(html), "utf-8", errors="replace")
        partial.replace(target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}. Choose another output") from error
    return target


# --- Rendering ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("rgsd.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "num": number,
        "score": lambda v: NONE if v is None else f"{v:.3f}".replace("-", "\N{MINUS SIGN}"),
        "points": lambda v: f"{100 * v:+.1f}".replace("-", "\N{MINUS SIGN}"),
        "percent": lambda v: NONE if v is None else f"{100 * v:.0f} %",
        "grouped": lambda v: NONE if v is None else f"{v:,.0f}",
        "seconds": _seconds,
        "dollars": lambda v: "unknown" if v is None else "none" if v == 0 else f"${v:,.4f}" if v < 1 else f"${v:,.2f}",
        "prob": _probability,
        "token": _token,
        "code": _code,
        "p": lambda v: NONE if v is None else "< 0.001" if v < 0.001 else f"{v:.3f}",
    }
    return made


def _seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _probability(value: float) -> str:
    if value >= 0.0995 or value == 0:
        return f"{100 * value:.0f} %"
    return f"{100 * value:.1f} %" if value >= 0.001 else "< 0.1 %"


def _token(text: str) -> str:
    """A token with its line breaks and outer spaces made visible, as the script shows it."""
    core = text.strip(" ")
    n_left = len(text) - len(text.lstrip(" "))
    n_right = len(text) - n_left - len(core) if core else 0
    seen = OPEN_BOX * n_left + core + OPEN_BOX * n_right
    return (
        seen.replace("\n", "\N{RETURN SYMBOL}").replace("\t", "\N{RIGHTWARDS ARROW TO BAR}") or "(part of a character)"
    )


def _code(text: str) -> Markup:
    """A sentence, escaped, with what stands between backquotes as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@lru_cache(maxsize=8)
def _asset(name: str) -> str:
    return resources.files("rgsd.report").joinpath("templates", name).read_text("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no text in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _render(template: str, payload: Any, **context: Any) -> str:
    style, script = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),
            script=Markup(script),
            policy=policy,
            data=embedded_json(payload),
            version=metadata.version("rgsd"),
            **context,
        )
    )


# --- Results --------------------------------------------------------------------------------------------------------


def _colours(facts: Facts) -> dict[tuple[str, str], int]:
    """A colour an arm: by its role in a single run, else a run's trained arm has the run's colour."""
    found: dict[tuple[str, str], int] = {}
    for i, run in enumerate(facts.runs):
        free = [c for c in range(COLOURS) if c not in ROLE_COLOURS.values()]
        for arm in run.arms:
            if arm.role in ROLE_COLOURS:
                found[(run.label, arm.name)] = ROLE_COLOURS[arm.role]
                if arm.role == TRAINED and len(facts.runs) > 1:
                    found[(run.label, arm.name)] = _line_colour(i)
            else:
                found[(run.label, arm.name)] = free[len(found) % len(free)]
    return found


def _line_colour(position: int) -> int:
    return 2 + position % (COLOURS - 2)


ROLE_WORDS = {
    BASELINE: "before training, the prompt alone",
    CONDITIONED: "before training, with the rubric or reference in the prompt: what there is to learn",
    CONTROL: "before training, shown what the control's teacher is shown",
    TRAINED: "after training, the prompt alone",
    TRAINED_CONTROL: "after training on another prompt's rubric for each prompt: the control",
}


def _results(facts: Facts, colours: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    """One table a run, on one scale for all of them."""
    ends = [v for r in facts.runs for a in r.arms if a.score for v in (a.score["low"], a.score["high"])]
    low, high = min([0.0, *ends]), max([0.1, *ends])
    steps = charts.ticks(low, high * 1.0001, 5)
    if steps[-1] < high and len(steps) > 1:
        high = steps[-1] + steps[1] - steps[0]
    if low < 0 and len(steps) > 1 and steps[0] > low:
        low = steps[0] - (steps[1] - steps[0])
    tables = []
    for run in facts.runs:
        is_training = run.kind in TRAINING_KINDS
        rows = [
            {
                "arm": a,
                "colour": colours[(run.label, a.name)],
                "words": ROLE_WORDS.get(a.role, "") if is_training else "what the others are compared with"
                if a.role == BASELINE else "",
                "chart": charts.interval_row(a.score, low, high, colours[(run.label, a.name)], zero=low < 0),
            }
            for a in run.arms
        ]  # fmt: skip
        tables.append({"run": run, "rows": rows, "axis": charts.interval_axis(low, high) if rows else ""})
    return tables


def _run_view(run: RunFacts, colours: Mapping[tuple[str, str], int], many: bool) -> dict[str, Any]:
    meta, settings = run.run.meta, run.run.settings or {}
    said = verdict(run)
    before, after = run.role(BASELINE), run.after
    # Of a conditioning gap, what the rubric in the prompt is worth is the result.
    headline = run.role(CONDITIONED) if run.kind == "gap" else after
    headline_gain = run.added or (headline.gain if headline else None)
    change = None
    if run.change and run.change["criteria"]["n"]:
        change = _change_view(run.change) | {"before": before, "after": after}
    return {
        "facts": run,
        "headline": said[0],
        "said": said[1:],
        "kind": {
            "rgsd": "RGSD",
            "grpo": "GRPO",
            "sft": "supervised control",
            "eval": "evaluation",
            "gap": "conditioning gap",
        }.get(run.kind, "run"),
        "model": settings.get("model_name_or_path") or ", ".join(map(str, settings.get("models") or ())) or "unknown",
        "change": change,
        "provenance": _provenance(run),
        "settings": sorted((k, _setting_text(v)) for k, v in settings.items() if v is not None),
        "started": str(meta.get("started", ""))[:10],
        "gain": headline_gain,
        "gains": _gains_view(run),
        "direction": _direction(headline_gain),
        "phases": [
            (name, seconds, 100 * seconds / max(1e-9, sum(run.cost.phases.values())))
            for name, seconds in run.cost.phases.items()
        ],
    }


def _gains_view(run: RunFacts) -> list[dict[str, Any]]:
    """A row a criterion tag: shares satisfied before and after, and the gains; none where there is one tag."""
    tags = list(dict.fromkeys(tag for gains in run.gains.values() for tag in gains))
    if len(tags) < 2:
        return []
    baseline, control = (run.gains.get(name, {}) for name in ("baseline", "control"))
    found = []
    for tag in tags[:MOST_GROUPS]:
        gain, added = baseline.get(tag), control.get(tag)
        found.append({"tag": tag.removeprefix("axis:"), "gain": gain, "added": added, "of": gain or added})
    return found


def _direction(gain: Mapping[str, Any] | None) -> str:
    """Which way the interval points, where it rests on enough prompts to point at all."""
    directions = {Conclusion.BETTER: "up", Conclusion.WORSE: "down"}
    return directions.get(conclude(gain), "flat")


def _change_view(change: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of criteria as rows with bars on one scale, most won first, most lost last."""
    view: dict[str, Any] = {"criteria": change["criteria"], "prompts": change["prompts"], "length": change["length"]}
    for key, name in (("by_tag", "criteria_by_tag"), ("by_text", "criteria_by_text")):
        groups = [g for g in change[name] if g["won"] or g["lost"]]
        left_out = max(0, len(groups) - MOST_GROUPS)
        if left_out:
            half = MOST_GROUPS // 2
            groups = [*groups[:half], *groups[-half:]]
        most = max((max(g["won"], g["lost"]) for g in groups), default=0)
        view[key] = [g | {"bar": charts.won_lost(g["won"], g["lost"], most)} for g in groups]
        view[f"{key}_left_out"] = left_out
    return view


def _setting_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _provenance(run: RunFacts) -> list[tuple[str, str]]:
    meta = run.run.meta
    commit, lineage = meta.get("commit"), meta.get("lineage") or []
    versions = ", ".join(f"{k} {v}" for k, v in (meta.get("versions") or {}).items() if v)
    facts = [
        ("status", meta.get("status")),
        ("started", meta.get("started")),
        ("command", meta.get("command")),
        ("judge", run.judge),
        ("commit", None if commit is None else commit + (", with uncommitted changes" if meta.get("dirty") else "")),
        ("device", f"{meta.get('device')}, {meta.get('cores')} cores" if meta.get("device") else None),
        ("python", meta.get("python")),
        ("versions", versions),
        (
            "starts from",
            "; before it ".join(f"{a['run']} ({a['kind']}, id {a['id']})" for a in lineage),
        ),
        ("model fingerprint", meta.get("model_fingerprint")),
        ("training data fingerprint", meta.get("train_fingerprint")),
        ("held-out data fingerprint", meta.get("held_out_fingerprint")),
        ("seed", (run.run.settings or {}).get("seed")),
    ]
    return [(k, str(v)) for k, v in facts if v not in (None, "")]


def _comparison(facts: Facts) -> dict[str, Any] | None:
    table = facts.comparison
    if table is None:
        return None
    ends = [
        v for d in table["differences"] if d["difference"] for v in (d["difference"]["low"], d["difference"]["high"])
    ]
    reach = max([0.05, *(abs(v) for v in ends)]) * 1.1
    rows = []
    for d in table["differences"]:
        chart = charts.interval_row(d["difference"], -reach, reach, 2, zero=True)
        rows.append(d | {"chart": chart, "change": _change_view(d)})
    return {
        "rows": rows,
        "axis": charts.interval_axis(-reach, reach),
        "warnings": table["warnings"],
        "sentences": table["sentences"],
        "judge": table["judge"],
        "n": table["n_shared_prompts"],
    }


# --- Curves and lengths ---------------------------------------------------------------------------------------------


def _curves(facts: Facts) -> list[dict[str, Any]]:
    found = []
    for title, keys, unit, percent in CURVES:
        series = []
        for i, run in enumerate(facts.runs):
            # RGSD's loss is the clipped divergence, GRPO's says nothing by its size.
            logged = [] if keys == "loss" and run.kind != "sft" else run.steps
            points = [(s["step"], value) for s in logged if (value := _first(s, keys)) is not None]
            series.append(Series(run.label, [x for x, _ in points], [y for _, y in points], _line_colour(i)))
        flat = all(v == 0 for s in series for v in s.y)
        if keys == "clipped_share" and flat:
            continue  # no clip
        if keys == "clipped_divergence" and _same(series, found):
            continue
        chart = charts.lines(title, series, unit=unit, percent=percent)
        if chart:
            found.append({"title": title, "unit": unit, "chart": chart, "key": keys, "series": series, "flat": flat})
    return found


def _first(step: Mapping[str, Any], keys: str) -> float | None:
    return next((float(step[k]) for k in keys.split("|") if isinstance(step.get(k), int | float)), None)


def _same(series: Sequence[Series], found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the clip took nothing, so that the clipped divergence repeats the plain one."""
    plain = next((f["series"] for f in found if f["key"] == "divergence"), None)
    return plain is not None and [list(s.y) for s in plain] == [list(s.y) for s in series]


def _lengths(facts: Facts, colours: Mapping[tuple[str, str], int]) -> list[tuple[str, Markup]]:
    many = len(facts.runs) > 1
    groups = [
        (
            f"{r.label}: {a.name}" if many else a.name,
            [s.n_tokens for s in a.samples if s.n_tokens is not None],
            colours[(a.run, a.name)],
        )
        for r in facts.runs
        for a in r.arms
    ]
    return charts.histograms(groups, unit="tokens")


# --- The data that the page's script shows --------------------------------------------------------------------------


def _payload(facts: Facts, arms: Sequence[Arm]) -> dict[str, Any]:
    """Prompts with their criteria and every arm's response, each text once."""
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    for k, arm in enumerate(arms):
        for sample in arm.samples:
            entry = prompts.setdefault(
                (sample.example_id, sample.question),
                {"id": sample.example_id, "q": sample.question, "d": sample.domain or None, "c": [], "a": {}},
            )
            criteria = [[v.criterion, v.weight] for v in sample.verdicts]
            if not entry["c"]:
                entry["c"] = criteria
            entry["a"][k] = _response(arm, sample, None if criteria == entry["c"] else criteria)
    many = len(facts.runs) > 1
    first = facts.runs[0]
    before, after = first.role(BASELINE), first.after
    position = {id(a): k for k, a in enumerate(arms)}
    left = position[id(before)] if before else 0
    right = position[id(after)] if after else min(1, max(0, len(arms) - 1))
    return {
        "arms": [f"{a.run}: {a.name}" if many else a.name for a in arms],
        "prompts": list(prompts.values()),
        "left": left,
        "right": right,
        "perPage": PER_PAGE,
        "maps": [m | {"run": r.label if many else ""} for r in facts.runs for m in r.maps],
    }


def _response(arm: Arm, sample: Sample, criteria: list[list[Any]] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "r": sample.judged_text,
        "s": None if sample.score is None else round(sample.score, 4),
        "n": sample.n_tokens,
        "v": [v.value for v in sample.verdicts],
    }
    if sample.judge != "checks" and any(v.reason for v in sample.verdicts):
        entry["w"] = [v.reason for v in sample.verdicts]
    if sample.is_truncated:
        entry["t"] = 1
    if sample.example_id in arm.leaking:
        entry["l"] = 1
    if sample.problem:
        entry["p"] = sample.problem
    if sample.response != sample.judged_text:
        entry["full"] = sample.response
    if criteria is not None:
        entry["c"] = criteria
    return entry


def as_json(facts: Facts) -> dict[str, Any]:
    """The numbers of a report without its responses."""
    return {
        "runs": [
            {
                "label": r.label,
                "kind": r.kind,
                "judge": r.judge,
                "sentences": verdict(r),
                "problems": r.problems,
                "cost": asdict(r.cost),
                "added": r.added,
                "gains_by_tag": r.gains,
                "arms": [_arm_numbers(a) for a in r.arms],
            }
            for r in facts.runs
        ],
        "comparison": facts.comparison,
        "refusal": facts.refusal,
    }


def _arm_numbers(arm: Arm) -> dict[str, Any]:
    kept = ("run", "name", "role", "score", "gain", "leak_rate", "coverage", "tokens", "truncated", "usage")
    return {name: getattr(arm, name) for name in kept}
