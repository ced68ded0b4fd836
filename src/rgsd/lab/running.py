"""Train and measure arms, several at a time. Each is an ordinary run folder, scored by the exact judge.

LAB/
  lab.json            arms, seeds, model, machine, versions, commit
  seed-0/task.jsonl   nano: the task of that seed, prompts with rubrics as `rgsd train --data` reads them
  seed-0/base/        the untrained model: alone, with the rubric, with another prompt's rubric
  seed-0/rgsd/        the run folder of an arm; samples.jsonl holds the trained model's responses and verdicts
  seed-0/rgsd.log     the output of that run

A seed seeds the training. In the nano world it also decides the task (which reader wants which facts, and the split).
Finished arms are not run again, so repeating a command resumes a lab that was stopped.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError, Interrupted, RGSDError, RunError
from rgsd.evaluation.samples import Sample
from rgsd.files import write_json
from rgsd.lab.benches import HELD_OUT, Bench, NanoBench
from rgsd.lab.grid import LabArm, Task
from rgsd.progress import say
from rgsd.provenance import environment
from rgsd.redaction import redact
from rgsd.runs import BASELINE, RECORD, Run, conditioned_role, create_run, hold, open_run

LAB = "lab.json"
BASE = "base"
BASE_ARMS = {"base": "none", "base+rubric": "rubric", "base+mismatched": "mismatched"}
"""Arm of the untrained model -> the privileged context in its prompt."""
TRAINED, MEASURED = "trained", "measured"
"""Values of `lab_status` in run.json: trained but not measured on every prompt; measured on the splits `lab_splits`."""


@dataclass(frozen=True)
class LabJob:
    """One arm at one seed, or the untrained model on a task.

    Args:
        folder: The lab's folder.
        seed: Seed of training, and of the task in the nano world.
        task: The task.
        arm: The arm; None for the untrained model.
        bench: The model and the data.
        split: The prompts to measure on, "held-out" or "development".
    """

    folder: Path
    seed: int
    task: Task
    arm: LabArm | None = None
    bench: Bench = field(default_factory=NanoBench)
    split: str = HELD_OUT

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
    def start(self) -> Path | None:
        """The folder of the run that this one starts from."""
        return self.home.with_name(self.arm.after) if self.arm and self.arm.after else None

    @property
    def n_responses(self) -> int:
        """Responses that training samples, or learns from."""
        if self.arm is None:
            return 0
        s = self.arm.settings
        steps = max(0, int(s.get("max_steps", 1)))
        return steps * int(s.get("per_device_train_batch_size", 8)) * int(s.get("gradient_accumulation_steps", 1))

    def stored_arm(self, arm: str) -> str:
        """The name in samples.jsonl of an arm, measured on this job's split."""
        return arm if self.split == HELD_OUT else f"{arm} ({self.split})"

    def settings(self) -> dict[str, Any]:
        """The settings of the arm's command."""
        assert self.arm is not None
        return {
            **self.arm.settings,
            **({"model_name_or_path": str(self.start)} if self.start else {}),
            **self.bench.data_settings(self.data),
            "seed": self.seed,
            "output_dir": str(self.home),
            "overwrite": True,
        }


def jobs_of(
    folder: Path,
    arms: Iterable[LabArm],
    seeds: Sequence[int],
    *,
    bench: Bench | None = None,
    split: str = HELD_OUT,
) -> list[LabJob]:
    """The jobs for every arm at every seed, and for the untrained model on each of their tasks. Where all seeds share
    the prompts, the untrained model is measured once."""
    chosen, bench = list(arms), bench or NanoBench()
    tasks = sorted({Task(), *(arm.task for arm in chosen)}, key=lambda t: t.name)
    base_seeds = seeds[:1] if bench.shares_prompts else seeds
    jobs = [LabJob(folder, seed, task, None, bench, split) for seed in base_seeds for task in tasks]
    return jobs + [LabJob(folder, seed, arm.task, arm, bench, split) for seed in seeds for arm in chosen]


def run_lab(
    folder: str | Path,
    arms: Sequence[LabArm],
    seeds: Sequence[int],
    *,
    bench: Bench | None = None,
    split: str = HELD_OUT,
    seconds: Mapping[str, float] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Run all jobs that are not finished.

    Args:
        folder: The lab's folder.
        arms: The arms to run, with those that they start from.
        seeds: Seeds of training, and of the tasks in the nano world.
        bench: The model and the data; by default the nano world.
        split: The prompts to measure on. Finished training is not repeated to measure another split.
        seconds: Measured durations, as in a grid file, for the estimate of the time.
        workers: Number of processes, which share the cores; by default one per core.
        overwrite: Run finished jobs again.

    Raises:
        ConfigError: If a command does not accept the settings of an arm. Nothing is run then.
        RunError: If the folder holds an arm of that name with other settings, another model's lab, or if an arm failed.
            Finished arms are kept.
    """
    home, bench = Path(folder), bench or NanoBench()
    jobs = jobs_of(home, arms, seeds, bench=bench, split=split)
    for arm in arms:  # All settings are checked before the first job starts.
        bench.check(arm.task)
        recipe_of(arm.command, LabJob(home, 0, arm.task, arm, bench, split).settings())
    if not overwrite:
        _check_same(home, bench, jobs)
    todo = _unfinished(jobs, overwrite)
    home.mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    asked = {"arms": {arm.name: asdict(arm) for arm in arms}, "seeds": list(seeds), "model": bench.model}
    record = {**asked, "split": split, "workers": workers, "threads": _threads(workers), **environment()}
    write_json(home / LAB, json.loads(json.dumps(record, default=str)))
    for job in todo:
        job.home.parent.mkdir(exist_ok=True)
        bench.write_data(job.seed, job.task, job.data)
    estimate = Estimate(jobs, seconds or {})
    say(
        f"Lab: {len(arms)} arms, {len(seeds)} seeds; {len(todo)} of {len(jobs)} runs to do, {workers} at a time with "
        f"{_threads(workers)} thread(s) each{estimate.text(todo, workers)}"
    )
    _run_all(sorted(todo, key=lambda job: -estimate(job)), workers, overwrite, estimate)
    return home


def _threads(workers: int) -> int:
    """Threads of each worker; a single one is this process."""
    if workers == 1:
        import torch

        return torch.get_num_threads()
    return max(1, (os.cpu_count() or 1) // workers)


class Estimate:
    """How long jobs take, in seconds: what the same arm took at another seed, else a model of its size, scaled by what
    finished jobs took.

    Args:
        jobs: All jobs of the lab; the finished ones count.
        seconds: Measured durations, as in a grid file: `start` of a job; per 80 tokens, each response of `train`,
            `grpo` and `sft`, and each measured response, `measure`. Missing ones give relative durations only.
    """

    def __init__(self, jobs: Sequence[LabJob], seconds: Mapping[str, float]) -> None:
        self._seconds = {"start": 1.0, "train": 1.0, "grpo": 0.6, "sft": 0.6, "measure": 0.1, **seconds}
        self._taken: dict[str, list[float]] = {}
        taken = expected = 0.0
        for job in jobs:
            if _is_finished(job) and (own := open_run(job.home).meta.get("lab_seconds")):
                self._taken.setdefault(job.home.name, []).append(float(own))
                taken, expected = taken + float(own), expected + self._modelled(job)
        self._scale = taken / expected if expected else 1.0
        self.is_known = bool(seconds) or expected > 0

    def __call__(self, job: LabJob) -> float:
        """The seconds of one job."""
        taken = self._taken.get(job.home.name)
        return sum(taken) / len(taken) if taken else self._scale * self._modelled(job)

    def _modelled(self, job: LabJob) -> float:
        s, length = self._seconds, job.bench.max_new_tokens / 80
        measured = s["measure"] * length * MEASURED_PROMPTS * (len(BASE_ARMS) if job.arm is None else 1)
        if job.arm is None:
            return s["start"] + measured
        length = int(job.arm.settings.get("max_completion_length", 80)) / 80
        return s["start"] + measured + s[job.arm.command] * length * job.n_responses

    def text(self, todo: Sequence[LabJob], workers: int) -> str:
        """The time that jobs take together, for the first line."""
        return f"; about {duration(sum(map(self, todo)) / workers)}" if todo and self.is_known else ""


MEASURED_PROMPTS = 120
"""Prompts of a measurement, for the estimate of its time."""


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _run_all(jobs: list[LabJob], workers: int, overwrite: bool, estimate: Callable[[LabJob], float]) -> None:
    started, total, done = time.monotonic(), sum(map(estimate, jobs)), 0.0
    failed: list[LabJob] = []
    run = _in_this_process if workers == 1 else _in_processes
    for job, line, error in run(jobs, workers, overwrite):
        done += estimate(job)
        if error is not None:
            failed.append(job)
            line = f"failed: {error}"
        left = (time.monotonic() - started) / done * (total - done)
        say(f"  {job.home.name}, seed {job.seed}: {line}" + (f"; about {duration(left)} left" if left >= 1 else ""))
    if failed:
        names = ", ".join(f"{j.home.name} (seed {j.seed})" for j in failed[:5])
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed: {names}. See {failed[0].log}. The others are kept; repeat the "
            "command to run the failed ones again"
        )


_Outcome = tuple[LabJob, str, RGSDError | None]
"""A job that ended, the line to print about it, and its error."""


def _ready(left: Sequence[LabJob], running: Iterable[LabJob]) -> list[LabJob]:
    """The jobs whose start, if they have one, is neither waiting nor running."""
    ahead = {job.home for job in (*left, *running)}
    return [job for job in left if job.start not in ahead]


def _without_start(job: LabJob) -> RunError | None:
    """The error of a job whose start has failed."""
    if job.start is None or (job.start / RECORD).is_file():
        return None
    return RunError(f"the arm {job.start.name}, from which it starts, has failed")


def _in_this_process(jobs: Sequence[LabJob], workers: int, overwrite: bool) -> Iterator[_Outcome]:
    left = list(jobs)
    while left:
        job = _ready(left, [])[0]
        left.remove(job)
        try:
            if error := _without_start(job):
                raise error
            yield job, run_job(job, overwrite=overwrite), None
        except Interrupted:
            raise
        except RGSDError as error:
            yield job, "", error


def _in_processes(jobs: Sequence[LabJob], workers: int, overwrite: bool) -> Iterator[_Outcome]:
    # Spawned, not forked: a forked child inherits the locks of torch's thread pool and can deadlock.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
        initargs=(_threads(workers), os.getpid()),
    )
    left, running = list(jobs), dict[Future[str], LabJob]()
    try:
        while left or running:
            for job in _ready(left, running.values()):
                left.remove(job)
                if error := _without_start(job):
                    yield job, "", error
                else:
                    running[pool.submit(run_job, job, overwrite=overwrite)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if error is not None and not isinstance(error, RGSDError):
                    raise error
                yield job, "" if error else future.result(), error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepare_worker(threads: int, parent: int) -> None:
    import torch

    torch.set_num_threads(threads)

    def watch() -> None:
        # A killed lab must not leave a worker that trains on and holds a run's lock.
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_finished(job: LabJob) -> bool:
    """Whether a job is trained and measured on its split, from the start that is there now."""
    # `lab_status` and not `status`: a training run is finished before it is measured.
    if not (job.home / RECORD).is_file():
        return False
    meta = open_run(job.home).meta
    return (
        meta.get("lab_status") == MEASURED and job.split in meta.get("lab_splits", [HELD_OUT]) and _has_start(job, meta)
    )


def _unfinished(jobs: Sequence[LabJob], overwrite: bool) -> list[LabJob]:
    """The jobs to run, with those that start from one of them: its policy may become another."""
    todo = [job for job in jobs if overwrite or not _is_finished(job)]
    while more := [job for job in jobs if job not in todo and job.start in {j.home for j in todo}]:
        todo += more
    return todo


def _has_start(job: LabJob, meta: Mapping[str, Any]) -> bool:
    if job.start is None:
        return True
    line = meta.get("lineage") or [{}]
    return (job.start / RECORD).is_file() and line[0].get("id") == open_run(job.start).meta.get("id")


def _is_trained(job: LabJob) -> bool:
    """Whether a job needs no training: it is there with the same settings, from the start that is there now."""
    if not (job.home / RECORD).is_file():
        return False
    meta = open_run(job.home).meta
    status = meta.get("lab_status") in (TRAINED, MEASURED)
    return status and (job.arm is None or (meta.get("lab_settings") == _identity(job) and _has_start(job, meta)))


def _check_same(home: Path, bench: Bench, jobs: Sequence[LabJob]) -> None:
    """Raise a RunError if the folder holds another model's lab, or a finished arm with other settings than it would be
    run with now."""
    if (home / LAB).is_file():
        before = json.loads((home / LAB).read_text("utf-8")).get("model", bench.model)
        if before != bench.model:
            raise RunError(f"{home} holds a lab of {before}, not of {bench.model}: choose another --output_dir")
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
    after = {"after": job.arm.after} if job.arm.after else {}
    return json.loads(json.dumps({"command": job.arm.command, "task": asdict(job.task), **after, **job.arm.settings}))


# --- In a worker ----------------------------------------------------------------------------------------------------


def run_job(job: LabJob, *, overwrite: bool = False) -> str:
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
            samples = _train_and_measure(job, overwrite)
        except Interrupted:
            raise
        except Exception as error:
            file.write(redact(traceback.format_exc()))
            # The traceback is in the log, and not every exception can be pickled for the parent process.
            raise RunError(f"{type(error).__name__}: {redact(str(error))[:300]} ({job.log})") from None
    gc.collect()  # models and trainers are in cycles
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


def _train_and_measure(job: LabJob, overwrite: bool) -> dict[str, list[Sample]]:
    started = time.monotonic()
    if not overwrite and _is_trained(job):
        hold(job.home)
        run = open_run(job.home)
    else:
        run = _train(job)
    was = float(run.meta.get("lab_seconds", 0.0))
    samples = _measure(run, job)
    splits = sorted({*run.meta.get("lab_splits", []), job.split})
    seconds = round(was + time.monotonic() - started, 1)
    run.note(status="finished", lab_status=MEASURED, lab_splits=splits, lab_seconds=seconds)
    return samples


def _train(job: LabJob) -> Run:
    """Train the arm; of the untrained model, open the folder of its measurements."""
    import torch

    from rgsd.workflows.train import train

    if job.arm is None:
        settings = {"model_name_or_path": job.bench.model, **job.bench.data_settings(job.data), "seed": job.seed}
        run = create_run(job.home, settings, overwrite=True)
        roles = {arm: BASELINE if c == "none" else conditioned_role(c) for arm, c in BASE_ARMS.items()}
        run.note(kind="eval", roles=roles, lab_status=TRAINED)
        return run
    torch.manual_seed(job.seed)
    run = train(recipe_of(job.arm.command, job.settings()))
    run.note(lab_settings=_identity(job), lab_status=TRAINED)
    return run


def _measure(run: Run, job: LabJob) -> dict[str, list[Sample]]:
    from rgsd import models

    if job.arm is None:
        model, tokenizer = models.load_model(job.bench.model), models.load_tokenizer(job.bench.model)
        contexts = BASE_ARMS
    else:
        model, tokenizer = models.load_trained(run.folder)
        contexts = {"trained": "none"}
    return {arm: measure(run, arm, context, model, tokenizer, job) for arm, context in contexts.items()}


def measure(run: Run, arm: str, privileged_context: str, model: Any, tokenizer: Any, job: LabJob) -> list[Sample]:
    """Sample greedy responses to the prompts of the job's split, judge them exactly, and store them."""
    from rgsd.evaluation.arms import evaluate_arm
    from rgsd.inference import SamplingConfig, TransformersGenerator
    from rgsd.judges import ChecksJudge
    from rgsd.prompts.messages import PromptSettings, teacher_prompts

    bench = job.bench
    examples = bench.examples(job.seed, job.task, job.split)
    settings = PromptSettings(bench.template, privileged_context=privileged_context, seed=job.seed)  # pyright: ignore[reportArgumentType]
    prompts = teacher_prompts(examples, settings)
    generator = TransformersGenerator(
        model, tokenizer, SamplingConfig(bench.max_new_tokens), batch_size=bench.batch_size
    )  # fmt: skip
    return evaluate_arm(run, job.stored_arm(arm), examples, prompts, generator, ChecksJudge())
