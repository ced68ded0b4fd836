"""One training run from a recipe to its table: data, split, baselines, training, evaluation, run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import ModelConfig, get_peft_config

from rgsd import models
from rgsd.data.config import DataConfig, load_split
from rgsd.errors import ConfigError, RunError
from rgsd.evaluation.arms import evaluate_arm
from rgsd.evaluation.config import EvalConfig
from rgsd.evaluation.responses import references, set_aside_stale
from rgsd.evaluation.samples import Sample
from rgsd.evaluation.summaries import results
from rgsd.inference import SamplingConfig, TransformersGenerator
from rgsd.judges import Judge, JudgeConfig, build_judge, check_judgeable, try_out, unchecked
from rgsd.models import adapters
from rgsd.models.sharding import is_partitioned
from rgsd.progress import Steps, say
from rgsd.prompts.messages import SHOWS_REFERENCE, PromptSettings, teacher_prompts, template_source, training_rows
from rgsd.prompts.thinking import prompt_opens_thinking
from rgsd.redaction import without_credentials
from rgsd.rubrics import Example, fingerprint
from rgsd.runs import (
    ADAPTER,
    BASELINE,
    METRICS,
    MODEL,
    RECORD,
    RESULTS,
    ROLLOUTS,
    SPLIT,
    TRAINED,
    Run,
    conditioned_role,
    create_run,
    open_run,
)
from rgsd.training.changes import PROCESSES, Change, changes, recorded
from rgsd.training.checkpoints import agree, checkpoints, step_of, trim_lines
from rgsd.training.config import RGSDConfig
from rgsd.training.grpo import RubricGRPOConfig, RubricGRPOTrainer, RubricReward, grpo_rows
from rgsd.training.sft import RubricSFTConfig, RubricSFTTrainer, sample_conditioned
from rgsd.training.trainer import RGSDTrainer


@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of."""

    model: ModelConfig
    data: DataConfig
    evaluation: EvalConfig
    training: RGSDConfig | RubricGRPOConfig | RubricSFTConfig
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def settings(self) -> dict[str, Any]:
        """All fields that differ from their defaults or belong to rgsd, as one flat mapping, as in a recipe's YAML."""
        flat: dict[str, Any] = {}
        for part in (self.model, self.data, self.evaluation, self.judge, self.training):
            for f in dataclasses.fields(part):
                value = getattr(part, f.name)
                own = part is not self.training or f.name in type(part).__annotations__
                default = f.default if f.default is not dataclasses.MISSING else None
                if f.init and (own or (value != default and value not in ("", {}, []))):
                    flat[f.name] = getattr(value, "value", value)
        flat["output_dir"] = self.training.output_dir
        return {k: v for k, v in flat.items() if _is_plain(v) and k not in _NOT_SETTINGS}

    def defaults(self) -> dict[str, Any]:
        """What a setting is that `settings` leaves out."""
        parts = (self.model, self.data, self.evaluation, self.judge, self.training)
        return {
            f.name: f.default for part in parts for f in dataclasses.fields(part)
            if f.default is not dataclasses.MISSING
        }  # fmt: skip


_NOT_SETTINGS = frozenset(
    {"logging_dir", "hub_token", "push_to_hub_token", "overwrite", "resume_from_checkpoint", "local_rank"}
)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, str | int | float | bool)


def train(recipe: Recipe) -> Run:
    """Train as the recipe says, and write the run folder.

    Raises:
        RGSDError: whatever keeps the run from starting, before anything is trained.
    """
    started = time.time()
    args, data = recipe.training, recipe.data
    sides = load_split(data, holds_out=recipe.evaluation.evaluate, max_held_out=recipe.evaluation.max_eval_prompts)
    train_set, held_out = sides.train, sides.held_out
    run, changed = _open(recipe)
    main = args.process_index == 0
    try:
        judge = build_judge(recipe.judge)
        measured = recipe.evaluation.evaluate and _judgeable(held_out, recipe.judge)
        if main and (measured or isinstance(args, RubricGRPOConfig)):
            try_out(judge)
        try:
            built = _build(recipe, run, train_set, held_out, judge, measured=measured, changed=changed)
        except ValueError as error:
            if type(error).__name__ != "NoMatchingPeftModuleError":  # older releases of peft lack the class
                raise
            raise ConfigError(
                f"lora_target_modules {recipe.model.lora_target_modules} name no module of "
                f"{recipe.model.model_name_or_path!r}: {error}"
            ) from error
        if main:
            run.begin()
            run.note(near_duplicates=sides.near_duplicates)
            (run.folder / RESULTS).unlink(missing_ok=True)  # of a resumed run: they were another policy's
    except BaseException:
        if main:
            run.discard()
        raise
    try:
        _train(recipe, run, built, train_set, held_out, judge, measured=measured, changed=changed)
    except BaseException:
        # Until the first checkpoint or result the run that was to be replaced is still there.
        if main and run.replaced is not None:
            run.discard()
        raise
    if main:
        run.note(status="finished", seconds=round(time.time() - started, 1))
    return run


@dataclass(frozen=True)
class _Built:
    """What a run is about to do its work with.

    Args:
        trainer: with its model and data.
        base: the base model's identity.
        references: self-written ones by example; None where the teacher is shown none of these.
    """

    trainer: Any
    base: str
    references: dict[str, str] | None


def _train(
    recipe: Recipe,
    run: Run,
    built: _Built,
    train_set: Sequence[Example],
    held_out: Sequence[Example],
    judge: Judge,
    *,
    measured: bool,
    changed: list[Change],
) -> None:
    """Measure, train, save, measure again; `changed` is what a resumed run goes on with other values of."""
    args, trainer, settings = recipe.training, built.trainer, recipe.training.prompt_settings()
    main, tokenizer = args.process_index == 0, trainer.processing_class
    arms: dict[str, list[Sample]] = {}
    if measured and main:
        say(f"Before training, on {len(held_out)} held-out prompts")
        # A new adapter adds nothing: before its first step, the policy that GRPO and SFT train is the base.
        with trainer.teacher.active() if isinstance(trainer, RGSDTrainer) else nullcontext():
            arms["base"] = _arm("base", built.base, trainer.model, tokenizer, held_out, recipe, run, judge)
            shown = f"base+{settings.privileged_context}"
            arms[shown] = _arm(
                shown, built.base, trainer.model, tokenizer, held_out, recipe, run, judge, settings, built.references
            )
    steps = trainer.args.max_steps if trainer.args.max_steps > 0 else "all"
    what = "responses" if isinstance(args, RubricSFTConfig) else "rollouts"
    say(f"Training: {len(train_set)} prompts, {steps} steps of {_rollouts_per_step(trainer)} {what}")
    if main:
        run.note(rollouts_per_step=_rollouts_per_step(trainer))
    checkpoint = _checkpoint(run, args)
    if main and changed:
        _record_changes(run, changed, 0 if checkpoint is None else step_of(checkpoint))
    trainer.train(resume_from_checkpoint=checkpoint)
    trained = _save(trainer, tokenizer, run)
    if not main:
        return
    run.settle()
    weights = models.trained_identity(run.folder, built.base)
    if measured:
        say("After training")
        trained = trained or models.load_trained(run.folder, trust_remote_code=args.trust_remote_code)[0]
        arms["trained"] = _arm("trained", weights, trained, tokenizer, held_out, recipe, run, judge)
        run.write(RESULTS, results(arms, run, args.seed, judge=judge.name))
    else:
        set_aside_stale(run, "trained", {})


def _build(
    recipe: Recipe,
    run: Run,
    train_set: Sequence[Example],
    held_out: Sequence[Example],
    judge: Judge,
    *,
    measured: bool,
    changed: Sequence[Change],
) -> _Built:
    """The trainer with its model and data, every check passed; the run's split and fingerprints noted."""
    args, main = recipe.training, recipe.training.process_index == 0
    settings = args.prompt_settings()
    say(f"Model: {recipe.model.model_name_or_path}")
    tokenizer = models.load_tokenizer(
        str(recipe.model.model_name_or_path), recipe.model.model_revision, args.trust_remote_code
    )
    model = models.load_model(
        str(recipe.model.model_name_or_path),
        dtype=recipe.model.dtype,
        revision=recipe.model.model_revision,
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        **(args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}),
    )
    if isinstance(args.model_init_kwargs, dict):
        # The model is here: a token among these would only travel on, into whatever the trainer reports to.
        args.model_init_kwargs = without_credentials(args.model_init_kwargs)
    base = _base_identity(recipe, model)
    model_fingerprint = models.fingerprint(model) if main or is_partitioned(model) else ""
    if main:
        run.write(SPLIT, {"train": [e.id for e in train_set], "held_out": [e.id for e in held_out]})
        facts = {
            "train_fingerprint": fingerprint(train_set),
            "held_out_fingerprint": fingerprint(held_out),
            "model_fingerprint": model_fingerprint,
            # A template of one's own is named by its path, whatever the file holds by now.
            "template_fingerprint": hashlib.sha256(template_source(settings.template).encode()).hexdigest()[:16],
        }
        # Fewer or other prompts to measure on are a change of the evaluation; the training's are compared below.
        same = {k: v for k, v in facts.items() if k != "held_out_fingerprint" or not _measures_others(changed)}
        _check_same(run, **same)
        roles = {"base": BASELINE, "trained": TRAINED}
        roles[f"base+{settings.privileged_context}"] = conditioned_role(settings.privileged_context)
        # Checkpoints carry the id, so that one of another run is told apart.
        facts["id"] = run.meta.get("id") or uuid.uuid4().hex
        run.note(**facts, base_identity=base, processes=args.world_size, kind=_kind(args), roles=roles)
    if recipe.evaluation.evaluate and held_out and is_partitioned(model):
        raise ConfigError(
            "under DeepSpeed ZeRO-3 no process has the whole model to evaluate: set --evaluate false, and measure the "
            "finished run with `rgsd eval`"
        )
    references = None
    if _needs_references(recipe):
        wanted = [*train_set, *(held_out if measured else ())]
        references = _self_written(model, tokenizer, wanted, recipe, run, base)
    common: dict[str, Any] = {
        "processing_class": tokenizer,
        "peft_config": get_peft_config(recipe.model),
        "callbacks": [_Log(run)] if main else [],
    }
    if isinstance(args, RubricGRPOConfig):
        trainer: Any = _grpo_trainer(recipe, run, model, tokenizer, train_set, judge, common)
    elif isinstance(args, RubricSFTConfig):
        trainer = _sft_trainer(recipe, run, model, tokenizer, train_set, references, common)
    else:
        rows = Dataset.from_list(training_rows(train_set, settings, references))
        trainer = RGSDTrainer(model, args=args, train_dataset=rows, **common)
    _plain_progress(trainer)
    return _Built(trainer, base, references)


def _kind(args: Any) -> str:
    """How a run trains, for run.json."""
    return "grpo" if isinstance(args, RubricGRPOConfig) else "sft" if isinstance(args, RubricSFTConfig) else "rgsd"


def _base_identity(recipe: Recipe, model: Any) -> str:
    """The identity of the base, whose model is loaded by now."""
    name, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    return models.identity(name, revision) or f"fingerprint:{models.fingerprint(model)}"


def _grpo_trainer(
    recipe: Recipe, run: Run, model: Any, tokenizer: Any, train_set: Sequence[Example], judge: Judge, common: Any
) -> Any:
    args: Any = recipe.training
    check_judgeable(train_set, recipe.judge)
    rows = grpo_rows(train_set)
    ids = tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_dict=False, **(args.chat_template_kwargs or {})
    )
    reward = RubricReward(
        train_set,
        judge,
        tokenizer=tokenizer,
        think_tags=(args.think_open_tag, args.think_close_tag),
        starts_in_thinking=prompt_opens_thinking(ids, tokenizer, args.think_open_tag),
        log=run.folder / ROLLOUTS if args.keep_rollouts else None,
    )
    return RubricGRPOTrainer(model, args=args, reward_funcs=reward, train_dataset=Dataset.from_list(rows), **common)


def _sft_trainer(
    recipe: Recipe,
    run: Run,
    model: Any,
    tokenizer: Any,
    train_set: Sequence[Example],
    references: dict[str, str] | None,
    common: dict[str, Any],
) -> Any:
    args: Any = recipe.training
    started = time.time()
    found = sample_conditioned(
        model,
        tokenizer,
        train_set,
        args,
        batch_size=recipe.evaluation.eval_generation_batch_size,
        references=references,
    )
    say(
        f"Conditioned responses: {found.n_sampled} sampled, {len(found.rows)} to learn "
        f"({found.n_truncated} cut off, {found.n_leaking} speak of the rubric)"
    )
    if args.process_index == 0:
        facts = {name: getattr(found, name) for name in ("n_sampled", "n_tokens", "n_truncated", "n_leaking")}
        run.note(conditioned_responses={**facts, "seconds": round(time.time() - started, 2)})
    return RubricSFTTrainer(model, args=args, train_dataset=Dataset.from_list(found.rows), **common)


def _open(recipe: Recipe) -> tuple[Run, list[Change]]:
    """The run's folder, and what a resumed run goes on with other values of.

    Raises:
        RunError: when the folder cannot be used, or a setting changed that must not.
    """
    args = recipe.training
    resume = bool(args.resume_from_checkpoint)
    folder = Path(str(args.output_dir))
    is_finished = (folder / RECORD).is_file() and open_run(folder).meta.get("status") == "finished"
    if resume and is_finished and not checkpoints(folder):
        raise RunError(
            f"the run in {folder} is finished, and has no checkpoint to go on from: start anew with --overwrite, or in "
            "another output_dir"
        )
    if args.process_index != 0:
        return Run(folder, {}, recipe.settings()), []
    changed = _changes(recipe, folder) if resume and (folder / RECORD).is_file() else []
    return create_run(folder, recipe.settings(), overwrite=recipe.evaluation.overwrite, resume=resume), changed


def _changes(recipe: Recipe, folder: Path) -> list[Change]:
    """What differs from the settings of the run in the folder, which nothing has touched yet."""
    args, old = recipe.training, open_run(folder)
    kind = old.meta.get("kind", _kind(args))
    if kind != _kind(args):
        raise RunError(
            f"{folder} holds a run of kind {kind!r}, this is {_kind(args)!r}: choose another output_dir, or "
            "replace the run with --overwrite true"
        )
    return changes(
        old.settings | {PROCESSES: old.meta.get(PROCESSES, args.world_size)},
        without_credentials(recipe.settings()) | {PROCESSES: args.world_size},
        recipe.defaults(),
        kind=kind,
        run=str(folder),
    )


def _record_changes(run: Run, changed: list[Change], step: int) -> None:
    """Into run.json first: a kill between the two finds the change once more, and records it no second time."""
    names = ", ".join(f"{c.setting} from {c.old!r} to {c.new!r}" for c in changed)
    say(f"Settings changed after step {step}: {names}")
    run.note(changes=recorded(run.meta.get("changes", []), changed, step))
    run.write_settings()


def _checkpoint(run: Run, args: Any) -> str | None:
    """The checkpoint to go on from. What the run logged after it is taken out: those steps are done again."""
    if not args.resume_from_checkpoint:
        return None
    found = agree(args.output_dir, args.resume_from_checkpoint)
    step = 0 if found is None else step_of(found)
    if args.process_index == 0:
        trim_lines(run.folder / METRICS, lambda row: row["step"] <= step and "train_runtime" not in row)
        trim_lines(run.folder / ROLLOUTS, lambda row: (row["step"] or 0) < step)
    say(f"Going on from {found.name}" if found else "No whole checkpoint yet: training begins with its first step")
    return None if found is None else str(found)


def _measures_others(changed: Sequence[Change]) -> bool:
    return any(c.setting in ("max_eval_prompts", "evaluate") for c in changed)


def _check_same(run: Run, **fingerprints: str) -> None:
    """A resumed run must have the data and the base model that it had."""
    changed = [name for name, value in fingerprints.items() if run.meta.get(name, value) != value]
    if run.meta.get("resumed") and changed:
        raise RunError(
            f"{run.folder} cannot go on: {', '.join(f'{n} was {run.meta[n]}, is {fingerprints[n]}' for n in changed)}. "
            "Restore the data, the model and the template that it began with, or start anew with --overwrite"
        )


def _needs_references(recipe: Recipe) -> bool:
    privileged_context = recipe.training.prompt_settings().privileged_context
    wanted = privileged_context in SHOWS_REFERENCE
    if recipe.evaluation.self_written_references and not wanted:
        raise ConfigError(
            f"self_written_references is set, but privileged_context is {privileged_context!r}, which shows none: "
            "use privileged_context 'reference' or 'both', or unset it"
        )
    return wanted and recipe.evaluation.self_written_references


def _self_written(
    model: Any, tokenizer: Any, examples: Sequence[Example], recipe: Recipe, run: Run, weights: str
) -> dict[str, str]:
    """References that the base model writes from the rubrics, before it is trained."""
    tags = (recipe.training.think_open_tag, recipe.training.think_close_tag)
    template: Any = recipe.training.chat_template_kwargs or {}
    sampling = SamplingConfig(
        recipe.training.max_completion_length or 512,
        chat_template_kwargs=template,
        think_tags=tags,
    )
    batch_size = recipe.evaluation.eval_generation_batch_size
    generator = TransformersGenerator(model, tokenizer, sampling, batch_size=batch_size, weights=weights)
    main = recipe.training.process_index == 0
    return references(run, examples, generator, think_tags=tags, keep=main)


def _judgeable(held_out: Sequence[Example], judge: JudgeConfig) -> bool:
    if problem := unchecked(held_out, judge):
        say(f"No evaluation: {problem}. Name an LLM judge (--judge), or measure the run later with `rgsd eval`")
        return False
    return bool(held_out)


def _arm(
    arm: str,
    weights: str,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    run: Run,
    judge: Judge,
    settings: PromptSettings | None = None,
    references: dict[str, str] | None = None,
) -> list[Sample]:
    """Generate, judge and store one arm; with settings, the model is shown what the teacher is shown."""
    prompts = teacher_prompts(examples, settings or PromptSettings(privileged_context="none"), references)
    tags = (recipe.training.think_open_tag, recipe.training.think_close_tag)
    template: Any = recipe.training.chat_template_kwargs or {}
    sampling = SamplingConfig(
        recipe.evaluation.eval_max_new_tokens or recipe.training.max_completion_length or 512,
        chat_template_kwargs=template,
        think_tags=tags,
    )
    batch_size = recipe.evaluation.eval_generation_batch_size
    generator = TransformersGenerator(model, tokenizer, sampling, batch_size=batch_size, weights=weights)
    return evaluate_arm(run, arm, examples, prompts, generator, judge, think_tags=tags)


def _rollouts_per_step(trainer: Any) -> int:
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes


def _save(trainer: Any, tokenizer: Any, run: Run) -> Any:
    """The adapter (or the whole model) into the run, by every process together; returns the trained policy, or None
    where no process holds all of it."""
    from peft import PeftModel

    trainer.check_weights()
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None
    if trainer.args.process_index != 0:
        return None
    if not isinstance(model, PeftModel):
        models.save_model(model, tokenizer, run.folder / MODEL, state)
    else:
        with adapters.saved_without_the_hub():
            model.save_pretrained(str(run.folder / ADAPTER), state_dict=state)
        tokenizer.save_pretrained(run.folder / ADAPTER)
    return None if is_sharded else adapters.policy(model)


class _Log(TrainerCallback):
    """Each logged step into metrics.jsonl, and a line for the person who waits."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps = Steps()
        self._start = time.monotonic()
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self._run.append(METRICS, [{"step": state.global_step, "time": round(time.time(), 3), **logs}])
        if "loss" not in logs:
            return
        done = max(1, state.global_step - self._first)
        left = (time.monotonic() - self._start) / done * (state.max_steps - state.global_step)
        self._steps.show(state.global_step, state.max_steps, logs, left)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.settle()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.close()


def _plain_progress(trainer: Any) -> None:
    """Our lines in place of transformers' bar and dictionaries."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)


__all__ = ["Recipe", "train"]
