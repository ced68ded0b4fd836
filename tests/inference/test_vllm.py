"""`--use_vllm true --vllm_mode server`: TRL's client over real HTTP, against a server that implements its protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.killing import make_world
from support.processes import free_port
from support.vllm_server import FakeVLLM

pytestmark = pytest.mark.integration

TESTS = Path(__file__).parents[1]
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}


def run(world, *argv):
    paths = os.pathsep.join([str(TESTS / "support" / "fake_vllm"), str(TESTS.parent / "src")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "support" / "fake_vllm" / "run_rgsd.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


def vllm_flags(server):
    return (
        *("--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server.url),
        *("--vllm_group_port", str(free_port())),
    )


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_rollouts_come_from_a_server_that_has_the_students_weights(tmp_path, tokenizer, kind):
    peft = LORA if kind == "lora" else {"use_peft": False}
    recipe = make_world(tmp_path, tokenizer, **peft, evaluate=False, max_steps=3, save_steps=3, dtype="bfloat16")
    server = FakeVLLM(tmp_path / "model")
    first = {n: p.detach().clone() for n, p in server.model.named_parameters()}
    try:
        code, text = run(
            tmp_path, "train", "--config", str(recipe), "--output_dir", str(tmp_path / "run"), *vllm_flags(server)
        )
    finally:
        server.close()
    assert code == 0, text
    # One update before each step's rollout, each ended by a reset of the prefix cache, and one request a step.
    paths = [p for p, _ in server.calls]
    assert paths.count("/update_weights") == paths.count("/reset_prefix_cache") == paths.count("/v1/completions") == 3
    order = [
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/v1/completions",
    ]
    assert [p for p in paths if p in order] == order * 3
    requests = [body for path, body in server.calls if path == "/v1/completions"]
    assert all(len(r["prompt"]) == 2 and r["max_tokens"] == 6 for r in requests)
    # The first weights are the base's, later ones are trained (with LoRA: merged).
    for name, value in server.updates[0].items():
        torch.testing.assert_close(value.float(), first[name], atol=1e-2, rtol=1e-2)
    moved = [n for n, v in server.updates[2].items() if not torch.equal(v, server.updates[0][n])]
    assert moved
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
    assert rows[0]["response_length"] == 6
    if kind == "full":  # the last sync sends the weights before the last step, all of them trained
        assert load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors").keys() <= server.updates[2].keys() | {
            "lm_head.weight"
        }


@pytest.mark.slow
def test_grpo_samples_from_the_server_too(tmp_path, tokenizer):
    recipe = make_world(
        tmp_path, tokenizer, **LORA, evaluate=False, max_steps=2, num_generations=2, per_device_train_batch_size=2
    )
    server = FakeVLLM(tmp_path / "model")
    try:
        code, text = run(
            tmp_path, "grpo", "--config", str(recipe), "--output_dir", str(tmp_path / "run"), *vllm_flags(server)
        )
    finally:
        server.close()
    assert code == 0, text
    assert len(server.updates) == 2
    requests = [body for path, body in server.calls if path == "/v1/completions"]
    assert [(len(r["prompt"]), r["n"]) for r in requests] == [(2, 2)] * 2


@pytest.mark.slow
def test_a_server_that_is_not_there_is_said(tmp_path, tokenizer):
    recipe = make_world(tmp_path, tokenizer, **LORA, evaluate=False, max_steps=1)
    code, text = run(
        tmp_path, "train", "--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--use_vllm", "true",
        "--vllm_mode", "server", "--vllm_server_base_url", f"http://127.0.0.1:{free_port()}",
        "--vllm_server_timeout", "0.1",
    )  # fmt: skip
    assert code == 1, text
    assert "Traceback" not in text
    assert "vLLM server can't be reached" in text


def test_vllm_that_is_missing_is_said(tmp_path, tokenizer, capsys):
    from rgsd.cli import main

    recipe = make_world(tmp_path, tokenizer, **LORA, evaluate=False, max_steps=1)
    assert main(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--use_vllm", "true"]) == 1
    assert "pip install 'rgsd[vllm]'" in capsys.readouterr().err
