import json
from pathlib import Path

import pytest

from rgsd.data import bundled
from rgsd.errors import DataError
from rgsd.judges import ChecksJudge
from rgsd.judges.checks import holds, validate
from rgsd.rubrics import Criterion, Example, Rubric, score

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
        ({"count": {"of": "lines", "min": 1}}, "counts words"),
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


def test_the_bundled_data_are_what_the_docs_say(rows):
    assert len(rows) >= 160
    assert {e.domain for e in rows.values()} == {"medicine", "science"}
    for e in rows.values():
        assert 5 <= len(e.rubric) <= 8, e.id
        assert e.rubric.is_checkable, e.id
        assert sum("own" in c.tags for c in e.rubric) >= 1, e.id
        assert any(t.startswith("split:") for t in e.tags), e.id
    assert sum(c.is_pitfall for e in rows.values() for c in e.rubric) >= 40
    assert len({e.prompt_key for e in rows.values()}) == len(rows)


def test_every_reference_meets_its_rubric(rows):
    for e in rows.values():
        assert score(e.rubric, ChecksJudge().judge(e, e.reference).verdicts).value == 1.0, e.id


def test_every_own_check_tells_a_response_that_meets_it_from_one_that_does_not(rows):
    tested = {(c["id"], c["criterion"]) for c in CASES}
    for case in CASES:
        check = rows[case["id"]].rubric.criteria[case["criterion"]].check
        assert holds(check, case["met"]), case
        assert not holds(check, case["unmet"]), case
    for e in rows.values():
        for k, c in enumerate(e.rubric):
            assert (e.id, k) in tested or "shared" in c.tags, (e.id, c.text)


def test_the_recurring_checks_tell_texts_apart(rows):
    shared = {c.text: c.check for e in rows.values() for c in e.rubric if "shared" in c.tags and "jargon" not in c.tags}
    texts = {
        "Says when to seek medical help.": ("See a doctor if it lasts.", "Doctors know this well."),
        'Opens with a one-sentence answer that begins with "In short".': ("In short, rest.\nMore.", "Rest.\nIn short."),
        'Gives a concrete example, introduced with "For example".': ("For example, tea.", "Tea is an example."),
        'Ends with a one-sentence summary that begins with "In summary".': (
            "A.\nIn summary, rest.",
            "In summary, a.\nB.",
        ),
        "Lists the main points as bullet points.": ("- a\n- b", "a and b"),
        "Corrects a common myth or misconception.": ("It is a myth that cold causes colds.", "Cold air is dry."),
        "Explains the idea with an everyday comparison.": ("It works like a pump.", "People like it."),
        "Gives at least one figure with its unit.": ("It is 3 km away.", "There are 3 of them."),
        "Says what is uncertain or not yet known.": ("Why is still unclear.", "It is clear why."),
    }
    assert set(texts) == set(shared)
    for text, (met, unmet) in texts.items():
        assert holds(shared[text], met), text
        assert not holds(shared[text], unmet), text


def test_no_check_holds_on_the_question_alone(rows):
    for e in rows.values():
        question = e.messages[-1]["content"]
        own = [c for c in e.rubric if "own" in c.tags or c.is_pitfall]
        assert not any(holds(c.check, question) for c in own), e.id
