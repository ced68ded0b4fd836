"""`rgsd gap`: before any training, what a rubric in the prompt is worth to a model, and whether RGSD will pay off.

The conditioning gap (arXiv 2606.12507) is the score of the base model with the rubric in its prompt, minus its score
without: what the teacher has to teach. Another prompt's rubric is the control. The divergence between teacher and
student on the student's own rollouts needs no judge; it predicted the gain in arXiv 2605.30070.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rgsd import data as rubric_data
from rgsd.data.config import DataConfig
from rgsd.errors import ConfigError
from rgsd.evaluation.arms import check_coverage, evaluate_arm
from rgsd.evaluation.conclusions import LEAST_FOR_A_VERDICT, Conclusion, conclude, points
from rgsd.evaluation.config import MeasureConfig
from rgsd.evaluation.evaluate import examples_for, open_evaluation, prompts_for, with_tags_of
from rgsd.evaluation.policies import load_policy
from rgsd.evaluation.responses import respond
from rgsd.evaluation.run_ref import RunRef
from rgsd.evaluation.samples import Sample
from rgsd.evaluation.statistics import interval
from rgsd.evaluation.summaries import paired_difference, score_cells, summarise, tokens_cell
from rgsd.inference import SamplingConfig, TransformersGenerator, replay
from rgsd.judges import Judge, JudgeConfig, build_judge, missing_checks, try_out
from rgsd.progress import counting, say
from rgsd.prompts.leaks import mentions_rubric
from rgsd.rubrics import Example, fingerprint
from rgsd.runs import BASELINE, CONDITIONED, CONTROL, RESULTS, Run
from rgsd.settings import setting
from rgsd.training.loss import DivergenceSpec, divergence

LOGIT_TOKENS = 128
"""Tokens whose logits are compared at once."""
COPY_WORDS = 5
"""A criterion of at least this many words that appears verbatim in a response was copied."""
MOST_COPIES = 0.1
"""From this share of copies on, a gap is not worth training on."""
LEAST_KEPT = 0.5
"""Least share of the divergence that the clip should keep."""


@dataclass
class GapConfig:
    """What `rgsd gap` measures besides the scores."""

    templates: list[str] = setting(
        ["paper", "cover"], "Templates to try, by name or as .jinja files; the best one is recommended."
    )
    divergence_prompts: int = setting(32, "Prompts on whose rollouts the divergence is measured; 0 skips it.")
    rollout_tokens: int = setting(256, "Longest of these rollouts, in tokens.")
    beta: float = setting(0.5, "Divergence, as in `rgsd train`.")
    clip_threshold: float = setting(0.05, "Entry clip to evaluate, in nats.")

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError("templates must name at least one template, got none: for example paper")


@dataclass(frozen=True)
class _Gap:
    """What the measurements of a gap share."""

    run: Run
    model: Any
    tokenizer: Any
    examples: list[Example]
    settings: MeasureConfig
    config: GapConfig

    def generator(self, max_new_tokens: int, **options: Any) -> TransformersGenerator:
        """A generator on the loaded model; greedy unless `options` of `SamplingConfig` say otherwise."""
        sampling = SamplingConfig(max_new_tokens, think_tags=self.settings.think_tags, **options)
        return TransformersGenerator(self.model, self.tokenizer, sampling, batch_size=self.settings.batch_size)

    def shown(self, template: str) -> MeasureConfig:
        """The settings with another template."""
        return dataclasses.replace(self.settings, template=template)


def gap(
    name: str, data: DataConfig, judge_config: JudgeConfig, settings: MeasureConfig, gap_settings: GapConfig
) -> Run:
    """Measure the gap of one model; write samples and results into a run folder.

    Raises:
        RGSDError: As `rgsd.evaluation.evaluate.evaluate_models`.
    """
    ref = RunRef.parse_policy(name)
    if ref.privileged_context != "none":
        raise ConfigError(f"{name!r} names a privileged context, and rgsd gap shows each in turn: give the model alone")
    if settings.backend != "transformers":
        raise ConfigError(
            "rgsd gap needs the model's own probabilities, so it runs with --backend transformers. For the scores "
            f"alone, run `rgsd eval {name} {name}+rubric {name}+mismatched --backend {settings.backend}`"
        )
    examples = examples_for(data, settings, None)
    is_judged = not missing_checks(examples, judge_config)
    if not is_judged:
        say("No scores: criteria without a programmatic check, and no LLM judge (--judge). The divergence needs none.")
    judge = build_judge(judge_config) if is_judged else None
    if judge is not None:
        try_out(judge)  # before the model is loaded: a wrong key should not cost minutes
    settings = with_tags_of([ref], settings)
    run = open_evaluation([name], data, judge_config, settings, asdict(gap_settings))
    roles = {"base": BASELINE}
    for template in gap_settings.templates:
        roles |= {f"base+rubric ({template})": CONDITIONED, f"base+mismatched ({template})": CONTROL}
    run.note(kind="gap", roles=roles, held_out_fingerprint=fingerprint(examples))
    parts = _Gap(run, *load_policy(ref, settings), examples, settings, gap_settings)
    arms, templates, selection = _scores(parts, judge) if judge is not None else ({}, {}, None)
    best = best_template(templates) or gap_settings.templates[0]
    measured = None
    if gap_settings.divergence_prompts:
        chosen = rubric_data.subset(examples, gap_settings.divergence_prompts, data.split_seed)
        measured = _divergences(dataclasses.replace(parts, examples=chosen, settings=parts.shown(best)))
    table = {
        "arms": [summarise(samples, seed=settings.seed) for samples in arms.values()],
        "templates": templates,
        "best_template": best if templates else None,
        "selection": selection,
        "divergence": measured,
        "advice": advice(templates, best, measured, selection),
        "judge": judge_config.judge if is_judged else None,
    }
    run.write(RESULTS, table)
    run.note(status="finished")
    return run


def _scores(parts: _Gap, judge: Judge) -> tuple[dict[str, list[Sample]], dict[str, dict[str, Any]], dict[str, int]]:
    """The samples of every arm, the gaps of every template, and how many prompts chose the best one."""
    settings, examples, names = parts.settings, parts.examples, parts.config.templates
    generator = parts.generator(settings.max_new_tokens)
    arms: dict[str, list[Sample]] = {}

    def evaluate(arm: str, context: str, template: str) -> list[Sample]:
        prompts = prompts_for(context, examples, parts.shown(template))
        arms[arm] = evaluate_arm(parts.run, arm, examples, prompts, generator, judge, think_tags=settings.think_tags)
        return arms[arm]

    base = evaluate("base", "none", names[0])
    choice, report = parts_for(len(examples), len(names), settings.seed)
    templates = {}
    for name in names:
        right = evaluate(f"base+rubric ({name})", "rubric", name)
        wrong = evaluate(f"base+mismatched ({name})", "mismatched", name)
        templates[name] = {
            "choice_gap": _difference(base, right, choice, settings.seed),
            "gap": _difference(base, right, report, settings.seed),
            "mismatched_gap": _difference(base, wrong, report, settings.seed),
            "right_over_wrong": _difference(wrong, right, report, settings.seed),
            "leak_rate": float(np.mean([mentions_rubric(s.judged_text, s.question) for s in right])),
            "copied_share": float(
                np.mean([copied_share(e, s.judged_text) for e, s in zip(examples, right, strict=True)])
            ),
        }
    for samples in arms.values():
        check_coverage(samples, settings.min_coverage)
    return arms, templates, {"n_choice": len(choice), "n_report": len(report)}


def parts_for(n: int, n_templates: int, seed: int) -> tuple[list[int], list[int]]:
    """The prompts that choose the template, and the prompts that report its gap, as positions.

    The best of several templates looks better than it is on the prompts that chose it. So a random half chooses, and
    the other half reports. A single template needs no choice, and a single prompt cannot be split.
    """
    if n_templates < 2 or n < 2:
        return [], list(range(n))
    order = np.random.default_rng(seed).permutation(n).tolist()
    return sorted(order[: n // 2]), sorted(order[n // 2 :])


def best_template(templates: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The template with the widest gap on the prompts that choose; the first one if they tie."""

    def width(name: str) -> float:
        difference = templates[name]["choice_gap"]
        return -math.inf if difference is None else difference["mean"]

    return max(templates, key=width, default=None)


def copied_share(example: Example, response: str) -> float:
    """Share of the criteria of at least `COPY_WORDS` words that appear verbatim in a response, in [0, 1]."""
    text = _folded(response)
    long = [c for c in example.rubric if len(c.text.split()) >= COPY_WORDS]
    return sum(_folded(c.text) in text for c in long) / len(long) if long else 0.0


def _folded(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _difference(
    before: Sequence[Sample], after: Sequence[Sample], positions: Sequence[int], seed: int
) -> dict[str, Any] | None:
    """after minus before over some of the prompts; None if none of them was scored in both."""
    difference = paired_difference([before[i] for i in positions], [after[i] for i in positions], seed=seed)
    return None if difference is None else asdict(difference)


def _divergences(parts: _Gap) -> dict[str, Any]:
    """Mean divergence per token between teacher and student on sampled rollouts, with its interval over prompts."""
    settings, examples, config = parts.settings, parts.examples, parts.config
    generator = parts.generator(config.rollout_tokens, temperature=1.0, seed=settings.seed)
    prompts = {context: prompts_for(context, examples, settings) for context in ("none", "rubric", "mismatched")}
    rollouts = respond(parts.run, "rollouts", examples, prompts["none"], generator)
    spec = DivergenceSpec(beta=config.beta, clip="entry", clip_threshold=config.clip_threshold)

    def logits(context: str, i: int, ids: list[int]) -> torch.Tensor:
        prompt_ids = replay.prompt_ids(parts.tokenizer, prompts[context][i])
        return replay.logits(parts.model, prompt_ids, ids, examples[i].id)

    values: dict[str, list[float]] = {"rubric": [], "rubric_clipped": [], "mismatched": []}
    with counting("divergence", len(examples)) as counter:
        for i, example in enumerate(examples):
            read = replay.replay(rollouts[example.id].response, parts.tokenizer, think_tags=settings.think_tags)
            in_loss_N = torch.tensor(read.in_loss)
            counter.advance()
            if not any(read.in_loss):
                continue
            student = logits("none", i, read.ids)[in_loss_N]
            for context in ("rubric", "mismatched"):
                unclipped, clipped = _mean(student, logits(context, i, read.ids)[in_loss_N], spec)
                values[context].append(unclipped)
                if context == "rubric":
                    values["rubric_clipped"].append(clipped)
    if not values["rubric"]:
        return {"n": 0}
    result: dict[str, Any] = {name: asdict(interval(v, seed=settings.seed)) for name, v in values.items()}
    result["clip_keeps"] = float(np.sum(values["rubric_clipped"]) / max(1e-12, np.sum(values["rubric"])))
    return result | {"n": len(values["rubric"]), "beta": config.beta, "template": settings.template}


def _mean(student: torch.Tensor, teacher: torch.Tensor, spec: DivergenceSpec) -> tuple[float, float]:
    """Mean divergence per token, before and after the clip; a part at a time, since logits are large."""
    unclipped = clipped = 0.0
    for start in range(0, len(student), LOGIT_TOKENS):
        part = divergence(student[start : start + LOGIT_TOKENS], teacher[start : start + LOGIT_TOKENS], spec)
        unclipped += float(part.unclipped_N.sum())
        clipped += float(part.clipped_N.sum())
    return unclipped / len(student), clipped / len(student)


def advice(
    templates: Mapping[str, Mapping[str, Any]],
    best: str,
    divergences: Mapping[str, Any] | None,
    selection: Mapping[str, int] | None = None,
) -> list[str]:
    """Plain sentences: whether training will pay off, and with which template and settings.

    Args:
        templates: Name -> its gaps, as `gap` writes them.
        best: The recommended template.
        divergences: The measured divergences; None, or without `n`, if there are none.
        selection: How many prompts chose the template, and how many report its gap.
    """
    sentences: list[str] = []
    if selection and selection["n_choice"]:
        sentences.append(
            f"Template {best!r} was chosen on {selection['n_choice']} prompts; its gap below is from the other "
            f"{selection['n_report']}."
        )
    flags = [f"--template {best}"]
    if templates and templates[best]["gap"]:
        sentences += _gap_sentences(templates[best], best)
    if divergences and divergences.get("n"):
        rubric, other, kept = divergences["rubric"], divergences["mismatched"], divergences["clip_keeps"]
        sentences.append(
            f"On the student's own rollouts, the rubric moves the teacher by {rubric['mean']:.4f} nats per token "
            f"({rubric['low']:.4f} to {rubric['high']:.4f}; another prompt's rubric: {other['mean']:.4f})."
        )
        flags.append("--clip entry" if kept >= LEAST_KEPT else "--clip none")
        if kept < LEAST_KEPT:
            sentences.append(f"The entry clip would keep {100 * kept:.0f} % of that divergence: try --clip none.")
    sentences.append(f"To train: rgsd train --config RECIPE.yaml {' '.join(flags)}")
    return sentences


def _gap_sentences(gaps: Mapping[str, Any], best: str) -> list[str]:
    """What the gap of the best template means."""
    difference = gaps["gap"]
    worth, conclusion = f"{points(difference)}, {difference['n']} prompts,", conclude(difference)
    copies = max(gaps["leak_rate"], gaps["copied_share"])
    if conclusion is Conclusion.TOO_FEW:
        return [
            f"With template {best!r}, the rubric in the prompt is worth {worth} to this model: {conclusion} whether "
            f"training will pay off; a verdict takes at least {LEAST_FOR_A_VERDICT}."
        ]
    if conclusion is not Conclusion.BETTER:
        is_worse = conclusion is Conclusion.WORSE
        return [
            f"{'Training will not pay off' if is_worse else 'Nothing shows that training will pay off'}: the rubric in "
            f"the prompt is worth {worth} to this model: {conclusion}. Try another template, a larger model, or a warm "
            "start."
        ]
    if copies < MOST_COPIES:
        first = f"Training can pay off: the rubric in the prompt is worth {worth} to this model with template {best!r}."
    else:
        first = (
            f"Do not train like this: the rubric is worth {worth} with template {best!r}, but the responses repeat it "
            f"({100 * gaps['leak_rate']:.0f} % mention a rubric, {100 * gaps['copied_share']:.0f} % of the criteria "
            "are copied verbatim), and the student would learn that. Try another template, a larger model, or a warm "
            "start (`rgsd warmstart`)."
        )
    specific = gaps["right_over_wrong"]
    if not specific:
        return [first]
    if conclude(specific) is Conclusion.BETTER:
        return [first, f"The right rubric beats another prompt's rubric by {points(specific)}."]
    return [
        first,
        f"Nothing shows that the right rubric beats another prompt's ({points(specific)}): the gain may come from "
        "having any rubric. Train the control too (--privileged_context mismatched).",
    ]


def show_gap(table: Mapping[str, Any]) -> None:
    """Print the arms, the templates and the advice."""
    if table["arms"]:
        view = Table(title="Rubric satisfaction before training (95 % interval over prompts)")
        for column in ("prompt", "score", "95 % interval", "prompts", "coverage", "mean tokens"):
            view.add_column(column, justify="left" if column == "prompt" else "right", no_wrap=True)
        for arm in table["arms"]:
            view.add_row(
                arm["arm"],
                *score_cells(arm["score"]),
                str(arm["n_prompts"]),
                f"{100 * arm['coverage']:.0f} %",
                tokens_cell(arm["mean_tokens"]),
            )
        Console(width=120).print(view)
    for sentence in table["advice"]:
        say(sentence)
