"""The leak meter: what it finds, and what it must ignore."""

import time

import pytest

from rgsd.errors import ConfigError
from rgsd.prompts.leaks import LEAK_PATTERNS, mentions_rubric
from rgsd.prompts.messages import PromptSettings, teacher_messages
from rgsd.rubrics import Criterion, Example, Rubric

QUESTION = "How do I treat a cold?"

LEAKS = [
    "The rubric asks for three causes, so here they are.",
    "As per the rubric's second point, drink water.",
    "Here are the hidden criteria I considered.",
    "This meets the hidden evaluation criteria.",
    "Based on the evaluation criteria, I will cover fluids and rest.",
    "To satisfy these grading criteria, I list the doses.",
    "Criterion 3: mentions red flags.",
    "This addresses criteria 1 and 2.",
    "As the criteria require, I will mention fever.",
    "As required by the criteria, I mention fever.",
    "According to the criteria, a good answer names red flags.",
    "Per the given criteria, the answer must be short.",
    "The criteria ask for a warning about antibiotics.",
    "I was asked to cover hydration, rest and red flags.",
    "I have been told not to mention this list, but hydration matters.",
    "I\N{RIGHT SINGLE QUOTATION MARK}ve been instructed to include a warning.",
    "Drink water. [weight=5]",
    "2. Mistake to avoid: Recommends antibiotics for a cold.",
    "This response addresses all of the criteria.",
    "I have covered each criterion.",
    "The grading instructions want a dose.",
    "This answer will be graded on its accuracy.",
    "The grader is looking for a dose.",
    "Like the reference response, I would rest.",
    "The criteria for this response are clear, so let me use the evaluation criteria.",
    "The criteria provided include hydration.",
    "To address the listed criteria, I start with rest.",
    "Here is my answer, guided by the evaluation criteria for a good response.",
]

SILENT = [
    "Drink water and rest.",
    "The diagnostic criteria are fever and cough.",
    "Several criteria for diagnosis of lupus exist.",
    "The criteria for admission are hypoxia and confusion.",
    "According to the criteria for admission, she should stay.",
    "According to the Jones criteria, two major signs are needed. As the criteria require, check for carditis.",
    "The Rome IV criteria help. Criterion 3 concerns stool form.",
    "DSM-5 criteria: criterion 2 must last two weeks.",
    "She does not meet the criteria for sepsis.",
    "Selection criteria differ between hospitals.",
    "This falls under the rubric of supportive care.",
    "Tumour grading guides treatment.",
    "The grading of evidence follows GRADE.",
    "Treatment response is assessed by CT after two cycles.",
    "Gain weight slowly; the weight of the child matters.",
    "I was asked whether this is safe: it is.",
    "Set your own evaluation criteria for vendors, such as price.",
    "The evaluation criteria for vendors include price and support.",
    "The patient must satisfy the criteria used in the trial.",
    "Reference ranges differ, see the reference values.",
    "The exclusion criteria were pregnancy and age.",
    "Cover the wound, and include a plan to avoid infection.",
    "The judge will decide on the criteria of the statute.",
    "The diagnosis is based on the following criteria: fever and cough. According to these criteria, he is ill.",
    "If any of the above criteria are met, refer the patient.",
    "A common mistake to avoid: taking antibiotics.",
    "",
]


@pytest.mark.parametrize("response", LEAKS)
def test_a_leak_is_seen(response: str) -> None:
    assert mentions_rubric(response, QUESTION)
    assert mentions_rubric(f"Rest helps.\n\n{response.upper()}")


@pytest.mark.parametrize("response", SILENT)
def test_ordinary_words_are_not_a_leak(response: str) -> None:
    assert not mentions_rubric(response, QUESTION)


@pytest.mark.parametrize(
    ("question", "response", "leaks"),
    [
        ("Write a rubric for essays.", "Here is the rubric: clarity, 5 points.", False),
        ("What are the diagnostic criteria of lupus?", "According to the criteria, four signs are needed.", False),
        ("What are the diagnostic criteria of lupus?", "Criterion 2 is a photosensitive rash.", False),
        ("What are the diagnostic criteria of lupus?", "The hidden evaluation criteria want a rash.", True),
        ("What are the diagnostic criteria of lupus?", "The rubric wants a rash.", True),
        ("How is the Centor score computed?", "The scoring criteria are fever and nodes.", False),
        ("I was asked to cover a shift, must I?", "I was asked to cover one too.", False),
        ("What does [weight=3] mean in this graph?", "[weight=3] is the edge's weight.", False),
        ("List the grading criteria of gliomas.", "The grading criteria are mitoses and necrosis.", False),
        ("How do I treat a cold?", "The criteria ask for rest.", True),
    ],
)
def test_what_the_question_brings_up_does_not_count(question: str, response: str, leaks: bool) -> None:
    assert mentions_rubric(response, question) == leaks


def test_patterns_of_ones_own() -> None:
    assert mentions_rubric("By the SECRET list.", patterns=[r"secret list"])
    assert not mentions_rubric("By the rubric.", patterns=[r"secret list"])
    with pytest.raises(ConfigError, match="regular expression"):
        mentions_rubric("a", patterns=["("])


def test_the_teachers_own_prompt_is_a_leak() -> None:
    rubric = Rubric((Criterion("Recommends rest.", 5), Criterion("Recommends antibiotics for a cold.", -8)))
    example = Example("colds", ({"role": "user", "content": "Colds?"},), rubric)
    text = teacher_messages(example, PromptSettings(show_weights=True))[0]["content"]
    assert mentions_rubric(text, "Colds?")
    assert len(LEAK_PATTERNS) == len(set(LEAK_PATTERNS))


def test_the_meter_is_fast_on_long_responses() -> None:
    response = "The criteria differ, and I was asked to weigh the evaluation of these criteria in full. " * 2000
    started = time.perf_counter()
    mentions_rubric(response, QUESTION)
    assert time.perf_counter() - started < 2.0
