"""Development prompts: neither trained on nor held out."""

from __future__ import annotations

import json

import pytest

from rgsd.data.config import DataConfig, load_split
from rgsd.errors import ConfigError

WORDS = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet"),
    *("jetty", "kelp", "larch", "maple", "nadir", "oasis", "prism", "quartz", "ridge"),
)


def config(folder, **settings) -> DataConfig:
    """18 unlike prompts, six a split, and two near-duplicates of a development prompt, one of them to train on."""
    sides = ["train"] * 6 + ["dev"] * 6 + ["test"] * 6
    rows = [
        {"id": f"{side}{n}", "prompt": f"What is the use of {word} in a garden?", "tags": [f"split:{side}", "all"]}
        for n, (word, side) in enumerate(zip(WORDS, sides, strict=True))
    ]
    rows.append({"id": "copy", "prompt": rows[6]["prompt"].rstrip("?") + " !", "tags": ["split:train", "all"]})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row | {"rubric": [{"criterion": "Answers."}]}) for row in rows))
    return DataConfig(data=str(path), **settings)


def ids(examples) -> set[str]:
    return {e.id for e in examples}


def test_by_tags_they_are_on_neither_side_and_their_copies_are_dropped(tmp_path, capsys):
    sides = load_split(config(tmp_path, held_out_tags=["split:test"], development_tags=["split:dev"]))
    assert ids(sides.development) == {f"dev{n}" for n in range(6, 12)}
    assert ids(sides.train) == {f"train{n}" for n in range(6)}
    assert ids(sides.held_out) == {f"test{n}" for n in range(12, 18)}
    assert sides.near_duplicates["dropped"] == []
    assert sides.near_duplicates["development"]["dropped"] == ["copy"]
    said = capsys.readouterr().out
    assert "6 training, 6 development and 6 held-out prompts" in said
    assert "1 training prompts nearly repeat development ones" in said


def test_a_share_or_a_count_is_taken_from_what_is_not_held_out(tmp_path):
    tags = {"held_out_tags": ["split:test"]}
    count, share = (load_split(config(tmp_path, development=d, **tags)) for d in (4, 0.3))
    for sides in (count, share):
        assert len(sides.development) == 4
        groups = {"dev6", "copy"}
        assert not groups & ids(sides.train) or not groups & ids(sides.development)
        assert ids(sides.train) | ids(sides.development) | ids(sides.held_out) == ids(
            load_split(config(tmp_path, **tags)).train
        ) | ids(sides.held_out)
        assert not ids(sides.train) & ids(sides.development)
        assert not ids(sides.held_out) & ids(sides.development)
    seeded = load_split(config(tmp_path, held_out=5, development=4))
    assert len(seeded.held_out) == 5
    assert len(seeded.development) == 4
    assert not ids(seeded.held_out) & ids(seeded.development)


def test_the_held_out_prompts_do_not_depend_on_development(tmp_path):
    plain, with_development = (load_split(config(tmp_path, held_out=5, development=d)) for d in (0.0, 4))
    assert ids(plain.held_out) == ids(with_development.held_out)


def test_those_that_are_not_sampled_are_not_trained_on_either(tmp_path):
    tags = {"held_out_tags": ["split:test"], "development_tags": ["split:dev"]}
    sides = load_split(config(tmp_path, max_development_prompts=2, **tags))
    assert len(sides.development) == 2
    assert ids(sides.development) < {f"dev{n}" for n in range(6, 12)}
    assert ids(sides.train) == {f"train{n}" for n in range(6)}
    again = load_split(config(tmp_path, max_development_prompts=2, split_seed=3, **tags))
    assert len(again.development) == 2


def test_without_held_out_prompts_too(tmp_path):
    sides = load_split(config(tmp_path, held_out=0, development=4), holds_out=False)
    assert (len(sides.development), len(sides.held_out)) == (4, 0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"development": -1}, "share from 0 to 1 or a whole number, got -1"),
        ({"development": 2.5}, "got 2.5"),
        ({"development": 3, "development_tags": ["split:dev"]}, "set one of them"),
        ({"max_development_prompts": 3}, "set development or development_tags too"),
        ({"development": 3, "max_development_prompts": 0}, "at least 1, got 0"),
    ],
)
def test_contradictions_fail_at_construction(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"development_tags": ["split:test"]}, "6 examples have one of development_tags and one of held_out_tags"),
        ({"development_tags": ["nothing"]}, r"development_tags \['nothing'\] leave 13 training and 0 development"),
        ({"development": 13}, "development is 13, of 13 prompts that are not held out"),
        ({"development_tags": ["split:dev"], "near_duplicates": "refuse"}, "nearly repeat development ones"),
    ],
)
def test_what_leaves_a_side_empty_or_mixes_them_is_refused(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        load_split(config(tmp_path, held_out_tags=["split:test"], **settings))
