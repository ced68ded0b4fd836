"""A run's treatment of near-duplicates of held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rgsd.data.config import DataConfig, load_split
from rgsd.errors import ConfigError

QUESTIONS = [
    "How long does a sprained ankle need rest?",
    "Why do leaves turn red in autumn?",
    "Which vaccine needs three doses?",
    "What keeps a satellite in its orbit?",
    "When is a fever dangerous for a baby?",
    "How does soap remove grease from a pan?",
]


def config(folder: Path, **settings) -> DataConfig:
    """Six questions; held-out ones nearly repeat the first two."""
    conversation = [
        {"role": "user", "content": QUESTIONS[1]},
        {"role": "assistant", "content": "Chlorophyll breaks down."},
        {"role": "user", "content": "And in spring?"},
    ]
    rows = [{"id": f"q{n}", "prompt": q, "tags": ["split:train"]} for n, q in enumerate(QUESTIONS)]
    rows += [
        {"id": f"h{n}", "prompt": p, "tags": ["split:test"]} for n, p in enumerate([QUESTIONS[0][:-1], conversation])
    ]
    rows += [{"id": "h2", "prompt": "What makes bread rise in the oven?", "tags": ["split:test"]}]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row | {"rubric": [{"criterion": "Answers."}]}) for row in rows))
    return DataConfig(data=str(path), **settings)


def ids(examples) -> list[str]:
    return [e.id for e in examples]


def test_near_duplicates_of_a_fixed_held_out_set_are_dropped_from_training(tmp_path, capsys):
    sides = load_split(config(tmp_path, held_out_tags=["split:test"]))
    assert ids(sides.train) == ["q2", "q3", "q4", "q5"]
    assert ids(sides.held_out) == ["h0", "h1", "h2"]
    found = sides.near_duplicates
    assert (found["rule"], found["groups"], found["prompts"], found["dropped"]) == ("drop", 2, 4, ["q0", "q1"])
    assert found["first"][0] == {"ids": ["q0", "h0"], "why": ["same text"]}
    said = capsys.readouterr()
    assert "q0 ~ h0" in " ".join((said.out + said.err).split())


def test_they_can_be_kept(tmp_path):
    sides = load_split(config(tmp_path, held_out_tags=["split:test"], near_duplicates="keep"))
    assert len(sides.train) == 6
    assert (sides.near_duplicates["rule"], sides.near_duplicates["groups"]) == ("keep", 2)
    assert sides.near_duplicates["dropped"] == []


@pytest.mark.parametrize("rule", ["refuse", "Drop"])
def test_they_can_be_refused_and_so_is_an_unknown_rule(tmp_path, rule):
    with pytest.raises(ConfigError, match="q0 ~ h0" if rule == "refuse" else "'Drop'"):
        load_split(config(tmp_path, held_out_tags=["split:test"], near_duplicates=rule))


def test_a_fixed_split_that_leaves_nothing_to_train_on_says_why(tmp_path):
    data = config(tmp_path, held_out_tags=["split:test"])
    rows = [json.loads(line) for line in Path(data.data).read_text().splitlines()]
    Path(data.data).write_text("\n".join(json.dumps(r) for r in rows if r["id"] in ("q0", "h0")))
    with pytest.raises(ConfigError, match="1 near-duplicates"):
        load_split(data)


def test_a_seeded_split_separates_no_group_and_reports_them(tmp_path):
    for seed in range(8):
        sides = load_split(config(tmp_path, held_out=3, split_seed=seed))
        for pair in ({"q0", "h0"}, {"q1", "h1"}):
            assert len(pair & set(ids(sides.held_out))) in (0, 2)
        assert (sides.near_duplicates["rule"], sides.near_duplicates["groups"]) == ("grouped", 2)
