"""A run killed anywhere resumes as if it had never stopped: equal bits in weights, optimizer, random numbers, average,
logs and scores."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.killing import assert_same, make_world, outcome, run

from rgsd.errors import ConfigError, RunError
from rgsd.training.checkpoints import MANIFEST, SAVING, find_checkpoint, last_complete, problem_of, trim_lines

pytestmark = pytest.mark.integration

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_modules": "all-linear"}
FULL = {"use_peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 0.3}
STEPS = 5


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, tokenizer):
    """A recipe and the results of its uninterrupted run, per kind of training; built once each."""
    made = {}

    def make(name, command="train", **settings):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            recipe = make_world(folder, tokenizer, **settings)
            argv = [command, "--config", str(recipe)]
            code, text = run([*argv, "--output_dir", str(folder / "whole")], folder)
            assert code == 0, text
            made[name] = (argv, outcome(folder / "whole", STEPS), folder)
        return made[name]

    return make


def killed_and_resumed(argv, folder, kills, output_dir):
    """Kill the run at each place in turn; every resume is the same command."""
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [*argv, "--output_dir", str(output_dir), "--resume_from_checkpoint", "true"]
    for place, nth in kills:
        code, text = run(command, folder, place, nth)
        assert code == -signal.SIGKILL, (place, nth, text)
    code, text = run(command, folder)
    assert code == 0, text
    return outcome(output_dir, STEPS)


def test_a_run_killed_at_every_turn_equals_one_that_never_was(whole_runs):
    """Before any checkpoint, in a rollout, in a backward pass after a checkpoint in mid-epoch, with half a file of the
    optimizer on the disk, before the rename, and in the last evaluation; log lines are made of two steps."""
    argv, want, folder = whole_runs("full", **FULL, logging_steps=2, save_steps=1)
    kills = [
        ("rollout", 2),
        ("optimizer half written", 1),
        ("backward", 2),
        ("before the rename", 1),
        ("evaluation", 1),
    ]
    got = killed_and_resumed(argv, folder, kills, folder / "killed")
    assert_same(got, want)
    assert [row["step"] for row in got["metrics"]] == [2, 4, 5]
    assert not (folder / "killed" / SAVING).exists()


EVERYWHERE = [
    ("rollout", 4),
    ("teacher", 4),
    ("backward", 7),
    ("optimizer", 4),
    ("log", 8),
    ("weights half written", 2),
    ("optimizer half written", 3),
    ("before the manifest", 2),
    ("before the rename", 2),
    ("after the rename", 2),
    ("evaluation", 3),
    ("final save", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("place", EVERYWHERE, ids=lambda p: p[0])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_kill_at_any_place_changes_nothing(whole_runs, kind, place):
    argv, want, folder = whole_runs(f"{kind}-2", **(LORA if kind == "lora" else FULL), logging_steps=3, save_steps=2)
    assert_same(killed_and_resumed(argv, folder, [place], folder / "killed"), want)


GRPO = {**LORA, "num_generations": 2, "per_device_train_batch_size": 2, "template": "paper"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [("grpo rollout", 4), ("backward", 6), ("before the rename", 2), ("after the rename", 1)]
)
def test_grpo_goes_on_too(whole_runs, place):
    argv, want, folder = whole_runs("grpo", "grpo", **GRPO)
    got = killed_and_resumed(argv, folder, [place], folder / "killed")
    assert_same(got, want)
    steps = [r["step"] for r in got["rollouts"]]
    assert steps == sorted(steps)
    assert len(steps) == STEPS * 4


def test_a_grpo_checkpoint_inside_a_rollouts_use_is_refused(tmp_path, tokenizer, capsys):
    from rgsd.cli import main

    recipe = make_world(tmp_path, tokenizer, **{**GRPO, "num_iterations": 2, "save_steps": 1})
    assert main(["grpo", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 1
    assert "save_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_kills_at_random_seconds(tmp_path, tokenizer):
    """As in real life: processes of `rgsd train`, killed at random times."""
    recipe = make_world(tmp_path, tokenizer, **FULL, save_steps=1)
    base = [sys.executable, "-m", "rgsd", "train", "--config", str(recipe)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    start = time.monotonic()
    subprocess.run([*base, "--output_dir", str(tmp_path / "whole")], env=env, check=True, capture_output=True)
    length = time.monotonic() - start
    want = outcome(tmp_path / "whole", STEPS)
    chance = random.Random(0)
    survived = 0
    for number in range(20):
        out = tmp_path / f"run{number % 4}"
        if number % 4 == number:
            shutil.rmtree(out, ignore_errors=True)
        command = [*base, "--output_dir", str(out), "--resume_from_checkpoint", "true"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(0.45, 1.0) * length)
            survived += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if survived and process.returncode == 0:
            assert_same(outcome(out, STEPS), want)
            shutil.rmtree(out)
    for out in tmp_path.glob("run[0-3]"):
        command = [*base, "--output_dir", str(out), "--resume_from_checkpoint", "true"]
        subprocess.run(command, env=env, check=True, capture_output=True)
        assert_same(outcome(out, STEPS), want)


# --- Checkpoint folders -----------------------------------------------------------------------------------------------


def checkpoint(folder, step, **files):
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name, text in files.items():
        (made / name).write_text(text)
    sizes = {name: len(text) for name, text in files.items()}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    (made / MANIFEST).write_text(json.dumps({"step": step, "files": sizes, "sha256": digests}))
    return made


def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path):
    good = checkpoint(tmp_path, 2, weights="abcd")
    (checkpoint(tmp_path, 4, weights="abcd") / "weights").write_text("ab")
    (checkpoint(tmp_path, 6, weights="abcd") / "weights").unlink()
    (checkpoint(tmp_path, 10, weights="abcd") / MANIFEST).write_text('{"fi')
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-draft").mkdir()
    told = []
    assert last_complete(tmp_path, told.append) == good
    assert [t.split(":")[0] for t in told] == [f"Skipping checkpoint-{n}" for n in (10, 8, 6, 4)]
    assert "weights has 2 bytes" in told[3]
    assert "weights is missing" in told[2]
    assert MANIFEST in told[0]
    assert find_checkpoint(tmp_path, True, told.append) == find_checkpoint(tmp_path, "true", told.append) == good
    assert find_checkpoint(tmp_path, "false") is find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path / "nothing", True) is None


def test_a_named_checkpoint_must_be_whole(tmp_path):
    damaged = checkpoint(tmp_path, 4, weights="abcd")
    (damaged / "weights").write_text("ab")
    with pytest.raises(RunError, match="weights has 2 bytes"):
        find_checkpoint(tmp_path, str(damaged))
    with pytest.raises(RunError, match="checkpoint-5"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-5"))
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError, match="other"):
        find_checkpoint(tmp_path, str(tmp_path / "other"))
    foreign = tmp_path / "checkpoint-7"
    foreign.mkdir()
    told = []
    assert find_checkpoint(tmp_path, str(foreign), told.append) == foreign
    assert told[0].startswith("checkpoint-7")
    assert problem_of(foreign)


def test_lines_are_trimmed_whole(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert trim_lines(file, lambda row: row["step"] < 3) == 1
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert trim_lines(tmp_path / "none.jsonl", lambda row: True) == 0


@pytest.mark.parametrize(
    "line", ["{oops", "[1]", "{}", '{"step": "x"}', "7", '{"step": ' + "9" * 5000 + "}", "[" * 90_000]
)
def test_a_damaged_line_is_named_when_lines_are_trimmed(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1}\n' + line + "\n" + '{"step": 3, "loss": NaN}\n')
    with pytest.raises(RunError, match=r"rows\.jsonl, line 2"):
        trim_lines(file, lambda row: row["step"] < 3)


def test_another_model_or_other_data_cannot_go_on(tmp_path, tokenizer, capsys):
    from conftest import tiny_model

    from rgsd.cli import main

    recipe = make_world(tmp_path, tokenizer, **FULL, max_steps=1, save_steps=1, evaluate=False)
    argv = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    tiny_model(tokenizer, seed=1).save_pretrained(tmp_path / "model")
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 1
    assert "model_fingerprint was" in capsys.readouterr().err


def test_saved_steps_beyond_the_limit_are_deleted_only_after_the_new_one_is_whole(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **FULL, save_steps=1, save_total_limit=1, evaluate=False, max_steps=3)
    argv = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    code, text = run(argv, tmp_path, "before the rename", 2)
    assert code == -signal.SIGKILL, text
    assert last_complete(tmp_path / "run").name == "checkpoint-1"
    code, text = run([*argv, "--resume_from_checkpoint", "true"], tmp_path)
    assert code == 0, text
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_that_falls_between_is_a_config_error():
    from rgsd.training.checkpoint_mixin import check_alignment

    check_alignment(4, 2)
    with pytest.raises(ConfigError, match="save_steps is 3"):
        check_alignment(3, 2)
