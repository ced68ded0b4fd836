"""`rgsd explain`: how far the rubric moves each token of one response, before or after training.

The student (prompt alone) and the teacher (prompt and rubric) read the same response, as in a training step. The map
shows, for each token, the divergence before and after the clip, and the most likely tokens of both models. The logits
of both models are kept in float32, which takes 2 x tokens x vocabulary x 4 bytes.

Letters in names: N response tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
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
from rgsd.runs import BASELINE, SPLIT, TRAINED, Run, hold, open_run, read_json
from rgsd.settings import setting
from rgsd.training.loss import DivergenceSpec, divergence

LOGIT_TOKENS = 128
"""Tokens to compare at once."""
N_SUGGESTIONS = 5
"""Similar ids to name in the error for an unknown id."""


@dataclass
class ExplainConfig:
    """What to explain. Values in brackets apply to a model that is not a run."""

    output: str = setting("explain.html", "File for the page, or a .json file for the numbers alone.", aliases=["-o"])
    keep: bool = setting(False, "Store the map in the run too, so that `rgsd report` shows it.")
    overwrite: bool = setting(False, "Replace the output file if it exists.")
    response: str | None = setting(
        None, "Text file with the response to explain. Unset: a stored response, or a sampled one."
    )
    arm: str | None = setting(
        None, "Arm of the run whose stored response to explain. Unset: `trained`, or `base` for RUN:base."
    )
    resample: bool = setting(False, "Sample a response even if one is stored.")
    max_new_tokens: int | None = setting(
        None, "Longest sampled response, in tokens. Unset: max_completion_length of the run (256)."
    )
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy. Training rollouts use 1.")
    seed: int = setting(0, "Seed of sampling and of the mismatched rubric.")
    template: str | None = setting(
        None, "The teacher's template: a name or a .jinja file. Unset: the run's template (paper)."
    )
    privileged_context: str | None = setting(
        None,
        "What the teacher sees besides the prompt. Unset: as in the run (rubric).",
        choices=["rubric", "reference", "both", "mismatched", "none"],
    )
    show_weights: bool | None = setting(None, "Show each criterion's weight to the teacher. Unset: as in the run (no).")
    beta: float | None = setting(
        None, "Divergence: 0 is forward KL, 0.5 Jensen-Shannon, 1 reverse KL. Unset: as in the run (0.5)."
    )
    clip: str | None = setting(
        None, "What the clip caps. Unset: as in the run (entry).", choices=["entry", "token", "none"]
    )
    clip_threshold: float | None = setting(None, "The cap, in nats. Unset: as in the run (0.05).")
    loss_temperature: float | None = setting(None, "Divisor of both models' logits. Unset: as in the run (1).")
    top_tokens: int = setting(6, "Number of most likely tokens to show for teacher and student.")
    dtype: str = setting("auto", "Type of the weights, as in transformers. `auto`: as in the run, or in the file.")
    model_revision: str = setting("main", "Revision of a hub model.")
    trust_remote_code: bool = setting(False, "Run code that ships with a model. Only for sources you trust.")

    def __post_init__(self) -> None:
        for name in ("top_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.response and self.arm:
            raise ConfigError("response and arm are both set: take the response from a file or from the run, not both")


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings in effect: the command's, or else the run's, or else the defaults."""

    prompt: PromptSettings
    spec: DivergenceSpec
    max_new_tokens: int
    chat_template_kwargs: dict[str, Any]
    mask_thinking: bool
    think_tags: tuple[str, str]


def explain(name: str, example_id: str | None, data: DataConfig, settings: ExplainConfig) -> dict[str, Any]:
    """Compute the token map of one response.

    Args:
        name: A model, a run (its trained policy against the base model with the rubric), or RUN:base.
        example_id: Id of the example; None for the run's first held-out prompt, or the first example of the data.
        data: The rubric data. Beside a run, the defaults mean the run's own data.
        settings: All other settings.

    Returns:
        The map for `rgsd.report.page.token_page`, in JSON types.

    Raises:
        RGSDError: If a model, run, example, response or setting cannot be used.
    """
    ref = RunRef.parse_policy(name)
    if ref.privileged_context != "none":
        raise ConfigError(
            f"{name!r} names a privileged context: use {name.rpartition('+')[0]} with --privileged_context "
            f"{ref.privileged_context}"
        )
    run = _run(ref)
    if settings.keep and run is None:
        raise ConfigError(f"--keep stores the map in a run, but {ref.source!r} is not a run: leave out --keep")
    resolved = resolve(settings, run)
    examples = examples_by_id(run) if run is not None and data == DataConfig() else load_by_id(data)
    example = _chosen(example_id, examples, run)
    student_prompt, teacher_prompt = student_messages(example), _teacher(example, examples, resolved.prompt, run)
    policy = ref.policy

    measure = MeasureConfig(
        dtype=settings.dtype, model_revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
    )
    model, tokenizer = load_policy(ref, measure)
    student_ids, teacher_ids = (
        replay.prompt_ids(tokenizer, p, resolved.chat_template_kwargs) for p in (student_prompt, teacher_prompt)
    )
    starts_in_thinking = prompt_opens_thinking(student_ids, tokenizer, resolved.think_tags[0])
    response, source = _response(
        ref, run, example, student_prompt, model, tokenizer, settings, resolved, starts_in_thinking
    )
    read = replay.replay(response, tokenizer, think_tags=resolved.think_tags, mask_thinking=resolved.mask_thinking)
    student_NV = replay.logits(model, student_ids, read.ids, example.id).float().cpu()
    fingerprint = models.fingerprint(model)
    if policy == "trained":
        # The teacher is the model before training. Freed first, so that only one model is in memory.
        del model
        gc.collect()
        model, _ = load_policy(dataclasses.replace(ref, arm="base"), measure)
    teacher_NV = replay.logits(model, teacher_ids, read.ids, example.id).float().cpu()
    rows = token_rows(student_NV, teacher_NV, read.ids, read.in_loss, tokenizer, resolved.spec, settings.top_tokens)
    token_map = {
        "example_id": example.id,
        "policy": policy,
        "model": ref.source,
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
        run.append(TOKEN_MAPS, [token_map])
    return token_map


def resolve(settings: ExplainConfig, run: Run | None) -> Resolved:
    """Resolve the settings in effect."""
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


def _run(ref: RunRef) -> Run | None:
    if not ref.is_run:
        return None
    run = open_run(ref.source)
    if not (run.settings or {}).get("model_name_or_path"):
        raise RunError(
            f"{ref.source} is an evaluation, which has no model of its own: name the model, or the run of "
            "`rgsd train` or `rgsd grpo`"
        )
    if not ref.is_base and run.meta.get("status") != "finished":
        raise RunError(
            f"the run in {ref.source} has status {run.meta.get('status')!r} and no trained policy yet: explain "
            f"{ref.source}:base, or finish the run"
        )
    return run


def _chosen(example_id: str | None, examples: Mapping[str, Example], run: Run | None) -> Example:
    if not examples:
        raise DataError("the data has no example to explain: check --data and --schema")
    if example_id is None:
        held_out = _split(run).get("held_out") or []
        return next((examples[i] for i in held_out if i in examples), next(iter(examples.values())))
    if example_id in examples:
        return examples[example_id]
    similar = difflib.get_close_matches(example_id, list(examples), N_SUGGESTIONS, 0.0)
    raise DataError(
        f"no example has the id {example_id!r} among {len(examples)}, for example {', '.join(similar)}: choose one of "
        "them, or other data with --data"
    )


def _split(run: Run | None) -> dict[str, list[str]]:
    return {} if run is None else read_json(run.folder / SPLIT)


def _teacher(
    example: Example, examples: Mapping[str, Example], settings: PromptSettings, run: Run | None
) -> list[dict[str, str]]:
    """The teacher's prompt. The mismatched control shows a rubric from the same side of the split, as in training."""
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
                    f"the run in {run.folder} has no self-written reference for example {example.id!r}: explain a "
                    "prompt that it was trained or evaluated on"
                )
        return teacher_messages(example, settings, reference=reference)
    side = next((ids for ids in _split(run).values() if example.id in ids), list(examples))
    members = list(rubric_data.deduplicate([examples[i] for i in side if i in examples]).examples)
    rows = training_rows(members, settings)
    prompt = next((r["teacher_prompt"] for r in rows if r["example_id"] == example.id), None)
    if prompt is None:
        raise DataError(f"example {example.id!r} duplicates another prompt: explain that one")
    return prompt


def _criteria(example: Example, settings: PromptSettings) -> list[dict[str, Any]]:
    shows = settings.privileged_context in ("rubric", "both")
    selected = {id(c) for c in select_criteria(example.rubric, settings)} if shows else set()
    return [
        {"criterion": c.text, "weight": c.weight, "tags": list(c.tags), "is_shown": id(c) in selected}
        for c in example.rubric
    ]


def _response(
    ref: RunRef,
    run: Run | None,
    example: Example,
    prompt: list[dict[str, str]],
    model: Any,
    tokenizer: Any,
    settings: ExplainConfig,
    resolved: Resolved,
    starts_in_thinking: bool,
) -> tuple[Response, str]:
    """The response and a description of its source: the given file, the run's stored response, or a new sample."""
    if settings.response:
        path = Path(settings.response)
        try:
            text = path.read_text("utf-8").removesuffix("\n")
            return Response(text, 0, is_truncated=False, starts_in_thinking=starts_in_thinking), f"the file {path.name}"
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the response from {settings.response} as UTF-8 text: {error}") from error
    arm = settings.arm or (run and run.arm_of(BASELINE if ref.is_base else TRAINED)) or ""
    stored = {} if run is None or settings.resample else stored_responses(run, arm)
    if example.id in stored:
        return stored[example.id].response, f"the run's stored response of `{arm}`"
    if settings.arm:
        raise RunError(
            f"{ref.source} has no stored response of arm {arm!r} to example {example.id!r}: leave out --arm to "
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
    """One row per response token.

    Returns:
        Rows with `t`, the token's text; `d` and `c`, the divergence before and after the clip, in nats; `m`, whether it
        is in the loss; `x`, only on special tokens; `pt` and `ps`, its probability under teacher and student; `T` and
        `S`, their most likely tokens with probabilities. Probabilities are at the loss temperature.
    """
    texts, decoder = align(list(ids), tokenizer).token_texts(), Decoder(tokenizer)
    special = set(tokenizer.all_special_ids)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(ids), LOGIT_TOKENS):
        part = slice(start, start + LOGIT_TOKENS)
        divergences = divergence(student_NV[part], teacher_NV[part], spec)
        p_student, p_teacher = ((x[part] / spec.temperature).softmax(-1) for x in (student_NV, teacher_NV))
        tops = [p.topk(min(top_tokens, p.size(-1)), dim=-1) for p in (p_teacher, p_student)]
        for i, token in enumerate(ids[part]):
            teacher_tokens, student_tokens = (
                [
                    [decoder([int(t)]), _rounded(float(p))]
                    for t, p in zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)
                ]
                for top in tops
            )
            rows.append(
                {
                    "t": texts[start + i],
                    "d": _rounded(float(divergences.unclipped_N[i])),
                    "c": _rounded(float(divergences.clipped_N[i])),
                    "m": bool(in_loss[start + i]),
                    **({"x": 1} if token in special else {}),
                    "pt": _rounded(float(p_teacher[i, token])),
                    "ps": _rounded(float(p_student[i, token])),
                    "T": teacher_tokens,
                    "S": student_tokens,
                }
            )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the tokens in the loss, in nats per token, and the share of the divergence on their top tenth."""
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


def _rounded(value: float) -> float:
    """The value with five significant digits, which keeps the page small."""
    return float(f"{value:.5g}")


__all__ = ["ExplainConfig", "explain", "resolve", "summary", "token_rows"]
