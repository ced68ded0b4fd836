"""Render facts as HTML: a single file with its styles, script and data.

Nothing from a run is trusted. The templates escape it, the script inserts it as text, and the page's
Content-Security-Policy allows no request and no script except the one with the given digest.
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
from rgsd.files import atomic_write
from rgsd.report import charts
from rgsd.report.charts import Series, number
from rgsd.report.facts import MOST_GROUPS, Facts, ReportArm, RunFacts, cost_sentence, verdict
from rgsd.runs import BASELINE, CONDITIONED, CONTROL, TRAINED, TRAINED_CONTROL, TRAINING_KINDS

COLORS = 8
"""Number of colors in the style sheet, c0 to c7."""
ROLE_COLORS = {BASELINE: 0, CONDITIONED: 1, TRAINED: 2}
NONE = "\N{EN DASH}"
OPEN_BOX = "\N{OPEN BOX}"
PER_PAGE = 10
"""Prompts per page in the list of responses."""

CURVES: tuple[tuple[str, str, str, bool], ...] = (
    ("Rubric score of the development prompts", "eval_rubric_score", "", False),
    ("Divergence on the development prompts", "eval_divergence", "nats per token", False),
    ("Response length on the development prompts", "eval_response_length", "tokens", False),
    ("Reward (rubric score)", "reward", "", False),
    ("Loss on the conditioned model's responses", "loss", "nats per token", False),
    ("Divergence from the teacher", "divergence", "nats per token", False),
    ("Divergence after the clip (the loss)", "clipped_divergence", "nats per token", False),
    ("Clipped tokens", "clipped_share", "", True),
    ("Response length", "response_length|completions/mean_length", "tokens", False),
    ("Responses cut off at the limit", "truncated_share|completions/clipped_ratio", "", True),
    ("Responses that mention a rubric", "leak_rate", "", True),
    ("Student's entropy", "student_entropy|entropy", "nats", False),
    ("Tokens that are the teacher's first choice", "agreement", "", True),
    ("Unscored rewards", "unscored_share", "", True),
)
"""Title; keys of metrics.jsonl, where RGSD and GRPO use different names for the same quantity; unit; whether it is a
share."""


def report_page(facts: Facts) -> str:
    """Render the report of one or more runs."""
    colors = _colors(facts)
    every = [a for run in facts.runs for a in run.arms]
    payload = _payload(facts, every)
    return _render(
        "report.html.jinja",
        payload,
        title=" · ".join(r.label for r in facts.runs),
        facts=facts,
        runs=[_run_view(run, colors, len(facts.runs) > 1) for run in facts.runs],
        results=_results(facts, colors),
        comparison=_comparison(facts),
        curves=_curves(facts),
        has_development=any(r.development for r in facts.runs),
        curve_colors=[(r.label, _line_color(i)) for i, r in enumerate(facts.runs)],
        cost_sentence=cost_sentence(facts.runs),
        lengths=_lengths(facts, colors),
        n_responses=sum(len(a.samples) for a in every),
        has_maps=any(r.maps for r in facts.runs),
        many=len(facts.runs) > 1,
    )


def token_page(token_map: Mapping[str, Any]) -> str:
    """Render one token map, as returned by `rgsd.report.token_map.explain`."""
    rows = [r for r in token_map["tokens"] if r["m"]]
    most = sorted(rows, key=lambda r: -r["d"])[:10]
    payload = {"maps": [token_map], "only": True}
    title = f"{token_map['example_id']} · {token_map['policy']}"
    return _render("tokens.html.jinja", payload, title=title, map=token_map, most=most)


def is_a_report(path: Path) -> bool:
    """Whether a file is a report (HTML or JSON), which can be replaced without losing anything."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return b'name="generator" content="rgsd ' in head or head.startswith(b'{\n  "runs": [')


def write_page(path: str | Path, html: str, *, overwrite: bool = False) -> Path:
    """Write a page.

    Raises:
        RunError: If the file exists and `overwrite` is not set, or if it cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise RunError(f"{target} is a folder: give the page a file name, e.g. {target / 'report.html'}")
    if target.exists() and not overwrite:
        raise RunError(f"{target} exists: choose another file with -o, or replace it with --overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, html)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}. Choose another file with -o") from error
    return target


# --- Rendering ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rgsd.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
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
    return environment


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
    """A token with visible line breaks and outer spaces, as page.js shows it."""
    core = text.strip(" ")
    n_left = len(text) - len(text.lstrip(" "))
    n_right = len(text) - n_left - len(core) if core else 0
    visible = OPEN_BOX * n_left + core + OPEN_BOX * n_right
    visible = visible.replace("\n", "\N{RETURN SYMBOL}").replace("\t", "\N{RIGHTWARDS ARROW TO BAR}")
    return visible or "(part of a character)"


def _code(text: str) -> Markup:
    """Escape a sentence, and mark text between backquotes as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@lru_cache(maxsize=8)
def _asset(name: str) -> str:
    return resources.files("rgsd.report").joinpath("templates", name).read_text("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded_json(value: Any) -> Markup:
    """JSON for a script element. No text in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    # U+2028 and U+2029 are line breaks in JavaScript, but not in JSON.
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


def _colors(facts: Facts) -> dict[tuple[str, str], int]:
    """(Run, arm) -> color. Colors follow roles; among several runs, each trained arm has its run's color."""
    colors: dict[tuple[str, str], int] = {}
    for i, run in enumerate(facts.runs):
        free = [c for c in range(COLORS) if c not in ROLE_COLORS.values()]
        for arm in run.arms:
            if arm.role == TRAINED and len(facts.runs) > 1:
                color = _line_color(i)
            elif arm.role in ROLE_COLORS:
                color = ROLE_COLORS[arm.role]
            else:
                color = free[len(colors) % len(free)]
            colors[(run.label, arm.name)] = color
    return colors


def _line_color(position: int) -> int:
    return 2 + position % (COLORS - 2)


ROLE_WORDS = {
    BASELINE: "before training, the prompt alone",
    CONDITIONED: "before training, with the rubric or reference in the prompt: what training can teach",
    CONTROL: "before training, with the privileged context of the control",
    TRAINED: "after training, the prompt alone",
    TRAINED_CONTROL: "after training on another prompt's rubric for each prompt: the control",
}


def _results(facts: Facts, colors: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    """One table per run, all on one scale."""
    ends = [v for r in facts.runs for a in r.arms if a.score for v in (a.score["low"], a.score["high"])]
    low, high = min([0.0, *ends]), max([0.1, *ends])
    # Extend the scale to the next tick on both sides.
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
                "color": colors[(run.label, a.name)],
                "words": ROLE_WORDS.get(a.role, "") if is_training else "baseline of the others"
                if a.role == BASELINE else "",
                "chart": charts.interval_row(a.score, low, high, colors[(run.label, a.name)], zero=low < 0),
            }
            for a in run.arms
        ]  # fmt: skip
        tables.append({"run": run, "rows": rows, "axis": charts.interval_axis(low, high) if rows else ""})
    return tables


def _run_view(run: RunFacts, colors: Mapping[tuple[str, str], int], many: bool) -> dict[str, Any]:
    meta, settings = run.run.meta, run.run.settings or {}
    headline, *sentences = verdict(run)
    before, after = run.role(BASELINE), run.after
    # The result of `rgsd gap` is the gain of the model with the rubric in its prompt; that of a run with a control is
    # what the right rubric added.
    main_arm = run.role(CONDITIONED) if run.kind == "gap" else after
    gain = run.added or (main_arm.gain if main_arm else None)
    change = None
    if run.change and run.change["criteria"]["n"]:
        change = _change_view(run.change) | {"before": before, "after": after}
    return {
        "facts": run,
        "headline": headline,
        "sentences": sentences,
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
        "gain": gain,
        "gains": _gains_view(run),
        "direction": _direction(gain),
        "phases": [
            (name, seconds, 100 * seconds / max(1e-9, sum(run.cost.phases.values())))
            for name, seconds in run.cost.phases.items()
        ],
    }


def _gains_view(run: RunFacts) -> list[dict[str, Any]]:
    """One row per criterion tag with its gains; empty if there is only one tag."""
    tags = list(dict.fromkeys(tag for gains in run.gains.values() for tag in gains))
    if len(tags) < 2:
        return []
    baseline, control = (run.gains.get(name, {}) for name in ("baseline", "control"))
    rows = []
    for tag in tags[:MOST_GROUPS]:
        gain, added = baseline.get(tag), control.get(tag)
        rows.append({"tag": tag.removeprefix("axis:"), "gain": gain, "added": added, "of": gain or added})
    return rows


def _direction(gain: Mapping[str, Any] | None) -> str:
    """The direction of a gain that is shown; flat otherwise."""
    directions = {Conclusion.BETTER: "up", Conclusion.WORSE: "down"}
    return directions.get(conclude(gain), "flat")


def _change_view(change: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of criteria as rows with bars on one scale; the most won and the most lost if there are too many."""
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
    curves: list[dict[str, Any]] = []
    for title, keys, unit, percent in CURVES:
        series = []
        for i, run in enumerate(facts.runs):
            # RGSD's loss is the clipped divergence, which has its own curve. The size of GRPO's loss means nothing.
            is_development = keys.startswith("eval_")
            logged = [] if keys == "loss" and run.kind != "sft" else run.development if is_development else run.steps
            best = run.best["step"] if run.best and is_development else None
            points = [(s["step"], value) for s in logged if (value := _first(s, keys)) is not None]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            series.append(Series(run.label, xs, ys, _line_color(i), best, "best"))
        flat = all(v == 0 for s in series for v in s.y)
        if keys == "clipped_share" and flat:
            continue
        if keys == "clipped_divergence" and _clips_nothing(series, curves):
            continue
        chart = charts.lines(title, series, unit=unit, percent=percent)
        if chart:
            curves.append({"title": title, "unit": unit, "chart": chart, "key": keys, "series": series, "flat": flat})
    return curves


def _first(step: Mapping[str, Any], keys: str) -> float | None:
    return next((float(step[k]) for k in keys.split("|") if isinstance(step.get(k), int | float)), None)


def _clips_nothing(series: Sequence[Series], curves: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the clipped divergence equals the divergence."""
    plain = next((c["series"] for c in curves if c["key"] == "divergence"), None)
    return plain is not None and [list(s.y) for s in plain] == [list(s.y) for s in series]


def _lengths(facts: Facts, colors: Mapping[tuple[str, str], int]) -> list[tuple[str, Markup]]:
    many = len(facts.runs) > 1
    groups = [
        (
            f"{r.label}: {a.name}" if many else a.name,
            [s.n_tokens for s in a.samples if s.n_tokens is not None],
            colors[(a.run, a.name)],
        )
        for r in facts.runs
        for a in r.arms
    ]
    return charts.histograms(groups, unit="tokens")


# --- The data for the page's script ---------------------------------------------------------------------------------


def _payload(facts: Facts, arms: Sequence[ReportArm]) -> dict[str, Any]:
    """Prompts with their criteria and the response of every arm. Keys are short, and each text is stored once.

    Of a prompt: id, q(uestion), d(omain), c(riteria with weights), a(rms: position -> response). Keys of a response
    are in `_response`.
    """
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


def _response(arm: ReportArm, sample: Sample, criteria: list[list[Any]] | None) -> dict[str, Any]:
    """A response: r(esponse), s(core), n (tokens), v(erdicts).

    Present only where they apply: w (the judge's reasons), t(runcated), l(eaking), p(roblem), full (the response with
    its reasoning), c (its own criteria, if they differ from the prompt's).
    """
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
    """The numbers of a report, without its responses."""
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


def _arm_numbers(arm: ReportArm) -> dict[str, Any]:
    names = ("run", "name", "role", "score", "gain", "leak_rate", "coverage", "tokens", "truncated", "usage")
    return {name: getattr(arm, name) for name in names}
