"""Several gloo processes, forked from a server with the libraries imported, with DDP or FSDP2."""

from __future__ import annotations

import copy
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.killing import CONTEXT, command

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "ACCELERATE_USE_CPU": "true",
}
"""What accelerate makes of TRL's fsdp2.yaml."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fsdp_on_cpus() -> None:
    """accelerate allows FSDP on accelerators only, and silently falls back to DDP on CPUs. torch's FSDP2
    itself runs on gloo, so let accelerate choose it."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def choose(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        wanted = os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU
        if wanted and kwargs.get("fsdp_plugin") is not None:
            plugin = kwargs["fsdp_plugin"]
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = choose


def _child(work: Callable[..., Any], rank: int, world: int, port: int, engine: str, out: str, settings: Any) -> None:
    sys.stdout = sys.stderr = open(f"{out}.{rank}.txt", "a", buffering=1)  # noqa: SIM115 - open as long as the process lives
    torch.set_num_threads(1)
    _join(rank, world, port, engine)
    try:
        torch.save(work(**settings), f"{out}.{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # skip the process group's shutdown messages


def _join(rank: int, world: int, port: int, engine: str) -> None:
    """The environment that a launcher sets for a process."""
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if engine == "fsdp2":
        os.environ |= FSDP2
        fsdp_on_cpus()


def together(
    work: Callable[..., Any], out_dir: Path, world: int = 2, engine: str = "ddp", seconds: int = 120, **settings: Any
) -> list[Any]:
    """The result of `work(**settings)` in each process."""
    out_dir.mkdir(parents=True, exist_ok=True)
    out, port = str(out_dir / f"{engine}{world}"), free_port()
    for old in out_dir.glob(f"{engine}{world}.*"):
        old.unlink()
    processes = [
        CONTEXT.Process(target=_child, args=(work, rank, world, port, engine, out, settings)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    stuck = [p for p in processes if p.exitcode is None]
    for process in stuck:
        process.kill()
    texts = "\n".join(f"--- rank {r}\n" + Path(f"{out}.{r}.txt").read_text() for r in range(world))
    assert not stuck, f"still running after {seconds} s\n{texts}"
    assert all(p.exitcode == 0 for p in processes), texts
    return [torch.load(f"{out}.{rank}.pt", weights_only=False) for rank in range(world)]


def _ranked(rank: int, world: int, port: int, engine: str, *args: Any) -> None:
    _join(rank, world, port, engine)
    code = command(*args)
    sys.stdout.flush()
    os._exit(code)


def commands(
    argv: list[str],
    folder: Path,
    engine: str,
    place: str | None = None,
    nth: int = 1,
    signal_number: int = signal.SIGKILL,
    rank: int = 0,
    world: int = 2,
    seconds: int = 120,
) -> tuple[list[int], str]:
    """The exit codes of `rgsd` as a launcher runs it in several processes, and what was printed. The signal goes to one
    of them; when that ends by it, the others are killed, as a launcher would."""
    port = free_port()
    outputs = [folder / f"output.{r}.txt" for r in range(world)]
    processes = []
    for r, output in enumerate(outputs):
        output.unlink(missing_ok=True)
        args = (argv, place if r == rank else None, nth, signal_number, str(output))
        processes.append(CONTEXT.Process(target=_ranked, args=(r, world, port, engine, *args)))
        processes[-1].start()
    until = time.monotonic() + seconds
    while any(p.exitcode is None for p in processes) and time.monotonic() < until:
        if any(p.exitcode not in (None, 0, 143) for p in processes):
            for process in processes:
                process.kill()
        time.sleep(0.05)
    stuck = [p for p in processes if p.exitcode is None]
    for process in stuck:
        process.kill()
    text = "\n".join(f"--- rank {r}\n{o.read_text() if o.exists() else ''}" for r, o in enumerate(outputs))
    assert not stuck, f"still running after {seconds} s\n{text}"
    return [int(p.exitcode or 0) for p in processes], text


# --- Work -------------------------------------------------------------------------------------------------------------


def train(folder: str, steps: int = 2, resume: str | None = None, **settings: Any) -> dict[str, Any]:
    """Train a tiny model; returns the first gradient, final weights, logs and teacher's average, all gathered."""
    from conftest import tiny_model
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from rgsd.models.sharding import whole
    from support.training import Scripted, config

    class Masked(Scripted):
        empty_from = settings.pop("empty_from", None)

        def _in_loss(self, prompt, response):
            return [self.empty_from is None or len(prompt) < self.empty_from] * len(response)

    class Sampled(Masked):
        _generate_single_turn = Scripted.__mro__[1]._generate_single_turn

    lora, heads = settings.pop("lora", False), settings.pop("train_head", False)
    tied, sampled = settings.pop("tied", True), settings.pop("sampled", False)
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    model = tiny_model(tokenizer, tied=tied)
    peft = None
    if lora:
        saved = ["lm_head"] if heads else None
        peft = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=saved)
    elif not heads:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = settings.pop("rows", 8) // world
    trainer = (Sampled if sampled else Masked)(
        model,
        args=config(
            Path(folder) / settings.pop("output", "run"),
            per_device_train_batch_size=rows // settings.get("gradient_accumulation_steps", 1),
            **{"gradient_accumulation_steps": 1, "max_steps": steps, "shuffle_dataset": False, **settings},
        ),
        train_dataset=_examples(),
        processing_class=tokenizer,
        peft_config=peft,
    )
    gradients: dict[str, Any] = {}
    clip = trainer._get_grad_norm

    def keep(model, grad_norm=None):
        if not gradients:
            for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
                if p.grad is not None:
                    gradients[name] = whole(p.grad).detach().clone()
        return clip(model, grad_norm=grad_norm)

    trainer._get_grad_norm = keep
    trainer.train(resume_from_checkpoint=resume)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "gradient": gradients,
        "weights": {n: whole(p.detach()).clone() for n, p in unwrapped.named_parameters()},
        "teacher": trainer.teacher.state_dict(),
        "history": copy.deepcopy(trainer.state.log_history),
        "engine": str(trainer.accelerator.distributed_type),
        "sharded": sum(hasattr(p, "full_tensor") for p in unwrapped.parameters()),
    }


def _examples() -> list[Any]:
    from conftest import examples

    return examples.__wrapped__() if hasattr(examples, "__wrapped__") else examples.__pytest_wrapped__.obj()


def train_with_development(
    folder: str, scores: list[float], fails: bool = False, evaluated: bool = True, **settings: Any
) -> dict[str, Any] | str:
    """Train with scores of the development prompts that a test made up; what each process was asked, and ended with."""
    from conftest import tiny_model
    from transformers import AutoTokenizer

    from rgsd.errors import JudgeError, RGSDError
    from support.training import Scripted, config

    asked: list[int] = []

    class Scores:
        identity = "made up"

        def score(self, step: int) -> dict[str, float]:
            asked.append(step)
            if fails:
                raise JudgeError("the judge is gone")
            return {
                "eval_rubric_score": scores[step - 1], "eval_coverage": 1.0, "eval_prompts": 2.0,
                "eval_response_length": 3.0, "eval_truncated_share": 0.0,
            }  # fmt: skip

        def fall(self, best: int, step: int) -> None:
            return None

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    chosen = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "rubric_score"} if evaluated else {}
    try:
        trainer = Scripted(
            tiny_model(tokenizer, tied=False),
            args=config(Path(folder) / settings.pop("output", "run"), max_steps=len(scores), **chosen, **settings),
            train_dataset=_examples(),
            processing_class=tokenizer,
            development=(lambda trainer: Scores()) if evaluated else None,
        )
        trainer.train()
    except RGSDError as error:
        return f"{type(error).__name__}: {error}"
    weights = {n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    return {"asked": asked, "best": trainer.best, "steps": trainer.state.global_step, "weights": weights}


def train_until_stopped(folder: str, **settings: Any) -> str:
    """Tell one process to stop; returns the output of both."""
    import signal

    from rgsd.errors import RGSDError
    from rgsd.training.trainer import RGSDTrainer

    end, rank = RGSDTrainer._end_of_step, int(os.environ["RANK"])

    def tell(self):
        end(self)
        if rank == 1 and self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    RGSDTrainer._end_of_step = tell
    try:
        train(folder, steps=4, **settings)
    except RGSDError as error:
        return f"{type(error).__name__}: {error}"
    return "not stopped"


def train_and_be_told_while_asking(folder: str, **settings: Any) -> str:
    """A signal arrives while this process asks the others for theirs; it must not be lost."""
    import signal

    from accelerate import Accelerator

    from rgsd.errors import RGSDError
    from rgsd.training.checkpoint_mixin import CheckpointMixin

    ask, gather, asking = CheckpointMixin._is_told_to_stop, Accelerator.gather, []

    def noted(self):
        asking.append(self.state.global_step)
        try:
            return ask(self)
        finally:
            asking.pop()

    def told(self, tensor):
        found = gather(self, tensor)
        if asking == [1]:
            signal.raise_signal(signal.SIGTERM)
        return found

    CheckpointMixin._is_told_to_stop, Accelerator.gather = noted, told
    try:
        train(folder, steps=4, **settings)
    except RGSDError as error:
        return f"{type(error).__name__}: {error}"
    return "not stopped"


def train_into_nan(folder: str, **settings: Any) -> str:
    """Make the loss of one process's rows NaN in the second step; returns the output of both."""
    from rgsd.errors import RGSDError
    from rgsd.training.trainer import RGSDTrainer

    loss = RGSDTrainer._divergence_of

    def poisoned(self, hidden_NH, student, inputs):
        value = loss(self, hidden_NH, student, inputs)
        return value * float("nan") if self.state.global_step == 1 and "e6" in inputs["example_ids"] else value

    RGSDTrainer._divergence_of = poisoned
    try:
        train(folder, steps=4, **settings)
    except RGSDError as error:
        return f"{type(error).__name__}: {error}"
    return "not stopped"


def train_with_an_engine_that_is_sent_merges(folder: str, **settings: Any) -> bool:
    """Sync merged weights to vLLM with TRL; returns whether each is the float32 merge and the base is unchanged."""
    from trl import DistillationTrainer

    from rgsd.models import adapters
    from rgsd.models.sharding import whole
    from rgsd.training.trainer import RGSDTrainer
    from support.training import Scripted, sync_of

    before: dict[str, Any] = {}

    def engine(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        student = self.accelerator.unwrap_model(self.model)
        frozen = {n: whole(p.detach()).clone() for n, p in student.named_parameters() if not p.requires_grad}
        if not before:
            before.update(frozen)
        assert all(torch.equal(frozen[n], v) for n, v in before.items())
        if getattr(self, "vllm_generation", None) is None:
            self.vllm_generation = sync_of(self)
            self._send_exact_merges()
        sent = dict(self.vllm_generation._iter_named_params())
        for name, layer in adapters.layers(student):
            a, b = (whole(part["default"].weight.detach()) for part in (layer.lora_A, layer.lora_B))
            want = whole(layer.get_base_layer().weight.detach()) + layer.scaling["default"] * (b @ a)
            torch.testing.assert_close(sent[name.removeprefix("base_model.model.") + ".weight"], want)
        return Scripted.said(self, prompt_ids)

    Scripted.said = lambda self, prompt_ids: [[40 + len(p) % 50, 41, self.eos_token_ids[0]] for p in prompt_ids]
    DistillationTrainer._generate_single_turn = engine
    Scripted._generate_single_turn = RGSDTrainer._generate_single_turn
    train(folder, steps=4, lora=True, tied=False, learning_rate=0.05, merge_lora_for_rollouts=False, **settings)
    return bool(before)
