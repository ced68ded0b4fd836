"""`rgsd gap`: before any training, what a rubric in the prompt is worth to a model, and whether RGSD will pay.

The conditioning gap (arXiv 2606.12507) is the score of the base model that sees the rubric, minus its score without:
what the teacher has to teach. Another prompt's rubric is the control. The divergence between teacher and student on the
student's own rollouts needs no judge; it predicted the gain in arXiv 2605.30070.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rgsd import data as rubric_data
from rgsd.errors import ConfigError
from rgsd.evaluation import evaluate
from rgsd.evaluation.measure import MeasureConfig, Subject, examples_for, load, opened, prompts_for
from rgsd.evaluation.statistics import (
    LEAST_FOR_A_VERDICT,
    Conclusion,
    conclude,
    interval,
    paired_difference,
    points,
    summarise,
)
from rgsd.inference import SamplingConfig, TransformersGenerator, replay
from rgsd.judges import JudgeConfig, build_judge, try_out
from rgsd.progress import counting, say
from rgsd.prompts.leaks import mentions_rubric
from rgsd.rubrics import Example, fingerprint
from rgsd.runs import BASELINE, CONDITIONED, CONTROL, RESULTS, Run
from rgsd.training.loss import DivergenceSpec, divergence
from rgsd.workflows.train import DataConfig

LOGIT_TOKENS = 128
"""Tokens whose logits are compared at once."""
WORDS_OF_A_COPY = 5
"""A criterion of at least so many words that stands word for word in a response was copied."""
COPIES_TOO_OFTEN = 0.1
CLIP_TAKES_TOO_MUCH = 0.5


@dataclass
class GapConfig:
    """What `rgsd gap` looks at besides the scores."""

    templates: list[str] = field(
        default_factory=lambda: ["paper", "cover"],
        metadata={"help": "Templates to try, by name or as .jinja files; the best is recommended."},
    )
    divergence_prompts: int = field(
        default=32, metadata={"help": "Prompts on whose rollouts the divergence is taken; 0 leaves it out."}
    )
    rollout_tokens: int = field(default=256, metadata={"help": "Longest of these rollouts, in tokens."})
    beta: float = field(default=0.5, metadata={"help": "Divergence, as in `rgsd train`."})
    clip_threshold: float = field(default=0.05, metadata={"help": "Entry clip that is looked at, in nats."})

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError("templates is empty: name at least one, e.g. paper")


def gap(
    name: str, data: DataConfig, judge_config: JudgeConfig, settings: MeasureConfig, gap_settings: GapConfig
) -> Run:
    """Measure the gap of one model; write rows and results into a run folder.

    Raises:
        RGSDError: as `rgsd.evaluation.measure.evaluate_models`.
    """
    one = Subject(name)
    if settings.backend != "transformers":
        raise ConfigError(
            "rgsd gap needs the model's own probabilities: it runs with --backend transformers. For the scores alone, "
            f"run `rgsd eval {name} {name}+rubric {name}+mismatched --backend {settings.backend}`"
        )
    examples = examples_for(data, settings, None)
    is_judged = not judge_config.needs_checks or all(e.rubric.is_checkable for e in examples)
    if not is_judged:
        say("No scores: criteria without a programmatic check, and no LLM judge (--judge). The divergence needs none.")
    run = opened([name], data, judge_config, settings, asdict(gap_settings))
    roles = {"base": BASELINE}
    for template in gap_settings.templates:
        roles |= {f"base+rubric ({template})": CONDITIONED, f"base+mismatched ({template})": CONTROL}
    run.note(kind="gap", roles=roles, held_out_fingerprint=fingerprint(examples))
    model, tokenizer = load(one, settings)
    arms: dict[str, list[dict[str, Any]]] = {}
    templates: dict[str, dict[str, Any]] = {}
    selection: dict[str, int] | None = None
    if is_judged:
        judge = build_judge(judge_config)
        try_out(judge)
        sampling = SamplingConfig(
            settings.max_new_tokens, think_tags=(settings.think_open_tag, settings.think_close_tag)
        )
        generator = TransformersGenerator(model, tokenizer, sampling, batch_size=settings.batch_size)

        def arm(label: str, prompts: Any) -> list[dict[str, Any]]:
            tags = (settings.think_open_tag, settings.think_close_tag)
            arms[label] = evaluate.measure(run, label, examples, prompts, generator, judge, think_tags=tags)
            return arms[label]

        base = arm("base", prompts_for("none", examples, settings))
        choice, rest = parts_for(len(examples), len(gap_settings.templates), settings.seed)
        for template in gap_settings.templates:
            shown = dataclasses.replace(settings, template=template)
            right = arm(f"base+rubric ({template})", prompts_for("rubric", examples, shown))
            wrong = arm(f"base+mismatched ({template})", prompts_for("mismatched", examples, shown))
            templates[template] = {
                "choice_gap": _difference(base, right, choice, settings.seed),
                "gap": _difference(base, right, rest, settings.seed),
                "mismatched_gap": _difference(base, wrong, rest, settings.seed),
                "right_over_wrong": _difference(wrong, right, rest, settings.seed),
                "leak_rate": float(np.mean([mentions_rubric(r["judged_text"], r["question"]) for r in right])),
                "copied_share": float(
                    np.mean([copied_share(e, r["judged_text"]) for e, r in _paired(examples, right)])
                ),
            }
        selection = {"n_choice": len(choice), "n_report": len(rest)}
        for rows in arms.values():
            evaluate.check_coverage(rows, settings.min_coverage)
    best = best_template(templates) or gap_settings.templates[0]
    found = None
    if gap_settings.divergence_prompts:
        some = rubric_data.subset(examples, gap_settings.divergence_prompts, data.split_seed)
        found = _divergences(run, model, tokenizer, some, dataclasses.replace(settings, template=best), gap_settings)
    table = {
        "arms": [summarise(rows, seed=settings.seed) for rows in arms.values()],
        "templates": templates,
        "best_template": best if templates else None,
        "selection": selection,
        "divergence": found,
        "advice": advice(templates, best, found, selection),
        "judge": judge_config.judge if is_judged else None,
    }
    run.write(RESULTS, table)
    run.note(status="finished")
    return run


def parts_for(n: int, n_templates: int, seed: int) -> tuple[list[int], list[int]]:
    """The prompts that choose the template, and those that its gap is reported on, as positions.

    The best of several on some prompts looks better there than it is. So one half, drawn by the seed, chooses, and the
    other half reports. A single template needs no choice, and one prompt cannot be shared.
    """
    if n_templates < 2 or n < 2:
        return [], list(range(n))
    order = np.random.default_rng(seed).permutation(n).tolist()
    return sorted(order[: n // 2]), sorted(order[n // 2 :])


def best_template(templates: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The one with the widest gap on the prompts that choose; the first where nothing tells them apart."""

    def width(name: str) -> float:
        found = templates[name]["choice_gap"]
        return -math.inf if found is None else found["mean"]

    return max(templates, key=width, default=None)


def copied_share(example: Example, response: str) -> float:
    """Share of the criteria of five words or more that stand word for word in a response, in [0, 1]."""
    text = _folded(response)
    long = [c for c in example.rubric if len(c.text.split()) >= WORDS_OF_A_COPY]
    return sum(_folded(c.text) in text for c in long) / len(long) if long else 0.0


def _folded(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _paired(examples: Sequence[Example], rows: Sequence[dict[str, Any]]) -> list[tuple[Example, dict[str, Any]]]:
    return list(zip(examples, rows, strict=True))


def _difference(
    rows_a: Sequence[dict[str, Any]], rows_b: Sequence[dict[str, Any]], positions: Sequence[int], seed: int
) -> dict[str, Any] | None:
    """b minus a over some of the prompts; None when none of them was scored in both."""
    found = paired_difference([rows_a[i] for i in positions], [rows_b[i] for i in positions], seed=seed)
    return None if found is None else asdict(found)


def _divergences(
    run: Run, model: Any, tokenizer: Any, examples: Sequence[Example], settings: MeasureConfig, gap_settings: GapConfig
) -> dict[str, Any]:
    """Mean divergence a token between teacher and student, on sampled rollouts, with its interval over prompts."""
    sampling = SamplingConfig(
        gap_settings.rollout_tokens,
        temperature=1.0,
        seed=settings.seed,
        think_tags=(settings.think_open_tag, settings.think_close_tag),
    )
    generator = TransformersGenerator(model, tokenizer, sampling, batch_size=settings.batch_size)
    kept = evaluate.respond(run, "rollouts", examples, prompts_for("none", examples, settings), generator)
    shown = {kind: prompts_for(kind, examples, settings) for kind in ("none", "rubric", "mismatched")}
    spec = DivergenceSpec(beta=gap_settings.beta, clip="entry", clip_threshold=gap_settings.clip_threshold)

    def logits(kind: str, i: int, example_id: str, ids: list[int]) -> torch.Tensor:
        return replay.logits(model, replay.prompt_ids(tokenizer, shown[kind][i]), ids, example_id)

    values: dict[str, list[float]] = {"rubric": [], "rubric_clipped": [], "mismatched": []}
    with counting("divergence", len(examples)) as counter:
        for i, example in enumerate(examples):
            read = replay.replay(
                kept[example.id], tokenizer, think_tags=(settings.think_open_tag, settings.think_close_tag)
            )
            keeps_N = torch.tensor(read.in_loss)
            counter.advance()
            if not any(read.in_loss):
                continue
            student = logits("none", i, example.id, read.ids)[keeps_N]
            for kind in ("rubric", "mismatched"):
                teacher = logits(kind, i, example.id, read.ids)[keeps_N]
                unclipped, clipped = _mean(student, teacher, spec)
                values[kind].append(unclipped)
                if kind == "rubric":
                    values["rubric_clipped"].append(clipped)
    if not values["rubric"]:
        return {"n": 0}
    result: dict[str, Any] = {k: asdict(interval(v, seed=settings.seed)) for k, v in values.items()}
    result["clip_keeps"] = float(np.sum(values["rubric_clipped"]) / max(1e-12, np.sum(values["rubric"])))
    return result | {"n": len(values["rubric"]), "beta": gap_settings.beta, "template": settings.template}


def _mean(student: torch.Tensor, teacher: torch.Tensor, spec: DivergenceSpec) -> tuple[float, float]:
    unclipped = clipped = 0.0
    for start in range(0, len(student), LOGIT_TOKENS):
        part = divergence(student[start : start + LOGIT_TOKENS], teacher[start : start + LOGIT_TOKENS], spec)
        unclipped += float(part.unclipped_N.sum())
        clipped += float(part.clipped_N.sum())
    return unclipped / len(student), clipped / len(student)


def advice(
    templates: Mapping[str, Mapping[str, Any]],
    best: str,
    found: Mapping[str, Any] | None,
    selection: Mapping[str, int] | None = None,
) -> list[str]:
    """Plain sentences: will it pay, with which template and settings.

    Args:
        templates: name -> its gaps, as `gap` writes them.
        best: the one that is recommended.
        found: the divergences; None or without `n` where none was taken.
        selection: how many prompts chose the template, and how many its gap is reported on.
    """
    said: list[str] = []
    if selection and selection["n_choice"]:
        said.append(
            f"Template {best!r} was chosen on {selection['n_choice']} prompts; its gap below is from the other "
            f"{selection['n_report']}."
        )
    flags = [f"--template {best}"]
    if templates and (t := templates[best])["gap"]:
        g = t["gap"]
        worth, conclusion = f"{points(g)}, {g['n']} prompts,", conclude(g)
        copies = max(t["leak_rate"], t["copied_share"])
        if conclusion is Conclusion.TOO_FEW:
            said.append(
                f"With template {best!r} the rubric in the prompt is worth {worth} to this model: {conclusion} whether "
                f"it will pay; a verdict takes at least {LEAST_FOR_A_VERDICT}."
            )
        elif conclusion is Conclusion.BETTER and copies < COPIES_TOO_OFTEN:
            said.append(f"It can pay: the rubric in the prompt is worth {worth} to this model with template {best!r}.")
        elif conclusion is Conclusion.BETTER:
            said.append(
                f"Not like this: the rubric is worth {worth} with template {best!r}, but the responses repeat it "
                f"({100 * t['leak_rate']:.0f} % speak of a rubric, {100 * t['copied_share']:.0f} % of the criteria are "
                "copied word for word), and that is what the student would learn. Try another template, a larger "
                "model, or a warm start (`rgsd warmstart`)."
            )
        else:
            said.append(
                f"It will not pay: the rubric in the prompt is worth {worth} to this model: {conclusion}. The teacher "
                "has nothing to teach. Try another template, a larger model, or a warm start."
            )
        specific = t["right_over_wrong"]
        if specific and conclusion is Conclusion.BETTER:
            how = points(specific)
            said.append(
                f"The right rubric beats another prompt's by {how}."
                if conclude(specific) is Conclusion.BETTER
                else f"Another prompt's rubric does about as well (the right one: {how}): the gain would come from "
                "having any rubric. Train the control too (--privileged_context mismatched)."
            )
    if found and found.get("n"):
        d, m = found["rubric"], found["mismatched"]
        said.append(
            f"On the student's own rollouts the rubric moves the teacher by {d['mean']:.4f} nats a token "
            f"({d['low']:.4f} to {d['high']:.4f}; another prompt's rubric: {m['mean']:.4f})."
        )
        if found["clip_keeps"] < CLIP_TAKES_TOO_MUCH:
            flags.append("--clip none")
            said.append(
                f"The entry clip would keep {100 * found['clip_keeps']:.0f} % of that divergence: try --clip none."
            )
        else:
            flags.append("--clip entry")
    said.append(f"To train: rgsd train --config RECIPE.yaml {' '.join(flags)}")
    return said


def show_gap(table: dict[str, Any]) -> None:
    """Print the arms, the templates and the advice."""
    if table["arms"]:
        view = Table(title="Rubric satisfaction before training (95 % interval over prompts)")
        for column in ("what it reads", "score", "95 % interval", "prompts", "coverage", "mean tokens"):
            view.add_column(column, justify="left" if column == "what it reads" else "right", no_wrap=True)
        for a in table["arms"]:
            s = a["score"]
            view.add_row(
                a["arm"],
                f"{s['mean']:.3f}" if s else "unscored",
                f"{s['low']:.3f} to {s['high']:.3f}" if s else "",
                str(a["n_prompts"]),
                f"{100 * a['coverage']:.0f} %",
                f"{a['mean_tokens']:.0f}",
            )
        Console(width=120).print(view)
    for sentence in table["advice"]:
        say(sentence)
