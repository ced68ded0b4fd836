"""One training run, from a recipe to its table.

`train` is the whole workflow: split the data, open the run's folder (`opening.py`), build the trainer (`setup.py`),
evaluate the base policy, train, save (`saving.py`), evaluate the trained policy.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from rgsd import models
from rgsd.data.config import load_split
from rgsd.data.recurrence import in_words, recurrence
from rgsd.evaluation.arms import evaluate_arm
from rgsd.evaluation.development import TRAINING
from rgsd.evaluation.responses import set_aside_stale
from rgsd.evaluation.samples import Sample
from rgsd.evaluation.summaries import results
from rgsd.inference import Conversation, TransformersGenerator
from rgsd.judges import Judge, build_judge, missing_checks, record_requests, try_out
from rgsd.progress import say
from rgsd.prompts.messages import PromptSettings, teacher_prompts
from rgsd.runs import JUDGE_REQUESTS, RESULTS, Run
from rgsd.training.checkpoints import step_of
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows.control import check_control, check_control_prompts, reuse_base, twin_of, write_results
from rgsd.workflows.development import plan_development
from rgsd.workflows.opening import (
    checkpoint_to_resume,
    is_half_finished,
    open_training_run,
    reopen_finished_half,
)
from rgsd.workflows.recipe import Recipe
from rgsd.workflows.reporting import write_report
from rgsd.workflows.saving import save_policy
from rgsd.workflows.setup import Job, Setup, set_up


def train(recipe: Recipe) -> Run:
    """Train according to the recipe and write the run's folder; with `control`, its twin's too (`control.py`).

    Raises:
        RGSDError: Before training, for anything that keeps the run from starting; the folder is then unchanged. During
            training, for anything that stops it; checkpoints and logs are kept.
    """
    twin = None
    if recipe.evaluation.control:
        check_control(recipe)
        twin = twin_of(recipe)
    judge = build_judge(recipe.judge)
    if twin is not None and is_half_finished(recipe):
        run = reopen_finished_half(recipe)
    else:
        run = _train_half(recipe, judge)
    if twin is not None:
        _train_twin(twin, run, judge)
        if recipe.is_main:
            write_results(run, judge.name, recipe.training.seed)
    if recipe.is_main:
        run.note(status="finished")
        if recipe.evaluation.report:
            write_report(run, trust_remote_code=recipe.training.trust_remote_code)
    return run


def _train_twin(twin: Recipe, right: Run, judge: Judge) -> None:
    """Train and evaluate the mismatched twin, unless that is done."""
    # The trainer's cycles hold the first half's model until they are collected.
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    say(f"Control: the same recipe with another prompt's rubric for each prompt, in {right.twin}")
    run = reopen_finished_half(twin) if is_half_finished(twin) else _train_half(twin, judge, right)
    if twin.is_main:
        run.note(status="finished")


def _train_half(recipe: Recipe, judge: Judge, right: Run | None = None) -> Run:
    """Train one policy and evaluate it before and after.

    Args:
        recipe: of the run, or of its twin.
        judge: scores the responses.
        right: the run that a twin controls.
    """
    started = time.time()
    evaluation = recipe.evaluation
    split = load_split(recipe.data, holds_out=evaluation.evaluate, max_held_out=evaluation.max_eval_prompts)
    development = plan_development(recipe, split)
    if evaluation.control:
        check_control_prompts(split.train)
    opened = open_training_run(recipe)
    run, is_main = opened.run, recipe.is_main
    with _discarded_on_error(run, is_main):
        job = Job(recipe, opened, split, judge, _can_evaluate(recipe, split.held_out), development)
        is_tried = right is not None and not right.meta.get("resumed")
        is_judged = job.is_evaluated or recipe.kind == "grpo" or (development is not None and development.is_judged)
        if is_main and not is_tried and is_judged:
            try_out(judge)
        setup = set_up(job)
        if is_main:
            run.begin()
            recurring = recurrence(split.train).to_row()
            if right is None:
                say(f"Training data: {in_words(recurring)}")
            run.note(near_duplicates=split.near_duplicates, recurrence=recurring, half_finished=False)
            if right is not None:
                run.note(control_of=right.meta.get("id"))
            (run.folder / RESULTS).unlink(missing_ok=True)  # a resumed run's results are of an earlier policy
    with _discarded_on_error(run, is_main, only_if_replacing=True):
        samples = _evaluate_base(job, setup, right) if job.is_evaluated and is_main else {}
        trained = _train(job, setup)
        if is_main:
            _finish(job, setup, trained, samples)
    if is_main:
        run.note(half_finished=True, seconds=round(time.time() - started, 1))
    return run


@contextmanager
def _discarded_on_error(run: Run, is_main: bool, *, only_if_replacing: bool = False) -> Iterator[None]:
    """Restore the folder if the block fails.

    Args:
        run: The run.
        is_main: Whether this is the process that writes the folder.
        only_if_replacing: Restore only a run that this run replaces. A new run keeps its checkpoints and logs.
    """
    try:
        yield
    except BaseException:
        if is_main and (run.replaced is not None or not only_if_replacing):
            run.discard()
        raise


def _can_evaluate(recipe: Recipe, held_out: Any) -> bool:
    """Whether the judge can score the held-out prompts. Prints the reason if it cannot."""
    if not recipe.evaluation.evaluate:
        return False
    if problem := missing_checks(held_out, recipe.judge):
        say(f"No evaluation: {problem}. Name an LLM judge with --judge, or score the run later with `rgsd eval`")
        return False
    return bool(held_out)


def _evaluate_base(job: Job, setup: Setup, right: Run | None) -> dict[str, list[Sample]]:
    """Score the base policy on the held-out prompts, alone and with the teacher's context. A twin takes the samples of
    the run that it controls."""
    trainer, settings = setup.trainer, job.recipe.training.prompt_settings()
    if right is not None:
        keys = _generator(job, setup, trainer.model, setup.base_identity).keys(_prompts(job, setup))
        samples = reuse_base(right, job.run, "base", job.split.held_out, keys, job.judge.name)
        return {"base": samples} if samples else {}
    say(f"Before training, on {len(job.split.held_out)} held-out prompts")
    # RGSD's teacher is the base policy. GRPO and SFT train a new adapter, which adds nothing before its first step.
    with trainer.teacher.active() if isinstance(trainer, RGSDTrainer) else nullcontext():
        conditioned = f"base+{settings.privileged_context}"
        return {
            "base": _evaluate(job, setup, "base", trainer.model, setup.base_identity),
            conditioned: _evaluate(job, setup, conditioned, trainer.model, setup.base_identity, settings),
        }


def _train(job: Job, setup: Setup) -> Any:
    """Train, or resume training, and save the policy. Returns what `save_policy` returns."""
    recipe, run, trainer, args = job.recipe, job.run, setup.trainer, setup.trainer.args
    per_step = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    )  # fmt: skip
    n_steps = args.max_steps if args.max_steps > 0 else "all"
    what = "responses" if recipe.kind == "sft" else "rollouts"
    say(f"Training: {len(job.split.train)} prompts, {n_steps} steps of {per_step} {what}")
    if recipe.is_main:
        run.note(rollouts_per_step=per_step)
    checkpoint = checkpoint_to_resume(run, recipe.training)
    if recipe.is_main and job.opened.changes:
        job.opened.record_changes(0 if checkpoint is None else step_of(checkpoint))
    if recipe.is_main:
        # Not those of the arm that was judged last.
        record_requests(job.judge, run.folder / JUDGE_REQUESTS, TRAINING)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if recipe.is_main:
        _note_outcome(job, trainer)
    return save_policy(trainer, trainer.processing_class, run)


def _note_outcome(job: Job, trainer: Any) -> None:
    """Note the best step, whether its weights are the run's, and what training was warned of."""
    facts: dict[str, Any] = {"warnings": trainer.warnings} if trainer.warnings else {}
    if job.development is not None:
        facts |= {"steps": trainer.state.global_step, "best": None}
        if trainer.best is not None:
            is_loaded = bool(trainer.args.load_best_model_at_end)
            facts["best"] = trainer.best | {"is_loaded": is_loaded, "n_prompts": len(job.development.examples)}
    if facts:
        job.run.note(**facts)


def _finish(job: Job, setup: Setup, trained: Any, samples: dict[str, list[Sample]]) -> None:
    """Score the trained policy and write the table."""
    run, args = job.run, job.recipe.training
    run.settle()
    if not job.is_evaluated:
        set_aside_stale(run, "trained", {}, "of an earlier policy")
        return
    say("After training")
    weights = models.trained_identity(run.folder, setup.base_identity)
    policy = trained or models.load_trained(run.folder, trust_remote_code=args.trust_remote_code)[0]
    samples["trained"] = _evaluate(job, setup, "trained", policy, weights)
    baseline = next(iter(samples))
    run.write(RESULTS, results(samples, run, args.seed, judge=job.judge.name, baseline=baseline))


def _evaluate(
    job: Job, setup: Setup, arm: str, model: Any, weights: str, settings: PromptSettings | None = None
) -> list[Sample]:
    """Generate, judge and store the responses of one arm. With `settings`, the model reads the teacher's prompts."""
    generator = _generator(job, setup, model, weights)
    think_tags = generator.sampling.think_tags
    prompts = _prompts(job, setup, settings)
    return evaluate_arm(job.run, arm, job.split.held_out, prompts, generator, job.judge, think_tags=think_tags)


def _prompts(job: Job, setup: Setup, settings: PromptSettings | None = None) -> Sequence[Conversation]:
    """The held-out prompts; with `settings`, as the teacher reads them."""
    settings = settings or PromptSettings(privileged_context="none")
    return teacher_prompts(job.split.held_out, settings, setup.references)


def _generator(job: Job, setup: Setup, model: Any, weights: str) -> TransformersGenerator:
    recipe = job.recipe
    return TransformersGenerator(
        model,
        setup.trainer.processing_class,
        recipe.sampling(recipe.evaluation.eval_max_new_tokens),
        batch_size=recipe.evaluation.eval_generation_batch_size,
        weights=weights,
    )


__all__ = ["train"]
