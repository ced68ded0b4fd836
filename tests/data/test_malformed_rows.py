"""Malformed rows of every schema: each is refused with its field and a remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import published_rows

from rgsd.data import SCHEMAS, Where, load
from rgsd.data.schemas.fields import FieldError

NAN = float("nan")


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets the value at a path."""

    def change(row: Any) -> None:
        for key in path[:-1]:
            row = row[key]
        row[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change that removes the value at a path."""

    def change(row: Any) -> None:
        for key in path[:-1]:
            row = row[key]
        del row[path[-1]]

    return change


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


NUMBER = "expected a finite number other than 0"
LIST = "expected a list of at least one criterion"
TEXT = "expected a non-empty string"
TURNS = "expected a string, or a list of {role, content}"
LAST = "expected 'user' in the last turn"

# (schema, what is wrong, the change, the field named, a piece of the message)
CASES = [
    # --- our own
    ("rgsd", "no prompt", drop("prompt"), "prompt", f"got nothing, {TURNS}"),
    ("rgsd", "empty prompt", put("prompt", value="  "), "prompt", f"got an empty string, {TURNS}"),
    ("rgsd", "prompt is a number", put("prompt", value=3), "prompt", f"got 3, {TURNS}"),
    ("rgsd", "no turns", put("prompt", value=[]), "prompt", f"got a list of 0, {TURNS}"),
    ("rgsd", "turn is a text", put("prompt", value=["hi"]), "prompt[0]", "got 'hi', expected a turn"),
    ("rgsd", "unknown role", put("prompt", 1, "role", value="human"), "prompt[1].role", "got 'human', expected one of"),
    ("rgsd", "no role", drop("prompt", 1, "role"), "prompt[1].role", "got nothing, expected one of system, user"),
    (
        "rgsd",
        "null content",
        put("prompt", 1, "content", value=None),
        "prompt[1].content",
        "got nothing, expected a string",
    ),
    (
        "rgsd",
        "content is an object",
        put("prompt", 1, "content", value={"a": 1}),
        "prompt[1].content",
        "keys a, expected",
    ),
    (
        "rgsd",
        "image part",
        put("prompt", 1, "content", value=[{"type": "image_url", "image_url": "x"}]),
        "prompt[1].content[0]",
        "got 'image_url', expected a string",
    ),
    (
        "rgsd",
        "blank user turn",
        put("prompt", 1, "content", value=" \n"),
        "prompt[1].content",
        f"got an empty string, {TEXT}",
    ),
    (
        "rgsd",
        "assistant last",
        put("prompt", 1, "role", value="assistant"),
        "prompt[1].role",
        f"got 'assistant', {LAST}",
    ),
    ("rgsd", "null rubric", put("rubric", value=None), "rubric", f"got nothing, {LIST}"),
    ("rgsd", "empty rubric", put("rubric", value=[]), "rubric", f"got a list of 0, {LIST}"),
    ("rgsd", "rubric is a text", put("rubric", value="Be nice."), "rubric", f"got 'Be nice.', {LIST}"),
    ("rgsd", "criterion is a text", put("rubric", 0, value="Be nice."), "rubric[0]", "expected an object"),
    ("rgsd", "no criterion", drop("rubric", 2, "criterion"), "rubric[2].criterion", f"got nothing, {TEXT}"),
    (
        "rgsd",
        "blank criterion",
        put("rubric", 2, "criterion", value=""),
        "rubric[2].criterion",
        f"got an empty string, {TEXT}",
    ),
    ("rgsd", "criterion is a number", put("rubric", 2, "criterion", value=4), "rubric[2].criterion", f"got 4, {TEXT}"),
    ("rgsd", "weight 0", put("rubric", 2, "weight", value=0), "rubric[2].weight", f"got 0, {NUMBER}"),
    ("rgsd", "weight NaN", put("rubric", 2, "weight", value=NAN), "rubric[2].weight", f"got nan, {NUMBER}"),
    (
        "rgsd",
        "weight infinite",
        put("rubric", 2, "weight", value=float("inf")),
        "rubric[2].weight",
        f"got inf, {NUMBER}",
    ),
    ("rgsd", "weight true", put("rubric", 2, "weight", value=True), "rubric[2].weight", f"got True, {NUMBER}"),
    ("rgsd", "weight is a text", put("rubric", 2, "weight", value="2"), "rubric[2].weight", f"got '2', {NUMBER}"),
    ("rgsd", "weight beyond floats", put("rubric", 2, "weight", value=10**400), "rubric[2].weight", NUMBER),
    (
        "rgsd",
        "unknown check",
        put("rubric", 0, "check", value={"anny": ["x"]}),
        "rubric[0].check",
        "unknown check 'anny'",
    ),
    ("rgsd", "two checks", put("rubric", 0, "check", value={"any": ["x"], "all": ["y"]}), "rubric[0].check", "one key"),
    ("rgsd", "bad regex", put("rubric", 0, "check", value={"regex": "("}), "rubric[0].check", "regular expression"),
    ("rgsd", "check is a text", put("rubric", 0, "check", value="any"), "rubric[0].check", "'any'"),
    ("rgsd", "misspelt key", put("refrence", value="x"), "refrence", "did you mean 'reference'?"),
    ("rgsd", "foreign key", put("zzz", value="x"), "zzz", "got the unknown key 'zzz', expected one of id, prompt"),
    (
        "rgsd",
        "misspelt criterion key",
        put("rubric", 0, "weigth", value=2),
        "rubric[0].weigth",
        "did you mean 'weight'?",
    ),
    ("rgsd", "unknown scoring", put("scoring", value="satisfacton"), "scoring", "did you mean 'satisfaction'?"),
    ("rgsd", "tags are a text", put("tags", value="short"), "tags", "got 'short', expected a list of strings"),
    ("rgsd", "tags are an object", put("tags", value={"a": "b"}), "tags", "expected a list of strings"),
    ("rgsd", "tag is a number", put("rubric", 1, "tags", value=[1]), "rubric[1].tags", "expected a list of strings"),
    ("rgsd", "title is a number", put("rubric", 1, "title", value=1), "rubric[1].title", "got 1, expected a string"),
    ("rgsd", "reference is a list", put("reference", value=["x"]), "reference", "got a list of 1, expected a string"),
    ("rgsd", "domain is a number", put("domain", value=1), "domain", "got 1, expected a string"),
    ("rgsd", "metadata is a list", put("metadata", value=[1]), "metadata", "got a list of 1, expected an object"),
    ("rgsd", "id is true", put("id", value=True), "id", "got True, expected a string"),
    # --- RubricHub
    ("rubrichub", "null prompt", put("prompt", value=None), "prompt", f"got nothing, {TURNS}"),
    (
        "rubrichub",
        "content null",
        put("prompt", value=user(None)),
        "prompt[0].content",
        "got nothing, expected a string",
    ),
    (
        "rubrichub",
        "no criteria at all",
        lambda r: r.update(Rubrics=None, reward_model=None),
        "Rubrics",
        f"got nothing, {LIST}",
    ),
    (
        "rubrichub",
        "zero points",
        put("reward_model", "rubrics", 1, "points", value=0),
        "reward_model.rubrics[1].points",
        f"got 0, {NUMBER}",
    ),
    ("rubrichub", "lists of two lengths", drop("Rubrics", 1), "Rubrics", "got 1 criteria, expected the 2 of"),
    ("rubrichub", "lists that differ", put("Rubrics", 1, "points", value=9), "Rubrics[1]", "with 9 points, expected"),
    ("rubrichub", "reward_model is a list", put("reward_model", value=[1]), "reward_model", "expected an object"),
    (
        "rubrichub",
        "tags are a number",
        put("reward_model", "rubrics", 0, "tags", value=3),
        "reward_model.rubrics[0].tags",
        "got 3",
    ),
    # --- its synthesis export
    ("rubrichub_synthesis", "null question", put("question", value=None), "question", f"got nothing, {TEXT}"),
    ("rubrichub_synthesis", "empty rubric", put("rubrics", value=[]), "rubrics", f"got a list of 0, {LIST}"),
    (
        "rubrichub_synthesis",
        "null points",
        put("rubrics", 0, "points", value=None),
        "rubrics[0].points",
        f"got nothing, {NUMBER}",
    ),
    # --- RaR
    ("rar", "empty question", put("question", value=""), "question", f"got an empty string, {TEXT}"),
    ("rar", "null rubric", lambda r: r.update(rubric=None, rubric_list=None), "rubric_list", f"got nothing, {LIST}"),
    (
        "rar",
        "label alone",
        put("rubric", 0, "description", value="Essential Criteria: "),
        "rubric[0].description",
        "after its label",
    ),
    ("rar", "no weight", drop("rubric", 0, "weight"), "rubric[0].weight", f"got nothing, {NUMBER}"),
    ("rar", "zero weight", put("rubric", 3, "weight", value=0), "rubric[3].weight", f"got 0, {NUMBER}"),
    (
        "rar",
        "essential below zero",
        put("rubric", 0, "weight", value=-5),
        "rubric[0].weight",
        "expected a positive number under",
    ),
    (
        "rar",
        "null description",
        put("rubric", 2, "description", value=None),
        "rubric[2].description",
        f"got nothing, {TEXT}",
    ),
    ("rar", "rubric is broken JSON", put("rubric", value='[{"description": '), "rubric", LIST),
    (
        "rar",
        "list without labels",
        lambda r: r.update(rubric=None, rubric_list=["Names it."]),
        "rubric_list[0].description",
        'expected "Essential',
    ),
    # --- HealthBench
    ("healthbench", "null rubrics", put("rubrics", value=None), "rubrics", f"got nothing, {LIST}"),
    ("healthbench", "points true", put("rubrics", 0, "points", value=True), "rubrics[0].points", f"got True, {NUMBER}"),
    (
        "healthbench",
        "assistant last",
        put("prompt", 2, "role", value="assistant"),
        "prompt[2].role",
        f"got 'assistant', {LAST}",
    ),
    ("healthbench", "null criterion", put("rubrics", 1, value=None), "rubrics[1]", "got nothing, expected an object"),
    ("healthbench", "id is a list", put("prompt_id", value=["x"]), "prompt_id", "got a list of 1, expected a string"),
    (
        "healthbench",
        "tags are a text",
        put("example_tags", value="theme"),
        "example_tags",
        "got 'theme', expected a list of strings",
    ),
    (
        "healthbench",
        "ideal completion is a list",
        put("ideal_completions_data", "ideal_completion", value=["x"]),
        "ideal_completions_data.ideal_completion",
        "expected a string or nothing",
    ),
    (
        "healthbench",
        "ideal data is a text",
        put("ideal_completions_data", value="x"),
        "ideal_completions_data",
        "expected an object",
    ),
    # --- HealthBench Professional
    ("healthbench_professional", "no conversation", drop("conversation"), "conversation", f"got nothing, {TURNS}"),
    (
        "healthbench_professional",
        "no messages",
        put("conversation", value={}),
        "conversation.messages",
        f"got nothing, {TURNS}",
    ),
    (
        "healthbench_professional",
        "empty criterion",
        put("rubric_items", 0, "criterion_text", value=" "),
        "rubric_items[0].criterion_text",
        f"got an empty string, {TEXT}",
    ),
    (
        "healthbench_professional",
        "points text",
        put("rubric_items", 1, "points", value="-6"),
        "rubric_items[1].points",
        f"got '-6', {NUMBER}",
    ),
    # --- ResearchQA
    ("researchqa", "no query", drop("query"), "query", f"got nothing, {TEXT}"),
    ("researchqa", "null rubric", put("rubric", value=None), "rubric", f"got nothing, {LIST}"),
    (
        "researchqa",
        "null item",
        put("rubric", 0, "rubric_item", value=None),
        "rubric[0].rubric_item",
        f"got nothing, {TEXT}",
    ),
    (
        "researchqa",
        "type is a number",
        put("rubric", 0, "type", value=2),
        "rubric[0].type",
        "got 2, expected a list of strings",
    ),
    # --- PRBench
    ("prbench", "no first prompt", put("prompt_0", value=None), "prompt_0", f"got nothing, {TEXT}"),
    ("prbench", "no response between", put("response_0", value=None), "response_0", f"got nothing, {TEXT}"),
    ("prbench", "a gap in the prompts", put("prompt_3", value="And?"), "response_1", f"got nothing, {TEXT}"),
    ("prbench", "turns miscounted", put("turns", value=3), "turns", "got 3, expected 2, the number of prompts"),
    (
        "prbench",
        "class without a column",
        put("rubric", 0, "annotations", "weight_class", value="vital"),
        "rubric[0].annotations.weight_class",
        "got the class 'vital'",
    ),
    (
        "prbench",
        "null weight",
        put("rubric", 0, "annotations", "critically_important_weight", value=None),
        "rubric[0].annotations.critically_important_weight",
        f"got nothing, {NUMBER}",
    ),
    (
        "prbench",
        "important below zero",
        put("rubric", 0, "annotations", "critically_important_weight", value=-9),
        "rubric[0].annotations.critically_important_weight",
        "expected a positive number, since the class is",
    ),
    (
        "prbench",
        "no annotations",
        drop("rubric", 1, "annotations"),
        "rubric[1].annotations",
        "got nothing, expected an object",
    ),
    # --- ResearchRubrics
    ("researchrubrics", "null prompt", put("prompt", value=None), "prompt", f"got nothing, {TURNS}"),
    (
        "researchrubrics",
        "weight NaN",
        put("rubrics", 0, "weight", value=NAN),
        "rubrics[0].weight",
        f"got nan, {NUMBER}",
    ),
    (
        "researchrubrics",
        "axis is a list",
        put("rubrics", 0, "axis", value=["x"]),
        "rubrics[0].axis",
        "expected a string",
    ),
    # --- verl
    ("verl", "null reward_model", put("reward_model", value=None), "reward_model", "got nothing, expected an object"),
    (
        "verl",
        "null rubrics",
        put("reward_model", "rubrics", value=None),
        "reward_model.rubrics",
        f"got nothing, {LIST}",
    ),
    (
        "verl",
        "assistant last",
        put("prompt", 0, "role", value="assistant"),
        "prompt[0].role",
        f"got 'assistant', {LAST}",
    ),
    (
        "verl",
        "zero points",
        put("reward_model", "rubrics", 0, "points", value=0.0),
        "reward_model.rubrics[0].points",
        f"got 0.0, {NUMBER}",
    ),
    ("verl", "extra_info is a text", put("extra_info", value="x"), "extra_info", "got 'x', expected an object"),
]


def test_there_are_many_malformations_and_no_two_are_the_same():
    assert len(CASES) >= 60
    assert len({(schema, what) for schema, what, *_ in CASES}) == len(CASES)
    assert {schema for schema, *_ in CASES} == set(published_rows.NAMES)


@pytest.mark.parametrize(
    ("name", "change", "field", "message"),
    [(schema, change, field, message) for schema, _, change, field, message in CASES],
    ids=[f"{schema}-{what.replace(' ', '-')}" for schema, what, *_ in CASES],
)
def test_a_malformed_row_is_a_problem_that_names_its_field(tmp_path: Path, name, change, field, message):
    bad = published_rows.row(name)
    change(bad)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (published_rows.other_row(name), bad)))
    loaded = load(path, skip_bad_rows=True)
    assert loaded.schema == name
    (problem,) = loaded.problems
    assert (problem.file, problem.row, problem.field) == ("rows.jsonl", 2, field)
    assert message in problem.message
    assert_form_of_message(problem.message)
    assert str(problem).startswith(f"rows.jsonl, row 2, field {field}: ")
    assert loaded.n_rows == len(loaded.examples) + len(loaded.problems) == 2


ODD_VALUES = (
    *(
        None,
        "",
        " ",
        0,
        1,
        -1,
        1.5,
        NAN,
        float("inf"),
        True,
        10**400,
        b"x",
        (1, 2),
        object(),
        np.array([1]),
        np.float32(2),
    ),
    *([], {}, [None], ["x"], [[]], {"a": 1}, {1: 2}, "[", "{}", "[]", '[{"a": 1}]'),
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from paths(inner, (*path, key))


@pytest.mark.parametrize("name", published_rows.NAMES)
def test_an_odd_value_anywhere_gives_an_example_or_a_refusal(name):
    for path in paths(published_rows.row(name)):
        for value in ODD_VALUES:
            row = published_rows.row(name)
            put(*path, value=value)(row)
            try:
                example = SCHEMAS[name].parse(row, Where("rows.jsonl", 1))
            except FieldError:
                continue
            json.dumps(dict(example.metadata), allow_nan=False)


def assert_form_of_message(message: str) -> None:
    """Refusals have one form; those of a check are worded by the check."""
    if "check" not in message:
        assert re.search(r"got .+, expected .+: .+", message), message
    assert len(message) < 400
