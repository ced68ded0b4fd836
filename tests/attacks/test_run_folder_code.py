"""A run's folder is data: its own `trust_remote_code` has no effect."""

import json

import pytest
import yaml
from conftest import tiny_model

from rgsd import models
from rgsd.cli import main
from rgsd.errors import ModelError
from rgsd.evaluation.config import MeasureConfig
from rgsd.evaluation.policies import load_policy
from rgsd.evaluation.run_ref import RunRef

EXPLOIT = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("executed")
class Config(LlamaConfig):
    model_type = "stranger"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def strangers_run(tmp_path, tokenizer):
    """A finished run whose base and saved model ship code that leaves a mark when it runs."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    for place in (tmp_path / "base", run / "model"):
        tiny_model(tokenizer).save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / "code.py").write_text(EXPLOIT.format(mark=str(mark)))
        config = json.loads((place / "config.json").read_text())
        config |= {
            "model_type": "stranger",
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        }
        (place / "config.json").write_text(json.dumps(config))
    settings = {"model_name_or_path": str(tmp_path / "base"), "trust_remote_code": True, "data": "bundled"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "run.json").write_text(json.dumps({"status": "finished"}))
    return run, mark


def test_a_run_that_trusts_its_code_is_not_trusted(strangers_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, mark = strangers_run
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for argv in (
        ["export", str(run), "--output_dir", "out"],
        ["eval", str(run), "--max_prompts", "1", "--output_dir", "eval"],
        ["eval", f"{run}:base", "--max_prompts", "1", "--output_dir", "eval-base"],
        ["explain", str(run), "--trust_remote_code", "false"],
        ["train", "--model_name_or_path", str(run), "--data", "bundled", "--max_steps", "1", "--output_dir", "second"],
    ):
        main(argv)
        assert not mark.exists(), argv
    assert "Ignoring trust_remote_code" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_an_attention_from_the_hub_is_code(tmp_path, tokenizer, key):
    tiny_model(tokenizer).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "stranger/attention"}))
    for attention in (None, "eager"):  # the file wins over the setting
        with pytest.raises(ModelError, match="is code on the hub"):
            models.load_model(str(tmp_path), attn_implementation=attention)


def test_every_loader_ignores_it(strangers_run):
    run, mark = strangers_run
    for name in (str(run), f"{run}:base"):
        with pytest.raises(ModelError):
            load_policy(RunRef.parse(name), MeasureConfig())
    with pytest.raises(ModelError):
        models.load_trained(run)
    assert not mark.exists()


def test_the_commands_own_flag_counts(strangers_run, tmp_path):
    run, mark = strangers_run
    load_policy(RunRef.parse(str(run)), MeasureConfig(trust_remote_code=True))
    assert mark.exists()
