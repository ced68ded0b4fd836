"""`rgsd init`: its files are valid and train, and it replaces nothing unasked."""

import json

import pytest
from conftest import tiny_model

from rgsd import data as datasets
from rgsd.cli import main
from rgsd.cli.train import parse_recipe
from rgsd.workflows.starter import FILES, start


def test_the_recipe_parses_and_points_at_the_rubrics(tmp_path):
    folder = tmp_path / 'my "own" rubrics'
    recipe, rubrics, _ = start(folder)
    parsed = parse_recipe(["--config", str(recipe)])
    assert parsed.data.data == str(rubrics)
    assert parsed.training.output_dir == str(folder / "run")
    assert parsed.model.model_name_or_path == "embedded-warm"
    assert parsed.training.report_to == []
    assert parsed.training.beta == 0.0
    comments = [line for line in recipe.read_text().splitlines() if "#" in line]
    assert len(comments) > 20
    assert "FOLDER" not in recipe.read_text()


def test_five_prompts_with_checks_and_the_same_without(tmp_path):
    _, rubrics, judged = start(tmp_path / "x")
    checked, plain = (datasets.load(str(path)).examples for path in (rubrics, judged))
    assert len(checked) == len(plain) == 5
    assert all(e.rubric.is_checkable for e in checked)
    assert not any(c.check for e in plain for c in e.rubric)
    assert any(c.is_pitfall for e in checked for c in e.rubric)
    for a, b in zip(checked, plain, strict=True):
        assert a.id == b.id
        assert [(c.text, c.weight) for c in a.rubric] == [(c.text, c.weight) for c in b.rubric]


GOOD = {
    "kettle": "In short, vinegar dissolves it.\n- Boil vinegar in it.\n- Rinse it twice.\nDo not use bleach.",
    "bicycle": "In short, clean it.\n- Clean the chain first.\n- Then oil it lightly.\nNever use olive oil.",
    "basil": "In short, it drowns.\n- Too much water rots it.\n- It wants sun.\nPinch the top so that it branches.",
    "interview": "In short, read and rest.\n- Read about the company.\n- Write down a question or two.\nThen sleep.",
    "rice": "In short, rinse it.\n- Rinse it until clear.\n- Take two cups of water to one of rice.\nDo not stir it.",
}


def test_the_checks_accept_a_good_answer_and_refuse_an_empty_one(tmp_path):
    from rgsd.judges import JudgeConfig, build_judge
    from rgsd.rubrics import score

    _, rubrics, _ = start(tmp_path / "x")
    judge = build_judge(JudgeConfig())
    for example in datasets.load(str(rubrics)).examples:
        for answer, wanted in ((GOOD[example.id], 1.0), ("I do not know.", 0.0)):
            found = score(example.rubric, judge.judge(example, answer).verdicts, example.scoring, answer)
            assert found.value == wanted, (example.id, answer)


def test_nothing_is_replaced_unasked(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert main(["init", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n  rgsd ") == 3
    (folder / "recipe.yaml").unlink()
    (folder / "rubrics.jsonl").write_text("my own work")
    assert main(["init", str(folder)]) == 1
    assert "rubrics.jsonl" in capsys.readouterr().err
    assert (folder / "rubrics.jsonl").read_text() == "my own work"
    assert not (folder / "recipe.yaml").exists()  # nothing at all was written
    assert main(["init", str(folder), "--overwrite", "true"]) == 0
    assert "kettle" in (folder / "rubrics.jsonl").read_text()
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("taken", ["file", "under"])
def test_a_place_that_is_no_folder_is_refused(tmp_path, capsys, taken):
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / ("file" if taken == "file" else "file/under"))]) == 1
    assert "folder" in capsys.readouterr().err


def test_the_three_commands_that_it_names_work(tmp_path, tokenizer, capsys, monkeypatch):
    """The printed command, with a model and a length small enough for a unit test."""
    monkeypatch.chdir(tmp_path)
    tiny_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    assert main(["init"]) == 0
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  rgsd ")]
    assert [c[0] for c in commands] == ["data", "train", "report"]
    small = ["--model_name_or_path", "model", "--max_steps", "2", "--max_completion_length", "8"]
    small += ["--eval_max_new_tokens", "8", "--bf16", "false", "--use_cpu", "true"]
    for command in commands:
        assert main([*command, *(small if command[0] == "train" else [])]) == 0
    results = json.loads((tmp_path / "my-rubrics" / "run" / "results.json").read_text())
    assert [a["n_prompts"] for a in results["arms"]] == [2, 2, 2]
    assert (tmp_path / "report.html").is_file()
