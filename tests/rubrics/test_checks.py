import json
import time
from pathlib import Path

import pytest

from rgsd.data import bundled
from rgsd.errors import DataError
from rgsd.judges import ChecksJudge
from rgsd.rubrics import Criterion, Example, Rubric, score
from rgsd.rubrics.checks import holds, validate

CASES = [json.loads(line) for line in (Path(__file__).parent / "check_cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("check", "met", "unmet"),
    [
        ({"any": ["ice", "cold pack"]}, "Use ICE.", "Eat rice."),
        ({"any": ["dehydrat*"]}, "You are dehydrated.", "Hydrate."),
        ({"any": ["don't"]}, "You don\u2019t.", "You do."),  # a curly apostrophe
        ({"all": ["rest", "drink"]}, "Rest and\ndrink.", "Rest."),
        ({"order": ["rinse", "cover"]}, "Rinse, then cover.", "Cover, then rinse."),
        ({"regex": r"\d+ ml"}, "Take 20 ML.", "Take some."),
        ({"count": {"of": "words", "min": 2, "max": 3}}, "two words", "one two three four"),
        ({"count": {"of": "bullets", "min": 2}}, "- a\n* b", "a - b\n- c"),
        ({"count": {"of": "numbered", "max": 1}}, "1. a", "1. a\n2) b"),
        ({"count": {"of": "sentences", "min": 2}}, "One. Two!", "One."),
        ({"count": {"of": "paragraphs", "min": 2}}, "a\n\nb", "a\nb"),
        ({"count": {"of": {"regex": "a+"}, "min": 2}}, "aa b a", "aa b"),
        ({"not": {"any": ["bleach"]}}, "Use soap.", "Use bleach."),
        ({"every": [{"any": ["a"]}, {"any": ["b"]}]}, "a b", "a"),
        ({"some": [{"any": ["a"]}, {"any": ["b"]}]}, "b", "c"),
        ({"starts": {"any": ["in short"]}}, "In short, yes.\nMore.", "Yes.\nIn short."),
        ({"ends": {"any": ["in summary"]}}, "Yes.\n\nIn summary, rest.\n", "In summary, rest.\nYes."),
        ({"negated": ["antibiotics"]}, "You don't need antibiotics.", "Take antibiotics."),
        ({"affirmed": ["antibiotics"]}, "Take antibiotics.", "Rest. Do not take antibiotics."),
    ],
)
def test_each_kind_of_check(check, met, unmet):
    validate(check)
    assert holds(check, met)
    assert not holds(check, unmet)


@pytest.mark.parametrize(
    ("check", "match"),
    [
        ({}, "one key"),
        ({"any": ["a"], "all": ["b"]}, "one key"),
        ("any", "one key"),
        ({"contains": ["a"]}, "unknown check 'contains'"),
        ({"any": []}, "non-empty list"),
        ({"any": ["*"]}, "non-empty list of phrases"),
        ({"regex": "("}, "regular expression"),
        ({"regex": 3}, "regular expression"),
        ({"count": {"min": 1}}, "'of'"),
        ({"count": {"of": "words"}}, "'min' or a 'max'"),
        ({"count": {"of": "words", "min": -1}}, "at least 0"),
        ({"count": {"of": "lines", "min": 1}}, "'lines'"),
        ({"count": {"of": "words", "least": 1}}, "unknown keys"),
        ({"not": ["a"]}, "one key"),
        ({"every": {}}, "list of checks"),
    ],
)
def test_malformed_checks_are_refused(check, match):
    with pytest.raises(DataError, match=match):
        validate(check)


def test_a_criterion_without_a_check_is_unscored():
    example = Example(
        "x", ({"role": "user", "content": "Hi"},), Rubric((Criterion("a", check={"any": ["yes"]}), Criterion("b")))
    )
    verdicts = ChecksJudge().judge(example, "Yes.").verdicts
    assert [v.met for v in verdicts] == [True, None]
    assert "LLM judge" in verdicts[1].reason


@pytest.fixture(scope="module")
def rows():
    return {e.id: e for e in bundled().examples}


def test_every_reference_meets_its_rubric(rows):
    for e in rows.values():
        assert score(e.rubric, ChecksJudge().judge(e, e.reference).verdicts).value == 1.0, e.id


def test_every_check_of_one_prompt_tells_a_response_that_meets_it_from_one_that_does_not(rows):
    tested = {(c["id"], c["criterion"]) for c in CASES}
    for case in CASES:
        check = rows[case["id"]].rubric.criteria[case["criterion"]].check
        assert holds(check, case["met"]), case
        assert not holds(check, case["unmet"]), case
    for e in rows.values():
        for k, c in enumerate(e.rubric):
            assert (e.id, k) in tested or c.tags[1] in FORMS, (e.id, c.text)


FORMS = {
    "opening": ("In short, rest.\nMore.", "Rest.\nIn short."),
    "seek-help": ("See a doctor if it lasts.", "Doctors know this well."),
    "bullets": ("- a\n- b", "a and b"),
    "example": ("For example, tea.", "Tea is an example."),
    "myth": ("It is a myth that cold causes colds.", "Cold air is dry."),
    "analogy": ("It works like a pump.", "People like it."),
    "number": ("It takes 3 weeks.", "There are 3 of them."),
}
"""A form -> a response that has it and one that has not."""


def test_the_checks_of_forms_tell_texts_apart_wanted_or_penalised(rows):
    forms = [c for e in rows.values() for c in e.rubric if c.tags[1] in FORMS]
    assert {(c.tags[1], c.is_pitfall) for c in forms} >= {(form, wanted) for form in FORMS for wanted in (True, False)}
    for tag, check in {(c.tags[1], json.dumps(c.check)) for c in forms}:
        met, unmet = FORMS[tag]
        assert holds(json.loads(check), met), tag
        assert not holds(json.loads(check), unmet), tag


def test_no_check_holds_on_the_question_alone(rows):
    for e in rows.values():
        question = e.messages[-1]["content"]
        assert not [c.text for c in e.rubric if c.tags[1] != "number" and holds(c.check, question)], e.id


def test_a_fact_is_rarely_met_by_the_answer_to_another_question(rows):
    others = list(rows.values())[::18]
    met = [
        holds(c.check, other.reference)
        for e in rows.values()
        for c in e.rubric
        if "own" in c.tags
        for other in others
        if other is not e
    ]
    assert len(met) > 10_000
    assert sum(met) / len(met) < 0.02


@pytest.mark.parametrize(
    "response", ["It is not the water that helps you rest, and so on, " * 38, "- one two; three, but four\n" * 74]
)
def test_no_check_is_slow_on_a_long_response(rows, response):
    checks = {json.dumps(c.check): c.check for e in rows.values() for c in e.rubric}
    seconds = []
    for check in checks.values():
        holds(check, "warm")  # compiles the pattern
        started = time.perf_counter()
        holds(check, response)
        seconds.append(time.perf_counter() - started)
    assert sum(seconds) / len(seconds) < 0.01
    assert max(seconds) < 0.5  # one check on a busy machine
