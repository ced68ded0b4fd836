"""A resumed run keeps the settings that affect its weights; other changes are recorded with their step."""

import json

import pytest
import yaml
from support.killing import make_world

from rgsd.cli import main
from rgsd.errors import RunError
from rgsd.training.changes import Change, allowed_changes, recorded

DEFAULTS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": -1, "beta": 0.5}
OLD = {"learning_rate": 0.01, "max_steps": 4, "processes": 1, "gradient_accumulation_steps": 2, "output_dir": "a"}


def differ(kind="rgsd", old=(), **new):
    old = OLD | dict(old)
    return allowed_changes(old, old | new, DEFAULTS, kind=kind, run="RUN")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", 9), ("save_steps", 3), ("logging_steps", 5), ("report_to", "wandb"), ("evaluate", False),
     ("dataloader_num_workers", 2), ("judge_budget", 3.0), ("judge", "openai/x")],
)  # fmt: skip
def test_what_does_not_decide_the_weights_may_change(name, value):
    assert differ(**{name: value}) == [Change(name, OLD.get(name), value)]


@pytest.mark.parametrize("kind", ["rgsd", "grpo", "sft"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.02), ("teacher_model_kind", "ema"), ("beta", 1.0), ("clip", "none"), ("template", "cover"),
     ("seed", 1), ("per_device_train_batch_size", 2), ("max_steps", 3), ("max_steps", -1), ("processes", 2)],
)  # fmt: skip
def test_what_decides_the_weights_may_not(kind, name, value):
    with pytest.raises(RunError) as refused:
        differ(kind, **{name: value})
    for part in (name, repr(value), repr(OLD.get(name, DEFAULTS.get(name))), "--overwrite", "output_dir"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "name"), [("grpo", "judge"), ("grpo", "judge_mode"), ("sft", "eval_generation_batch_size")]
)
def test_what_decides_the_weights_of_one_kind_alone(kind, name):
    with pytest.raises(RunError, match=name):
        differ(kind, **{name: "x"})
    assert differ("rgsd", **{name: "x"})


def test_processes_may_change_while_a_step_sees_as_many_responses():
    found = differ(processes=2, gradient_accumulation_steps=1)
    assert {c.setting for c in found} == {"processes", "gradient_accumulation_steps"}
    with pytest.raises(RunError, match="processes"):
        differ(processes=2, gradient_accumulation_steps=4)


def test_unset_is_the_default_and_another_name_of_the_folder_is_no_change():
    assert differ(beta=0.5, output_dir="b", criteria_tags=[], clip=None) == []


def test_a_change_is_recorded_once():
    change = [Change("max_steps", 2, 4)]
    once = recorded([], change, 2)
    assert once == recorded(once, change, 2) == [{"step": 2, "setting": "max_steps", "from": 2, "to": 4}]


COMMANDS = {
    "train": {"learning_rate": 0.5, "teacher_model_kind": "ema", "beta": 1.0, "clip": "none"},
    "grpo": {"learning_rate": 0.5, "beta": 0.3, "temperature": 0.7},
    "sft": {"learning_rate": 0.5, "drop_leaks": False},
}
ALL = {"template": "cover", "seed": 7, "per_device_train_batch_size": 2}


@pytest.mark.integration
@pytest.mark.parametrize("command", COMMANDS)
def test_a_resumed_run_refuses_other_settings_and_records_a_longer_one(tmp_path, tokenizer, capsys, command):
    more = {
        "train": {},
        "grpo": {"num_generations": 2, "per_device_train_batch_size": 4},
        "sft": {"max_completion_length": 400},  # by then the tiny model has ended some response
    }[command]
    recipe = make_world(tmp_path, tokenizer, max_steps=1, save_steps=1, evaluate=False, **more)
    folder = tmp_path / "run"
    argv = [command, "--config", str(recipe), "--output_dir", str(folder)]
    assert main(argv) == 0
    before = {name: (folder / name).read_text() for name in ("run.json", "config.yaml")}
    for name, value in {**COMMANDS[command], **ALL}.items():
        capsys.readouterr()
        assert main([*argv, "--resume_from_checkpoint", "true", f"--{name}", str(value)]) == 1, name
        assert name in capsys.readouterr().err
        assert {n: (folder / n).read_text() for n in before} == before, name
    assert main([*argv, "--resume_from_checkpoint", "true", "--max_steps", "2"]) == 0
    assert (folder / "checkpoint-2").is_dir()
    assert json.loads((folder / "run.json").read_text())["changes"] == [
        {"step": 1, "setting": "max_steps", "from": 1, "to": 2}
    ]
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_steps"] == 2


@pytest.mark.integration
def test_a_template_whose_file_was_edited_is_another_template(tmp_path, tokenizer, capsys):
    template = tmp_path / "own.jinja"
    text = "{{ question }}\n{% for criterion in criteria %}{{ criterion.text }}{{ criterion.mark }}\n{% endfor %}"
    template.write_text(text)
    recipe = make_world(tmp_path, tokenizer, max_steps=1, save_steps=1, evaluate=False, template=str(template))
    argv = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    template.write_text("Mind this.\n" + text)
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 1
    assert "template_fingerprint was" in capsys.readouterr().err
