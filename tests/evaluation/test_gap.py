"""`rgsd gap`: the template is chosen on one set of prompts, and its gap is reported on another."""

import numpy as np
import pytest
from support.samples import sample

from rgsd.evaluation.gap import advice, best_template, parts_for
from rgsd.evaluation.summaries import paired_difference


def test_one_half_chooses_and_the_other_reports():
    choice, rest = parts_for(41, 2, seed=0)
    assert (len(choice), len(rest)) == (20, 21)
    assert sorted(choice + rest) == list(range(41))
    assert parts_for(41, 2, seed=0) == (choice, rest)
    assert parts_for(41, 2, seed=1) != (choice, rest)


@pytest.mark.parametrize(("n", "templates"), [(41, 1), (1, 3)])
def test_where_nothing_is_chosen_all_prompts_report(n, templates):
    assert parts_for(n, templates, seed=0) == ([], list(range(n)))


def test_the_reported_gap_of_the_best_of_many_is_not_inflated():
    # Twenty templates that are worth nothing: the best of them on the prompts that choose must not look so on the rest.
    rng = np.random.default_rng(0)
    chosen, reported = [], []
    for seed in range(40):
        base = [sample(str(i), 0.5) for i in range(60)]
        choice, rest = parts_for(60, 20, seed)
        templates = {}
        for t in range(20):
            rows = [sample(str(i), 0.5 + rng.normal(0, 0.2)) for i in range(60)]
            gaps = [paired_difference([base[i] for i in p], [rows[i] for i in p]) for p in (choice, rest)]
            templates[str(t)] = {k: {"mean": g.mean} for k, g in zip(("choice_gap", "gap"), gaps, strict=True)}
        best = templates[best_template(templates)]
        chosen.append(best["choice_gap"]["mean"])
        reported.append(best["gap"]["mean"])
    assert np.mean(chosen) > 0.05
    assert abs(np.mean(reported)) < 0.02


def gap_of(mean, low, high, n, **more):
    found = {"mean": mean, "low": low, "high": high, "n": n}
    right = {"mean": 0.3, "low": 0.2, "high": 0.4, "n": n}
    return {"cover": {"gap": found, "right_over_wrong": right, "leak_rate": 0.0, "copied_share": 0.0} | more}


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (gap_of(0.4, 0.3, 0.5, 40), "Training can pay off"),
        (gap_of(0.4, 0.3, 0.5, 8), "too few prompts to say whether training will pay off"),
        (gap_of(0.0, -0.1, 0.1, 40), "Nothing shows that training will pay off"),
        (gap_of(-0.3, -0.4, -0.2, 40), "Training will not pay off"),
        (gap_of(0.4, 0.3, 0.5, 40, leak_rate=0.5), "Do not train like this"),
    ],
)
def test_the_advice_says_no_more_than_the_interval(gap, said):
    told = "\n".join(advice(gap, "cover", None, {"n_choice": 20, "n_report": 21}))
    assert said in told
    assert "chosen on 20 prompts; its gap below is from the other 21" in told
    assert ("The right rubric beats another prompt's" in told) == (
        said in ("Training can pay off", "Do not train like this")
    )
