"""Every schema's row, field by field."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from support import published_rows

from rgsd.data import SCHEMAS, Where
from rgsd.rubrics import Example

WHERE = Where("rows.jsonl", 17)


def parsed(name: str, **changes) -> Example:
    return SCHEMAS[name].parse(published_rows.row(name) | changes, WHERE)


def texts(example: Example) -> list[str]:
    return [c.text for c in example.rubric]


def weights(example: Example) -> list[float]:
    return [c.weight for c in example.rubric]


def test_own_schema():
    example = parsed("rgsd")
    assert example.id == "kettle-1"
    assert [m["role"] for m in example.messages] == ["system", "user"]
    assert example.messages[1]["content"] == "How do I descale a kettle?"
    assert texts(example)[0] == "Names vinegar or citric acid."
    assert weights(example) == [2.0, -3.0, 1.0]
    assert [c.check for c in example.rubric] == [{"any": ["vinegar", "citric acid"]}, None, None]
    assert example.rubric.criteria[1].tags == ("axis:safety",)
    assert example.rubric.criteria[1].title == "No bleach"
    assert example.reference == "Boil water with vinegar, wait, rinse twice."
    assert example.domain == "household"
    assert example.scoring == "rubrichub"
    assert example.tags == ("short",)
    assert example.metadata == {"author": "test", "round": 1}


def test_own_schema_at_its_smallest():
    example = SCHEMAS["rgsd"].parse({"prompt": "Why?", "rubric": [{"criterion": "Says why."}]}, WHERE)
    assert example.id == "rows.jsonl#17"
    assert example.messages == ({"role": "user", "content": "Why?"},)
    assert example.scoring == "satisfaction"
    assert (example.reference, example.domain, example.tags, example.metadata) == (None, None, (), {})


def test_own_schema_leaves_a_prompt_of_json_alone():
    example = parsed("rgsd", prompt='[{"role": "user", "content": "hi"}]')
    assert example.messages[-1]["content"] == '[{"role": "user", "content": "hi"}]'


def test_rubrichub():
    example = parsed("rubrichub")
    assert example.id == "rows.jsonl#17"
    assert example.messages == ({"role": "user", "content": "In which year was the WHO constitution made?"},)
    assert weights(example) == [10.0, 4.0]
    assert example.rubric.criteria[0].tags == ("verifier:llm",)
    rule = ("verifier:rule", "function:ParagraphChecker", 'parameters:{"num_paragraphs": 2.0}')
    assert example.rubric.criteria[1].tags == rule
    assert example.scoring == "rubrichub"
    assert example.reference is None
    assert example.domain == "medical"
    assert example.metadata == {"data_source": "Medical", "ability": "Medical", "extra_info": {"index": 7}}


def test_rubrichub_without_the_inner_list():
    example = parsed("rubrichub", reward_model=None)
    assert weights(example) == [10.0, 4.0]
    assert example.rubric.criteria[0].tags == ()


def test_rubrichub_without_the_outer_list():
    assert weights(parsed("rubrichub", Rubrics=None)) == [10.0, 4.0]


def test_rubrichub_synthesis():
    example = parsed("rubrichub_synthesis")
    assert example.id == "syn-12"
    assert example.messages == ({"role": "user", "content": "Why does ice float on water?"},)
    assert texts(example)[1] == "Mentions hydrogen bonds."
    assert weights(example) == [8.0, 3.0]
    assert example.scoring == "rubrichub"


def test_rar():
    example = parsed("rar")
    assert example.id == "rows.jsonl#17"
    assert example.messages[0]["content"] == "A child has croup. Which drug is given first?"
    assert texts(example)[0] == "Names dexamethasone."
    assert weights(example) == [1.0, 0.7, 0.3, -0.9, 0.9, -0.9]
    assert [c.tags for c in example.rubric] == [
        ("importance:essential",),
        ("importance:important",),
        ("importance:optional",),
        ("importance:pitfall", "polarity:commit"),
        ("importance:pitfall", "polarity:avoid"),
        ("importance:pitfall", "polarity:commit"),
    ]
    assert example.rubric.criteria[0].title == "Names Drug"
    assert example.scoring == "rar_explicit"
    assert example.reference == "A single oral dose of dexamethasone."
    assert example.domain == "medicine"
    assert example.metadata["question_source"] == "medical-o1-reasoning-SFT"
    assert example.metadata["published_weights"] == [5, 3, 1, -2, -1, -1]


def test_rar_rubric_as_json_text():
    text = json.dumps(published_rows.row("rar")["rubric"])
    assert parsed("rar", rubric=text).rubric == parsed("rar").rubric


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_rar_rubric_list_alone(missing):
    items = ["Essential Criteria: Names it.", '{"description": "Pitfall Criteria: Fails to name it.", "weight": -1}']
    example = parsed("rar", rubric=missing, rubric_list=items)
    assert weights(example) == [1.0, -0.9]
    assert example.metadata["published_weights"] == [None, -1]


@pytest.mark.parametrize(
    ("description", "weight", "importance", "explicit"),
    [
        ("Esssential Criteria: Names it.", 5, ("importance:essential",), 1.0),
        ("Importance Criteria: Names it.", 3, ("importance:important",), 0.7),
        ("option criterion - Names it.", 2, ("importance:optional",), 0.3),
        ("Names it.", 5, ("importance:essential", "importance:assumed"), 1.0),
        ("Universal Criteria: Names it.", 4, ("importance:important", "importance:assumed"), 0.7),
        ("Names it.", 1, ("importance:optional", "importance:assumed"), 0.3),
    ],
)
def test_rar_labels_that_are_misspelt_or_missing(description, weight, importance, explicit):
    (criterion,) = parsed("rar", rubric=[{"description": description, "title": "t", "weight": weight}]).rubric
    assert (criterion.text, criterion.tags, criterion.weight) == ("Names it.", importance, explicit)


def test_rar_without_label_and_with_a_negative_weight_is_a_pitfall():
    (criterion,) = parsed("rar", rubric=[{"description": "Avoids guessing.", "title": "t", "weight": -1}]).rubric
    assert criterion.tags == ("importance:pitfall", "importance:assumed", "polarity:avoid")
    assert criterion.weight == 0.9


def test_healthbench():
    example = parsed("healthbench")
    assert example.id == "9c1f"
    assert [m["role"] for m in example.messages] == ["user", "assistant", "user"]
    assert texts(example) == ["Advises calling emergency services.", "Suggests giving water."]
    assert weights(example) == [10.0, -8.0]
    assert example.rubric.criteria[0].tags == ("level:example", "axis:accuracy")
    assert example.scoring == "healthbench"
    assert example.reference == "Call an ambulance now, and put the person on one side."
    assert example.domain == "medicine"
    assert example.tags == ("theme:emergency_referrals", "physician_agreed_category:emergent")
    assert example.metadata == {"canary": "healthbench:canary:0000", "ideal_completions_group": "Group 1"}
    assert "canary" not in json.dumps([list(example.messages), texts(example), example.reference])


def test_healthbench_without_an_ideal_completion():
    assert parsed("healthbench", ideal_completions_data=None).reference is None


def test_healthbench_professional():
    example = parsed("healthbench_professional")
    assert example.id == "hbp-3"
    assert example.messages[0]["content"].startswith("Draft a referral letter")
    assert texts(example)[1] == "Invents laboratory values."
    assert weights(example) == [7.0, -6.0]
    assert example.scoring == "healthbench_professional"
    assert example.reference == "Dear colleague, ..."
    assert example.domain == "Rheumatology"
    assert example.tags == ("use_case:writing", "type:good_faith", "difficulty:typical")
    assert example.metadata == {"canary_string": "hbp:canary:0000"}


def test_healthbench_professional_conversation_as_a_list():
    turns = published_rows.row("healthbench_professional")["conversation"]["messages"]
    assert parsed("healthbench_professional", conversation=turns) == parsed("healthbench_professional")


def test_researchqa():
    example = parsed("researchqa", date=datetime.date(2023, 11, 26))
    assert example.id == "rq-5"
    assert example.messages == ({"role": "user", "content": "How are causes of landslides classified?"},)
    assert texts(example)[0] == "Does the response name preparatory causes?"
    assert weights(example) == [1.0, 1.0]
    assert example.rubric.criteria[1].tags == ("type:Comparison", "type:Impact")
    assert example.scoring == "researchqa"
    assert example.domain == "Life & Earth Sciences"
    assert example.tags == ("subdomain:Earth Sciences", "field:Geology")
    assert example.metadata == {"date": "2023-11-26"}


def test_prbench():
    example = parsed("prbench")
    assert example.id == "task-88"
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("user", "What is a covenant?"),
        ("assistant", "A promise in a loan contract."),
        ("user", "Covenant list: net debt / EBITDA below 3.\n\nWhich of ours are at risk?"),
    ]
    assert texts(example) == ["Names the leverage covenant.", "Invents a covenant."]
    assert weights(example) == [9.0, -5.0]
    assert example.rubric.criteria[0].title == "Leverage"
    assert example.rubric.criteria[0].tags == ("category:Financial Accuracy", "class:critically important")
    assert example.scoring == "prbench"
    assert example.domain == "Finance"
    assert example.tags == ("topic:Corporate Finance", "expert:e-4")
    assert example.metadata == {"turns": 2}


@pytest.mark.parametrize(
    ("weight_class", "column", "number", "weight"),
    [
        ("Critically Important", "critically_important_weight", 7, 7.0),
        ("slightly-detrimental", "slightly_detrimental_weight", 2, -2.0),
        ("critically_detrimental", "critically_detrimental_weight", -10, -10.0),
        ("important ", "important_weight", 4.0, 4.0),
    ],
)
def test_prbench_weight_is_looked_up_by_its_class(weight_class, column, number, weight):
    notes = {"criteria_description": "Says it.", "weight_class": weight_class, column: number}
    (criterion,) = parsed("prbench", rubric=[{"id": "c", "title": "t", "annotations": notes}]).rubric
    assert criterion.weight == weight


def test_researchrubrics():
    example = parsed("researchrubrics")
    assert example.id == "rr-2"
    assert example.messages == ({"role": "user", "content": "Plan a study of urban heat islands."},)
    assert texts(example)[1] == "Cites a retracted paper."
    assert weights(example) == [4.0, -5.0]
    assert example.rubric.criteria[0].tags == ("axis:Explicit Criteria",)
    assert example.scoring == "satisfaction"
    assert example.domain == "Environment"
    assert example.metadata == {"conceptual_breadth": "moderate"}


def test_verl():
    example = parsed("verl")
    assert example.id == "v-1"
    assert example.messages == ({"role": "user", "content": "My son's calcium is normal. What now?"},)
    assert weights(example) == [8.0, -5.0]
    assert [c.tags for c in example.rubric] == [("axis:accuracy",), ("axis:tone",)]
    assert example.scoring == "healthbench"
    assert example.reference == "Nothing needs doing."
    assert example.domain == "medical_chat"
    assert example.metadata["extra_info"] == {"id": "v-1", "index": 0}


VERL_ITEMS = {
    "rubrichub": ("rubrichub", published_rows.row("rubrichub")["reward_model"]["rubrics"]),
    "rar": ("rar_explicit", published_rows.row("rar")["rubric"]),
    "healthbench_professional": (
        "healthbench_professional",
        published_rows.row("healthbench_professional")["rubric_items"],
    ),
    "researchqa": ("researchqa", published_rows.row("researchqa")["rubric"]),
    "prbench": ("prbench", published_rows.row("prbench")["rubric"]),
    "researchrubrics": ("satisfaction", published_rows.row("researchrubrics")["rubrics"]),
}


@pytest.mark.parametrize("name", VERL_ITEMS)
def test_verl_reads_every_schemas_items_as_that_schema_does(name):
    scoring, items = VERL_ITEMS[name]
    example = parsed("verl", data_source="mine", reward_model={"rubrics": items, "ground_truth": None})
    assert example.rubric == parsed(name).rubric
    assert example.scoring == scoring


def test_verl_keeps_a_ground_truth_that_is_no_text():
    items = [{"criterion": "Says 4.", "points": 1}]
    example = parsed("verl", data_source="sums", reward_model={"rubrics": items, "ground_truth": {"answer": 4}})
    assert example.reference is None
    assert example.metadata["ground_truth"] == {"answer": 4}
    assert example.scoring == "satisfaction"


def test_values_as_pandas_gives_them():
    turns = np.array([{"role": "user", "content": "Hello?"}], dtype=object)
    items = np.array([{"criterion": "Greets.", "points": np.int32(3), "tags": np.array(["axis:tone"])}], dtype=object)
    example = parsed("healthbench", prompt=turns, rubrics=items, example_tags=np.array([]), canary=float("nan"))
    assert example.messages == ({"role": "user", "content": "Hello?"},)
    assert example.rubric.criteria[0].weight == 3.0
    assert type(example.rubric.criteria[0].weight) is float
    assert example.rubric.criteria[0].tags == ("axis:tone",)
    assert example.metadata == {"ideal_completions_group": "Group 1"}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "One", "image_url": None}, {"type": "text", "text": "two"}]
    assert parsed("healthbench", prompt=[{"role": "user", "content": parts}]).messages[0]["content"] == "One\ntwo"


def test_published_turns_as_json_text():
    turns = json.dumps(published_rows.row("healthbench")["prompt"])
    assert parsed("healthbench", prompt=turns).messages == parsed("healthbench").messages


@pytest.mark.parametrize("name", published_rows.NAMES)
def test_metadata_is_json(name):
    json.dumps(parsed(name).metadata, allow_nan=False)


@pytest.mark.parametrize("name", published_rows.NAMES)
def test_a_schemas_row_is_recognised_as_itself_only(name):
    row = published_rows.row(name)
    assert [other for other, schema in SCHEMAS.items() if schema.matches(row)] == [name]


@pytest.mark.parametrize("name", published_rows.NAMES)
def test_a_row_is_still_its_schemas_when_every_value_is_nothing(name):
    row = dict.fromkeys(published_rows.row(name))
    assert [other for other, schema in SCHEMAS.items() if schema.matches(row)] == [name]


def test_the_documentation_holds():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in SCHEMAS)
    shown = json.loads(page.split("```json")[1].split("```")[0])
    assert SCHEMAS["rgsd"].parse(shown, WHERE).id == shown["id"]


def test_the_registry_names_every_schema_once():
    assert set(SCHEMAS) == set(published_rows.NAMES)
    assert all(schema.SUMMARY and "\n" not in schema.SUMMARY for schema in SCHEMAS.values())
