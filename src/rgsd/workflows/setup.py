"""Load the model and build the trainer of a training run, after all checks that can fail early."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import get_peft_config

from rgsd import models
from rgsd.data.config import DataSplit
from rgsd.errors import ConfigError
from rgsd.evaluation.responses import references
from rgsd.inference import TransformersGenerator
from rgsd.judges import Judge, check_judgeable
from rgsd.models.lineage import is_run, lineage_from
from rgsd.models.sharding import is_partitioned
from rgsd.progress import say
from rgsd.prompts.messages import SHOWS_REFERENCE, training_rows
from rgsd.prompts.rendering import template_source
from rgsd.prompts.thinking import prompt_opens_thinking
from rgsd.redaction import without_credentials
from rgsd.rubrics import fingerprint
from rgsd.runs import BASELINE, ROLLOUTS, SPLIT, TRAINED, Run, conditioned_role
from rgsd.training.grpo import RubricGRPOTrainer, RubricReward, grpo_rows
from rgsd.training.sft import RubricSFTTrainer, sample_conditioned
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows.development import DevelopmentPlan, scorer_of
from rgsd.workflows.opening import OpenedRun
from rgsd.workflows.recipe import Recipe
from rgsd.workflows.run_log import OutdatedResults, RunLog, use_plain_progress


@dataclass(frozen=True)
class Job:
    """One training run before its model is loaded.

    Args:
        recipe: The run's settings.
        opened: The run's folder.
        split: Training and held-out examples.
        judge: Scores held-out responses, and GRPO's rollouts.
        is_evaluated: Whether the policy is evaluated before and after training.
        development: What is evaluated during training; None for nothing.
    """

    recipe: Recipe
    opened: OpenedRun
    split: DataSplit
    judge: Judge
    is_evaluated: bool
    development: DevelopmentPlan | None = None

    @property
    def run(self) -> Run:
        """The run's folder."""
        return self.opened.run


@dataclass(frozen=True)
class Setup:
    """A trainer that is ready to run.

    Args:
        trainer: The trainer, with its model and data.
        base_identity: Identity of the base model.
        references: Self-written references by example id; None if the teacher sees none of these.
    """

    trainer: Any
    base_identity: str
    references: dict[str, str] | None


def set_up(job: Job) -> Setup:
    """Load the model and build the trainer; note the split and the fingerprints in the run.

    Raises:
        ConfigError: If settings contradict each other or the model.
        RunError: If a resumed run has other data or another model.
    """
    recipe, args = job.recipe, job.recipe.training
    say(f"Model: {recipe.model.model_name_or_path}")
    name, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    tokenizer = models.load_tokenizer(name, revision, args.trust_remote_code)
    model = models.load_model(
        name,
        dtype=recipe.model.dtype,
        revision=revision,
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        **(args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}),
    )
    if isinstance(args.model_init_kwargs, dict):
        # Only loading needs a token; left here, it would reach whatever the trainer reports to.
        args.model_init_kwargs = without_credentials(args.model_init_kwargs)
    base_identity = models.identity(name, revision) or f"fingerprint:{models.fingerprint(model)}"
    _note_facts(job, model, base_identity)
    if recipe.evaluation.evaluate and job.split.held_out and is_partitioned(model):
        raise ConfigError(
            "DeepSpeed ZeRO-3 leaves no process with the whole model to evaluate: set --no_evaluate, and score the "
            "finished run with `rgsd eval`"
        )
    written = _self_written_references(job, model, tokenizer, base_identity) if _needs_references(recipe) else None
    try:
        trainer = _build_trainer(job, model, tokenizer, written)
    except ValueError as error:
        if type(error).__name__ != "NoMatchingPeftModuleError":  # older releases of peft lack the class
            raise
        raise ConfigError(
            f"lora_target_modules {recipe.model.lora_target_modules} match no module of {name!r}: {error}"
        ) from error
    use_plain_progress(trainer)
    return Setup(trainer, base_identity, written)


def _note_facts(job: Job, model: Any, base_identity: str) -> None:
    """Note the split, the fingerprints and the arms' roles, and compare them with those of a resumed run."""
    recipe, run = job.recipe, job.run
    settings = recipe.training.prompt_settings()
    # Partitioned weights are gathered to be read, in which every process takes part.
    model_fingerprint = models.fingerprint(model) if recipe.is_main or is_partitioned(model) else ""
    if not recipe.is_main:
        return
    train_set, held_out = job.split.train, job.split.held_out
    development = job.split.development
    aside = {"development": [e.id for e in development]} if development else {}
    run.write(SPLIT, {"train": [e.id for e in train_set], **aside, "held_out": [e.id for e in held_out]})
    if development:
        run.note(development_fingerprint=fingerprint(development))
    fingerprints = {
        "train_fingerprint": fingerprint(train_set),
        "held_out_fingerprint": fingerprint(held_out),
        "model_fingerprint": model_fingerprint,
        # The settings name a template by its path; the file behind it can change.
        "template_fingerprint": hashlib.sha256(template_source(settings.template).encode()).hexdigest()[:16],
    }
    must_match = dict(fingerprints)
    if job.opened.has_other_held_out_prompts:
        del must_match["held_out_fingerprint"]
    job.opened.check_unchanged(must_match)
    conditioned = f"base+{settings.privileged_context}"
    name = str(recipe.model.model_name_or_path)
    run.note(
        **fingerprints,
        id=run.meta.get("id") or uuid.uuid4().hex,  # in every checkpoint too, so a resume rejects another run's
        base_identity=base_identity,
        lineage=lineage_from(name, base_identity) if is_run(name) else [],
        processes=recipe.training.world_size,
        kind=recipe.kind,
        roles={
            "base": BASELINE,
            "trained": TRAINED,
            conditioned: conditioned_role(settings.privileged_context),
        },
    )


# --- References ---------------------------------------------------------------------------------------------------


def _needs_references(recipe: Recipe) -> bool:
    """Whether the base model must write references first.

    Raises:
        ConfigError: If the settings ask for references that the teacher would not see.
    """
    context = recipe.training.prompt_settings().privileged_context
    if recipe.evaluation.self_written_references and context not in SHOWS_REFERENCE:
        raise ConfigError(
            f"self_written_references needs privileged_context 'reference' or 'both', got {context!r}: change one of "
            "the two"
        )
    return recipe.evaluation.self_written_references


def _self_written_references(job: Job, model: Any, tokenizer: Any, base_identity: str) -> dict[str, str]:
    """Let the untrained base model write a reference for each rubric."""
    recipe = job.recipe
    development = job.development.examples if job.development else ()
    examples = [*job.split.train, *development, *(job.split.held_out if job.is_evaluated else ())]
    sampling = recipe.sampling()
    batch_size = recipe.evaluation.eval_generation_batch_size
    generator = TransformersGenerator(model, tokenizer, sampling, batch_size=batch_size, weights=base_identity)
    return references(job.run, examples, generator, think_tags=sampling.think_tags, keep=recipe.is_main)


# --- Trainers -----------------------------------------------------------------------------------------------------


def _build_trainer(job: Job, model: Any, tokenizer: Any, written: dict[str, str] | None) -> Any:
    recipe, train_set = job.recipe, job.split.train
    args: Any = recipe.training
    common: dict[str, Any] = {
        "args": args,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(recipe.model),
        "callbacks": [RunLog(job.run), OutdatedResults(job.run)] if recipe.is_main else [],
    }
    if recipe.kind == "grpo":
        check_judgeable(train_set, recipe.judge)
        common["development"] = _scorer(job, tokenizer)
        rows = grpo_rows(train_set)
        reward = _reward(job, tokenizer, rows[0]["prompt"])
        return RubricGRPOTrainer(model, reward_funcs=reward, train_dataset=Dataset.from_list(rows), **common)
    if recipe.kind == "sft":
        rows = _conditioned_rows(job, model, tokenizer, written)
        common["development"] = _scorer(job, tokenizer)
        return RubricSFTTrainer(model, train_dataset=Dataset.from_list(rows), **common)
    with_contrast = args.teacher_contrast > 0
    rows = training_rows(train_set, args.prompt_settings(), written, with_contrast=with_contrast)
    if job.development is not None:
        examples = job.development.examples
        aside = training_rows(examples, args.prompt_settings(), written, with_contrast=with_contrast)
        # As the evaluation's dataset, so that their lengths are checked before training.
        common |= {"development": _scorer(job, tokenizer, aside), "eval_dataset": Dataset.from_list(aside)}
    return RGSDTrainer(model, train_dataset=Dataset.from_list(rows), **common)


def _scorer(job: Job, tokenizer: Any, rows: list[Any] | None = None) -> Any:
    """What makes the scorer of the development prompts, given the trainer; None for a run that evaluates none."""
    if job.development is None:
        return None
    return scorer_of(job.development, job.recipe, job.run, tokenizer, job.judge, rows)


def _reward(job: Job, tokenizer: Any, prompt: Sequence[dict[str, str]]) -> RubricReward:
    """GRPO's reward: the judge's rubric score."""
    args: Any = job.recipe.training
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=False, **(args.chat_template_kwargs or {})
    )
    return RubricReward(
        job.split.train,
        job.judge,
        tokenizer=tokenizer,
        think_tags=(args.think_open_tag, args.think_close_tag),
        starts_in_thinking=prompt_opens_thinking(ids, tokenizer, args.think_open_tag),
        log=job.run.folder / ROLLOUTS if args.keep_rollouts else None,
    )


def _conditioned_rows(job: Job, model: Any, tokenizer: Any, written: dict[str, str] | None) -> list[Any]:
    """Sample SFT's training rows: responses of the base model with the rubric in its prompt."""
    args: Any = job.recipe.training
    started = time.time()
    batch_size = job.recipe.evaluation.eval_generation_batch_size
    sampled = sample_conditioned(
        model, tokenizer, job.split.train, args, batch_size=batch_size, references=written
    )  # fmt: skip
    say(
        f"Conditioned responses: {sampled.n_sampled} sampled, {len(sampled.rows)} to train on "
        f"({sampled.n_truncated} truncated, {sampled.n_leaking} mention the rubric)"
    )
    if job.recipe.is_main:
        counts = {name: getattr(sampled, name) for name in ("n_sampled", "n_tokens", "n_truncated", "n_leaking")}
        job.run.note(conditioned_responses={**counts, "seconds": round(time.time() - started, 2)})
    return sampled.rows
