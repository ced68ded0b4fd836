"""Checkpoints that are whole or absent, and a trainer that goes on from them as if it had never stopped.

A checkpoint is written into OUTPUT_DIR/.saving, forced to the disk, listed in its manifest, and only then renamed to
checkpoint-N. Whatever is killed, and whenever: a folder of that name is whole. One that was damaged later, by a bit,
does not match the digests in its manifest, and is passed over.

`CheckpointMixin` makes any of TRL's trainers use them. Beyond what transformers keeps (weights, optimizer,
schedule, random
numbers, position in the data), a checkpoint holds the sums that the next log line is made of, and the order of the data
in an epoch depends on the epoch alone.
"""

# transformers' Trainer leaves its attributes untyped:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # no advisory locks on this system: keep to one process a run
    fcntl = None

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from rgsd.errors import ConfigError, Interrupted, RunError, TrainingDiverged
from rgsd.models import adapters
from rgsd.models.sharding import load_optimizer, load_weights, local, whole
from rgsd.progress import say
from rgsd.redaction import redact_known
from rgsd.runs import RECORD

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
SAVING = ".saving"
FSDP_WEIGHTS, FSDP_OPTIMIZER, OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin", "optimizer.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
N_NAMED = 8
"""How many examples an error names."""


# --- Folders ------------------------------------------------------------------------------------------------------


def step_of(checkpoint: str | Path) -> int:
    """The number of optimizer steps after which a checkpoint was saved."""
    found = _NAME.fullmatch(Path(checkpoint).name)
    if found is None:
        raise RunError(f"{checkpoint} is not named checkpoint-N, as checkpoints are: give the path of one")
    return int(found.group(1))


def problem_of(checkpoint: str | Path, *, in_full: bool = True) -> str | None:
    """What keeps a checkpoint from being whole, or None.

    Args:
        checkpoint: its folder.
        in_full: compare digests too, which reads every byte (about 1.5 GB/s); else names and sizes alone.
    """
    folder = Path(checkpoint)
    if folder.is_symlink():
        return "it is a link: a run goes on from its own checkpoints, so copy the folder if it is one of them"
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        return manifest
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    for name, (size, digest) in manifest.files.items():
        path = found.pop(name, None)
        if path is None:
            return f"{name} is missing"
        if path.is_symlink() or not path.is_file():
            return f"{name} is not a plain file"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, {size:,} were written"
        if in_full and _digest(path) != digest:
            return f"{name} does not hold the bytes that were written"
    extra = sorted(name for name in found if name != MANIFEST and not name.startswith("."))
    return f"{extra[0]} was added after it was saved" if extra else None


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What a checkpoint's manifest says. files: (bytes, SHA-256) by name; run: the run's id, if it had one."""

    files: dict[str, tuple[int, str]]
    run: str | None


def _manifest(folder: Path) -> _Manifest | str:
    """A checkpoint's manifest, or what is wrong with it."""
    try:
        read = json.loads((folder / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    sizes = read.get("files") if isinstance(read, dict) else None
    if not isinstance(sizes, dict) or not sizes or not all(type(size) is int for size in sizes.values()):
        return f"its {MANIFEST} cannot be read (no sizes of files)"
    digests = read.get("sha256")
    if not isinstance(digests, dict) or digests.keys() != sizes.keys():
        return f"its {MANIFEST} holds no digest of each file, as an earlier rgsd left it"
    if read.get("step") != step_of(folder):
        return f"its {MANIFEST} says step {read.get('step')}"
    run = read.get("run")
    return _Manifest({n: (sizes[n], str(digests[n])) for n in sizes}, None if run is None else str(run))


_DIGESTS: dict[tuple[Path, int, int, int], str] = {}
"""Digests by file, size, time and inode, so that a process reads a checkpoint once."""


def _digest(path: Path) -> str:
    facts = path.stat()
    key = (path.resolve(), facts.st_size, facts.st_mtime_ns, facts.st_ino)
    if key not in _DIGESTS:
        with path.open("rb") as file:
            _DIGESTS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _DIGESTS[key]


def run_id(output_dir: str | Path) -> str | None:
    """The identity of the run in a folder; None for a trainer that was started from Python, which has no run.json."""
    try:
        read = json.loads((Path(output_dir) / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    found = read.get("id") if isinstance(read, dict) else None
    return None if found is None else str(found)


def _problem_in_run(checkpoint: Path, in_full: bool = True) -> str | None:
    """As `problem_of`, of a checkpoint in a run's folder; one of another run is none of this run's."""
    problem = problem_of(checkpoint, in_full=in_full)
    own = run_id(checkpoint.parent)
    if problem is None and own is not None:
        manifest = _manifest(checkpoint)
        if isinstance(manifest, _Manifest) and manifest.run != own:
            return f"it belongs to run {manifest.run}, this is run {own}"
    return problem


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders named checkpoint-N, latest step first, whole or not."""
    folder = Path(output_dir)
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def last_whole(output_dir: str | Path, tell: Callable[[str], None] = say, *, in_full: bool = True) -> Path | None:
    """The latest whole checkpoint of a run, or None; later ones that are not whole are told. `in_full` as in
    `problem_of`."""
    for candidate in checkpoints(output_dir):
        problem = _problem_in_run(candidate, in_full)
        if problem is None:
            return candidate
        tell(f"Passing over {candidate.name}: {problem}")
    return None


def find(output_dir: str | Path, wanted: str | bool | None, tell: Callable[[str], None] = say) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or for true the last whole one, if there is one.

    Raises:
        RunError: when the path given is not a whole checkpoint.
    """
    if wanted is None or wanted is False or (isinstance(wanted, str) and wanted.lower() in ("", "false", "none")):
        return None
    if wanted is True or str(wanted).lower() == "true":
        return last_whole(output_dir, tell)
    path = Path(wanted)
    if not path.is_dir():
        raise RunError(f"there is no checkpoint {wanted!r}: give a checkpoint-N folder, or true for the last")
    step_of(path)
    is_own = path.parent.resolve() == Path(output_dir).resolve()
    problem = _problem_in_run(path) if is_own else problem_of(path)
    if problem is not None and (path.is_symlink() or (path / MANIFEST).exists()):
        raise RunError(
            f"{path} is damaged: {problem}. Resume from another, or with --resume_from_checkpoint true from the last "
            "whole one"
        )
    if problem is not None:
        tell(f"{path.name} was not saved by rgsd ({problem}): whether it is whole cannot be told")
    return path


def agree(output_dir: str | Path, wanted: str | bool | None, tell: Callable[[str], None] = say) -> Path | None:
    """As `find`, the same checkpoint in every process: the first one picks it and reads its digests, the others make
    sure that they see it. Every process calls it.

    Raises:
        RunError: in every process, when the first finds none that serves, or another does not see the one it found.
    """
    state = PartialState()
    if state.num_processes == 1:
        return find(output_dir, wanted, tell)
    picked: list[Any] = [None, None]
    if state.is_main_process:
        try:
            picked[0] = find(output_dir, wanted, tell)
        except RunError as error:
            picked[1] = str(error)
    broadcast_object_list(picked)
    found, problem = picked
    if problem is None and found is not None and not state.is_main_process:
        here = None if found.is_dir() else f"there is no {found}"
        if here is None and (found / MANIFEST).exists():
            here = problem_of(found, in_full=False)
        problem = None if here is None else f"process {state.process_index} cannot go on from {found.name}: {here}"
    problems = [p for p in gather_object([problem]) if p is not None]
    if problems:
        raise RunError(problems[0])
    return found


def trim_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Drop the rows of a .jsonl file that `keep` refuses, and half a line at its end; the file is whole at all times.

    Returns the number of rows dropped.
    """
    if not path.is_file():
        return 0
    kept, dropped = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        if line and not keep(json.loads(line.decode("utf-8", "surrogatepass"))):
            dropped += 1
        else:
            kept.append(line + b"\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(kept))
    _sync(partial)
    partial.replace(path)
    return dropped


def append_together(path: Path, lines: str) -> None:
    """Add whole lines to a file that several processes add to."""
    with path.open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(redact_known(lines).encode("utf-8", "surrogatepass"))
        file.flush()


def _write_manifest(folder: Path, **facts: Any) -> None:
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    files.pop(MANIFEST, None)
    for name in files:
        _sync(folder / name)
    digests = {name: _digest(folder / name) for name in files}  # read from memory: they were just written
    manifest = {**facts, "files": files, "sha256": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- The trainer --------------------------------------------------------------------------------------------------


class CheckpointMixin(_Base):
    """Mixed into a trainer, before TRL's class: whole checkpoints, exact resume, an orderly end on SIGTERM, no step
    taken on a loss that is not a number, float32 master weights, and float32 merges of LoRA for vLLM.

    Logs `engine/update_kept` with vLLM and LoRA: the share of the adapters' update that survives in the precision of
    vLLM's weights (`adapters.Kept`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._staging: Path | None = None
        self._restored: dict[str, Any] = {}
        self._losses: list[tuple[Tensor, list[str]]] = []
        self._stop_signal: int | None = None
        self._update_kept: float | None = None
        with _vllm_explained():
            super().__init__(*args, **kwargs)
        # DeepSpeed keeps float32 master weights of its own.
        upcast = 0 if self.is_deepspeed_enabled else adapters.use_float32_master_weights(self.model)
        if upcast and self.is_world_process_zero():
            say(f"{upcast} trained parameters came in half precision: they are trained in float32")
        self._send_exact_merges()
        self.add_callback(_Keeper(self))

    def _send_telemetry(self) -> None:
        """Nothing: TRL would tell the hub of each trainer that is built, from Python too."""

    def _send_exact_merges(self) -> None:
        """Have TRL send vLLM weights that are merged in float32 and rounded once, without touching the base weights."""
        engine = getattr(self, "vllm_generation", None)
        if engine is None or not isinstance(engine.model, PeftModel):
            return
        if adapters.is_quantized(engine.model) or engine._dist.fsdp_version == 1:
            return  # TRL's own way: it merges in the quantized layer, or in the parts that FSDP1 summons
        of_trl = engine._iter_named_params

        def merged() -> Iterator[tuple[str, Tensor]]:
            kept = adapters.Kept()
            yield from adapters.merged_values(engine.model, of_trl, kept)
            self._update_kept = kept.share

        engine._iter_named_params = merged

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with `True` for the last whole checkpoint, or none where there is none yet.

        Raises:
            RunError: for a checkpoint that is not whole, or one that cannot be written.
            Interrupted: after SIGTERM; the step was finished and its checkpoint saved.
            TrainingDiverged: when a loss or gradient is not finite; the weights are those before that step.
        """
        tell = say if self.is_world_process_zero() else _quietly
        wanted = agree(self.args.output_dir, resume_from_checkpoint, tell)
        if resume_from_checkpoint and wanted is None:
            tell("There is no whole checkpoint yet: training begins with its first step")
        self._restored, self._stop_signal = {}, None
        if wanted is not None and (wanted / PROGRESS).is_file():
            self._restored = json.loads((wanted / PROGRESS).read_text("utf-8"))
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / SAVING, ignore_errors=True)
        with self._heeding_sigterm():
            done = super().train(None if wanted is None else str(wanted), *args, **kwargs)
        if self._stop_signal is not None and self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"stopped by {signal.Signals(self._stop_signal).name} after step {self.state.global_step} of "
                f"{self.state.max_steps}; checkpoint-{self.state.global_step} is saved. "
                "Go on with --resume_from_checkpoint true"
            )
        return done

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers', without a trace in training: random numbers go on as if there had been no evaluation.

        Every evaluation of a run draws the same numbers, so that two of them differ by the policy alone.
        """
        with _random_numbers_kept(self.accelerator.device):
            set_seed(self.args.seed, device_specific=True)
            return super().evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # A run whose last step is in its checkpoint has none left; transformers would take another.
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.model.train()  # as after a step: by this TRL knows which log it writes
        return None

    # --- SIGTERM

    @contextmanager
    def _heeding_sigterm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return

        def note(number: int, frame: Any) -> None:
            # A launcher sends it once more than the one who sent it to all of its processes: twice is no haste.
            self._stop_signal = number

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _is_told_to_stop(self) -> bool:
        """Whether any process was; all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self._stop_signal is not None
        told = torch.tensor(self._stop_signal or 0, device=self.accelerator.device)
        number = int(self.accelerator.gather(told).max())
        if number:  # and never back to None: the signal may have come while the others were asked
            self._stop_signal = number
        return bool(number)

    # --- Losses that are no numbers

    def _examples_of(self, inputs: Any) -> list[str]:
        """The ids of the examples in what the last `compute_loss` was given."""
        return [str(row.get("example_id", "?")) for row in inputs] if isinstance(inputs, list) else []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append((loss.detach(), self._examples_of(inputs)))
        return loss

    def _check_before_backward(self, loss: Tensor, names: list[str]) -> None:
        """DeepSpeed's backward takes the optimizer's step in the same call: after it would be too late."""
        if self.is_deepspeed_enabled and self.model.training:
            self._losses.append((loss.detach(), names))
            self._check_finite(None)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().compute_loss(model, inputs, *args, **kwargs)
        self._check_before_backward(out[0] if isinstance(out, tuple) else out, [])
        return out

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once a step, after the gradients are summed over processes and before the optimizer.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite(norm)
        return norm

    def _check_finite(self, norm: Any) -> None:
        losses, self._losses = self._losses, []
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        finite = torch.stack([torch.isfinite(loss).all() for loss, _ in losses])
        # With fp16 a gradient that overflows is the loss scaler's business: it skips the step.
        norm_is_finite = self.args.fp16 or norm is None or math.isfinite(float(norm))
        verdict = torch.stack([finite.all().int(), torch.tensor(int(norm_is_finite), device=finite.device)])
        verdict = self.accelerator.gather(verdict.to(self.accelerator.device)[None]).amin(0)
        loss_ok, norm_ok = (bool(v) for v in verdict.tolist())
        if loss_ok and norm_ok:
            return
        groups = [names for ok, (_, names) in zip(finite.tolist(), losses, strict=True) if loss_ok or not ok]
        named = list(dict.fromkeys(name for names in groups for name in names))
        if self.accelerator.num_processes > 1:
            shares: list[Any] = [[] for _ in range(self.accelerator.num_processes)]
            torch.distributed.all_gather_object(shares, named)
            named = list(dict.fromkeys(str(name) for share in shares for name in share))
        value = next((float(loss) for ok, (loss, _) in zip(finite.tolist(), losses, strict=True) if not ok), math.nan)
        what = f"the loss is {value}" if not loss_ok else f"the norm of the gradient is {float(norm)}"
        last = last_whole(self.args.output_dir, _quietly, in_full=False)
        raise TrainingDiverged(
            f"step {self.state.global_step + 1}: {what}, among the examples {', '.join(named[:N_NAMED])}"
            f"{', ...' if len(named) > N_NAMED else ''}. The weights were not touched by this step. "
            + (f"The last whole checkpoint is {last.name}. " if last else "No checkpoint had been saved yet. ")
            + "Look at those examples, lower learning_rate or max_grad_norm, or load the model in float32"
        )

    def check_weights(self) -> None:
        """Raises:
        TrainingDiverged: when a trained weight is not finite, so that it is never saved.
        """
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(local(parameter.detach())).all()):
                raise TrainingDiverged(
                    f"step {self.state.global_step}: {name} holds values that are not finite; nothing was saved. Go on "
                    "from the last checkpoint (--resume_from_checkpoint true) with a lower learning_rate"
                )

    # --- Order of the data

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        plain = super()._get_train_sampler(*args, **kwargs)
        is_trls = hasattr(plain, "mini_repeat_count")  # transformers' own sampler goes by the epoch already
        return plain if not is_trls else _EpochOrder(plain, lambda: int(self.state.epoch + 1e-9))

    # --- Saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights()
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged = run / SAVING / name
        progress = self._progress()
        try:
            if self.args.should_save:
                staged.mkdir(parents=True, exist_ok=True)
            self._staging = run / SAVING
            try:
                with adapters.saved_without_the_hub():
                    super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._save_extra(staged)
            if self.args.should_save:
                # A pickle of the settings, keys for the hub among them, that nothing here reads.
                (staged / "training_args.bin").unlink(missing_ok=True)
                (staged / PROGRESS).write_text(json.dumps(progress), "utf-8")
                if self.state.best_global_step:
                    best = run / f"checkpoint-{self.state.best_global_step}"
                    self.state.best_model_checkpoint = str(best)
                    self.state.save_to_json(str(staged / "trainer_state.json"))
            self.accelerator.wait_for_everyone()  # every process has written its own files
            for turn in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
                # Machines without a common disk each have a folder of their own to put in place.
                if turn and self.args.should_save and staged.is_dir():
                    facts = {"step": self.state.global_step, "processes": self.args.world_size, "run": run_id(run)}
                    _put_in_place(staged, run / name, **facts)
                self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_of_the_disk(error):
                raise
            shutil.rmtree(run / SAVING, ignore_errors=True)
            last = last_whole(run, _quietly, in_full=False)
            raise RunError(
                f"{name} cannot be saved in {run}: {_first_line(error)}. Nothing of it is left; the last whole "
                f"checkpoint is {last.name if last else 'none'}. Make room (save_total_limit deletes old ones), and go "
                "on with --resume_from_checkpoint true"
            ) from error
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False)

    def _save_extra(self, folder: Path) -> None:
        """What a subclass keeps beside transformers' files; called by every process."""

    def _progress(self) -> dict[str, Any]:
        """The sums of the log line that is being made, and what else a subclass wants to find again."""
        loss = self.accelerator.gather(self._tr_loss.detach().reshape(1))
        return {
            "loss_since_log": loss.tolist(),
            "step_last_logged": self._globalstep_last_logged,
            "loss_until_log": self._total_loss_scalar,
            "metrics": {mode: dict(values) for mode, values in getattr(self, "_metrics", {}).items()},
            "tokens": getattr(self, "_total_train_tokens", 0),
        }

    def _restore_progress(self) -> None:
        kept, self._restored = self._restored, {}
        if not kept:
            return
        losses = kept["loss_since_log"]
        same = len(losses) == self.accelerator.num_processes
        own = losses[self.accelerator.process_index] if same else sum(losses) / len(losses)
        self._tr_loss.fill_(own)
        self._globalstep_last_logged = kept["step_last_logged"]
        self._total_loss_scalar = kept["loss_until_log"]
        for mode, values in kept["metrics"].items():
            for name, series in values.items():
                self._metrics[mode][name] = list(series)
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = kept["tokens"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs:  # of the whole run, not of its part since the last resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        elif self._update_kept is not None:
            logs["engine/update_kept"] = self._update_kept
        super().log(logs, *args, **kwargs)

    # --- Resuming, across numbers of processes too

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        many = self.args.world_size > 1
        file = f"rng_state_{self.args.process_index}.pth" if many else "rng_state.pth"
        if (Path(checkpoint) / file).is_file():
            super()._load_rng_state(checkpoint)
            return
        if self.is_world_process_zero():
            say(
                f"{Path(checkpoint).name} was saved by another number of processes than the {self.args.world_size} of "
                "this run: weights, optimizer and data go on; random numbers begin anew"
            )
        set_seed(self.args.seed + self.state.global_step, device_specific=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        is_sharded = any(folder.glob("pytorch_model_fsdp*"))
        if is_sharded == bool(self.is_fsdp_enabled) or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.accelerator.unwrap_model(self.model if model is None else model), folder)

    def _load_extra(self, folder: Path) -> None:
        """What `_save_extra` kept, back; called by every process once the model is in place."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_extra(Path(checkpoint))
        folder = None if checkpoint is None else Path(checkpoint)
        theirs = FSDP_OPTIMIZER if self.is_fsdp_enabled else OPTIMIZER
        ours = OPTIMIZER if self.is_fsdp_enabled else FSDP_OPTIMIZER
        if folder is None or self.is_deepspeed_enabled or (folder / theirs).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
        elif (folder / ours).is_file():
            state = torch.load(folder / ours, map_location="cpu", weights_only=True)
            model = self.accelerator.unwrap_model(self.model)
            load_optimizer(model, getattr(self.optimizer, "optimizer", self.optimizer), state)
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        elif any(folder.glob("optimizer_*")):  # shards of torch.distributed.checkpoint
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            raise RunError(
                f"{checkpoint} holds no optimizer that this run can go on with: it was saved with save_only_model, or "
                "by another engine (DeepSpeed checkpoints are resumed under DeepSpeed alone)"
            )


class _Keeper(TrainerCallback):
    """Where transformers lets a trainer step in only through callbacks."""

    def __init__(self, trainer: CheckpointMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._restore_progress()
        self._trainer._losses.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._is_told_to_stop():
            control.should_save = control.should_training_stop = True


class _EpochOrder(Sampler):
    """TRL's sampler with an order that depends on the epoch alone: its own generator goes on from epoch to epoch, which
    a resumed run does not have."""

    def __init__(self, plain: Any, epoch: Callable[[], int]) -> None:
        self._plain, self._epoch = plain, epoch

    def __iter__(self) -> Iterator[int]:
        if self._plain.shuffle:
            self._plain.generator.manual_seed((self._plain.seed or 0) + self._epoch())
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Within it, draw at will: afterwards the generators of Python, numpy, torch and the device are as before."""
    python, arrays, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    own = None if module is None else module.get_rng_state()  # of the current device, which is this process's
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(host)
        if module is not None:
            module.set_rng_state(own)


# --- Small things -------------------------------------------------------------------------------------------------


@contextmanager
def _vllm_explained() -> Iterator[None]:
    """What keeps TRL from using vLLM, as an error of rgsd's."""
    try:
        yield
    except ImportError as error:
        if "vLLM" not in str(error):
            raise
        raise ConfigError("use_vllm needs vLLM, which is not installed: pip install 'rgsd[vllm]'") from error
    except OSError as error:  # requests' ConnectionError is one
        if "vLLM" not in str(error):
            raise
        raise ConfigError(
            f"{str(error).strip()} Start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config "
            '\'{"backend": "nccl"}\', and say where it is with --vllm_server_base_url'
        ) from error


def _put_in_place(staged: Path, target: Path, **facts: Any) -> None:
    _write_manifest(staged, **facts)
    old = target.with_name(f".{target.name}.old")
    if target.exists():  # of an earlier run through these steps, or damaged
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    staged.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _is_of_the_disk(error: RuntimeError) -> bool:
    """Whether torch.save failed for want of room: it raises RuntimeError for that."""
    text = str(error)
    return any(sign in text for sign in ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream"))


def _first_line(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    text = str(cause or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _quietly(text: str) -> None:
    """In place of `say`, where another process says it."""


def check_alignment(save_steps: float, steps_per_rollout: float) -> None:
    """Raises:
    ConfigError: when a checkpoint would fall between a rollout and the last step that uses it: what TRL keeps of the
        rollout in memory is in no checkpoint.
    """
    if steps_per_rollout > 1 and save_steps % steps_per_rollout:
        raise ConfigError(
            f"save_steps is {save_steps:g}, but each rollout serves {steps_per_rollout:g} optimizer steps, and a "
            f"checkpoint in their midst could not be resumed: take a multiple of {steps_per_rollout:g}"
        )


__all__: Sequence[str] = ["CheckpointMixin", "checkpoints", "find", "last_whole", "problem_of", "trim_lines"]
