"""Runs that start from runs, as a user types them: one after another, and as the stages of one recipe."""

import json
import shutil

import pytest
import yaml
from conftest import write_recipes

from rgsd import models
from rgsd.cli import main
from rgsd.runs import open_run


@pytest.fixture
def world(tmp_path, tokenizer):
    """A model folder, a rubric file, recipe.yaml (RGSD), grpo.yaml, and stages.yaml (both)."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"What helps with a cough number {i}?",
            "rubric": [{"criterion": "Has an early letter.", "weight": 5, "check": {"regex": "[a-h]"}}],
        }
        for i in range(10)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    write_recipes(tmp_path, tokenizer)
    shared = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    shared |= {"output_dir": str(tmp_path / "both"), "eval_max_new_tokens": 8}
    del shared["max_steps"], shared["per_device_train_batch_size"]
    stages = [
        {"command": "train", "max_steps": 2, "per_device_train_batch_size": 2, "clip": "none"},
        {"command": "grpo", "max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4},
    ]
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(shared | {"stages": stages}))
    return tmp_path


def scores(run):
    return {a["arm"]: a["score"]["mean"] for a in json.loads((run / "results.json").read_text())["arms"]}


@pytest.mark.integration
@pytest.mark.parametrize("peft", ["true", "false"])
def test_grpo_starts_from_a_run_of_rgsd(world, capsys, peft):
    first, second = world / "run", world / "grpo"
    assert main(["train", "--config", str(world / "recipe.yaml"), "--use_peft", peft]) == 0
    start = ["--model_name_or_path", str(first), "--eval_max_new_tokens", "8", "--use_peft", peft]
    assert main(["grpo", "--config", str(world / "grpo.yaml"), *start]) == 0
    line = open_run(second, finished=True).meta["lineage"]
    assert line == [
        {
            "run": str(first),
            "id": open_run(first).meta["id"],
            "kind": "rgsd",
            "weights": models.trained_identity(first),
        }
    ]
    assert open_run(second).meta["base_identity"] == line[0]["weights"]

    # Every command reads the second run; its base is the first run's policy.
    names = [f"{second}:base", str(first), str(second)]
    where = ["--output_dir", str(world / "eval"), "--max_new_tokens", "8"]
    assert main(["eval", *names, *where]) == 0
    arms = scores(world / "eval")
    assert arms["base"] == arms["run:trained"] == scores(second)["base"]
    assert arms["grpo:trained"] == scores(second)["trained"]
    assert main(["export", str(second), "--output_dir", str(world / "out")]) == 0
    page = ["--max_new_tokens", "8", "-o", str(world / "map.json")]
    assert main(["explain", str(second), "r0", *page]) == 0
    assert main(["report", str(second), "-o", str(world / "report.html")]) == 0
    report = (world / "report.html").read_text()
    assert f"{first} (rgsd)" in report
    assert "starts from" in report

    # Without the first run, an adapter has no base; a whole model does without.
    shutil.rmtree(first)
    shutil.rmtree(world / "eval")
    capsys.readouterr()
    assert main(["eval", str(second), *where, "--data", str(world / "data.jsonl")]) == (1 if peft == "true" else 0)
    if peft == "true":
        assert "move that run back" in capsys.readouterr().err
    assert main(["eval", str(world / "out"), "--data", str(world / "data.jsonl"), *where, "--overwrite", "true"]) == 0


@pytest.mark.integration
def test_stages_train_in_a_row_and_a_finished_one_is_not_repeated(world, capsys):
    command = ["train", "--config", str(world / "stages.yaml")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    first, second = world / "both" / "1-train", world / "both" / "2-grpo"
    assert printed.rstrip().endswith(f"Runs: {first}, {second}")
    assert open_run(second, finished=True).meta["lineage"][0]["id"] == open_run(first, finished=True).meta["id"]
    assert scores(second)["base"] == scores(first)["trained"]

    # Killed in the second stage: the first one stays.
    started = open_run(first).meta["started"]
    record = second / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    assert main(command) == 1
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    assert main([*command, "--resume_from_checkpoint", "true"]) == 0
    assert "is finished and kept" in capsys.readouterr().out
    assert open_run(first).meta["started"] == started
    assert open_run(second, finished=True).meta["resumed"]

    # A finished stage of other settings, or of another first stage, is not taken for this one.
    assert main([*command, "--resume_from_checkpoint", "true", "--learning_rate", "0.5"]) == 1
    assert "learning_rate" in capsys.readouterr().err
    shutil.rmtree(first)
    assert main([*command, "--resume_from_checkpoint", "true"]) == 1
    assert "did not start from" in capsys.readouterr().err
    assert main([*command, "--overwrite", "true"]) == 0


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([], "must be a list of mappings"),
        ("train", "must be a list of mappings"),
        ([{"max_steps": 2}], "the command of stage 1 must be one of train, grpo, sft, got None"),
        ([{"command": "train"}, {"command": "pray"}], "stage 2 must be one of"),
        ([{"command": "train", "output_dir": "x"}], "stage 1 sets output_dir"),
        ([{"command": "train"}, {"command": "grpo", "clip": "none"}], "stage 2:1: unknown setting 'clip'"),
        ([{"command": "train", "num_processes": 2}], "train in one process"),
        ([{"command": "train", "dry_run": True}], "have no dry run"),
    ],
)
def test_malformed_stages_are_refused_before_anything_is_trained(world, capsys, stages, said):
    recipe = yaml.safe_load((world / "stages.yaml").read_text())
    (world / "stages.yaml").write_text(yaml.safe_dump(recipe | {"stages": stages, "per_device_train_batch_size": 2}))
    assert main(["train", "--config", str(world / "stages.yaml")]) == 2
    assert said in capsys.readouterr().err
    assert not (world / "both").exists()


def test_stages_belong_to_rgsd_train(world, capsys):
    assert main(["grpo", "--config", str(world / "stages.yaml")]) == 2
    assert "unknown setting 'stages'" in capsys.readouterr().err


def test_a_stage_with_nothing_to_control_is_refused_before_the_first_trains(world, capsys):
    assert main(["train", "--config", str(world / "stages.yaml"), "--control", "true"]) == 1
    assert "GRPO has none" in capsys.readouterr().err
    assert not (world / "both").exists()
