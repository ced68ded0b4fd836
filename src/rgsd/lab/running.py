"""Train and measure arms, several at a time. Each is an ordinary run folder, scored by the exact judge.

LAB/
  lab.json            arms, seeds, machine, versions, commit
  seed-0/task.jsonl   the task of that seed: prompts with rubrics, as `rgsd train --data` reads them
  seed-0/base/        the untrained model on that task: alone, with the rubric, with another prompt's rubric
  seed-0/rgsd/        the run folder of an arm; samples.jsonl holds the trained model's responses and verdicts
  seed-0/rgsd.log     the output of that run

A seed decides the task (which reader wants which facts, and the split) and seeds the training. Finished arms are not
run again, so repeating a command resumes a lab that was stopped.
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
from rgsd.files import write_json
from rgsd.lab.grid import LabArm, Task
from rgsd.lab.nano_scores import MAX_NEW_TOKENS
from rgsd.lab.world import World, write_jsonl
from rgsd.progress import say
from rgsd.provenance import environment
from rgsd.redaction import redact
from rgsd.runs import BASELINE, RECORD, Run, conditioned_role, create_run, open_run

LAB = "lab.json"
BASE = "base"
HELD_OUT = "held-out"
BASE_ARMS = {"base": "none", "base+rubric": "rubric", "base+mismatched": "mismatched"}
"""Arm of the untrained model -> the privileged context in its prompt."""


@dataclass(frozen=True)
class LabJob:
    """One arm at one seed, or the untrained model on a task.

    Args:
        folder: The lab's folder.
        seed: Seed of the task and of training.
        task: The task.
        arm: The arm; None for the untrained model.
    """

    folder: Path
    seed: int
    task: Task
    arm: LabArm | None = None

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
    def log(self) -> Path:
        """The file for the run's output."""
        return self.home.with_name(self.home.name + ".log")

    @property
    def world(self) -> World:
        """The world whose prompts and rubrics are the task."""
        return World(task_seed=self.seed, generality=self.task.generality)

    @property
    def weight(self) -> float:
        """Rough relative duration. Long jobs start first, so that no core idles at the end."""
        if self.arm is None:
            return 0.3
        steps = int(self.arm.settings.get("max_steps", 1))
        return steps * (8.0 if self.arm.command == "grpo" else 1.0)

    def settings(self) -> dict[str, Any]:
        """The settings of the arm's command."""
        assert self.arm is not None
        return {
            **self.arm.settings,
            "data": str(self.data),
            "seed": self.seed,
            "output_dir": str(self.home),
            "overwrite": True,
        }


def jobs_of(folder: Path, arms: Iterable[LabArm], seeds: Sequence[int]) -> list[LabJob]:
    """The jobs for every arm at every seed, and for the untrained model on each of their tasks."""
    chosen = list(arms)
    tasks = {Task(), *(arm.task for arm in chosen)}
    jobs = [LabJob(folder, seed, task) for seed in seeds for task in sorted(tasks, key=lambda t: t.name)]
    return jobs + [LabJob(folder, seed, arm.task, arm) for seed in seeds for arm in chosen]


def run_lab(
    folder: str | Path,
    arms: Sequence[LabArm],
    seeds: Sequence[int],
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Run all jobs that are not finished.

    Args:
        folder: The lab's folder.
        arms: The arms to run.
        seeds: Seeds of the tasks and of training.
        workers: Number of processes, with one thread each; by default the number of cores.
        overwrite: Run finished jobs again.

    Raises:
        ConfigError: If a command does not accept the settings of an arm. Nothing is run then.
        RunError: If the folder holds an arm of that name with other settings, or if an arm failed. Finished arms are
            kept.
    """
    home = Path(folder)
    jobs = jobs_of(home, arms, seeds)
    for arm in arms:  # All settings are checked before the first job starts.
        recipe_of(arm.command, LabJob(home, 0, arm.task, arm).settings())
    if not overwrite:
        _check_same(jobs)
    todo = [job for job in jobs if overwrite or not _is_finished(job)]
    home.mkdir(parents=True, exist_ok=True)
    record = {"arms": {arm.name: asdict(arm) for arm in arms}, "seeds": list(seeds), **environment()}
    write_json(home / LAB, json.loads(json.dumps(record, default=str)))
    for job in todo:
        job.home.parent.mkdir(exist_ok=True)
        write_jsonl(job.world.examples(think=job.task.think), job.data)
    workers = workers or os.cpu_count() or 1
    say(f"Lab: {len(arms)} arms, {len(seeds)} seeds; {len(todo)} of {len(jobs)} runs to do, {workers} at a time")
    _run_all(sorted(todo, key=lambda job: -job.weight), workers)
    return home


def _run_all(jobs: list[LabJob], workers: int) -> None:
    started, total, done = time.monotonic(), sum(j.weight for j in jobs), 0.0
    failed: list[LabJob] = []
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
            f"{len(failed)} of {len(jobs)} runs failed: {names}. See {failed[0].log}. The others are kept; repeat the "
            "command to run the failed ones again"
        )


_Outcome = tuple[LabJob, str, RGSDError | None]
"""A job that ended, the line to print about it, and its error."""


def _in_this_process(jobs: Sequence[LabJob]) -> Iterator[_Outcome]:
    for job in jobs:
        try:
            yield job, run_job(job), None
        except RGSDError as error:
            yield job, "", error


def _in_processes(jobs: Sequence[LabJob], workers: int) -> Iterator[_Outcome]:
    # Spawned, not forked: a forked child inherits the locks of torch's thread pool and can deadlock.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_use_one_thread)
    try:
        waiting: dict[Future[str], LabJob] = {pool.submit(run_job, job): job for job in jobs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job, error = waiting.pop(future), future.exception()
                if error is not None and not isinstance(error, RGSDError):
                    raise error
                yield job, "" if error else future.result(), error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _is_finished(job: LabJob) -> bool:
    # `lab_status` and not `status`: a training run is finished before it is measured.
    return (job.home / RECORD).is_file() and open_run(job.home).meta.get("lab_status") == "measured"


def _check_same(jobs: Sequence[LabJob]) -> None:
    """Raise a RunError if a finished arm has other settings than it would be run with now."""
    changed = [
        job
        for job in jobs
        if job.arm is not None and _is_finished(job) and open_run(job.home).meta.get("lab_settings") != _identity(job)
    ]
    if changed:
        names = sorted({job.home.name for job in changed})
        raise RunError(
            f"{jobs[0].folder} holds {', '.join(names)} with other settings: choose another --output_dir, rename the "
            "arm, or run everything again with --overwrite"
        )


def _identity(job: LabJob) -> dict[str, Any]:
    """What decides an arm's result at a given seed."""
    assert job.arm is not None
    return json.loads(json.dumps({"command": job.arm.command, "task": asdict(job.task), **job.arm.settings}))


# --- In a worker ----------------------------------------------------------------------------------------------------


def run_job(job: LabJob) -> str:
    """Train and measure one arm, with its output in a log file. Returns a line about it.

    Raises:
        RunError: If it failed; names the log.
    """
    started = time.monotonic()
    with (
        job.log.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            samples = _train_and_measure(job)
        except Exception as error:
            file.write(redact(traceback.format_exc()))
            # The traceback is in the log, and not every exception can be pickled for the parent process.
            raise RunError(f"{type(error).__name__}: {redact(str(error))[:300]} ({job.log})") from None
    means = {arm: sum(s.score or 0.0 for s in own) / len(own) for arm, own in samples.items()}
    text = ", ".join(f"{arm} {mean:.3f}" for arm, mean in means.items())
    return f"{text} ({time.monotonic() - started:.0f} s)"


def recipe_of(command: str, settings: dict[str, Any]) -> Any:
    """Build the recipe of `rgsd train`, `rgsd grpo` or `rgsd sft` from settings.

    Raises:
        ConfigError: If the command does not have a setting, or does not accept its value.
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
        raise ConfigError(f"`rgsd {command}` does not accept these settings: {error}") from error
    return Recipe(model=model, data=data, evaluation=evaluation, training=training, judge=judge)


def _train_and_measure(job: LabJob) -> dict[str, list[Sample]]:
    import torch

    from rgsd import models
    from rgsd.workflows.train import train

    if job.arm is None:
        run = create_run(
            job.home, {"model_name_or_path": "nano", "data": str(job.data), "seed": job.seed}, overwrite=True
        )
        roles = {arm: BASELINE if c == "none" else conditioned_role(c) for arm, c in BASE_ARMS.items()}
        run.note(kind="eval", roles=roles)
        model, tokenizer = models.load_model("nano"), models.load_tokenizer("nano")
        contexts = BASE_ARMS
    else:
        torch.manual_seed(job.seed)
        run = train(recipe_of(job.arm.command, job.settings()))
        model, tokenizer = models.load_trained(run.folder)
        contexts = {"trained": "none"}
    samples = {arm: measure(run, arm, context, model, tokenizer, job) for arm, context in contexts.items()}
    if job.arm is not None:
        run.note(lab_settings=_identity(job))
    run.note(status="finished", lab_status="measured")
    return samples


def measure(run: Run, arm: str, privileged_context: str, model: Any, tokenizer: Any, job: LabJob) -> list[Sample]:
    """Sample greedy responses to the held-out prompts of the job's task, judge them exactly, and store them."""
    from rgsd.evaluation.arms import evaluate_arm
    from rgsd.inference import SamplingConfig, TransformersGenerator
    from rgsd.judges import ChecksJudge
    from rgsd.prompts.messages import PromptSettings, teacher_prompts

    examples = job.world.examples(HELD_OUT, think=job.task.think)
    settings = PromptSettings("cover", privileged_context=privileged_context, seed=job.seed)  # pyright: ignore[reportArgumentType]
    prompts = teacher_prompts(examples, settings)
    generator = TransformersGenerator(model, tokenizer, SamplingConfig(MAX_NEW_TOKENS), batch_size=96)
    return evaluate_arm(run, arm, examples, prompts, generator, ChecksJudge())
