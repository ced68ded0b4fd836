"""How much of the rubric weight recurs across prompts."""

import json
import random

import pytest

from rgsd.data import load, summarise
from rgsd.data.recurrence import Recurrence, in_words, recurrence
from rgsd.rubrics import Criterion, Example, Rubric


def example(name, *criteria, prompt=None):
    message = {"role": "user", "content": prompt or f"Question {name}?"}
    return Example(id=name, messages=(message,), rubric=Rubric(tuple(Criterion(text, w) for text, w in criteria)))


def test_only_what_several_prompts_have_recurs_by_absolute_weight():
    found = recurrence(
        [
            example("a", ("Names a doctor.", 6), ("Says that rest helps.", 4)),
            example("b", ("names a DOCTOR", 5), ("Says that tea is hot.", 3)),
            example("c", ("Shouts.", -2), ("Says that water is wet.", 1)),
            example("d", ("Shouts!", -3), ("Says that ice is cold.", 1)),
        ]
    )
    assert found.weight_share == pytest.approx((6 + 5 + 2 + 3) / 25)
    assert [(c.n_prompts, c.is_pitfall) for c in found.criteria] == [(2, False), (2, True)]
    assert found.criteria[0].weight_share == pytest.approx(11 / 25)
    assert found.criteria[0].text in ("Names a doctor.", "names a DOCTOR")


def test_a_criterion_that_one_prompt_repeats_does_not_recur():
    found = recurrence([example("a", ("Names a doctor.", 6), ("Names a doctor.", 6)), example("b", ("Says hello.", 1))])
    assert found == Recurrence(0.0, ())
    assert in_words(found.to_row()) == "no criterion recurs across prompts"


def test_copies_of_a_prompt_count_once():
    rows = [example(n, ("Names a doctor.", 6), prompt="What helps with a cough?") for n in "ab"]
    near = [example("c", ("Names a doctor.", 6), prompt="Please, what helps with the cough?  ")]
    near += [example("d", ("Names a doctor.", 6), prompt="what helps with the cough")]
    assert recurrence(rows).weight_share == 0.0
    assert recurrence(near).weight_share == 0.0
    assert recurrence([*rows, example("e", ("Names a doctor.", 2))]).weight_share == 1.0


def test_a_merit_and_a_pitfall_of_the_same_words_are_two_criteria():
    found = recurrence([example("a", ("Uses bullets.", 3)), example("b", ("Uses bullets.", -3))])
    assert found.weight_share == 0.0


def test_nearly_the_same_text_recurs():
    long = " ".join(f"word{i}" for i in range(60)) + " "
    rows = [
        example("a", (long + "every day", 3)),
        example("b", (long + "every single day", 2)),
        example("c", ("No.", 5)),
    ]
    found = recurrence(rows)
    assert found.weight_share == pytest.approx(0.5)
    assert [c.n_prompts for c in found.criteria] == [2]


def test_words():
    assert in_words({"weight_share": None}) == ""
    assert in_words({"weight_share": 0.001}).startswith("less than 1 % of the rubric weight recurs")
    assert in_words({"weight_share": 0.624}) == (
        "62 % of the rubric weight recurs across prompts: a model can learn up to that share from any rubric"
    )


def test_the_share_of_many_rows_is_the_brute_force_one(tmp_path):
    rng = random.Random(0)
    pool = [f"States fact {rng.random()} about it." for _ in range(120)]
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"Question {i} about {rng.random()}?",
            "rubric": [{"criterion": rng.choice(pool), "weight": rng.choice([-2, 1, 4])} for _ in range(3)],
        }
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    loaded = load(str(tmp_path / "rows.jsonl"))
    prompts, total, recurring = {}, 0.0, 0.0
    for e in loaded.examples:
        for c in e.rubric:
            prompts.setdefault((c.text, c.is_pitfall), set()).add(e.id)
    for e in loaded.examples:
        for c in e.rubric:
            total += abs(c.weight)
            recurring += abs(c.weight) * (len(prompts[(c.text, c.is_pitfall)]) > 1)
    assert summarise(loaded)["recurrence"]["weight_share"] == pytest.approx(recurring / total)


def test_the_bundled_data_say_what_recurs(capsys):
    from rgsd.cli import main

    assert main(["data", "bundled"]) == 0
    said = capsys.readouterr().out
    assert "% of the rubric weight recurs across prompts" in said
    assert "recurring criterion: " in said
