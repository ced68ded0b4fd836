"""Tables of labelled wordings against the polarity rules for RaR's pitfalls."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from rgsd.data import SCHEMAS, Loaded, Where, describe, summarise
from rgsd.data.schemas.fields import FieldError
from rgsd.data.schemas.polarity import Row, decide
from rgsd.data.schemas.polarity_wording import read

AVOID = """
The response should avoid rounding intermediate values too early, as this can lead to errors.
Avoids recommending antibiotics for a viral infection.
Avoid confusing work with energy
The answer must not confuse mass with weight.
Refrains from speculation
Should not recommend surgery as first-line therapy
The response should not omit mentioning that non-ideal effects are negligible.
The response does not confuse velocity and acceleration
Does not incorrectly assume the gas is ideal
Does not overlook the sign of the charge
Does not include irrelevant information about other conditions
Does not suggest delaying fluids or antibiotics despite septic shock
Does not round intermediate values
Doesn\u2019t state incorrect dosages
No mention of unrelated treatments
Do not use the wrong formula
Never recommends stopping insulin abruptly
Confusing speed with velocity should be avoided
Care should be taken not to mix units
It is important not to neglect friction
Warns against self-medication
Ensures that units are consistent
Rounding too early should be avoided
The explanation needs to avoid mixing up reactants and products
Remains concise without adding unrelated detail
Units should not be omitted
The student must ensure that the sign is right
"""

COMMIT = """
Does not mention that frictional losses are assumed negligible
Does not mention identifying (B) as the correct answer.
Does not mention PKD1 as the gene that is not associated with the disease.
Recommends antibiotics for a viral infection
States that insulin is contraindicated
Fails to mention the need for a biopsy
Omits the units
Suggests NSAIDs, which should be avoided in renal failure
Recommends a drug that should not be given to children
Neglects to consider renal function
Incorrectly identifies (A) as the answer
Misinterprets the ECG as atrial fibrillation
Failure to distinguish type 1 from type 2
Overlooks the role of ADH
The response fails to include the energy conversion
The response may incorrectly apply the ideal gas law
The response might not mention the side effects
Assuming that the reaction is first order
A response that confuses A with B
Lacks a clear conclusion
Not mentioning the risk of bleeding
The response should be penalized if it recommends aspirin
It is incorrect to assume a linear relation
Does not correctly identify the diagnosis
Does not consider the possibility of pregnancy
Is overly verbose
A common mistake is to forget the factor of two
Identifies (B) as the correct answer
Does not explain why the other options are wrong
Overstates the benefit of surgery
"""

OPEN = """
Does not recommend follow-up imaging
The response may mention the boiling point
Two different units appear in the text
Bicarbonate dosing
"""


def lines(block: str) -> list[str]:
    return block.strip().splitlines()


@pytest.mark.parametrize("text", lines(AVOID))
def test_instructions_are_good_when_met(text):
    assert read(text) == "avoid"


@pytest.mark.parametrize("text", lines(COMMIT))
def test_bad_acts_and_omissions_are_bad_when_met(text):
    assert read(text) == "commit"


@pytest.mark.parametrize("text", lines(OPEN))
def test_the_rest_is_left_open(text):
    assert read(text) is None


def table(name: str) -> list[list[str]]:
    text = (Path(__file__).parent / name).read_text("utf-8")
    return [[part.strip() for part in line.split("|")] for line in text.splitlines() if not line.startswith("#")]


TABLE = table("polarity_table.txt")
"""Wordings labelled by hand: label, title, description, what the rest of the row wants."""


@pytest.mark.parametrize(("label", "title", "text", "wanted"), TABLE)
def test_wording_title_and_row_decide_together(label, title, text, wanted):
    decision = decide(text, title, Row.of(wanted.split(";"), None))
    assert ("open" if decision in ("disagree", "silent") else decision) == label


SECOND = table("polarity_table_2.txt")
"""Wordings that the rules had not seen: they may leave one out, and may not invert one."""


def outcome(label: str, title: str, text: str, wanted: str) -> str:
    decision = decide(text, title, Row.of(wanted.split(";"), None))
    found = "open" if decision in ("disagree", "silent") else decision
    return "right" if found == label else "left out" if found == "open" else "inverted"


@pytest.mark.parametrize(("label", "title", "text", "wanted"), SECOND)
def test_the_second_table_has_no_inversion(label, title, text, wanted):
    assert outcome(label, title, text, wanted) != "inverted"


def test_few_of_the_second_table_are_left_out():
    assert sum(outcome(*row) == "left out" for row in SECOND) <= 8
    asked = [row for row in SECOND if row[0] == "commit" and row[2].startswith("Does not mention")]
    assert sum(outcome(*row) == "right" for row in asked) >= 0.8 * len(asked)


THIRD = table("polarity_table_3.txt")
"""After the published patterns, labelled before the rules ran on them; the last part is written against the rules."""


@pytest.mark.parametrize(("label", "title", "text", "wanted"), THIRD)
def test_the_third_table_has_no_inversion(label, title, text, wanted):
    assert outcome(label, title, text, wanted) != "inverted"


def test_few_of_the_third_table_are_left_out():
    assert sum(outcome(*row) == "left out" for row in THIRD) <= 15


def test_the_third_table_is_of_use():
    labels = Counter(row[0] for row in THIRD)
    assert len(THIRD) >= 190
    assert min(labels["avoid"], labels["commit"]) >= 60


def parsed(*pitfalls: tuple[str, str], reference: str = "Soap."):
    items = [{"title": "Names it", "description": "Essential Criteria: Names soap.", "weight": 5}]
    items += [{"title": title, "description": f"Pitfall Criteria: {text}", "weight": -2} for title, text in pitfalls]
    row = {"question": "Which cleaner?", "reference_answer": reference, "rubric": items}
    return SCHEMAS["rar"].parse(row, Where("rows.jsonl", 1))


@pytest.mark.parametrize(
    ("title", "text", "weight"),
    [
        ("Bleach", "Recommends bleach.", -0.9),
        ("Bleach", "Avoids bleach.", 0.9),
        ("Avoids Wrong Agents", "Does not mention bleach as a cleaner.", 0.9),
        ("Omits Gloves", "Does not mention gloves.", -0.9),
    ],
)
def test_a_decided_pitfall_is_in_the_rubric_with_its_sign(title, text, weight):
    example = parsed((title, text))
    assert [c.weight for c in example.rubric] == [1.0, weight]
    assert "left_out" not in example.metadata


def test_the_reference_answer_is_part_of_the_row():
    text = "Does not mention rinsing twice with cold water."
    assert len(parsed(("Rinsing", text)).rubric) == 1
    asked = parsed(("Rinsing", text), reference="Use soap. Rinse twice with cold water.")
    assert [c.weight for c in asked.rubric] == [1.0, -0.9]


def test_an_undecided_pitfall_is_left_out_counted_and_listed():
    example = parsed(("Agent", "Does not mention bleach."), ("Bleach", "Recommends bleach."))
    assert [c.text for c in example.rubric] == ["Names soap.", "Recommends bleach."]
    assert example.metadata["published_weights"] == [5, -2]
    assert example.metadata["left_out"] == [
        {"criterion": "Does not mention bleach.", "title": "Agent", "why": "silent"}
    ]
    loaded = Loaded((example,), "rar", 1)
    assert summarise(loaded)["left_out"]["count"] == 1
    assert "Does not mention bleach." in describe(loaded)


def test_a_row_whose_every_criterion_is_undecided_is_refused():
    row = {
        "question": "q",
        "reference_answer": "r",
        "rubric": [{"description": "Pitfall Criteria: Bleach.", "weight": -1}],
    }
    with pytest.raises(FieldError) as refused:
        SCHEMAS["rar"].parse(row, Where("rows.jsonl", 1))
    assert refused.value.field == "rubric"
