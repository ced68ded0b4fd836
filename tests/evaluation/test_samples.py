"""A sample survives a round trip through samples.jsonl, whose lines are checked and carry a version."""

import json

import pytest
from support.samples import sample

from rgsd.errors import RunError
from rgsd.evaluation.arms import judge_responses
from rgsd.evaluation.samples import FORMAT, append_sample, read_samples
from rgsd.inference import Response
from rgsd.judges import ChecksJudge
from rgsd.runs import SAMPLES, create_run


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", {})


def test_a_sample_is_read_as_it_was_written(run, examples):
    samples = judge_responses(
        examples[:2], [Response("<think>hm</think>Rest.", 5, False)] * 2, ChecksJudge(), arm="base"
    )
    for each in samples:
        append_sample(run, each)
    assert read_samples(run) == samples
    assert {json.loads(line)["format"] for line in (run.folder / SAMPLES).read_text().splitlines()} == {FORMAT}


def test_a_line_without_a_version_is_the_first_version(run):
    """Missing fields stay unknown: no price of 0, no judge name; coverage follows from the verdicts."""
    verdicts = [{"criterion": "c", "weight": 1, "met": True}, {"criterion": "d", "weight": -1, "met": None}]
    row = {"arm": "a", "example_id": "e", "scoring": "satisfaction", "score": 1.0, "verdicts": verdicts}
    run.append(SAMPLES, [{**row, "response": "text", "usage": {"calls": 1}}])
    (read,) = read_samples(run)
    assert (read.judge, read.judged_text, read.coverage) == ("unknown", "text", 0.5)
    assert (read.usage.calls, read.usage.price) == (1, None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": FORMAT + 1}, f"format is {FORMAT + 1}"),
        ({"scoring": None}, "scoring"),
        ({"score": "high"}, "score"),
        ({"verdicts": [{"criterion": "c", "weight": 0}]}, r"verdicts\[0\].weight"),
        ({"verdicts": ["met"]}, r"verdicts\[0\]"),
        ({"usage": {"price": "1"}}, "usage.price"),
    ],
)
def test_a_line_that_is_not_a_sample_is_named(run, change, named):
    run.append(SAMPLES, [sample().to_row(), sample().to_row() | change])
    with pytest.raises(RunError, match=rf"{SAMPLES}, line 2: .*{named}"):
        read_samples(run)


def test_a_verdict_has_a_value_a_sense_and_a_yes_or_no():
    verdicts = [
        {"criterion": "a", "weight": 2, "met": True},
        {"criterion": "b", "weight": -2, "met": True},
        {"criterion": "c", "weight": -2, "grade": 0.25},
        {"criterion": "d", "weight": 1, "met": None},
    ]
    read = sample(verdicts=verdicts).verdicts
    assert [v.value for v in read] == [1.0, 1.0, 0.25, None]
    assert [v.satisfied for v in read] == [1.0, 0.0, 0.75, None]
    assert [v.is_met for v in read] == [True, True, False, None]
