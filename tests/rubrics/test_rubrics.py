import json
import os
import subprocess
import sys

import pytest

from rgsd.errors import DataError
from rgsd.rubrics import Criterion, Example, Rubric, Score, Verdict, fingerprint, mean_score, score

YES, NO, UNSCORED = Verdict(True), Verdict(False), Verdict(None, reason="timed out")
SIGNED = Rubric((Criterion("a", 5), Criterion("b", 3), Criterion("c", -4)))


def example(**kwargs):
    defaults = {"id": "x", "messages": ({"role": "user", "content": "Hi"},), "rubric": SIGNED}
    return Example(**{**defaults, **kwargs})


@pytest.mark.parametrize(
    ("scoring", "verdicts", "value"),
    [
        ("satisfaction", [YES, NO, NO], 5 / 8),
        ("satisfaction", [YES, YES, YES], 4 / 8),
        ("healthbench", [NO, NO, YES], -4 / 8),  # an example stays negative
        ("rubrichub", [NO, NO, YES], 0.0),
        ("rar_explicit", [YES, NO, NO], (5 + 4) / 12),
        ("rar_explicit", [NO, NO, YES], 0.0),
        ("researchqa", [Verdict(None, 0.75), Verdict(None, 0.25), Verdict(None, 0.5)], 0.5),
        ("prbench", [YES, NO, YES], (1 + 4) / 12),
        ("prbench", [NO, NO, YES], 0.0),
    ],
)
def test_scores_as_the_authors_define_them(scoring, verdicts, value):
    assert score(SIGNED, verdicts, scoring).value == pytest.approx(value)


def test_healthbench_professional_takes_length_off():
    got = score(SIGNED, [YES, YES, NO], "healthbench_professional", "x" * 3000).value
    assert got == pytest.approx(1.0 - 0.0147 * 2)


@pytest.mark.parametrize(("length", "adjustment"), [(0, 0.0588), (500, 0.0441), (2000, 0.0), (2500, -0.0147)])
def test_healthbench_professionals_length_term_is_linear_on_both_sides(length, adjustment):
    # As calculate_length_adjusted_score of openai/simple-evals (pull request 108).
    for verdicts, plain in (([YES, YES, NO], 1.0), ([NO, NO, NO], 0.0)):
        got = score(SIGNED, verdicts, "healthbench_professional", "x" * length).value
        assert got == pytest.approx(plain + adjustment)


@pytest.mark.parametrize("weight", [1e308, -1e308, 1.1e6, 1e-7, float("inf"), float("nan")])
def test_absurd_weights_are_refused_by_name(weight):
    with pytest.raises(DataError, match=r"weight must be .* for 'Advises rest.'"):
        Criterion("Advises rest.", weight)


@pytest.mark.parametrize("scoring", ["satisfaction", "rar_explicit", "prbench", "healthbench"])
def test_the_largest_weights_still_give_a_finite_score(scoring):
    rubric = Rubric(tuple(Criterion(f"c{i}", sign * 1e6) for i, sign in enumerate((1, 1, -1))))
    assert -1.0 <= score(rubric, [YES, NO, YES], scoring).value <= 1.0


def test_only_healthbenchs_mean_is_clipped():
    scores = [Score(-0.9, 3, 3), Score(0.1, 3, 3)]
    assert mean_score(scores, "healthbench") == 0.0
    assert mean_score(scores, "satisfaction") == pytest.approx(-0.4)
    assert mean_score([Score(None, 0, 3)], "healthbench") is None


def test_unscored_is_never_false_or_zero():
    got = score(SIGNED, [YES, UNSCORED, UNSCORED])
    assert got.value == 1.0  # unscored criteria count neither as points nor as pitfalls
    assert got.coverage == pytest.approx(1 / 3)
    assert score(SIGNED, [UNSCORED] * 3).value is None
    with pytest.raises(DataError, match="no value"):
        _ = UNSCORED.value


def test_a_rubric_of_pitfalls_alone_has_no_satisfaction():
    assert score(Rubric((Criterion("c", -4),)), [NO]).value is None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Criterion(" ", 1), "text"),
        (lambda: Criterion("a", 0), "not zero"),
        (lambda: Criterion("a", float("nan")), "finite"),
        (lambda: Criterion("a", True), "number"),
        (lambda: Rubric(()), "at least one"),
        (lambda: example(messages=()), "no messages"),
        (lambda: example(messages=({"role": "assistant", "content": "Hi"},)), "end with the user"),
        (lambda: example(messages=({"role": "user", "content": "  "},)), "empty"),
        (lambda: example(messages=({"role": "robot", "content": "Hi"},)), "unknown role 'robot'"),
        (lambda: example(messages=({"role": "user", "content": None},)), "NoneType"),
        (lambda: example(scoring="best"), "unknown scoring"),
        (lambda: Verdict(None, 1.5), r"\[0, 1\]"),
        (lambda: score(SIGNED, [YES]), "1 verdicts for 3 criteria"),
    ],
)
def test_bad_values_say_what_is_wrong(make, match):
    with pytest.raises(DataError, match=match):
        make()


def test_the_prompt_key_folds_case_and_space():
    a, b = example(), example(messages=({"role": "user", "content": " hI\n"},))
    assert a.prompt_key == b.prompt_key


def test_the_fingerprint_is_of_the_content_alone():
    assert fingerprint([example()]) == fingerprint([example(metadata={"note": 1})])
    assert fingerprint([example()]) != fingerprint([example(reference="r")])
    code = (
        "from rgsd.rubrics import *; turn = {'role': 'user', 'content': 'Hi'}; "
        "print(fingerprint([Example('x', (turn,), Rubric((Criterion('a', check={'any': ['b'], }),)))]))"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1
    assert prints != {""}


def test_rubrics_knows_only_the_standard_library():
    code = (
        "import json, sys; import rgsd.rubrics; heavy = ('torch', 'numpy', 'transformers', 'datasets'); "
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
