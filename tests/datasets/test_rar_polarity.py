"""The table of wordings by which a pitfall of RaR is read."""

from __future__ import annotations

import pytest

from rgsd.datasets import SCHEMAS, Where
from rgsd.datasets._polarity import read

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


@pytest.mark.parametrize(
    ("text", "published", "weight", "tag"),
    [
        ("Recommends bleach.", -2, -0.9, "polarity:commit"),
        ("Recommends bleach.", 4, -0.9, "polarity:commit"),
        ("Avoids bleach.", -2, 0.9, "polarity:avoid"),
        ("Bleach.", -2, -0.9, "polarity:assumed"),
        ("Bleach.", 4, 0.9, "polarity:assumed"),
    ],
)
def test_the_wording_decides_and_else_the_published_sign(text, published, weight, tag):
    row = {
        "question": "Which cleaner?",
        "reference_answer": "Soap.",
        "rubric": [{"title": "t", "description": f"Pitfall Criteria: {text}", "weight": published}],
    }
    (criterion,) = SCHEMAS["rar"].parse(row, Where("rows.jsonl", 1)).rubric
    assert criterion.text == text
    assert criterion.weight == weight
    assert criterion.tags == ("importance:pitfall", tag)
