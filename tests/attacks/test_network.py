"""No command uses the network unless asked to: each runs where every lookup and connection is refused and logged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from rgsd.errors import ModelError
from rgsd.models import load_model, load_trained, source_of

REFUSING = Path(__file__).parent / "no_network"
SRC = Path(__file__).parent.parent.parent / "src"
RECIPE = {
    "model_name_or_path": "nano",
    "held_out": 2,
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": "all-linear",
    "max_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 4,
    "eval_max_new_tokens": 4,
    "gradient_checkpointing": False,
    "report_to": "none",
    "use_cpu": True,
}


def rgsd(folder, *argv):
    """Run a command as an online machine would; returns its exit code, its output and its network requests."""
    log = folder / "network.txt"
    log.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI")}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(REFUSING), str(SRC)]),
        "NETWORK_LOG": str(log),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "rgsd", *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    asked = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout + done.stderr, asked


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    rows = [
        {
            "id": f"r{i}",
            "prompt": "Name a colour" + " now" * i,
            "rubric": [{"criterion": f"Names red {i}.", "weight": 1, "check": {"any": ["red", "a"]}}],
        }
        for i in range(6)
    ]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"data": str(folder / "data.jsonl")}))
    grpo = RECIPE | {"data": str(folder / "data.jsonl"), "num_generations": 2}
    (folder / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    (folder / "lab.yaml").write_text(yaml.safe_dump({"arms": {"tiny": {"command": "train", "max_steps": 1}}}))
    return folder


@pytest.mark.integration
@pytest.mark.slow
def test_no_command_touches_the_network(world):
    short = ["--data", "data.jsonl", "--max_new_tokens", "4"]
    commands = [
        ["data", "data.jsonl"],
        ["train", "--config", "recipe.yaml", "--output_dir", "mine"],
        ["grpo", "--config", "grpo.yaml", "--output_dir", "grpo"],
        ["sft", "--config", "recipe.yaml", "--output_dir", "sft"],
        ["gap", "nano", *short, "--rollout_tokens", "4", "--output_dir", "gap"],
        ["eval", "nano", "mine", *short, "--output_dir", "eval"],
        ["report", "mine", "--output", "report.html"],
        ["export", "mine", "--output_dir", "out"],
        ["explain", "mine", "--output", "explain.html"],
        ["audit", "mine", "--audits", "length"],
        ["compare", "mine:base", "mine:trained"],
        ["lab", "--grid", "lab.yaml", "--arms", "tiny", "--workers", "1", "--output_dir", "lab"],
    ]
    for argv in commands:
        code, text, asked = rgsd(world, *argv)
        assert asked == [], (argv, text)
        assert code == 0 or argv[0] == "sft", (argv, text)  # a nano model may have nothing to learn from itself


@pytest.mark.integration
def test_one_training_run_touches_no_network(world):
    code, text, asked = rgsd(world, "train", "--config", "recipe.yaml", "--output_dir", "one", "--evaluate", "false")
    assert (code, asked) == (0, []), text


@pytest.mark.integration
def test_an_unfinished_run_is_no_hub_id(world):
    folder = world / "unfinished"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "run.json").write_text(json.dumps({"status": "running"}))
    code, text, asked = rgsd(world, "eval", "unfinished", "--data", "data.jsonl", "--output_dir", "of-unfinished")
    assert (code, asked) == (1, [])
    assert "'running'" in text


def test_a_name_with_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("mine/model", "./owner/model", str(tmp_path / "none"), "a/b/c", "../x", "~/model", "owner/"):
        with pytest.raises(ModelError, match="there is no model folder"):
            source_of(name, "main")
    assert source_of("owner/model", "main") == ("owner/model", {"revision": "main"})
    assert source_of("mine", "main") == ("mine", {"local_files_only": True})


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapters_own_base_is_not_fetched(tmp_path, tokenizer, has_config):
    """transformers follows an adapter's file to another model even where the folder holds a whole one."""
    if has_config:
        tiny_model(tokenizer).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/model"}')
    with pytest.raises(ModelError, match="is an adapter"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda a: (a / "adapter_model.safetensors").unlink(), "lacks adapter_config.json or its weights"),
        (lambda a: (a / "adapter_config.json").unlink(), "lacks adapter_config.json or its weights"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "peft_type None"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda a: (a / "adapter_config.json").write_text('{"peft_type": "XLORA"}'), "peft_type 'XLORA'"),
    ],
)
def test_a_runs_adapter_that_lacks_a_file_is_not_looked_up(tmp_path, tokenizer, monkeypatch, damage, said):
    """peft would ask the hub for `run/adapter`, a name that a stranger may own there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: pytest.fail(f"looked up {a}"))
    model = tiny_model(tokenizer)
    model.save_pretrained("base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("run/adapter")
    for place in ("base", "run/adapter"):
        tokenizer.save_pretrained(place)
    Path("run/config.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(tmp_path / "base")}))
    Path("run/run.json").write_text(json.dumps({"status": "finished"}))
    load_trained(Path("run"))  # whole, it loads
    damage(Path("run/adapter"))
    with pytest.raises(ModelError, match=said):
        load_trained(Path("run"))


def test_a_dtype_that_torch_lacks_is_named():
    with pytest.raises(ModelError, match="dtype must be auto"):
        load_model("nano", dtype="float3")
