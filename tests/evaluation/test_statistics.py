"""Statistics against hand-computed cases, brute force and simulation."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.samples import sample

from rgsd.errors import DataError
from rgsd.evaluation import statistics
from rgsd.evaluation.conclusions import Conclusion, conclude, verdict_sentence
from rgsd.evaluation.samples import latest
from rgsd.evaluation.statistics import (
    Estimate,
    Interval,
    agreement,
    balanced_f1,
    cohens_kappa,
    confusion,
    count_difference,
    holm,
    interval,
    length_controlled,
    quantiles,
    ratio,
    resampled_sums,
    sign_test,
)
from rgsd.evaluation.summaries import met_by_tag, paired_difference, summarise, tag_score, usage_totals


def verdict(met, weight=1.0, tags=(), criterion="Advises rest.", grade=None):
    return {"criterion": criterion, "weight": weight, "tags": list(tags), "met": met, "grade": grade, "reason": ""}


def row(example_id="e0", verdicts=(), score=None, **more):
    """A sample; its coverage follows from its verdicts."""
    fields = {"judge": "j", "response": "some words", "n_tokens": 4, "is_truncated": False, **more}
    if not verdicts:
        fields.setdefault("coverage", 1.0)
    return sample(example_id, score, verdicts, question=f"question of {example_id}", **fields)


# Resampling.


def test_chunks_change_nothing(monkeypatch):
    values = np.random.default_rng(1).normal(size=37)
    whole = interval(values.tolist(), seed=5)
    sums = resampled_sums(np.stack([values, values**2], 1), seed=5)
    monkeypatch.setattr(statistics, "NUMBERS_AT_ONCE", 100)
    for kept in (statistics.NUMBERS_KEPT, 0):
        monkeypatch.setattr(statistics, "NUMBERS_KEPT", kept)
        assert interval(values.tolist(), seed=5) == whole
        np.testing.assert_allclose(resampled_sums(np.stack([values, values**2], 1), seed=5), sums, rtol=1e-12)


def test_sums_are_those_of_the_drawn_rows():
    columns = np.arange(10.0).reshape(5, 2)
    draws = np.random.default_rng(3).integers(0, 5, size=(7, 5))
    np.testing.assert_array_equal(resampled_sums(columns, seed=3, n_resamples=7), columns[draws].sum(1))


def test_the_interval_is_that_of_all_resamples_enumerated():
    values = [0.0, 0.1, 0.7, 1.0]
    means = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    low, high = np.quantile(means, quantiles(4))
    found = interval(values, n_resamples=200_000)
    # Between neighbouring values of a discrete distribution the sampled quantile can only move by a step.
    assert found.low == pytest.approx(low, abs=0.026)
    assert found.high == pytest.approx(high, abs=0.026)
    assert found.mean == pytest.approx(0.45)


def test_thousands_of_prompts_need_no_memory_for_all_resamples():
    import tracemalloc

    values = np.random.default_rng(0).normal(size=4000).tolist()
    tracemalloc.start()
    interval(values)
    ratio(values, [1.0] * 4000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6  # all at once would be 320 MB and more


def test_no_value_is_refused():
    with pytest.raises(DataError, match="at least one value"):
        interval([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match="value 1 of 3"):
        interval([0.5, bad, 0.5])


@pytest.mark.parametrize(
    ("low", "high", "n", "said"),
    [
        (0.1, 0.2, 30, Conclusion.BETTER),
        (-0.2, -0.1, 30, Conclusion.WORSE),
        (-0.1, 0.2, 30, Conclusion.NOT_SHOWN),
        (0.0, 0.2, 30, Conclusion.NOT_SHOWN),
        (0.75, 0.75, 2, Conclusion.TOO_FEW),
        (0.1, 0.2, 29, Conclusion.TOO_FEW),
        (-0.2, -0.1, 29, Conclusion.TOO_FEW),
    ],
)
def test_a_difference_in_words(low, high, n, said):
    found = {"mean": (low + high) / 2, "low": low, "high": high, "n": n}
    assert conclude(found) is said
    assert conclude(Interval(**found)) is said
    assert conclude(Estimate(found["mean"], low, high, n)) is said
    sentence = verdict_sentence("trained", "base", found)
    assert said in sentence
    assert f"{n} prompts" in sentence
    assert all(other not in sentence for other in Conclusion if other is not said)


def test_nothing_is_concluded_from_nothing_and_a_margin_moves_the_bar():
    assert conclude(None) is Conclusion.TOO_FEW
    assert conclude(Estimate(0.1, None, None, 90, "undefined")) is Conclusion.TOO_FEW
    assert conclude(Interval(0.0, -0.04, 0.04, 90), above=-0.05) is Conclusion.BETTER
    with pytest.raises(DataError, match="nan"):
        conclude(Interval(math.nan, 0.1, 0.2, 90))


def test_the_interval_covers_more_often_than_the_plain_percentile_one_where_prompts_are_few():
    from benchmarks.coverage import _symmetric, bounds

    rng = np.random.default_rng(0)
    ends = bounds(_symmetric(rng, (4_000, 20)), rng, 1_000)
    covered = {m: float(np.mean((low <= 0) & (high >= 0))) for m, (low, high) in ends.items()}
    assert covered["expanded"] == pytest.approx(0.95, abs=0.012)
    assert covered["percentile"] < covered["expanded"] - 0.01


def test_quantiles_reach_further_out_the_fewer_the_prompts():
    assert quantiles(10)[0] < quantiles(40)[0] < 0.025
    assert quantiles(100_000)[0] == pytest.approx(0.025, abs=1e-5)
    assert quantiles(1) == (0.025, 0.975)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_an_interval_lies_within_the_values_around_its_mean(values, seed):
    found = interval(values, seed=seed, n_resamples=500)
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12
    assert found.n == len(values)


def test_the_interval_of_a_clustered_ratio_covers_at_its_rate_where_one_over_criteria_does_not():
    # Ten criteria a prompt, all met or all missed: effectively one observation a prompt.
    rng = np.random.default_rng(0)
    covered = naive = 0
    for seed in range(150):
        met = (rng.random(80) < 0.3) * 10.0
        found = ratio(met.tolist(), [10.0] * 80, seed=seed, n_resamples=1000)
        covered += found.low <= 0.3 <= found.high
        single = np.repeat(met / 10, 10)
        half = 1.96 * single.std() / math.sqrt(len(single))
        naive += abs(single.mean() - 0.3) <= half
    assert 0.89 <= covered / 150 <= 0.99
    assert naive / 150 < 0.7


def test_a_share_of_all_or_nothing_is_not_certain():
    # No case in 10 prompts: a rate of 31 % would show that in 2.5 % of all samples of 10.
    none = ratio([0] * 10, [3] * 10, is_share=True)
    assert (none.value, none.low) == (0.0, 0.0)
    assert (1 - none.high) ** 10 == pytest.approx(0.025)
    every = ratio([3] * 10, [3] * 10, is_share=True)
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(1 - none.high)
    net = ratio([0] * 10, [3] * 10)
    assert (net.low, net.high) == (0.0, 0.0)
    assert agreement([True] * 5, [True] * 5, list("abcde")).raw.low == pytest.approx(0.025 ** (1 / 5))


def test_a_share_of_nothing_is_undefined():
    found = ratio([0, 0], [0, 0])
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.note


# Rows.


def test_later_rows_supersede_earlier_ones_of_the_same_key():
    rows = [
        row("a", score=0.1),
        row("a", score=0.2, judge="other"),
        row("b", score=0.3),
        row("a", score=0.9),
        row("a", score=0.5, arm="trained"),
    ]
    found = {(s.arm, s.example_id, s.judge): s.score for s in latest(rows)}
    assert found == {
        ("base", "a", "j"): 0.9,
        ("base", "a", "other"): 0.2,
        ("base", "b", "j"): 0.3,
        ("trained", "a", "j"): 0.5,
    }


def test_an_axis_is_scored_over_its_own_criteria():
    axis, other = ("axis:accuracy",), ("axis:completeness",)
    r = row(
        verdicts=[verdict(True, 5, axis), verdict(True, -4, axis), verdict(False, 3, axis), verdict(True, 7, other)]
    )
    assert tag_score(r, "axis:accuracy").value == pytest.approx((5 - 4) / 8)
    assert tag_score(r, "axis:completeness").value == 1.0
    assert tag_score(r, "axis:none") is None
    only_pitfalls = row(verdicts=[verdict(True, -4, axis)])
    assert tag_score(only_pitfalls, "axis:accuracy").value is None


def test_an_unscored_criterion_leaves_its_axis():
    axis = ("axis:accuracy",)
    r = row(verdicts=[verdict(True, 5, axis), verdict(None, -4, axis), verdict(None, 3, axis)])
    found = tag_score(r, "axis:accuracy")
    assert found.value == 1.0
    assert found.n_scored == 1


def test_the_summary_of_an_arm():
    axis = ("axis:accuracy",)
    rows = [
        row("a", [verdict(True, 5, axis), verdict(False, -3, axis)], 1.0, domain="medicine", tags=["theme:x"]),
        row(
            "b",
            [verdict(True, 5, axis), verdict(True, -3, axis)],
            -0.6,
            domain="science",
            is_truncated=True,
            n_tokens=8,
        ),
        row("c", [verdict(None, 5), verdict(None, -3)], None, domain="science", problem="timeout"),
    ]
    rows = [replace(s, scoring="healthbench") for s in rows]
    found = summarise(rows, seed=1)
    json.dumps(found, allow_nan=False)
    assert found["score"]["mean"] == pytest.approx(0.2)
    assert found["score"]["low"] == 0.0  # clipped as HealthBench clips its mean
    assert found["score"]["n"] == 2
    assert found["coverage"] == pytest.approx(2 / 3)
    assert found["scored"] == {
        "n_criteria": 6,
        "n_criteria_scored": 4,
        "criteria_share": pytest.approx(4 / 6),
        "n_prompts_scored": 2,
        "prompts_share": pytest.approx(2 / 3),
    }
    assert found["unscored"] == {"timeout": 1}
    assert found["by_criterion_tag"]["axis:accuracy"]["score"]["n"] == 2
    assert found["by_domain"]["medicine"]["score"]["mean"] == 1.0
    assert found["by_domain"]["science"]["n_prompts"] == 2
    assert found["by_domain"]["science"]["score"]["n"] == 1
    assert found["by_example_tag"]["theme:x"]["n_prompts"] == 1
    tag = found["criteria_by_tag"]["axis:accuracy"]
    assert tag["met"]["value"] == pytest.approx(3 / 4)
    assert tag["satisfied"]["value"] == pytest.approx(3 / 4)  # met, not met pitfall, met; the met pitfall is not
    assert (tag["n_scored"], tag["n_pitfalls"], tag["n_prompts"]) == (4, 2, 2)
    assert found["lengths"]["tokens"]["median"] == 4
    assert found["lengths"]["characters"]["mean"] == len("some words")
    assert found["truncated_share"] == pytest.approx(1 / 3)
    assert found["usage"]["price"] is None
    assert found["usage"]["n_rows_without_usage"] == 3


def test_recurring_criteria_are_counted_by_text_and_sign():
    rows = [
        row(f"e{i}", [verdict(i < 3, 2), verdict(i < 1, -1), verdict(True, criterion=f"only {i}")]) for i in range(4)
    ]
    found = summarise(rows)["criteria_by_text"]
    assert [(f["criterion"], f["is_pitfall"], f["met"]["value"], f["n_prompts"]) for f in found] == [
        ("Advises rest.", False, 0.75, 4),
        ("Advises rest.", True, 0.25, 4),
    ]
    assert [f["satisfied"]["value"] for f in found] == [0.75, 0.75]


def test_graded_verdicts_count_by_their_grade():
    rows = [
        row("a", [verdict(None, tags=("t",), grade=0.75)], 0.75),
        row("b", [verdict(None, tags=("t",), grade=0.25)], 0.25),
    ]
    rows = [replace(s, scoring="researchqa") for s in rows]
    found = summarise(rows)
    assert found["criteria_by_tag"]["t"]["met"]["value"] == 0.5
    assert found["by_criterion_tag"]["t"]["score"]["mean"] == 0.5
    assert met_by_tag(rows) == {}


def test_usage_is_summed_and_an_unknown_price_stays_unknown():
    use = {"calls": 2, "cached": 1, "prompt_tokens": 10, "completion_tokens": 5, "price": 0.25, "seconds": 1.5}
    rows = [row(name, [verdict(True)], 1.0, usage=use) for name in "ab"]
    assert summarise(rows)["usage"] == {
        "calls": 4,
        "cached": 2,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "seconds": 3.0,
        "price": 0.5,
        "n_rows_without_usage": 0,
    }
    rows[1] = row("b", [verdict(True)], 1.0, usage=use | {"price": None})
    assert usage_totals(rows)["price"] is None


def test_an_arm_without_rows_is_refused():
    with pytest.raises(DataError, match="at least one sample"):
        summarise([])


# Two arms.


def test_the_difference_takes_the_prompts_that_both_scored():
    a = [row("x", score=0.2), row("y", score=None), row("z", score=0.5)]
    b = [row("z", score=0.6), row("y", score=1.0), row("x", score=0.5)]
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(0.2)
    assert found.n == 2
    assert paired_difference(a, [row("q", score=1.0)]) is None


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 0), (7, 2), (4, 4), (2, 9)])
def test_the_sign_test_counts_all_ways_to_fall(won, lost):
    n = won + lost
    as_far = [s for s in itertools.product([0, 1], repeat=n) if abs(2 * sum(s) - n) >= abs(won - lost)]
    assert sign_test(won, lost) == pytest.approx(len(as_far) / 2**n)


def test_the_sign_test_of_thousands():
    assert sign_test(5000, 5000) == 1.0
    # The normal approximation with continuity correction.
    z = (5200 - 4800 - 1) / math.sqrt(10_000)
    assert sign_test(5200, 4800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_difference_at_equal_length_is_the_intercept():
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 0.6, size=200)
    lengths_a = np.full(200, 400.0)
    lengths_b = lengths_a * 2**x
    differences = 0.03 + 0.2 * x + rng.normal(0, 0.01, size=200)
    found = length_controlled(differences.tolist(), lengths_a.tolist(), lengths_b.tolist(), n_resamples=2000)
    slope, height = np.polyfit(x, differences, 1)
    assert found.difference.value == pytest.approx(height)
    assert found.slope.value == pytest.approx(slope)
    assert found.difference.low < 0.03 < found.difference.high
    assert found.difference.high - found.difference.low < 0.01
    assert found.mean_log2_ratio == pytest.approx(x.mean())
    assert not found.is_extrapolated


def test_the_interval_at_equal_length_covers_at_its_rate():
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(150):
        x = rng.normal(0.4, 0.5, size=60)
        y = 0.05 + 0.1 * x + rng.normal(0, 0.2, size=60)
        found = length_controlled(y.tolist(), [100.0] * 60, (100 * 2**x).tolist(), seed=seed, n_resamples=1000)
        covered += found.difference.low <= 0.05 <= found.difference.high
    assert 0.88 <= covered / 150 <= 0.99


def test_where_there_is_no_line_none_is_drawn():
    few = length_controlled([0.1] * 5, [10.0] * 5, [20.0] * 5)
    assert few.difference.value is None
    assert "at least 10" in few.difference.note
    same = length_controlled([0.1] * 20, [10.0] * 20, [10.0] * 20)
    assert same.difference.value is None
    assert "plain difference" in same.difference.note
    twice = length_controlled([0.1] * 20, [10.0] * 20, [20.0] * 20)
    assert twice.difference.value is None
    assert "plain difference" not in twice.difference.note
    assert twice.mean_log2_ratio == 1.0


def test_empty_responses_have_no_length_ratio_and_a_line_beyond_the_data_is_called_so():
    lengths = [100.0 * (2 + i) for i in range(12)]
    found = length_controlled([0.1 * i for i in range(13)], [100.0] * 13, [0.0, *lengths])
    assert (found.n, found.n_left_out) == (12, 1)
    assert found.is_extrapolated


# Two raters.


def test_kappa_and_f1_by_hand():
    # 20 both, 5 reference only, 10 other only, 15 neither: the textbook table, kappa 0.4.
    counts = np.array([20.0, 5, 10, 15])
    assert cohens_kappa(counts) == pytest.approx(0.4)
    f1_met, f1_unmet = 40 / (40 + 15), 30 / (30 + 15)
    assert balanced_f1(counts) == pytest.approx((f1_met + f1_unmet) / 2)
    reference = [True] * 25 + [False] * 25
    other = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = agreement(reference, other, [str(i) for i in range(50)])
    assert found.kappa.value == pytest.approx(0.4)
    assert found.raw.value == pytest.approx(0.7)
    assert (found.both_met, found.reference_only, found.other_only, found.neither_met) == (20, 5, 10, 15)
    assert (found.n, found.n_prompts) == (50, 50)
    assert found.kappa.low < 0.4 < found.kappa.high


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcd")), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_agreement_is_what_counting_says(triples):
    reference, other, prompts = (list(column) for column in zip(*triples, strict=True))
    found = agreement(reference, other, prompts, n_resamples=50)
    n = len(reference)
    observed = sum(r == o for r, o in zip(reference, other, strict=True)) / n
    assert found.raw.value == pytest.approx(observed)
    if len(set(reference)) == 1:
        assert found.kappa.value is None
        assert found.balanced_f1.value is None
        assert "all verdicts of the reference" in found.kappa.note
        return
    p, q = sum(reference) / n, sum(other) / n
    expected = p * q + (1 - p) * (1 - q)
    assert found.kappa.value == pytest.approx((observed - expected) / (1 - expected))
    f1 = []
    for kind in (True, False):
        hits = sum(r == o == kind for r, o in zip(reference, other, strict=True))
        f1.append(2 * hits / (reference.count(kind) + other.count(kind)))
    assert found.balanced_f1.value == pytest.approx(sum(f1) / 2)


def test_a_rater_who_always_says_the_same_agrees_by_chance():
    found = agreement([True, False] * 20, [True] * 40, [str(i) for i in range(40)])
    assert found.kappa.value == pytest.approx(0.0)
    assert found.balanced_f1.value == pytest.approx(1 / 3)


def test_an_interval_that_few_resamples_define_is_not_given():
    # One prompt in twenty carries the only "not met": a third of the resamples have none.
    found = agreement([True] * 19 + [False], [True] * 20, [str(i) for i in range(20)])
    assert found.kappa.value == pytest.approx(0.0)
    assert found.kappa.low is None
    assert "resamples" in found.kappa.note


def test_no_common_verdicts_agree_on_nothing():
    found = agreement([], [], [])
    assert found.n == 0
    assert found.raw == Estimate(None, None, None, 0, found.raw.note)


def test_agreement_is_resampled_by_prompt():
    rng = np.random.default_rng(0)
    truth = rng.random(40) < 0.5
    other = np.where(rng.random(40) < 0.8, truth, ~truth)
    once = agreement(truth.tolist(), other.tolist(), [str(i) for i in range(40)])
    # The same verdicts ten times over in each prompt hold nothing new.
    names = [str(i) for i in range(40) for _ in range(10)]
    tenfold = agreement(np.repeat(truth, 10).tolist(), np.repeat(other, 10).tolist(), names)
    assert tenfold.raw.low == pytest.approx(once.raw.low)
    assert tenfold.kappa.high == pytest.approx(once.kappa.high)
    assert (tenfold.n, tenfold.n_prompts) == (400, 40)


def test_kappas_interval_covers_at_its_rate():
    rng = np.random.default_rng(11)
    # The other rater copies the reference 7 times in 10, else tosses a coin: kappa 0.7 for a balanced reference.
    covered = 0
    for seed in range(150):
        reference = rng.random((60, 3)) < 0.5
        other = np.where(rng.random((60, 3)) < 0.7, reference, rng.random((60, 3)) < 0.5)
        names = [str(i) for i in range(60) for _ in range(3)]
        found = agreement(reference.ravel().tolist(), other.ravel().tolist(), names, seed=seed, n_resamples=1000)
        covered += found.kappa.low <= 0.7 <= found.kappa.high
    assert 0.88 <= covered / 150 <= 0.99


def test_a_difference_of_agreements_is_paired():
    reference = [True, False] * 30
    names = [str(i) for i in range(60)]
    worse = [not r if i % 10 == 0 else r for i, r in enumerate(reference)]
    a = confusion(reference, worse, names)
    same = count_difference(a, a, statistics.raw_agreement)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    b = confusion(reference, reference, names)
    better = count_difference(a, b, statistics.raw_agreement)
    assert better.value == pytest.approx(0.1)
    assert better.low > 0
