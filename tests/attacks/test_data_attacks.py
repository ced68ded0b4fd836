"""Data, recipes and templates that try to hang, exhaust memory or crash: each ends with an rgsd error, a refused row or
an unscored verdict, within seconds."""

import time
from contextlib import contextmanager

import pytest

from rgsd.errors import CheckUndecided, DataError
from rgsd.judges import ChecksJudge
from rgsd.rubrics import Criterion, Example, Rubric, checks
from rgsd.rubrics.checks import holds, validate

pytestmark = pytest.mark.timeout(60)


@contextmanager
def within(seconds=5.0):
    # Time of this process: a busy machine is no hang.
    begin = time.process_time()
    yield
    assert time.process_time() - begin < seconds


def example(*found):
    turn = {"role": "user", "content": "Hi"}
    return Example("x", (turn,), Rubric(tuple(Criterion(f"c{i}", check=c) for i, c in enumerate(found))))


@pytest.fixture(autouse=True)
def _no_earlier_timeouts():
    checks._TIMEOUTS.clear()


# --- Programmatic checks


HANGING = [
    (r"(a+)+$", "a" * 3000 + "!"),
    (r"(a|aa)+$", "a" * 41 + "!"),
    (r"((a|a)+)+$", "a" * 41 + "!"),
    (r"(\w+\s?)*$", "word " * 20_000 + "!?"),
    (r"(.+)\1+\1$", "a" * 20_000 + "!"),
    (r"(?=(a|aa)+$)", "a" * 5000 + "!"),
]


@pytest.mark.parametrize("body", [lambda p: {"regex": p}, lambda p: {"count": {"of": {"regex": p}, "min": 1}}])
@pytest.mark.parametrize(("pattern", "text"), HANGING, ids=[p for p, _ in HANGING])
def test_a_pattern_without_end_is_unscored_and_costs_its_time_once(pattern, text, body):
    rows = example({"not": body(pattern)}, {"any": ["a*", "word"]})
    validate(body(pattern))
    with within(3):
        judgement = ChecksJudge().judge(rows, text)
    assert [v.met for v in judgement.verdicts] == [None, True]  # under "not", an undecided check is no met one
    assert judgement.problem == "check limit"
    assert "(" in judgement.verdicts[0].reason
    with within(3):  # twenty more responses together
        for _ in range(20):
            assert ChecksJudge().judge(rows, text).verdicts[0].met is None
    assert holds(body(pattern), "aa") == holds(body(pattern), "aa")  # an ordinary text still gets its verdict


def test_the_published_example_of_a_hang_is_decided_at_once():
    with within(2):
        assert holds({"regex": "(a+)+$"}, "a" * 40 + "!") is False


@pytest.mark.parametrize("kind", ["negated", "affirmed"])
@pytest.mark.parametrize(
    "text", ["antibiotics " * 1700, "no " + "antibiotics " * 20_000, "n" * 20_000 + "n't", "never. " * 3000]
)
def test_negation_is_found_in_linear_time(kind, text):
    with within(1):
        found = holds({kind: ["antibiotics"]}, text)
    assert found == ("antibiotics" in text and text.startswith("no ") == (kind == "negated"))


@pytest.mark.parametrize(
    ("sentence", "negated", "affirmed"),
    [
        ("Antibiotics, not rest.", False, True),
        ("Antibiotics do not help, so take no antibiotics.", True, True),
        ("Without rest, antibiotics or antibiotics.", True, False),
        ("Rather than antibiotics, rest.", True, False),
        ("Not that. Antibiotics.", False, True),
        ("Nothing about antibiotics.", False, True),
    ],
)
def test_negation_reaches_to_the_end_of_its_sentence(sentence, negated, affirmed):
    assert holds({"negated": ["antibiotics"]}, sentence) is negated
    assert holds({"affirmed": ["antibiotics"]}, sentence) is affirmed


@pytest.mark.parametrize(
    "check",
    [
        {"regex": "a{4294967290}"},
        {"regex": "(?:ab){300000000}"},
        {"regex": "(?:(?:(?:a{100}){100}){100}){100}"},
        {"count": {"of": {"regex": "(?:a{1000}){1000}"}, "min": 1}},
        {"regex": "(" * 5000 + ")" * 5000},
        {"regex": "a" * 1_000_000},
        {"any": ["a " * 100_000 + "b"]},
        {"any": ["a"] * 100_000},
        {"every": [{"starts": {"any": ["a"]}}] * 5000},
    ],
    ids=lambda c: str(c)[:30],
)
def test_a_check_of_immoderate_size_is_refused(check):
    with within(), pytest.raises(DataError):
        validate(check)


def test_a_check_nested_without_end_is_refused():
    check = {"any": ["a"]}
    for _ in range(500):
        check = {"not": check}
    with within(), pytest.raises(DataError, match="levels deep"):
        validate(check)


def test_a_huge_response_is_unscored():
    with within(), pytest.raises(CheckUndecided, match="characters"):
        holds({"any": ["a"]}, "b" * (checks.MAX_TEXT_CHARS + 1))


def test_many_slow_parts_share_one_limit():
    check = {"every": [{"not": {"starts": {"any": ["nothing"]}}}] * 150}
    validate(check)
    with within(), pytest.raises(CheckUndecided):
        holds(check, "Some words here. " * 50_000)


@pytest.mark.parametrize(
    ("pattern", "text", "met"),
    [(r"a{e<=1}", "b", False), (r"a{e<=1}", "a{e<=1}", True), (r"[{]x\{1{2}", "{x{11", True), (r"a{,2}b", "aab", True)],
)
def test_braces_mean_what_they_mean_to_the_standard_library(pattern, text, met):
    validate({"regex": pattern})
    assert holds({"regex": pattern}, text) is met
