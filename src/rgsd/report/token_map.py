"""`rgsd explain`: on one response, how far the rubric pulls each token, before any training or after it.

The student (the prompt alone) and the teacher (the prompt and the rubric) read the same response, as in a training
step; at each of its tokens stand the divergence of the loss, clipped and not, and the words that either would have
said there. Logits of the response are held for both in float32: 2 x tokens x vocabulary x 4 bytes.

Letters in names: N response tokens, V vocabulary, K words shown.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rgsd import data as rubric_data
from rgsd import models
from rgsd.data.config import DataConfig, load_by_id
from rgsd.errors import ConfigError, DataError, RunError
from rgsd.evaluation.config import MeasureConfig
from rgsd.evaluation.evaluate import examples_by_id
from rgsd.evaluation.policies import load_policy
from rgsd.evaluation.responses import stored_references, stored_responses
from rgsd.evaluation.run_ref import RunRef
from rgsd.inference import Response, SamplingConfig, TransformersGenerator, replay
from rgsd.progress import say
from rgsd.prompts.messages import (
    SHOWS_REFERENCE,
    PromptSettings,
    select_criteria,
    student_messages,
    teacher_messages,
    training_rows,
)
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, Decoder, align, prompt_opens_thinking
from rgsd.report.facts import TOKEN_MAPS
from rgsd.rubrics import Example
from rgsd.runs import BASELINE, SPLIT, TRAINED, Run, hold, open_run
from rgsd.settings import setting
from rgsd.training.loss import DivergenceSpec, divergence

LOGIT_TOKENS = 128
"""Tokens whose distributions are compared at once."""
MOST_NEAR = 5


@dataclass
class ExplainConfig:
    """What is explained. Where `unset` says the run's, a model that is no run takes the value in brackets."""

    output: str = setting("explain.html", "The page, or a .json file for the numbers alone.", aliases=["-o"])
    keep: bool = setting(False, "Of a run: keep the map in its folder too, where `rgsd report` finds it.")
    overwrite: bool = setting(False, "Replace an output that is there.")
    response: str | None = setting(None, "A text file with the response to explain. Unset: stored, else sampled.")
    arm: str | None = setting(
        None, "Of a run: explain its stored response of this arm. Unset: `trained`, or `base` of RUN:base, if stored."
    )
    resample: bool = setting(False, "Sample a response even where one is stored.")
    max_new_tokens: int | None = setting(None, "Longest sampled response, in tokens. Unset: the run's (256).")
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy. 1 is what training rollouts use.")
    seed: int = setting(0, "Seed of sampling, and of the mismatched rubric.")
    template: str | None = setting(
        None, "The teacher's template, by name or as a .jinja file. Unset: the run's (paper)."
    )
    privileged_context: str | None = setting(
        None,
        "What the teacher is shown. Unset: the run's (rubric).",
        choices=["rubric", "reference", "both", "mismatched", "none"],
    )
    show_weights: bool | None = setting(None, "Show the criteria's weights to it. Unset: the run's (no).")
    beta: float | None = setting(None, "Divergence: 0 forward KL, 0.5 JSD, 1 reverse KL. Unset: the run's (0.5).")
    clip: str | None = setting(
        None, "What the clip caps. Unset: the run's (entry).", choices=["entry", "token", "none"]
    )
    clip_threshold: float | None = setting(None, "The cap, in nats. Unset: the run's (0.05).")
    loss_temperature: float | None = setting(None, "Divides both models' logits. Unset: the run's (1).")
    top_tokens: int = setting(6, "Words shown of teacher and student at each token (K).")
    dtype: str = setting("auto", "Weights' type, as transformers names it. `auto`: the run's, or the file's.")
    model_revision: str = setting("main", "Revision of a hub model.")
    trust_remote_code: bool = setting(False, "Run code that comes with a model. Only for sources that you trust.")

    def __post_init__(self) -> None:
        if self.top_tokens < 1:
            raise ConfigError(f"top_tokens is {self.top_tokens}, at least 1 is wanted")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}, at least 1 is wanted")
        if self.response and self.arm:
            raise ConfigError(
                "both response and arm are set: the response comes from the file or from the run, say which"
            )


@dataclass(frozen=True, slots=True)
class Resolved:
    """All settings in place: the command's, else the run's, else the defaults."""

    prompt: PromptSettings
    spec: DivergenceSpec
    max_new_tokens: int
    chat_template_kwargs: dict[str, Any]
    mask_thinking: bool
    think_tags: tuple[str, str]


def explain(name: str, example_id: str | None, data: DataConfig, settings: ExplainConfig) -> dict[str, Any]:
    """The token map of one response.

    Args:
        name: a model, a run's folder (its trained policy against the base that sees the rubric) or RUN:base.
        example_id: of the data; None: the run's first held-out prompt, or the data's first.
        data: the rubric data; at its defaults beside a run, the run's own.
        settings: the rest.

    Returns:
        what `rgsd.report.page.token_page` shows; JSON-able.

    Raises:
        RGSDError: for a model, run, example, response or setting that cannot be used.
    """
    one = RunRef.parse_policy(name)
    if one.privileged_context != "none":
        raise ConfigError(
            f"{name!r} names an privileged_context: say --privileged_context {one.privileged_context}, and "
            f"give the model alone"
        )
    run = _run(one)
    if settings.keep and run is None:
        raise ConfigError(f"keep is set, but {one.source!r} is no run's folder, so there is nowhere to keep the map")
    resolved = resolve(settings, run)
    examples = examples_by_id(run) if run is not None and data == DataConfig() else load_by_id(data)
    example = _chosen(example_id, examples, run)
    student_prompt, teacher_prompt = student_messages(example), _teacher(example, examples, resolved.prompt, run)
    policy = one.policy

    measure = MeasureConfig(
        dtype=settings.dtype, model_revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
    )
    model, tokenizer = load_policy(one, measure)
    student_ids, teacher_ids = (
        replay.prompt_ids(tokenizer, p, resolved.chat_template_kwargs) for p in (student_prompt, teacher_prompt)
    )
    starts_in_thinking = prompt_opens_thinking(student_ids, tokenizer, resolved.think_tags[0])
    response, source = _response(
        one, run, example, student_prompt, model, tokenizer, settings, resolved, starts_in_thinking
    )
    read = replay.replay(response, tokenizer, think_tags=resolved.think_tags, mask_thinking=resolved.mask_thinking)
    student_NV = replay.logits(model, student_ids, read.ids, example.id).float().cpu()
    fingerprint = models.fingerprint(model)
    if policy == "trained":
        del model
        gc.collect()
        model, _ = load_policy(dataclasses.replace(one, arm="base"), measure)
    teacher_NV = replay.logits(model, teacher_ids, read.ids, example.id).float().cpu()
    rows = token_rows(student_NV, teacher_NV, read.ids, read.in_loss, tokenizer, resolved.spec, settings.top_tokens)
    found = {
        "example_id": example.id,
        "policy": policy,
        "model": one.source,
        "model_fingerprint": fingerprint,
        "question": example.messages[-1]["content"],
        "teacher_prompt": [dict(m) for m in teacher_prompt],
        "criteria": _criteria(example, resolved.prompt),
        "source": source,
        "settings": {
            "template": resolved.prompt.template,
            "privileged_context": resolved.prompt.privileged_context,
            "show_weights": resolved.prompt.show_weights,
            **{k: v for k, v in dataclasses.asdict(resolved.spec).items() if k != "chunk_tokens"},
        },
        **summary(rows),
        "tokens": rows,
    }
    if settings.keep and run is not None:
        hold(run.folder)
        run.append(TOKEN_MAPS, [found])
    return found


def resolve(settings: ExplainConfig, run: Run | None) -> Resolved:
    """The settings in place."""
    of_run: Mapping[str, Any] = (run.settings if run else None) or {}

    def value(name: str, default: Any) -> Any:
        own = getattr(settings, name, None)
        own = of_run.get(name) if own is None else own
        return default if own is None else own

    temperature = settings.loss_temperature or of_run.get("loss_temperature") or of_run.get("temperature") or 1.0
    return Resolved(
        prompt=PromptSettings(
            template=value("template", "paper"),
            show_weights=value("show_weights", False),
            privileged_context=value("privileged_context", "rubric"),
            max_criteria=of_run.get("max_criteria"),
            criteria_tags=tuple(of_run.get("criteria_tags") or ()),
            seed=settings.seed,
        ),
        spec=DivergenceSpec(
            beta=value("beta", 0.5),
            clip=value("clip", "entry"),
            clip_threshold=value("clip_threshold", 0.05),
            temperature=temperature,
            top_k=of_run.get("loss_top_k"),
        ),
        max_new_tokens=settings.max_new_tokens or of_run.get("max_completion_length") or 256,
        chat_template_kwargs=of_run.get("chat_template_kwargs") or {},
        mask_thinking=of_run.get("mask_thinking", True),
        think_tags=(of_run.get("think_open_tag") or OPEN_TAG, of_run.get("think_close_tag") or CLOSE_TAG),
    )


def _run(one: RunRef) -> Run | None:
    if not one.is_run:
        return None
    run = open_run(one.source)
    if not (run.settings or {}).get("model_name_or_path"):
        raise RunError(
            f"{one.source} is an evaluation, which has no model of its own: name the model, or the run of "
            "`rgsd train` or `rgsd grpo`"
        )
    if not one.is_base and run.meta.get("status") != "finished":
        raise RunError(
            f"the run in {one.source} is {run.meta.get('status')!r}, so it has no trained policy yet: explain "
            f"{one.source}:base, or finish the run"
        )
    return run


def _chosen(wanted: str | None, examples: Mapping[str, Example], run: Run | None) -> Example:
    if not examples:
        raise DataError("the data hold no example to explain")
    if wanted is None:
        held_out = _split(run).get("held_out") or []
        return next((examples[i] for i in held_out if i in examples), next(iter(examples.values())))
    if wanted in examples:
        return examples[wanted]
    near = difflib.get_close_matches(wanted, list(examples), MOST_NEAR, 0.0)
    raise DataError(
        f"no example has the id {wanted!r}, the data have {len(examples)}, such as {', '.join(near)}: "
        "`rgsd data PATH` shows one, `--data PATH` takes other data"
    )


def _split(run: Run | None) -> dict[str, list[str]]:
    path = None if run is None else run.folder / SPLIT
    return json.loads(path.read_text("utf-8")) if path is not None and path.is_file() else {}


def _teacher(
    example: Example, examples: Mapping[str, Example], settings: PromptSettings, run: Run | None
) -> list[dict[str, str]]:
    """The teacher's prompt; for the mismatched control another prompt's rubric, from the same side of the split."""
    if settings.privileged_context != "mismatched":
        reference = None
        if (
            run is not None
            and run.settings.get("self_written_references")
            and settings.privileged_context in SHOWS_REFERENCE
        ):
            reference = stored_references(run).get(example.id)
            if reference is None:
                raise DataError(
                    f"the run in {run.folder} has no self-written reference for example {example.id!r}, and its "
                    "teacher reads no other: explain one of the prompts that it was trained or measured on"
                )
        return teacher_messages(example, settings, reference=reference)
    side = next((ids for ids in _split(run).values() if example.id in ids), list(examples))
    members = list(rubric_data.deduplicate([examples[i] for i in side if i in examples]).examples)
    rows = training_rows(members, settings)
    found = next((r["teacher_prompt"] for r in rows if r["example_id"] == example.id), None)
    if found is None:
        raise DataError(f"example {example.id!r} is a duplicate of another prompt: explain that one, or its own rubric")
    return found


def _criteria(example: Example, settings: PromptSettings) -> list[dict[str, Any]]:
    shows = settings.privileged_context in ("rubric", "both")
    selected = {id(c) for c in select_criteria(example.rubric, settings)} if shows else set()
    return [
        {"criterion": c.text, "weight": c.weight, "tags": list(c.tags), "is_shown": id(c) in selected}
        for c in example.rubric
    ]


def _response(
    one: RunRef,
    run: Run | None,
    example: Example,
    prompt: list[dict[str, str]],
    model: Any,
    tokenizer: Any,
    settings: ExplainConfig,
    resolved: Resolved,
    starts_in_thinking: bool,
) -> tuple[Response, str]:
    """The response, and where it is from. `opened`: whether the prompt opens its reasoning."""
    if settings.response:
        path = Path(settings.response)
        try:
            text = path.read_text("utf-8").removesuffix("\n")
            return Response(text, 0, is_truncated=False, starts_in_thinking=starts_in_thinking), f"the file {path.name}"
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the response {settings.response!r} cannot be read ({error}): a UTF-8 text is wanted"
            ) from error
    arm = settings.arm or (run and run.arm_of(BASELINE if one.is_base else TRAINED)) or ""
    stored = {} if run is None or settings.resample else stored_responses(run, arm)
    if example.id in stored:
        return stored[example.id].response, f"the run's stored response of `{arm}`"
    if settings.arm:
        raise RunError(
            f"{one.source} has no stored response of arm {arm!r} to example {example.id!r}: leave out --arm to "
            "sample one"
        )
    sampling = SamplingConfig(
        resolved.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        chat_template_kwargs=resolved.chat_template_kwargs or {},
        think_tags=resolved.think_tags,
    )
    generator = TransformersGenerator(model, tokenizer, sampling, batch_size=1)
    say(f"Sampling a response to {example.id}")
    (written,) = generator.generate([prompt])
    how = f"sampled at temperature {settings.temperature:g}, seed {settings.seed}" if settings.temperature else "greedy"
    return written, how


def token_rows(
    student_NV: Tensor,
    teacher_NV: Tensor,
    ids: Sequence[int],
    in_loss: Sequence[bool],
    tokenizer: Any,
    spec: DivergenceSpec,
    top_tokens: int,
) -> list[dict[str, Any]]:
    """One row a response token.

    Returns:
        `t` its text; `d` and `c` the divergence before and after the clip, in nats; `m` whether it is in the loss; `x`
        on special tokens alone; `pt`, `ps` the probability that teacher and student give it; `T`, `S` their likeliest
        words with probabilities. Probabilities are at the loss temperature.
    """
    texts, decoder = align(list(ids), tokenizer).token_texts(), Decoder(tokenizer)
    special = set(tokenizer.all_special_ids)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(ids), LOGIT_TOKENS):
        part = slice(start, start + LOGIT_TOKENS)
        found = divergence(student_NV[part], teacher_NV[part], spec)
        p_student, p_teacher = ((x[part] / spec.temperature).softmax(-1) for x in (student_NV, teacher_NV))
        tops = [p.topk(min(top_tokens, p.size(-1)), dim=-1) for p in (p_teacher, p_student)]
        for i, token in enumerate(ids[part]):
            teacher_words, student_words = (
                [
                    [decoder([int(w)]), _short(float(p))]
                    for w, p in zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)
                ]
                for top in tops
            )
            rows.append(
                {
                    "t": texts[start + i],
                    "d": _short(float(found.unclipped_N[i])),
                    "c": _short(float(found.clipped_N[i])),
                    "m": bool(in_loss[start + i]),
                    **({"x": 1} if token in special else {}),
                    "pt": _short(float(p_teacher[i, token])),
                    "ps": _short(float(p_student[i, token])),
                    "T": teacher_words,
                    "S": student_words,
                }
            )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the tokens in the loss, in nats a token, and how unevenly the divergence lies on them."""
    kept = [r for r in rows if r["m"]]
    if not kept:
        return {"n_tokens": len(rows), "n_in_loss": 0, "mean": None, "mean_clipped": None, "top_tenth_share": None}
    total = sum(r["d"] for r in kept)
    most = sorted((r["d"] for r in kept), reverse=True)[: max(1, round(len(kept) / 10))]
    return {
        "n_tokens": len(rows),
        "n_in_loss": len(kept),
        "mean": total / len(kept),
        "mean_clipped": sum(r["c"] for r in kept) / len(kept),
        "top_tenth_share": sum(most) / total if total > 0 else None,
    }


def _short(value: float) -> float:
    """Five significant digits: what a page can show, and not more bytes than that."""
    return float(f"{value:.5g}")


__all__ = ["ExplainConfig", "explain", "resolve", "summary", "token_rows"]
