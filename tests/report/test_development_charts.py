"""What a report shows of the development prompts."""

import json

import pytest
from support.samples import sample

from rgsd.errors import RunError
from rgsd.report import charts, read, report_page
from rgsd.report.charts import Series
from rgsd.report.facts import verdict
from rgsd.runs import create_run, open_run


@pytest.fixture
def run(tmp_path):
    """A trained run with three evaluations, the second the best."""
    made = create_run(tmp_path / "run", {"clip_threshold": 0.05})
    scores, divergences = (0.2, 0.6, 0.5), (0.3, 0.2, 0.1)
    rows = []
    for n, (score, nats) in enumerate(zip(scores, divergences, strict=True), start=1):
        rows.append({"step": 10 * n, "loss": nats, "divergence": nats})
        rows.append({
            "step": 10 * n, "eval_prompts": 40.0, "eval_rubric_score": score, "eval_coverage": 1.0,
            "eval_divergence": nats, "eval_response_length": 50.0 + n,
            "eval_judge/calls": 40.0, "eval_judge/dollars": 0.5,
        })  # fmt: skip
    made.append("metrics.jsonl", rows)
    for arm, score in (("base", 0.1), ("trained", 0.5)):
        made.append("samples.jsonl", [sample(f"e{i}", score + i / 1000, arm=arm).to_row() for i in range(40)])
    best = {"step": 20, "metric": "rubric_score", "value": 0.6, "is_loaded": True, "n_prompts": 40}
    made.note(kind="rgsd", status="finished", steps=30, best=best)
    return made


def test_the_curves_of_the_development_prompts_mark_the_best_step(run):
    html = report_page(read([str(run.folder)]))
    for title in ("Rubric score of the development prompts", "Divergence on the development prompts"):
        assert title in html
    assert "run: 0.2 at step 10, 0.5 at step 30; best: 0.6 at step 20" in html
    assert html.count('class="ring') == 3
    assert "A ring marks the best step" in html
    assert "Judge calls for the development prompts" in html
    (facts,) = read([str(run.folder)]).runs
    assert (facts.cost.development_calls, facts.cost.development_price) == (120, 1.5)
    assert [row["step"] for row in facts.steps] == [10, 20, 30]


def test_the_report_says_whose_weights_they_are(run):
    (facts,) = read([str(run.folder)]).runs
    assert any("that of step 20 of 30, the best by rubric score 0.600 on 40 development" in s for s in verdict(facts))
    run.note(best={**run.meta["best"], "is_loaded": False})
    (facts,) = read([str(run.folder)]).runs
    assert any("that of the last step, 30. Step 20 was the best (rubric score 0.600" in s for s in verdict(facts))


def test_warnings_of_training_are_problems_of_the_report(run):
    run.note(warnings=[{"step": 30, "kind": "length", "text": "responses are 2.5 times as long <b>"}])
    facts = read([str(run.folder)])
    assert "At step 30 of training: responses are 2.5 times as long <b>." in facts.runs[0].problems
    assert "as long &lt;b&gt;" in report_page(facts)


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"best": {"step": -1}}, "best.step"),
        ({"best": {"step": 1, "metric": "x", "value": "high", "n_prompts": 3}}, "best.value"),
        ({"warnings": ["now"]}, "warnings must be a list of objects"),
    ],
)
def test_a_damaged_record_is_refused(run, facts, match):
    path = run.folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    with pytest.raises(RunError, match=match):
        open_run(run.folder)


def test_a_run_without_evaluations_has_no_such_chart(run):
    path = run.folder / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "eval_prompts" not in line) + "\n")
    run.note(best=None)
    html = report_page(read([str(run.folder)]))
    assert "development prompts" not in html
    assert 'class="ring' not in html


def test_a_mark_that_is_no_point_is_left_out():
    assert "ring" not in charts.lines("T", [Series("a", [1, 2], [0.1, 0.2], 0, 5, "best")])
    assert "best: 0.2 at step 2" in charts.lines("T", [Series("a", [1, 2], [0.1, 0.2], 0, 2, "best")])
