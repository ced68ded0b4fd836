"""The commands as a user runs them, from files, on a tiny model and a few prompts."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import write_recipes
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgsd.cli import grpo, main, stages, train, warmstart
from rgsd.cli.parsing import recipe_file
from rgsd.cli.train import parse_recipe
from rgsd.errors import ConfigError
from rgsd.models import load_model
from rgsd.runs import open_run

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def world(tmp_path, tokenizer):
    """A model folder, a rubric file and a recipe."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"What helps with a cough number {i}?",
            "rubric": [
                {"criterion": "Advises rest.", "weight": 5, "check": {"any": ["rest"]}},
                {"criterion": f"Recommends syrup {i}.", "weight": -2, "check": {"any": ["syrup"]}},
            ],
        }
        for i in range(10)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    write_recipes(tmp_path, tokenizer)
    return tmp_path


@pytest.mark.parametrize("peft", ["true", "false"])
def test_train_then_export_gives_the_trained_policy(world, capsys, peft):
    recipe = str(world / "recipe.yaml")
    assert main(["train", "--config", recipe, "--use_peft", peft]) == 0
    printed = capsys.readouterr().out
    assert "step 2/2" in printed
    assert "trained" in printed
    assert printed.rstrip().endswith(str(world / "run"))

    run = open_run(world / "run", finished=True)
    assert run.settings["learning_rate"] == 0.01
    assert {"train_fingerprint", "held_out_fingerprint", "model_fingerprint", "versions", "commit"} <= run.meta.keys()
    assert run.meta["near_duplicates"]["groups"] == 0
    results = json.loads((run.folder / "results.json").read_text())
    assert [a["arm"] for a in results["arms"]] == ["base", "base+rubric", "trained"]
    assert all(a["n_prompts"] == 4 and a["coverage"] == 1.0 for a in results["arms"])
    split = json.loads((run.folder / "split.json").read_text())
    assert len(split["train"]) == 6
    assert not set(split["train"]) & set(split["held_out"])
    samples = run.read_lines("samples.jsonl")
    assert len(samples) == 12
    assert samples[0]["verdicts"][0]["criterion"] == "Advises rest."
    assert [m["step"] for m in run.read_lines("metrics.jsonl") if "loss" in m] == [1, 2]

    assert main(["export", str(run.folder), "--output_dir", str(world / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(world / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "out")
    assert tokenizer.chat_template
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert any(moved)
    # The exported model says what the trained one said in the run's own evaluation.
    from rgsd.inference import SamplingConfig, generate

    tokenizer.padding_side = "left"
    trained = [r for r in samples if r["arm"] == "trained"]
    prompts = [[{"role": "user", "content": r["question"]}] for r in trained]
    again = generate(model, tokenizer, prompts, SamplingConfig(8))
    assert [r.text for r in again] == [r["response"] for r in trained]
    assert main(["export", str(run.folder), "--output_dir", str(world / "out")]) == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_unasked_and_its_config_repeats_it(world, capsys):
    recipe = str(world / "recipe.yaml")
    assert main(["train", "--config", recipe]) == 0
    first = (world / "run" / "results.json").read_text()
    assert main(["train", "--config", recipe]) == 1
    assert "--overwrite" in capsys.readouterr().err
    again = ["train", "--config", str(world / "run" / "config.yaml"), "--output_dir", str(world / "second")]
    assert main(again) == 0
    second = json.loads((world / "second" / "results.json").read_text())
    assert second["arms"] == json.loads(first)["arms"]


def test_a_killed_run_goes_on(world):
    recipe = ["train", "--config", str(world / "recipe.yaml"), "--save_strategy", "steps", "--save_steps", "1"]
    assert main([*recipe, "--max_steps", "1"]) == 0
    run = open_run(world / "run")
    run.note(status="running")  # as a kill leaves it
    assert main([*recipe, "--resume_from_checkpoint", "true"]) == 0
    assert open_run(world / "run", finished=True).meta["resumed"]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--config", "no-such.yaml"], "there is no recipe"),
        (["--data", "no-such.jsonl"], "no-such.jsonl"),
        (["--model_name_or_path", "/no/such/model"], "/no/such/model"),
        (["--clip", "both"], "clip"),
        (["--beta", "3"], "beta"),
        (["--held_out", "0.999"], "held"),
        (["--held_out_tags", "none-such"], "held_out_tags"),
        (["--self_written_references", "true"], "privileged_context"),
    ],
)
def test_mistakes_end_with_a_reason(world, capsys, flags, match):
    argv = flags if flags[0] == "--config" else ["--config", str(world / "recipe.yaml"), *flags]
    assert main(["train", *argv]) in (1, 2)
    assert match in capsys.readouterr().err


def test_going_on_without_a_checkpoint_is_refused(world, capsys):
    recipe = ["train", "--config", str(world / "recipe.yaml")]
    assert main(recipe) == 0
    assert main([*recipe, "--resume_from_checkpoint", "true"]) == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_the_readmes_recipe_for_own_data_trains_on_it(world, capsys):
    """recipes/paper.yaml as in README.md, with a model and a batch small enough for a unit test."""
    recipe = Path(__file__).parents[2] / "recipes" / "paper.yaml"
    flags = f"--model_name_or_path {world / 'model'} --data {world / 'data.jsonl'} --output_dir {world / 'own'}"
    small = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_completion_length 16"
    assert main(["train", "--config", str(recipe), *flags.split(), *small.split(), "--dtype", "float32"]) == 0
    assert "step 2/2" in capsys.readouterr().out


def test_an_unknown_field_in_a_recipe_is_named(world):
    text = (world / "recipe.yaml").read_text() + "learning_rat: 1\n"
    (world / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="learning_rat"):
        parse_recipe(["--config", str(world / "recipe.yaml")])


def test_bad_rows_stop_the_run_or_are_listed(world, capsys):
    with (world / "data.jsonl").open("a") as file:
        file.write('\n{"prompt": "x", "rubric": [{"criterion": "", "weight": 1}]}\nnot json\n')
    recipe = ["train", "--config", str(world / "recipe.yaml")]
    assert main(recipe) == 1
    message = capsys.readouterr().err
    assert "row 11" in message
    assert "row 12" in message
    assert main([*recipe, "--skip_bad_rows", "true"]) == 0
    assert "Skipped 2 bad rows" in capsys.readouterr().out


@pytest.mark.parametrize("privileged_context", ["mismatched", "none"])
def test_the_controls_run(world, privileged_context):
    assert main(["train", "--config", str(world / "recipe.yaml"), "--privileged_context", privileged_context]) == 0
    results = json.loads((world / "run" / "results.json").read_text())
    assert [a["arm"] for a in results["arms"]] == ["base", f"base+{privileged_context}", "trained"]


@pytest.mark.parametrize("privileged_context", ["reference", "both"])
def test_self_written_references_serve_training_and_evaluation_and_are_kept(world, capsys, privileged_context):
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    (world / "data.jsonl").write_text("\n".join(json.dumps(r | {"reference": "PUBLISHED"}) for r in rows))
    flags = ["--privileged_context", privileged_context, "--self_written_references", "true", "--template", "cover"]
    flags += ["--save_strategy", "steps", "--save_steps", "2"]
    recipe = ["train", "--config", str(world / "recipe.yaml"), *flags]
    with spied_prompts() as prompts:
        assert main(recipe) == 0
    run = open_run(world / "run", finished=True)
    kept = {r["example_id"]: r["text"] for r in run.read_lines("references.jsonl")}
    assert len(kept) == 10  # six to train on, four to measure on
    shown = [p for p in prompts if any(text.strip() and text.strip() in p for text in kept.values())]
    assert shown
    assert not any("PUBLISHED" in p for p in prompts)  # never the dataset's own in their place
    results = json.loads((run.folder / "results.json").read_text())
    assert [(a["arm"], a["role"]) for a in results["arms"]] == [
        ("base", "baseline"),
        (f"base+{privileged_context}", "conditioned"),
        ("trained", "trained"),
    ]
    # A resumed run and an evaluation take the same ones again.
    assert main([*recipe, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert len(open_run(run.folder).read_lines("references.jsonl")) == 10
    capsys.readouterr()
    arm = f"{world / 'run'}:base+{privileged_context}"
    evaluation = ["eval", arm, "--output_dir", str(world / "e"), "--max_new_tokens", "8", "--template", "cover"]
    assert main(evaluation) == 0
    assert "self-written references" not in capsys.readouterr().out  # none is written
    mine, theirs = (
        {r["example_id"]: r["response"] for r in open_run(folder).read_lines("samples.jsonl") if "+" in r["arm"]}
        for folder in (world / "e", world / "run")
    )
    assert mine == theirs


@contextmanager
def spied_prompts():
    """The prompts that the model reads, as text."""
    from rgsd.inference import transformers_backend as _transformers

    seen, tokenize = [], _transformers.tokenize

    def spy(tokenizer, prompts, kwargs, name):
        seen.extend("\n".join(m["content"] for m in p) for p in prompts)
        return tokenize(tokenizer, prompts, kwargs, name)

    _transformers.tokenize = spy
    try:
        yield seen
    finally:
        _transformers.tokenize = tokenize


OVERWRITING_MISTAKES = [
    (["--model_name_or_path", "/nosuch"], "/nosuch"),
    (["--max_teacher_length", "3"], "teacher prompts exceed"),
    (["--lora_target_modules", "no_such_module"], "no_such_module"),
]


def test_a_mistake_with_overwrite_costs_nothing(world, capsys):
    recipe = ["train", "--config", str(world / "recipe.yaml")]
    assert main(recipe) == 0
    evaluation = ["eval", str(world / "run"), "--output_dir", str(world / "e"), "--max_new_tokens", "8"]
    assert main(evaluation) == 0

    def contents():
        return {str(p): p.read_bytes() for f in ("run", "e") for p in (world / f).rglob("*.json*")}

    before = contents()
    for flags, match in OVERWRITING_MISTAKES:
        assert main([*recipe, "--overwrite", "true", *flags]) == 1
        assert match in capsys.readouterr().err
        assert contents() == before, flags
    wrong = ["eval", "/nosuch", "--data", str(world / "data.jsonl"), "--output_dir", str(world / "e")]
    assert main([*wrong, "--overwrite", "true"]) == 1
    assert contents() == before
    assert sorted(p.name for p in world.iterdir() if p.is_dir()) == ["e", "model", "run"]
    # And without a mistake it is replaced.
    assert main([*recipe, "--overwrite", "true", "--seed", "9"]) == 0
    assert open_run(world / "run", finished=True).settings["seed"] == 9
    assert sorted(p.name for p in world.iterdir() if p.is_dir()) == ["e", "model", "run"]


def test_data_shows_what_a_file_holds(world, capsys):
    assert main(["data", str(world / "data.jsonl"), "--example", "r3", "--template", "cover", "--show_weights"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "rgsd",
        "10 examples",
        "10 positive, 10 negative",
        "number 3?",
        "Cover these points",
        "[weight=5]",
    ):
        assert expected in printed
    assert main(["data", str(world / "data.jsonl"), "--example", "r99"]) == 1


def test_a_run_that_cannot_start_leaves_nothing_behind(world, capsys):
    recipe = ["train", "--config", str(world / "recipe.yaml")]
    assert main([*recipe, "--max_teacher_length", "5"]) == 1
    assert "teacher prompts exceed" in capsys.readouterr().err
    assert not (world / "run").exists()
    assert main(recipe) == 0


def test_help_and_wrong_calls(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_parses(path, monkeypatch):
    if path.name == "warmstart.yaml":
        assert warmstart.COMMAND.parse(["--config", str(path)]).settings[1].model_name_or_path
        return
    monkeypatch.setattr(sys, "argv", ["rgsd"])
    if path.name == "rgsd_then_grpo.yaml":
        parsed = stages.stages_of(recipe_file(["--config", str(path)]), ["--learning_rate", "0.5"], train.parse_all)
        assert [s.command for s in parsed] == ["train", "grpo"]
        assert all(s.recipe.training.learning_rate == 0.5 for s in parsed)
        return
    command = grpo.COMMAND if path.name == "grpo.yaml" else train.COMMAND
    recipe = parse_recipe(["--config", str(path), "--learning_rate", "0.5"], command)
    assert recipe.training.learning_rate == 0.5
    assert recipe.training.output_dir


def test_grpo_on_the_same_recipe_and_eval_of_its_run(world, capsys):
    data = str(world / "data.jsonl")
    assert main(["grpo", "--config", str(world / "grpo.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "step 2/2: reward" in printed
    run = open_run(world / "grpo", finished=True)
    assert run.settings["num_generations"] == 4
    assert run.settings["judge"] == "checks"
    results = json.loads((run.folder / "results.json").read_text())
    assert [a["arm"] for a in results["arms"]] == ["base", "base+rubric", "trained"]
    assert len(run.read_lines("rollouts.jsonl")) == 16

    # `rgsd eval RUN` measures the trained policy on the run's own held-out prompts, and says what the run said.
    where = ["--output_dir", str(world / "eval"), "--max_new_tokens", "8", "--dtype", "float32"]
    names = [f"{run.folder}:base", str(run.folder), f"{run.folder}:base+rubric"]
    assert main(["eval", *names, *where]) == 0
    again = json.loads((world / "eval" / "results.json").read_text())
    assert [a["arm"] for a in again["arms"]] == ["base", "trained", "base+rubric"]
    by_arm = {a["arm"]: a["score"] for a in results["arms"]}
    assert {a["arm"]: a["score"] for a in again["arms"]} == by_arm

    # The same command again generates nothing and gives the same table; other settings are refused.
    before = (world / "eval" / "responses.jsonl").read_bytes()
    assert main(["eval", *names, *where]) == 0
    assert (world / "eval" / "responses.jsonl").read_bytes() == before
    assert main(["eval", *names, *where, "--max_prompts", "2"]) == 1
    assert "other settings (max_prompts" in capsys.readouterr().err
    assert main(["eval", str(world / "model"), "--data", data, "--output_dir", str(world / "all"), *where[2:]]) == 0
    assert json.loads((world / "all" / "results.json").read_text())["arms"][0]["n_prompts"] == 10


def test_gap_scores_three_prompts_takes_the_divergence_and_advises(world, capsys):
    argv = ["gap", str(world / "model"), "--data", str(world / "data.jsonl"), "--output_dir", str(world / "gap")]
    flags = ["--max_new_tokens", "8", "--rollout_tokens", "8", "--dtype", "float32", "--templates", "cover"]
    assert main([*argv, *flags]) == 0
    printed = capsys.readouterr().out
    assert "To train: rgsd train" in printed
    found = json.loads((world / "gap" / "results.json").read_text())
    assert [a["arm"] for a in found["arms"]] == ["base", "base+rubric (cover)", "base+mismatched (cover)"]
    assert found["divergence"]["n"] >= 1
    assert 0 < found["divergence"]["rubric"]["mean"] <= 0.6932
    assert 0 < found["divergence"]["clip_keeps"] <= 1


@pytest.mark.parametrize("command", ["train", "grpo", "sft", "eval", "gap"])
def test_a_base_with_a_nan_weight_is_refused_by_name_everywhere(world, capsys, command):
    model = load_model(str(world / "model"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 1] = float("nan")
    model.save_pretrained(world / "model")
    argv = {
        "grpo": ["grpo", "--config", str(world / "grpo.yaml")],
        "eval": ["eval", str(world / "model"), "--data", str(world / "data.jsonl"), "--output_dir", str(world / "e")],
        "gap": ["gap", str(world / "model"), "--data", str(world / "data.jsonl"), "--output_dir", str(world / "g")],
    }.get(command, [command, "--config", str(world / "recipe.yaml")])
    assert main(argv) == 1
    assert "model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err
