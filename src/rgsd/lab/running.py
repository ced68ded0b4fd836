"""Runs arms: each a run folder of the product's own trainers, measured by the exact judge; two at a time on two cores.

LAB/
  lab.json            what was asked, machine, versions, commit
  seed-0/task.jsonl   the task of that seed: prompts with rubrics, as `rgsd train --data` reads them
  seed-0/base/        the untrained model on it: alone, with the rubric, with another prompt's
  seed-0/rgsd/        an arm: a run folder, with the trained model's responses and verdicts in samples.jsonl
  seed-0/rgsd.log     what it printed

A seed is a task of its own (which reader wants which facts, and the split) and the seed of the training. An arm that is
finished is not run again, so that the same command goes on with what was stopped.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError, RGSDError, RunError
from rgsd.evaluation.samples import Sample
from rgsd.lab.figures import MAX_NEW_TOKENS
from rgsd.lab.grid import Arm, Task
from rgsd.lab.world import World, write_jsonl
from rgsd.progress import say
from rgsd.provenance import environment
from rgsd.redaction import redact
from rgsd.runs import BASELINE, RECORD, Run, conditioned_role, create_run, open_run, write_json

LAB = "lab.json"
BASE = "base"
HELD_OUT = "held-out"
BASE_ARMS = {"base": "none", "base+rubric": "rubric", "base+mismatched": "mismatched"}
"""What is measured before any training -> what the model is shown."""


@dataclass(frozen=True)
class Job:
    """One arm at one seed; without an arm, the untrained model on a task."""

    folder: Path
    seed: int
    task: Task
    arm: Arm | None = None

    @property
    def home(self) -> Path:
        """The run's folder."""
        name = self.arm.name if self.arm else BASE + self.task.name.removeprefix("task")
        return self.folder / f"seed-{self.seed}" / name

    @property
    def data(self) -> Path:
        """The task's file."""
        return self.folder / f"seed-{self.seed}" / f"{self.task.name}.jsonl"

    @property
    def weight(self) -> float:
        """About how long it takes, beside the others: the longest are begun first."""
        if self.arm is None:
            return 0.3
        steps = int(self.arm.settings.get("max_steps", 1))
        return steps * (8.0 if self.arm.command == "grpo" else 1.0)

    def settings(self) -> dict[str, Any]:
        """Of the product's command."""
        assert self.arm is not None
        return {
            **self.arm.settings,
            "data": str(self.data),
            "seed": self.seed,
            "output_dir": str(self.home),
            "overwrite": True,
        }


def jobs_of(folder: Path, arms: Iterable[Arm], seeds: Sequence[int]) -> list[Job]:
    """Every arm at every seed, and the untrained model on each of their tasks."""
    chosen = list(arms)
    tasks = {Task(), *(arm.task for arm in chosen)}
    jobs = [Job(folder, seed, task) for seed in seeds for task in sorted(tasks, key=lambda t: t.name)]
    return jobs + [Job(folder, seed, arm.task, arm) for seed in seeds for arm in chosen]


def run_lab(
    folder: str | Path,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Run what is not there yet.

    Args:
        folder: of the laboratory's run.
        arms: which ones.
        seeds: each a task and a training seed.
        workers: processes, of one thread each; as many as cores by default.
        overwrite: begin anew.

    Raises:
        ConfigError: for an arm whose settings its command does not take; nothing is run then.
        RunError: when the folder holds an arm of that name with other settings, or an arm failed. What was finished
            is kept.
    """
    home = Path(folder)
    jobs = jobs_of(home, arms, seeds)
    for arm in arms:
        recipe_of(arm.command, Job(home, 0, arm.task, arm).settings())
    if not overwrite:
        _check_same(jobs)
    todo = [job for job in jobs if overwrite or not _is_finished(job)]
    home.mkdir(parents=True, exist_ok=True)
    record = {"arms": {a.name: {**asdict(a)} for a in arms}, "seeds": list(seeds), **environment()}
    write_json(home / LAB, json.loads(json.dumps(record, default=str)))
    for job in todo:
        job.home.parent.mkdir(exist_ok=True)
        world = World(task_seed=job.seed, generality=job.task.generality)
        write_jsonl(world.examples(think=job.task.think), job.data)
    workers = workers or os.cpu_count() or 1
    say(f"Laboratory: {len(arms)} arms, {len(seeds)} seeds; {len(todo)} of {len(jobs)} runs to do, {workers} at a time")
    _run_all(sorted(todo, key=lambda job: -job.weight), workers)
    return home


def _run_all(jobs: list[Job], workers: int) -> None:
    started, total, done = time.monotonic(), sum(j.weight for j in jobs), 0.0
    failed: list[Job] = []
    for job, line, error in _in_this_process(jobs) if workers == 1 else _in_processes(jobs, workers):
        done += job.weight
        if error is not None:
            failed.append(job)
            line = f"failed: {error}"
        left = (time.monotonic() - started) / done * (total - done)
        say(f"  {job.home.name}, seed {job.seed}: {line}" + (f"; about {left:.0f} s left" if left >= 1 else ""))
    if failed:
        names = ", ".join(f"{j.home.name} (seed {j.seed})" for j in failed[:5])
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed: {names}. See {_log(failed[0])}; the others are kept, and the "
            "same command runs these again"
        )


_Outcome = tuple[Job, str, RGSDError | None]
"""A job that has ended, its line, and why it failed."""


def _in_this_process(jobs: Sequence[Job]) -> Iterator[_Outcome]:
    for job in jobs:
        try:
            yield job, run_job(job), None
        except RGSDError as error:
            yield job, "", error


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[_Outcome]:
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        waiting: dict[Future[str], Job] = {pool.submit(run_job, job): job for job in jobs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job, error = waiting.pop(future), future.exception()
                if error is not None and not isinstance(error, RGSDError):
                    raise error
                yield job, "" if error else future.result(), error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _is_finished(job: Job) -> bool:
    return (job.home / RECORD).is_file() and open_run(job.home).meta.get("lab_status") == "measured"


def _check_same(jobs: Sequence[Job]) -> None:
    changed = [
        job
        for job in jobs
        if job.arm is not None and _is_finished(job) and open_run(job.home).meta.get("lab_settings") != _identity(job)
    ]
    if changed:
        names = sorted({job.home.name for job in changed})
        raise RunError(
            f"{jobs[0].folder} holds {', '.join(names)} with other settings: choose another --out, name the arm anew, "
            "or say --overwrite true to run everything again"
        )


def _identity(job: Job) -> dict[str, Any]:
    assert job.arm is not None
    return json.loads(json.dumps({"command": job.arm.command, "task": asdict(job.task), **job.arm.settings}))


def _log(job: Job) -> Path:
    return job.home.with_name(job.home.name + ".log")


# --- In a worker ----------------------------------------------------------------------------------------------------


def run_job(job: Job) -> str:
    """Train and measure one arm, its output in a log beside its folder; returns a line about it.

    Raises:
        RunError: when it failed, naming the log.
    """
    log = _log(job)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            samples = _train_and_measure(job)
        except Exception as error:
            file.write(redact(traceback.format_exc()))
            raise RunError(f"{type(error).__name__}: {redact(str(error))[:300]} ({log})") from None
    means = {arm: sum(s.score or 0.0 for s in own) / len(own) for arm, own in samples.items()}
    text = ", ".join(f"{arm} {mean:.3f}" for arm, mean in means.items())
    return f"{text} ({time.monotonic() - started:.0f} s)"


def recipe_of(command: str, settings: dict[str, Any]) -> Any:
    """The product's recipe, checked as its command line checks it.

    Raises:
        ConfigError: for a setting that the command does not have, or a value that it does not take.
    """
    from transformers import HfArgumentParser
    from trl import ModelConfig

    from rgsd.data.config import DataConfig
    from rgsd.evaluation.config import EvalConfig
    from rgsd.judges import JudgeConfig
    from rgsd.training.config import RGSDConfig
    from rgsd.training.grpo import RubricGRPOConfig
    from rgsd.training.sft import RubricSFTConfig
    from rgsd.workflows.recipe import Recipe

    kinds: dict[str, Any] = {"train": RGSDConfig, "grpo": RubricGRPOConfig, "sft": RubricSFTConfig}
    parts: Any = (kinds[command], ModelConfig, DataConfig, EvalConfig, JudgeConfig)
    parser = HfArgumentParser(parts)
    try:
        training, model, data, evaluation, judge = parser.parse_dict(settings)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"`rgsd {command}` does not take these settings: {error}") from error
    return Recipe(model=model, data=data, evaluation=evaluation, training=training, judge=judge)


def _train_and_measure(job: Job) -> dict[str, list[Sample]]:
    import torch

    from rgsd import models
    from rgsd.workflows import train as pipeline

    if job.arm is None:
        run = create_run(
            job.home, {"model_name_or_path": "nano", "data": str(job.data), "seed": job.seed}, overwrite=True
        )
        roles = {
            arm: BASELINE if privileged_context == "none" else conditioned_role(privileged_context)
            for arm, privileged_context in BASE_ARMS.items()
        }
        run.note(kind="eval", roles=roles)
        model, tokenizer = models.load_model("nano"), models.load_tokenizer("nano")
        shown = BASE_ARMS
    else:
        torch.manual_seed(job.seed)
        run = pipeline.train(recipe_of(job.arm.command, job.settings()))
        model, tokenizer = models.load_trained(run.folder)
        shown = {"trained": "none"}
    samples = {
        arm: measure(run, arm, privileged_context, model, tokenizer, job) for arm, privileged_context in shown.items()
    }
    if job.arm is not None:
        run.note(lab_settings=_identity(job))
    run.note(status="finished", lab_status="measured")
    return samples


def measure(run: Run, arm: str, privileged_context: str, model: Any, tokenizer: Any, job: Job) -> list[Sample]:
    """Greedy responses to the held-out prompts of the job's task, with exact verdicts, into the run's samples.jsonl."""
    from rgsd.evaluation.arms import evaluate_arm
    from rgsd.inference import SamplingConfig, TransformersGenerator
    from rgsd.judges import ChecksJudge
    from rgsd.prompts.messages import PromptSettings, teacher_prompts

    examples = World(task_seed=job.seed, generality=job.task.generality).examples(HELD_OUT, think=job.task.think)
    settings = PromptSettings("cover", privileged_context=privileged_context, seed=job.seed)  # pyright: ignore[reportArgumentType]
    prompts = teacher_prompts(examples, settings)
    generator = TransformersGenerator(model, tokenizer, SamplingConfig(MAX_NEW_TOKENS), batch_size=96)
    return evaluate_arm(run, arm, examples, prompts, generator, ChecksJudge())
