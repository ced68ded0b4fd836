"""Duplicates, and held-out prompts."""

from __future__ import annotations

import json
import random

import pytest

from rgsd.data import Loaded, deduplicate, describe, load, split, subset, summarise
from rgsd.errors import DataError
from rgsd.rubrics import Criterion, Example, Rubric

RUBRIC = Rubric((Criterion("Answers."),))


def example(number: int, prompt: str | None = None) -> Example:
    content = prompt or f"Question {number}?"
    return Example(id=f"e{number}", messages=({"role": "user", "content": content},), rubric=RUBRIC)


EXAMPLES = [example(n) for n in range(60)]


def ids(examples) -> list[str]:
    return [e.id for e in examples]


def test_deduplicate_keeps_the_first_and_shows_the_rest():
    rows = [example(0, "Why?"), example(1, "How?"), example(2, " why? "), example(3, "HOW?")]
    found = deduplicate(rows)
    assert ids(found.examples) == ["e0", "e1"]
    assert ids(found.dropped) == ["e2", "e3"]


@pytest.mark.parametrize(("held_out", "count"), [(7, 7), (0.25, 15), (1, 1), (59, 59)])
def test_split_holds_out_a_count_or_a_share(held_out, count):
    sides = split(EXAMPLES, held_out, seed=3)
    assert len(sides.held_out) == count
    assert len(sides.train) == 60 - count


def test_split_is_disjoint_by_prompt_and_loses_nothing():
    rows = EXAMPLES + [example(100 + n, f"question  {n}?") for n in range(10)]
    sides = split(rows, 20, seed=0)
    assert not {e.prompt_key for e in sides.train} & {e.prompt_key for e in sides.held_out}
    assert ids(sides.dropped) == [f"e{100 + n}" for n in range(10)]
    assert sorted(ids(sides.train + sides.held_out + sides.dropped)) == sorted(ids(rows))


def test_split_does_not_depend_on_the_order_of_the_input():
    sides = split(EXAMPLES, 12, seed=1)
    for seed in range(5):
        shuffled = EXAMPLES[:]
        random.Random(seed).shuffle(shuffled)
        again = split(shuffled, 12, seed=1)
        assert set(ids(again.held_out)) == set(ids(sides.held_out))
        assert ids(again.train) == [e.id for e in shuffled if e.id in set(ids(sides.train))]


def test_sides_keep_the_order_of_the_input():
    sides = split(EXAMPLES, 12, seed=1)
    assert ids(sides.train) == sorted(ids(sides.train), key=lambda i: int(i[1:]))
    assert ids(sides.held_out) == sorted(ids(sides.held_out), key=lambda i: int(i[1:]))


def test_another_seed_is_another_split():
    assert ids(split(EXAMPLES, 12, seed=1).held_out) != ids(split(EXAMPLES, 12, seed=2).held_out)


def test_rows_added_later_move_few_others():
    before = set(ids(split(EXAMPLES, 20, seed=5).held_out))
    after = set(ids(split([*EXAMPLES, *(example(n) for n in range(60, 66))], 20, seed=5).held_out))
    # Six newcomers can displace six at most, and none of the old train side can come in.
    assert len(before - after) <= 6
    assert all(int(i[1:]) >= 60 for i in after - before)


@pytest.mark.parametrize("held_out", [0, 60, 61, -1, 0.0, 1.0, 1.5, 0.001, 0.999, float("nan"), True, "10"])
def test_split_refuses_an_empty_side_and_nonsense(held_out):
    with pytest.raises(DataError, match=r"got held_out="):
        split(EXAMPLES, held_out, seed=0)


def test_split_of_one_prompt():
    with pytest.raises(DataError, match="1 of 1 prompts"):
        split([example(0), example(1, "Question 0?")], 1, seed=0)


def test_summary(tmp_path):
    rows = [
        {"id": "a", "prompt": "One two three?", "domain": "x", "rubric": [{"criterion": "c", "check": {"any": ["1"]}}]},
        {"id": "b", "prompt": "ONE two three?", "reference": "r", "rubric": [{"criterion": "c"}] * 3},
        {
            "id": "c",
            "prompt": "Four?",
            "domain": "x",
            "rubric": [{"criterion": "c", "weight": -2.5}, {"criterion": "d"}],
        },
        {"id": "d", "prompt": ""},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    summary = summarise(load(path, skip_bad_rows=True))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["schema"], summary["rows"], summary["examples"]) == ("rgsd", 4, 3)
    assert summary["scoring"] == {"satisfaction": 3}
    assert summary["criteria"] == {"total": 6, "per_example": {"min": 1, "median": 2, "max": 3}}
    assert summary["weights"] == {"positive": 5, "negative": 1, "min": -2.5, "max": 1.0}
    assert summary["checks"] == {"criteria_share": pytest.approx(1 / 6), "examples_share": pytest.approx(1 / 3)}
    assert summary["prompt_words"] == {"min": 1, "median": 3, "max": 3}
    assert summary["prompt_characters"] == {"min": 5, "median": 14, "max": 14}
    assert summary["turns"] == {"min": 1, "median": 1, "max": 1}
    assert summary["references"] == 1
    assert summary["domains"] == {"x": 2, "(none)": 1}
    assert summary["duplicates"] == {"count": 1, "first_ids": ["b"]}
    assert summary["problems"]["count"] == 1
    assert "row 4, field prompt" in summary["problems"]["first"][0]


def test_description(tmp_path):
    path = tmp_path / "rows.jsonl"
    rubric = [{"criterion": "c", "weight": -2}, {"criterion": "d", "weight": 0.5}]
    rows = [
        {"id": "a", "prompt": "Why?", "rubric": rubric},
        {"id": "b", "prompt": "why?", "rubric": rubric},
        {"id": "c"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    lines = describe(load(path, skip_bad_rows=True)).splitlines()
    assert "rows        3: 2 examples, 1 bad rows" in lines
    assert "weights     2 positive, 2 negative, -2 to 0.5" in lines
    assert "criteria    4, 2 to 2 (median 2) per example" in lines
    assert "duplicates  1 repeated prompts, for example b" in lines
    assert lines[-1].startswith("bad row: rows.jsonl, row 3, field prompt: got nothing")


def test_summary_of_nothing():
    assert "none" in describe(Loaded(examples=(), schema="rgsd", n_rows=0))
    summary = summarise(Loaded(examples=(), schema="rgsd", n_rows=0))
    assert summary["criteria"]["per_example"] == {"min": None, "median": None, "max": None}


def test_a_subset_is_a_sample_in_the_inputs_order_and_a_larger_one_keeps_it():
    by_domain = [example(n) for n in range(200)]
    some = subset(by_domain, 40, seed=0)
    places = [int(e.id[1:]) for e in some]
    assert len(some) == 40
    assert places == sorted(places)
    assert max(places) > 150  # not the head of the file
    assert {e.id for e in some} < {e.id for e in subset(by_domain, 80, seed=0)}
    assert ids(some) == [e.id for e in by_domain if e.id in set(ids(subset(by_domain[::-1], 40, seed=0)))]
    assert ids(some) != ids(subset(by_domain, 40, seed=1))
    assert ids(subset(by_domain, None, seed=0)) == ids(subset(by_domain, 999, seed=0)) == ids(by_domain)
    with pytest.raises(DataError, match="0 prompts"):
        subset(by_domain, 0, seed=0)
