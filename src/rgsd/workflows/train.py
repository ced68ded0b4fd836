"""One training run, from a recipe to its table.

`train` is the whole workflow: split the data, open the run's folder (`opening.py`), build the trainer (`setup.py`),
evaluate the base policy, train, save (`saving.py`), evaluate the trained policy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rgsd import models
from rgsd.data.config import load_split
from rgsd.evaluation.arms import evaluate_arm
from rgsd.evaluation.responses import set_aside_stale
from rgsd.evaluation.samples import Sample
from rgsd.evaluation.summaries import results
from rgsd.inference import TransformersGenerator
from rgsd.judges import build_judge, try_out, unchecked
from rgsd.progress import say
from rgsd.prompts.messages import PromptSettings, teacher_prompts
from rgsd.runs import RESULTS, Run
from rgsd.training.checkpoints import step_of
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows.opening import checkpoint_to_resume, open_training_run
from rgsd.workflows.recipe import Recipe
from rgsd.workflows.saving import save_policy
from rgsd.workflows.setup import Job, Setup, set_up


def train(recipe: Recipe) -> Run:
    """Train according to the recipe and write the run's folder.

    Raises:
        RGSDError: Before training, for anything that keeps the run from starting; the folder is then unchanged. During
            training, for anything that stops it; checkpoints and logs are kept.
    """
    started = time.time()
    evaluation = recipe.evaluation
    split = load_split(recipe.data, holds_out=evaluation.evaluate, max_held_out=evaluation.max_eval_prompts)
    opened = open_training_run(recipe)
    run, is_main = opened.run, recipe.is_main
    with _discarded_on_error(run, is_main):
        judge = build_judge(recipe.judge)
        job = Job(recipe, opened, split, judge, is_evaluated=_can_evaluate(recipe, split.held_out))
        if is_main and (job.is_evaluated or recipe.kind == "grpo"):
            try_out(judge)
        setup = set_up(job)
        if is_main:
            run.begin()
            run.note(near_duplicates=split.near_duplicates)
            (run.folder / RESULTS).unlink(missing_ok=True)  # a resumed run's results are of an earlier policy
    with _discarded_on_error(run, is_main, only_if_replacing=True):
        samples = _evaluate_base(job, setup) if job.is_evaluated and is_main else {}
        trained = _train(job, setup)
        if is_main:
            _finish(job, setup, trained, samples)
    if is_main:
        run.note(status="finished", seconds=round(time.time() - started, 1))
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
    if problem := unchecked(held_out, recipe.judge):
        say(f"No evaluation: {problem}. Name an LLM judge with --judge, or score the run later with `rgsd eval`")
        return False
    return bool(held_out)


def _evaluate_base(job: Job, setup: Setup) -> dict[str, list[Sample]]:
    """Score the base policy on the held-out prompts, alone and with the teacher's context."""
    trainer, settings = setup.trainer, job.recipe.training.prompt_settings()
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
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return save_policy(trainer, trainer.processing_class, run)


def _finish(job: Job, setup: Setup, trained: Any, samples: dict[str, list[Sample]]) -> None:
    """Score the trained policy and write the table."""
    run, args = job.run, job.recipe.training
    run.settle()
    if not job.is_evaluated:
        set_aside_stale(run, "trained", {})
        return
    say("After training")
    weights = models.trained_identity(run.folder, setup.base_identity)
    policy = trained or models.load_trained(run.folder, trust_remote_code=args.trust_remote_code)[0]
    samples["trained"] = _evaluate(job, setup, "trained", policy, weights)
    run.write(RESULTS, results(samples, run, args.seed, judge=job.judge.name))


def _evaluate(
    job: Job, setup: Setup, arm: str, model: Any, weights: str, settings: PromptSettings | None = None
) -> list[Sample]:
    """Generate, judge and store the responses of one arm. With `settings`, the model reads the teacher's prompts."""
    recipe, examples = job.recipe, job.split.held_out
    prompts = teacher_prompts(examples, settings or PromptSettings(privileged_context="none"), setup.references)
    sampling = recipe.sampling(recipe.evaluation.eval_max_new_tokens)
    generator = TransformersGenerator(
        model,
        setup.trainer.processing_class,
        sampling,
        batch_size=recipe.evaluation.eval_generation_batch_size,
        weights=weights,
    )
    return evaluate_arm(job.run, arm, examples, prompts, generator, job.judge, think_tags=sampling.think_tags)


__all__ = ["train"]
