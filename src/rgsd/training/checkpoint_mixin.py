"""`CheckpointMixin`: exact resume and safe stops for any of TRL's trainers.

transformers' checkpoints hold weights, optimizer, schedule, random states and the position in the data. A run that
resumes from them still differs from one that never stopped: the sums of the next log line are lost, and TRL's sampler
continues a generator that the resumed process does not have. The mixin saves the sums in `progress.json` and derives
the order of an epoch from the epoch alone.
"""

# transformers' Trainer leaves its attributes untyped:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
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
from rgsd.training.checkpoints import PROGRESS, SAVING, agree_on_checkpoint, last_complete, put_in_place, run_id

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

FSDP_OPTIMIZER, OPTIMIZER = "optimizer.bin", "optimizer.pt"
MAX_NAMED = 8
"""How many example ids an error lists at most."""


class CheckpointMixin(_Base):
    """Complete checkpoints, exact resume and safe stops, mixed into a trainer before TRL's class.

    It also stops on SIGTERM after saving, refuses to step on a non-finite loss or gradient, keeps float32 master
    weights, and merges LoRA in float32 for vLLM.

    With vLLM and LoRA it logs `engine/update_kept`: the share of the adapters' update that survives rounding to the
    precision of vLLM's weights (`adapters.Kept`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._staging: Path | None = None
        self._restored: dict[str, Any] = {}
        self._losses: list[tuple[Tensor, list[str]]] = []
        self._stop_signal: int | None = None
        self._update_kept: float | None = None
        with _explaining_vllm_errors():
            super().__init__(*args, **kwargs)
        # DeepSpeed keeps float32 master weights of its own.
        upcast = 0 if self.is_deepspeed_enabled else adapters.use_float32_master_weights(self.model)
        if upcast and self.is_world_process_zero():
            say(f"Training {upcast} parameters in float32; they were loaded in half precision")
        self._send_exact_merges()
        self.add_callback(_CheckpointCallback(self))

    def _send_telemetry(self) -> None:
        """Do nothing: TRL would report each new trainer to the Hub."""

    def _send_exact_merges(self) -> None:
        """Make TRL send vLLM weights that are merged in float32 and rounded once.

        TRL merges into the base weights themselves and unmerges afterwards. In half precision that rounds away most of
        a small update, and the base weights drift by a rounding error per sync.
        """
        engine = getattr(self, "vllm_generation", None)
        if engine is None or not isinstance(engine.model, PeftModel):
            return
        if adapters.is_quantized(engine.model) or engine._dist.fsdp_version == 1:
            # Here TRL's merge stays: a quantized layer merges itself, and FSDP1 shows its weights only piece by piece.
            return
        trl_params = engine._iter_named_params

        def merged_params() -> Iterator[tuple[str, Tensor]]:
            kept = adapters.Kept()
            yield from adapters.merged_values(engine.model, trl_params, kept)
            self._update_kept = kept.share

        engine._iter_named_params = merged_params

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train like transformers, from a verified checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last complete one. With True and no complete
                checkpoint, training starts from the first step.
            *args, **kwargs: As in transformers.

        Raises:
            RunError: If the checkpoint is not complete, or a new one cannot be written.
            Interrupted: After SIGTERM, once the current step is finished and saved.
            TrainingDiverged: If a loss or gradient is not finite. The weights are those before that step.
        """
        tell = say if self.is_world_process_zero() else _discard
        checkpoint = agree_on_checkpoint(self.args.output_dir, resume_from_checkpoint, tell)
        if resume_from_checkpoint and checkpoint is None:
            tell("There is no complete checkpoint yet; training starts from the first step")
        self._restored, self._stop_signal = {}, None
        if checkpoint is not None and (checkpoint / PROGRESS).is_file():
            self._restored = json.loads((checkpoint / PROGRESS).read_text("utf-8"))
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / SAVING, ignore_errors=True)
        with self._noting_sigterm():
            output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        # A signal during the last step changes nothing: the run is finished.
        if self._stop_signal is not None and self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"stopped by {signal.Signals(self._stop_signal).name} after step {self.state.global_step} of "
                f"{self.state.max_steps}; checkpoint-{self.state.global_step} is saved. "
                "Continue with --resume_from_checkpoint true"
            )
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate like transformers, without changing the random numbers of training.

        Every evaluation of a run draws the same numbers, so two of them differ only by the policy.
        """
        with random_state_kept(self.accelerator.device):
            set_seed(self.args.seed, device_specific=True)
            return super().evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # transformers checks max_steps only after a step, so resuming a finished run would train one step too many.
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.model.train()  # as after a step: TRL reads this flag to decide between train and eval logs
        return None

    # --- SIGTERM

    @contextmanager
    def _noting_sigterm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python allows only the main thread to set signal handlers
            return

        def note(number: int, frame: Any) -> None:
            # Only noted, so a repeated SIGTERM is ignored: schedulers and launchers often both send one.
            self._stop_signal = number

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _is_told_to_stop(self) -> bool:
        """Whether any process received a signal. All processes must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self._stop_signal is not None
        received = torch.tensor(self._stop_signal or 0, device=self.accelerator.device)
        number = int(self.accelerator.gather(received).max())
        if number:  # never reset to None: a signal may have arrived during the gather
            self._stop_signal = number
        return bool(number)

    # --- Non-finite losses and gradients

    def _examples_of(self, inputs: Any) -> list[str]:
        """The example ids behind the inputs of the last `compute_loss`."""
        return [str(row.get("example_id", "?")) for row in inputs] if isinstance(inputs, list) else []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch, and remember its loss until the optimizer step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append((loss.detach(), self._examples_of(inputs)))
        return loss

    def _check_before_backward(self, loss: Tensor, example_ids: list[str]) -> None:
        # DeepSpeed's backward also takes the optimizer step, so a check after it would come too late.
        if self.is_deepspeed_enabled and self.model.training:
            self._losses.append((loss.detach(), example_ids))
            self._check_finite(None)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of TRL's trainer, checked before DeepSpeed steps on it."""
        output = super().compute_loss(model, inputs, *args, **kwargs)
        self._check_before_backward(output[0] if isinstance(output, tuple) else output, [])
        return output

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # transformers calls this once per step, after the gradients are reduced and before the optimizer runs.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite(norm)
        return norm

    def _check_finite(self, norm: Any) -> None:
        """Raise in every process if any process has a non-finite loss or gradient norm in this step."""
        losses, self._losses = self._losses, []
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        finite = torch.stack([torch.isfinite(loss).all() for loss, _ in losses])
        # With fp16, overflowing gradients are routine: the loss scaler skips the step.
        norm_is_finite = self.args.fp16 or norm is None or math.isfinite(float(norm))
        verdict = torch.stack([finite.all().int(), torch.tensor(int(norm_is_finite), device=finite.device)])
        verdict = self.accelerator.gather(verdict.to(self.accelerator.device)[None]).amin(0)
        loss_ok, norm_ok = (bool(v) for v in verdict.tolist())
        if loss_ok and norm_ok:
            return
        # A bad loss points at its own micro-batches; a bad gradient could come from any of the step's.
        groups = [ids for ok, (_, ids) in zip(finite.tolist(), losses, strict=True) if loss_ok or not ok]
        named = gather_object([example_id for ids in groups for example_id in ids])
        named = list(dict.fromkeys(str(example_id) for example_id in named))
        value = next((float(loss) for ok, (loss, _) in zip(finite.tolist(), losses, strict=True) if not ok), math.nan)
        what = f"the loss is {value}" if not loss_ok else f"the gradient norm is {float(norm)}"
        last = last_complete(self.args.output_dir, _discard, in_full=False)
        raise TrainingDiverged(
            f"step {self.state.global_step + 1}: {what}, among the examples {', '.join(named[:MAX_NAMED])}"
            f"{', ...' if len(named) > MAX_NAMED else ''}. This step did not change the weights. "
            + (f"The last complete checkpoint is {last.name}. " if last else "There is no checkpoint yet. ")
            + "Check those examples, lower learning_rate or max_grad_norm, or load the model in float32"
        )

    def check_weights(self) -> None:
        """Make sure that no broken weights are saved.

        Raises:
            TrainingDiverged: If a trained weight is not finite.
        """
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(local(parameter.detach())).all()):
                raise TrainingDiverged(
                    f"step {self.state.global_step}: {name} holds non-finite values; nothing was saved. Continue from "
                    "the last checkpoint (--resume_from_checkpoint true) with a lower learning_rate"
                )

    # --- Order of the data

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        is_trls = hasattr(sampler, "mini_repeat_count")  # transformers' own sampler already depends on the epoch alone
        # state.epoch is a float that a step leaves just below the next whole number.
        return sampler if not is_trls else _EpochSampler(sampler, lambda: int(self.state.epoch + 1e-9))

    # --- Saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights()
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        try:
            self._stage(model, trial, run, run / SAVING / name)
            self.accelerator.wait_for_everyone()  # every process has written its own files
            # Machines without a shared disk each have their own folder to rename. With a shared one, the main process
            # has renamed it by the second turn, and the others find nothing left to do.
            for is_my_turn in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
                if is_my_turn and self.args.should_save and (run / SAVING / name).is_dir():
                    facts = {"step": self.state.global_step, "processes": self.args.world_size, "run": run_id(run)}
                    put_in_place(run / SAVING / name, run / name, **facts)
                self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_disk_error(error):
                raise
            shutil.rmtree(run / SAVING, ignore_errors=True)
            last = last_complete(run, _discard, in_full=False)
            raise RunError(
                f"{name} cannot be saved in {run}: {_first_line(error)}. Its partial files are deleted; the last "
                f"complete checkpoint is {last.name if last else 'none'}. Free some space (save_total_limit deletes "
                "old checkpoints), and continue with --resume_from_checkpoint true"
            ) from error
        # Only now: transformers would delete old checkpoints before the new one is complete.
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False)

    def _stage(self, model: Any, trial: Any, run: Path, staged: Path) -> None:
        """Write all files of a checkpoint to the staging folder."""
        progress = self._progress()
        if self.args.should_save:
            staged.mkdir(parents=True, exist_ok=True)
        self._staging = staged.parent
        try:
            with adapters.saved_without_the_hub():
                super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self._save_extra(staged)
        if not self.args.should_save:
            return
        # A pickle of the settings, which may include credentials for the Hub. Nothing in rgsd reads it.
        (staged / "training_args.bin").unlink(missing_ok=True)
        (staged / PROGRESS).write_text(json.dumps(progress), "utf-8")
        if self.state.best_global_step:
            # transformers noted the path in the staging folder, which is about to go. The best step has a checkpoint
            # only if it was saved.
            best = run / f"checkpoint-{self.state.best_global_step}"
            is_there = self.state.best_global_step == self.state.global_step or best.is_dir()
            self.state.best_model_checkpoint = str(best) if is_there else None
            self.state.save_to_json(str(staged / "trainer_state.json"))

    def _save_extra(self, folder: Path) -> None:
        """Save what a subclass adds to transformers' files. Every process calls it."""

    def _progress(self) -> dict[str, Any]:
        """The sums behind the next log line, plus whatever a subclass needs after a resume."""
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
        # With another number of processes the shares do not map one to one. Their mean keeps the logged mean.
        is_same_size = len(losses) == self.accelerator.num_processes
        own_share = losses[self.accelerator.process_index] if is_same_size else sum(losses) / len(losses)
        self._tr_loss.fill_(own_share)
        self._globalstep_last_logged = kept["step_last_logged"]
        self._total_loss_scalar = kept["loss_until_log"]
        for mode, values in kept["metrics"].items():
            for name, series in values.items():
                self._metrics[mode][name] = list(series)
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = kept["tokens"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log like TRL, with `train_loss` averaged over the whole run rather than since the last resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        elif self._update_kept is not None:
            logs["engine/update_kept"] = self._update_kept
        super().log(logs, *args, **kwargs)

    # --- Resuming, also with another number of processes

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        is_distributed = self.args.world_size > 1
        file = f"rng_state_{self.args.process_index}.pth" if is_distributed else "rng_state.pth"
        if (Path(checkpoint) / file).is_file():
            super()._load_rng_state(checkpoint)
            return
        if self.is_world_process_zero():
            say(
                f"{Path(checkpoint).name} was saved by a different number of processes (this run has "
                f"{self.args.world_size}): weights, optimizer and data continue, random numbers restart"
            )
        # The step in the seed keeps the run from drawing its first random numbers again.
        set_seed(self.args.seed + self.state.global_step, device_specific=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        is_sharded = any(folder.glob("pytorch_model_fsdp*"))
        if is_sharded == bool(self.is_fsdp_enabled) or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # saved with FSDP and resumed without, or the other way round: transformers cannot convert
            load_weights(self.accelerator.unwrap_model(self.model if model is None else model), folder)

    def _load_extra(self, folder: Path) -> None:
        """Load what `_save_extra` saved. Every process calls it, once the model is in place."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        self._load_extra(folder)
        native = FSDP_OPTIMIZER if self.is_fsdp_enabled else OPTIMIZER
        foreign = OPTIMIZER if self.is_fsdp_enabled else FSDP_OPTIMIZER
        is_sharded = any(folder.glob("optimizer_*"))  # in the layout of torch.distributed.checkpoint
        if self.is_deepspeed_enabled or (folder / native).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
        elif (folder / foreign).is_file():
            state = torch.load(folder / foreign, map_location="cpu", weights_only=True)
            model = self.accelerator.unwrap_model(self.model)
            load_optimizer(model, getattr(self.optimizer, "optimizer", self.optimizer), state)
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        elif is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            # transformers would silently start with a fresh optimizer.
            raise RunError(
                f"{checkpoint} has no optimizer state that this run can load: it was saved with save_only_model, or by "
                "another engine (DeepSpeed checkpoints resume only under DeepSpeed)"
            )


class _CheckpointCallback(TrainerCallback):
    """Calls the mixin at the points that transformers offers only to callbacks."""

    def __init__(self, trainer: CheckpointMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._restore_progress()
        self._trainer._losses.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._is_told_to_stop():
            control.should_save = control.should_training_stop = True


class _EpochSampler(Sampler):
    """TRL's sampler, reseeded in each epoch so that the order depends on the epoch alone.

    TRL's own generator continues from epoch to epoch, and a resumed process does not have its state.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self._sampler, self._epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed((self._sampler.seed or 0) + self._epoch())
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, numpy, torch and the device on exit."""
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    device_state = None if module is None else module.get_rng_state()  # of this process's device only
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if module is not None:
            module.set_rng_state(device_state)


@contextmanager
def _explaining_vllm_errors() -> Iterator[None]:
    """Turn TRL's errors about a missing vLLM or vLLM server into a ConfigError with the remedy."""
    try:
        yield
    except ImportError as error:
        if "vLLM" not in str(error):
            raise
        raise ConfigError("use_vllm needs vLLM, which is not installed: pip install 'rgsd[vllm]'") from error
    except OSError as error:  # the base of requests' ConnectionError
        if "vLLM" not in str(error):
            raise
        raise ConfigError(
            f"{str(error).strip()} Start the server with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL "
            '--weight-transfer-config \'{"backend": "nccl"}\', and pass its address as --vllm_server_base_url'
        ) from error


def _is_disk_error(error: RuntimeError) -> bool:
    """Whether torch.save failed on a full disk, which it reports as a RuntimeError."""
    text = str(error)
    return any(sign in text for sign in ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream"))


def _first_line(error: BaseException) -> str:
    """The first line of the OSError behind an error, or of the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    text = str(cause or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _discard(text: str) -> None:
    """A stand-in for `say` in processes that must stay silent."""


def check_alignment(save_steps: float, steps_per_rollout: float, name: str = "save_steps") -> None:
    """Refuse checkpoints in the middle of a rollout's steps: TRL keeps the rollout in memory, and does not save it.

    Raises:
        ConfigError: If `save_steps` is not a multiple of `steps_per_rollout`.
    """
    if steps_per_rollout > 1 and save_steps % steps_per_rollout:
        raise ConfigError(
            f"{name} is {save_steps:g}, but a rollout serves {steps_per_rollout:g} optimizer steps, and a "
            f"checkpoint between them cannot be resumed: use a multiple of {steps_per_rollout:g}"
        )
