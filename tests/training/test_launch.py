"""`--accelerate_config`: which configuration, how many processes, and real launches of two on CPUs."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from support.killing import assert_same, make_world, outcome

from rgsd.cli import main
from rgsd.cli.train import COMMAND, parse_recipe
from rgsd.errors import ConfigError
from rgsd.training import launch
from rgsd.training.checkpoints import list_checkpoints
from rgsd.training.launch import LaunchConfig, accelerate_arguments, config_file

TESTS = Path(__file__).parents[1]
FULL = {"use_peft": False, "evaluate": False, "max_steps": 2, "save_steps": 1}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "evaluate": False, "max_steps": 2}


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_recipe_and_flags_win(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("accelerate_config: fsdp2\nnum_processes: 16\nnum_machines: 2\nlearning_rate: 1.0e-4\n")
    found = COMMAND.peek(["--config", str(recipe), "--num_processes", "8", "--main_process_ip=10.0.0.1"], LaunchConfig)[
        0
    ]
    assert found == LaunchConfig("fsdp2", 8, 2, None, "10.0.0.1")
    assert COMMAND.peek(["--learning_rate", "1"], LaunchConfig)[0] == LaunchConfig()
    with pytest.raises(ConfigError, match=r"num_processes.*two"):
        COMMAND.peek(["--num_processes", "two"], LaunchConfig)


@pytest.mark.parametrize("name", ["ddp", "multi_gpu", "fsdp2", "zero2", "zero3", "zero1", "single_gpu"])
def test_trls_configurations_go_by_their_names(name):
    assert yaml.safe_load(config_file(name).read_text())["compute_environment"] == "LOCAL_MACHINE"


def test_an_unknown_configuration_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'fsdp3'.*ddp, fsdp1, fsdp2"):
        config_file("fsdp3")


def arguments(**settings):
    return accelerate_arguments(LaunchConfig(**settings), "train", ["--config", "r.yaml", "--beta", "0.5"])


def test_accelerate_is_told_what_was_asked(monkeypatch):
    monkeypatch.setattr(launch, "_accelerators", lambda: 8)
    got = arguments(accelerate_config="fsdp2", num_machines=2, machine_rank=1, main_process_ip="10.0.0.1")
    assert (got.num_processes, got.num_machines, got.machine_rank, got.main_process_ip) == (16, 2, 1, "10.0.0.1")
    assert got.module
    assert [got.training_script, *got.training_script_args] == ["rgsd", "train", "--config", "r.yaml", "--beta", "0.5"]
    assert got.mixed_precision == "no"  # the recipe decides, not the configuration's file
    assert arguments(accelerate_config="ddp", gpu_ids="0,1", num_processes=2).gpu_ids == "0,1"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_processes": 3, "num_machines": 2, "machine_rank": 0, "main_process_ip": "a"}, "num_processes 3"),
        ({"num_processes": 4, "num_machines": 2}, "--machine_rank"),
        ({"num_processes": 16}, "16 processes.* 8 accelerators"),
    ],
)
def test_contradictions_are_refused(monkeypatch, settings, match):
    monkeypatch.setattr(launch, "_accelerators", lambda: 8)
    with pytest.raises(ConfigError, match=match):
        arguments(accelerate_config="ddp", **settings)


def test_a_machine_without_accelerators_must_be_told_how_many(monkeypatch):
    monkeypatch.setattr(launch, "_accelerators", lambda: 0)
    with pytest.raises(ConfigError, match="num_processes"):
        arguments(accelerate_config="ddp")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_missing_is_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"pip install 'rgsd\[deepspeed\]'"):
        arguments(accelerate_config="zero3", num_processes=2)


def test_the_environment_that_accelerate_makes_of_fsdp2_is_the_one_the_tests_run_under():
    """`processes.FSDP2` copies TRL's file; if TRL changes it, update the FSDP2 tests."""
    from support.processes import FSDP2

    args = launch_command_parser().parse_args(["--config_file", str(config_file("fsdp2")), "--module", "rgsd"])
    from accelerate.commands.launch import _validate_launch_command

    args, _, _ = _validate_launch_command(args)
    made = prepare_multi_gpu_env(args)
    for name in FSDP2.keys() - {"ACCELERATE_USE_CPU"}:
        assert made[name] == FSDP2[name], name


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeeds_configurations_are_read(zero):
    """As accelerate reads them for a launch; they run only if DeepSpeed is installed."""
    args = launch_command_parser().parse_args(["--config_file", str(config_file(zero)), "--module", "rgsd"])
    from accelerate.commands.launch import _validate_launch_command

    args, _, _ = _validate_launch_command(args)
    assert args.use_deepspeed
    assert str(args.zero_stage) == zero[-1]


def test_a_launched_process_reads_the_same_command_line_and_does_not_launch(tmp_path, tokenizer, monkeypatch):
    recipe = make_world(tmp_path, tokenizer, **FULL)
    argv = ["--config", str(recipe), "--accelerate_config", "ddp", "--num_processes", "2"]
    assert parse_recipe(argv).training.max_steps == 2
    started = []
    monkeypatch.setattr(launch, "launch", lambda settings, command, argv: started.append((settings, command)) or 7)
    assert main(["train", *argv]) == 7
    assert started == [(LaunchConfig("ddp", 2), "train")]


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_leaves_its_group_before_the_interpreter_ends(tmp_path, tokenizer, monkeypatch, fails):
    """Without cleanup, gloo's threads have ended finished runs with SIGABRT."""
    import torch.distributed as dist

    from rgsd.errors import RunError
    from rgsd.workflows import train as pipeline

    recipe = make_world(tmp_path, tokenizer, **FULL)
    joined = []

    def train(_):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
        joined.append(dist.is_initialized())
        if fails:
            raise RunError("as it happens")
        return SimpleNamespace(folder=tmp_path)

    monkeypatch.setattr(pipeline, "train", train)
    assert main(["train", "--config", str(recipe)]) == int(fails)
    assert joined == [True]
    assert not dist.is_initialized()


LEAVE = """
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rgsd.training.launch import leave_group

for i in range(12):
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-{i}", rank=0, world_size=1)
    wrapped = DistributedDataParallel(torch.nn.Linear(4, 4))
    wrapped.itself = wrapped  # a cycle, as a trainer's: the collector frees the group
    for _ in range(20):
        dist.all_gather([torch.zeros(1000)], torch.ones(1000), async_op=True)
    del wrapped
    leave_group()
"""


@pytest.mark.integration
def test_leaving_a_group_does_not_deadlock_with_its_threads(tmp_path):
    """They free the tensors of a last collective while the group is destroyed: without a pause, this hangs."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent / "src")}
    subprocess.run([sys.executable, "-c", LEAVE, str(tmp_path / "group")], env=env, timeout=120, check=True)


# --- Real launches ----------------------------------------------------------------------------------------------------


def rgsd(*argv, path=(), **env):
    paths = os.pathsep.join([str(TESTS.parent / "src"), *path, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "rgsd", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*argv, **kwargs):
    process = rgsd(*argv, **kwargs)
    text = process.communicate(timeout=280)[0]
    return process.returncode, text


def two(recipe, config, *more):
    return ("train", "--config", str(recipe), "--accelerate_config", config, "--num_processes", "2", *more)


@pytest.mark.integration
def test_two_processes_are_launched_and_train(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **FULL)
    code, text = run(*two(recipe, "ddp", "--output_dir", str(tmp_path / "run")))
    assert code == 0, text
    assert text.count("step 2/2") == 1  # one of them speaks
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2]
    assert (tmp_path / "run" / "checkpoint-2" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_fsdp2_is_launched_trains_evaluates_and_exports(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **{**FULL, "evaluate": True})
    code, text = run(
        *two(recipe, "fsdp2", "--output_dir", str(tmp_path / "run")), path=[str(TESTS / "support" / "fsdp_on_cpus")]
    )
    assert code == 0, text
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer.bin").is_file()  # FSDP's own file
    assert [a["arm"] for a in json.loads((tmp_path / "run" / "results.json").read_text())["arms"]][-1] == "trained"
    assert run("export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out"))[0] == 0


@pytest.mark.slow
def test_a_launched_run_that_is_told_to_stop_saves_and_goes_on(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **{**FULL, "max_steps": 60, "save_steps": 1000})
    process = rgsd(*two(recipe, "ddp", "--output_dir", str(tmp_path / "run")))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=100)[0]
    assert process.returncode == 143, text
    assert "stopped by SIGTERM after step" in text
    (saved,) = list_checkpoints(tmp_path / "run")
    assert int(saved.name.split("-")[1]) < 60
    code, text = run(*two(recipe, "ddp", "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"))
    assert code == 0, text


@pytest.mark.slow
def test_a_process_that_dies_ends_the_launch_with_its_code(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **FULL)
    code, text = run(*two(recipe, "ddp", "--output_dir", "/proc/rgsd"))
    assert code == 1
    assert "/proc/rgsd" in text
    assert re.search(r"process \d exited with code 1", text)


@pytest.mark.slow
def test_grpo_on_two_processes_judges_each_rollout_once_and_keeps_every_row(tmp_path, tokenizer):
    recipe = make_world(
        tmp_path, tokenizer, **LORA, num_generations=2, template="paper", per_device_train_batch_size=2, save_steps=1
    )
    code, text = run(
        "grpo", "--config", str(recipe), "--accelerate_config", "ddp", "--num_processes", "2",
        "--output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 0, text
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    # 2 steps x 2 processes x 2 responses x 2 micro-batches, and every prompt's group is whole.
    assert [r["step"] for r in rows] == [0] * 8 + [1] * 8
    for step in (0, 1):
        prompts = [r["example_id"] for r in rows if r["step"] == step]
        assert all(prompts.count(p) == 2 for p in prompts)
    losses = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    mean = sum(r["reward"] for r in rows[:8]) / 8
    assert losses[0]["reward"] == pytest.approx(mean)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(
    ("zero", "settings"),
    [
        ("zero2", {**FULL, "teacher_model_kind": "ema", "max_steps": 5}),
        ("zero3", {**LORA, "max_steps": 5, "save_steps": 1}),
    ],
)
def test_deepspeed_trains_and_goes_on_bit_for_bit(tmp_path, tokenizer, zero, settings):
    import shutil

    recipe = make_world(tmp_path, tokenizer, **settings)
    for name in ("whole", "resumed"):
        command = two(recipe, zero, "--output_dir", str(tmp_path / name))
        code, text = run(*command, DS_ACCELERATOR="cpu")
        assert code == 0, text
    for step in (4, 5):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step}")
    code, text = run(*command, "--resume_from_checkpoint", "true", DS_ACCELERATOR="cpu")
    assert code == 0, text
    (whole, resumed) = (_without_optimizer(tmp_path / n) for n in ("whole", "resumed"))
    assert_same(resumed, whole)


def _without_optimizer(folder):
    import torch

    for name in ("optimizer.pt", "scheduler.pt"):  # DeepSpeed keeps its own
        file = folder / "checkpoint-5" / name
        if not file.exists():
            torch.save({}, file)
    return outcome(folder, 5)
