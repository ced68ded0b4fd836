"""Runs `rgsd` in processes that die where a test wants: by SIGKILL, inside a named call."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import tiny_model
from safetensors.torch import load_file

# Imported once, in a server that each run is forked from: importing takes longer than a tiny run.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["support.killing", "rgsd.workflows.train", "rgsd.cli.train", "rgsd.cli.grpo", "trl.trainer.grpo_trainer"]
)

PLACES = {
    "rollout": ("rgsd.training.trainer:RGSDTrainer._generate_single_turn", "after"),
    "grpo rollout": ("trl:GRPOTrainer._generate_single_turn", "after"),
    "teacher": ("rgsd.training.trainer:RGSDTrainer._run_teacher", "before"),
    "backward": ("accelerate:Accelerator.backward", "after"),
    "optimizer": ("torch.optim:AdamW.step", "after"),
    "log": ("rgsd.runs:Run.append", "before"),
    "weights half written": ("rgsd.training.checkpoint_mixin:CheckpointMixin.check_weights", "after"),
    "optimizer half written": ("torch:save", "half"),
    "before the manifest": ("rgsd.training.checkpoints:write_manifest", "before"),
    "before the rename": ("rgsd.training.checkpoints:write_manifest", "after"),
    "after the rename": ("rgsd.training.checkpoint_mixin:put_in_place", "after"),
    "evaluation": ("rgsd.inference:TransformersGenerator.generate", "after"),
    "final save": ("rgsd.workflows.train:save_policy", "after"),
    "results": ("rgsd.runs:Run.write", "before"),
    "model loaded": ("rgsd.models.loading:load_model", "after"),
    "merged": ("rgsd.models.adapters:merge_and_unload", "after"),
    "weights of an export": ("transformers:PreTrainedModel.save_pretrained", "after"),
    "export written": ("rgsd.models.exporting:save_model", "after"),
    "judge's reply": ("rgsd.judges.cache:ReplyCache.put", "after"),
    "before a file's rename": ("pathlib:Path.replace", "before"),
    "task written": ("rgsd.lab.benches:write_jsonl", "after"),
    "run noted": ("rgsd.runs:Run.note", "after"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(place: str, nth: int, act: Any) -> None:
    where, moment = PLACES[place]
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and moment == "before":
            act()
        done = original(*args, **kwargs)
        if calls == nth and moment == "half":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        if calls == nth and moment != "before":
            act()
        return done

    setattr(owner, name, wrapped)


def command(argv: list[str], place: str | None, nth: int, signal_number: int, output: str) -> int:
    """Run `rgsd` in this process, output to a file, with a signal at the nth call of a place; returns the exit code."""
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115 - open as long as the process lives
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    torch.set_num_threads(1)
    from rgsd.cli import main

    if place is not None:
        _arm(place, nth, lambda: os.kill(os.getpid(), signal_number))
    return main(argv)


def _run(*args: Any) -> None:
    sys.exit(command(*args))


def run(
    argv: list[str], folder: Path, place: str | None = None, nth: int = 1, signal_number: int = signal.SIGKILL
) -> tuple[int, str]:
    """The exit code (minus the signal's number, if one ended the process) and the output."""
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    process = CONTEXT.Process(target=_run, args=(argv, place, nth, signal_number, str(output)))
    process.start()
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode is not None, f"still running after {LONGEST} s: {output.read_text()[-2000:]}"
    return process.exitcode, output.read_text()


# --- A world to run in ----------------------------------------------------------------------------------------------


def make_world(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """A model, rubric data and a recipe; returns the recipe's path."""
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "id": f"r{i}",
            "prompt": "What helps with a cough" + " now" * i + "?",
            "rubric": [
                {"criterion": "Advises rest.", "weight": 5, "check": {"any": ["rest", "a"]}},
                {"criterion": f"Recommends syrup {i}.", "weight": -2, "check": {"any": ["syrup", "e"]}},
            ],
        }
        for i in range(8)
    ]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "held_out": 2,
        "max_steps": 5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "eval_max_new_tokens": 6,
        "gradient_checkpointing": False,
        "learning_rate": 0.01,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        **settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


LONGEST = 600
"""Seconds that a command may take: seconds on an idle machine, minutes on a busy one."""
# What is a measure of time or names the folder cannot be equal.
TIMED = ("time", "seconds", "runtime", "per_second", "step_time", "dollars")


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not any(t in k for t in TIMED)}


def outcome(run_folder: Path, last_step: int) -> dict[str, Any]:
    """Everything in a run's folder that must not depend on interruptions.

    Tensors are copied: those of `load_file` are mapped from the file, and would follow what a test does to it.
    """
    checkpoint = run_folder / f"checkpoint-{last_step}"
    tensors: dict[str, Any] = {}
    for file in [*run_folder.glob("model/*.safetensors"), *run_folder.glob("adapter/*.safetensors")]:
        tensors |= {f"{file.name}:{n}": t.clone() for n, t in load_file(file).items()}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= {f"checkpoint:{file.name}:{n}": t.clone() for n, t in load_file(file).items()}
    for file in ("optimizer.pt", "scheduler.pt"):
        tensors |= _flat(file, torch.load(checkpoint / file, weights_only=True))
    for file in checkpoint.glob("rng_state*.pth"):
        tensors |= {f"{file.name}": torch.load(file, weights_only=False)["cpu"]}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    read = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    found = {
        "tensors": tensors,
        "metrics": [timeless(r) for r in read],
        "history": [timeless(r) for r in state["log_history"]],
        "state": {k: state[k] for k in ("global_step", "epoch", "total_flos", "max_steps")},
    }
    if (run_folder / "rollouts.jsonl").exists():
        lines = (run_folder / "rollouts.jsonl").read_text().splitlines()
        found["rollouts"] = [timeless({k: v for k, v in json.loads(x).items() if k != "usage"}) for x in lines]
    if (run_folder / "results.json").exists():
        results = json.loads((run_folder / "results.json").read_text())
        found["scores"] = [(a["arm"], a["score"], a["mean_tokens"]) for a in results["arms"]]
    return found


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k2: v2 for k, v in value.items() for k2, v2 in _flat(f"{prefix}.{k}", v).items()}
    if isinstance(value, list | tuple):
        return {k2: v2 for k, v in enumerate(value) for k2, v2 in _flat(f"{prefix}.{k}", v).items()}
    return {prefix: value}


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Compare bit for bit."""
    assert got["tensors"].keys() == want["tensors"].keys()
    for name, value in want["tensors"].items():
        other = got["tensors"][name]
        same = torch.equal(other, value) if torch.is_tensor(value) else other == value
        assert same, name
    for part in want.keys() - {"tensors"}:
        assert got[part] == want[part], part
