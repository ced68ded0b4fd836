"""`rgsd train --control true`: the mismatched twin, its place in the table, and going on after a kill."""

import json
import shutil

import pytest
import torch
from conftest import write_recipes
from safetensors.torch import load_file
from support.killing import run as run_in_process

from rgsd.cli import main
from rgsd.evaluation.conclusions import control_sentence
from rgsd.evaluation.samples import read_samples
from rgsd.evaluation.summaries import paired_difference, show_results
from rgsd.report import read, report_page
from rgsd.report.facts import verdict
from rgsd.report.page import as_json
from rgsd.runs import open_run

pytestmark = pytest.mark.integration  # these tests train

ANSWERS = ["[a-h]", "[i-p]", "[q-z]", "[0-9]", "[A-Z]"]


def write_data(path):
    """Fourteen prompts whose rubrics differ, with criteria of every kind."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"What helps with a cough number {i}?",
            "rubric": [
                {"criterion": f"Has {i}.", "weight": 5, "check": {"regex": ANSWERS[i % 5]}, "tags": ["content", "own"]},
                {"criterion": "Is long.", "weight": 2, "check": {"regex": ".{9}"}, "tags": ["form", "long"]},
                {"criterion": "Shouts.", "weight": -2, "check": {"regex": "[A-Z]{2}"}, "tags": ["pitfall", "loud"]},
            ],
        }
        for i in range(14)
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A recipe with a control, and the run that it made."""
    folder = tmp_path_factory.mktemp("world")
    write_recipes(folder, tokenizer)
    write_data(folder / "data.jsonl")
    assert main(["train", "--config", str(folder / "recipe.yaml"), "--control", "true"]) == 0
    return folder


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def untimed(folder):
    table = json.loads((folder / "results.json").read_text())
    for arm in table["arms"]:
        arm["usage"].pop("seconds", None)
    return table | {"provenance": None}


def test_the_twin_is_the_run_that_the_same_command_trains_mismatched(world, tmp_path):
    recipe = ["train", "--config", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "alone")]
    assert main([*recipe, "--privileged_context", "mismatched"]) == 0
    assert_equal(weights(world / "run" / "control"), weights(tmp_path / "alone"))
    right = weights(world / "run")
    assert any(not torch.equal(right[n], t) for n, t in weights(world / "run" / "control").items())
    twin = open_run(world / "run" / "control", finished=True)
    alone = open_run(tmp_path / "alone")
    assert (twin.meta["kind"], twin.roles) == ("rgsd", alone.roles)
    assert twin.meta["control_of"] == open_run(world / "run").meta["id"]
    assert twin.settings["privileged_context"] == "mismatched"
    own, theirs = ([s for s in read_samples(r) if s.arm == "trained"] for r in (twin, alone))
    assert [s.response for s in own] == [s.response for s in theirs]


def test_the_base_is_not_evaluated_a_second_time(world):
    right, twin = open_run(world / "run"), open_run(world / "run" / "control")
    assert {s.arm for s in read_samples(twin)} == {"base", "trained"}
    of = {r: [s for s in read_samples(r_) if s.arm == "base"] for r, r_ in (("right", right), ("twin", twin))}
    assert of["right"] == of["twin"]


def test_the_table_says_what_the_right_rubric_added(world, capsys):
    right, twin = open_run(world / "run", finished=True), open_run(world / "run" / "control")
    table = json.loads((right.folder / "results.json").read_text())
    roles = {a["arm"]: a["role"] for a in table["arms"]}
    assert list(roles) == ["base", "base+rubric", "trained", "control"]
    assert roles["control"] == right.roles["control"] == "trained control"
    ours = [s for s in read_samples(right) if s.arm == "trained"]
    theirs = [s for s in read_samples(twin) if s.arm == "trained"]
    expected = paired_difference(theirs, ours)
    assert expected is not None
    assert table["differences"]["trained - control"]["mean"] == expected.mean
    assert set(table["gains_by_tag"]["trained - control"]) == {"content", "form", "pitfall"}

    show_results(table)
    said = capsys.readouterr().out
    assert "control: trained" in said
    assert "trained minus control" in said
    assert said.strip().splitlines()[-1].startswith("The right rubric against training on another prompt's rubric")


def test_gains_by_tag_are_those_counted_by_hand(world):
    right = open_run(world / "run")
    table = json.loads((right.folder / "results.json").read_text())
    base, trained = ({s.example_id: s for s in read_samples(right) if s.arm == arm} for arm in ("base", "trained"))
    for tag, gain in table["gains_by_tag"]["trained - base"].items():
        moves = [
            (b.satisfied or 0.0) - (a.satisfied or 0.0)
            for i in base
            for a, b in zip(base[i].verdicts, trained[i].verdicts, strict=True)
            if tag in a.tags
        ]
        assert gain["n_criteria"] == len(moves) == 4
        assert gain["value"] == pytest.approx(sum(moves) / len(moves))
        assert gain["after"] - gain["before"] == pytest.approx(gain["value"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--privileged_context", "mismatched"], "--privileged_context rubric"),
        (["--privileged_context", "none"], "--privileged_context rubric"),
        (["--privileged_context", "reference"], "sees no rubric"),
        (["--evaluate", "false"], "--evaluate"),
    ],
)
def test_nothing_to_control_is_refused_before_anything_is_written(world, tmp_path, capsys, flags, match):
    argv = ["train", "--config", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), "--control", "true"]
    assert main([*argv, *flags]) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_control_of_one_prompt_is_refused_before_the_first_half_is_trained(world, tmp_path, capsys):
    """No other prompt's rubric could be shown."""
    argv = ["train", "--config", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*argv, "--control", "true", "--max_train_prompts", "1", "--per_device_train_batch_size", "1"]) == 1
    assert "control" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_grpo_has_no_twin(world, tmp_path, capsys):
    argv = ["grpo", "--config", str(world / "grpo.yaml"), "--output_dir", str(tmp_path / "run"), "--control", "true"]
    assert main(argv) == 1
    assert "GRPO" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "nth"),
    [(place, nth) for place, n in (("rollout", 4), ("final save", 2), ("results", 5)) for nth in range(1, n + 1)],
)
def test_a_run_that_was_killed_in_either_half_goes_on_to_the_same_table(world, tmp_path, place, nth):
    argv = ["train", "--config", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), "--control", "true"]
    code, text = run_in_process(argv, tmp_path, place, nth)
    assert code == -9, text
    before = _time_of(tmp_path / "run" / "adapter")
    is_done = open_run(tmp_path / "run").meta.get("half_finished")
    code, text = run_in_process([*argv, "--resume_from_checkpoint", "true"], tmp_path)
    assert code == 0, text
    assert untimed(tmp_path / "run") == untimed(world / "run")
    if is_done:
        assert "Trained and evaluated already" in text
        assert _time_of(tmp_path / "run" / "adapter") == before
    assert_equal(weights(tmp_path / "run" / "control"), weights(world / "run" / "control"))
    assert (
        open_run(tmp_path / "run" / "control", finished=True).meta["control_of"]
        == open_run(tmp_path / "run").meta["id"]
    )


def _time_of(folder):
    return (folder / "adapter_model.safetensors").stat().st_mtime_ns if folder.is_dir() else None


def test_a_finished_run_gets_its_control_later(world, tmp_path, capsys):
    recipe = ["train", "--config", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(recipe) == 0
    before = _time_of(tmp_path / "run" / "adapter")
    assert main([*recipe, "--control", "true", "--resume_from_checkpoint", "true"]) == 0
    assert "Trained and evaluated already" in capsys.readouterr().out
    assert _time_of(tmp_path / "run" / "adapter") == before
    assert untimed(tmp_path / "run") == untimed(world / "run")
    assert open_run(tmp_path / "run").settings["control"] is True


def test_a_longer_run_makes_its_twin_longer_too(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    recipe = [
        "train",
        "--config",
        str(world / "recipe.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
        "--control",
        "true",
    ]
    recipe += ["--save_strategy", "steps", "--save_steps", "1"]
    assert main([*recipe, "--max_steps", "1"]) == 0
    assert main([*recipe, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    for folder in (tmp_path / "run", tmp_path / "run" / "control"):
        assert max(m["step"] for m in open_run(folder, finished=True).read_lines("metrics.jsonl")) == 2


def test_the_reports_first_sentence_says_what_the_right_rubric_added(world):
    table = json.loads((world / "run" / "results.json").read_text())
    found = read([str(world / "run")])
    (facts,) = found.runs
    assert facts.added == table["differences"]["trained - control"]
    assert facts.gains["control"] == table["gains_by_tag"]["trained - control"]
    assert facts.gains["baseline"] == table["gains_by_tag"]["trained - base"]
    first, second, *_ = verdict(facts)
    assert facts.added is not None
    assert first == control_sentence(facts.added)
    assert second.startswith("trained against base")
    html = report_page(found)
    assert "after training on another prompt" in html
    assert "over the control" in html
    assert [a["name"] for a in as_json(found)["runs"][0]["arms"]] == ["base", "base+rubric", "trained", "control"]


def test_the_run_and_its_report_say_what_recurs(world):
    row = open_run(world / "run").meta["recurrence"]
    assert row["weight_share"] == pytest.approx(4 / 9)  # of 5, 2 and -2 a prompt, the last two are in every rubric
    assert [(c["criterion"], c["prompts"]) for c in row["first"]] == [("Is long.", 10), ("Shouts.", 10)]
    (facts,) = read([str(world / "run")]).runs
    assert any(s.startswith("Training data: 44 % of the rubric weight recurs") for s in verdict(facts))


def test_a_run_that_is_replaced_takes_its_control_along(world, tmp_path):
    argv = ["train", "--config", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    before = open_run(tmp_path / "run").meta["id"]
    assert main([*argv, "--overwrite", "true"]) == 0
    assert not (tmp_path / "run" / "control").exists()
    assert open_run(tmp_path / "run", finished=True).meta["id"] != before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_strange_or_unfinished_control_is_left_out_of_the_report(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    open_run(tmp_path / "run" / "control").note(status="running")
    (facts,) = read([str(tmp_path / "run")]).runs
    assert facts.added is None
    assert any("control is not finished" in p for p in facts.problems)
    open_run(tmp_path / "run" / "control").note(status="finished", control_of="another")
    (facts,) = read([str(tmp_path / "run")]).runs
    assert facts.added is None
    assert any("not this run's control" in p for p in facts.problems)


def test_a_comparison_shows_gains_by_tag(world, capsys):
    assert main(["compare", str(world / "run" / "control"), str(world / "run")]) == 0
    said = capsys.readouterr().out
    assert "Criteria satisfied, in points, by tag" in said
    assert all(tag in said for tag in ("content", "form", "pitfall"))


def test_a_report_is_written_at_the_end(world, tmp_path, capsys):
    argv = ["train", "--config", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), "--report", "true"]
    assert main(argv) == 0
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"Report: {path.resolve()}"
    assert path.read_text().startswith("<!doctype html>")
    assert len(open_run(tmp_path / "run").read_lines("explanations.jsonl")) == 1
