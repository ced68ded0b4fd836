"""Scores of the development prompts: what is logged, what is stored, and a judge that fails."""

import json

import pytest
from conftest import tiny_model
from support.samples import sample

from rgsd.errors import BudgetExhausted, PromptTooLong, RunError
from rgsd.evaluation.development import DevelopmentScorer, read_development
from rgsd.evaluation.samples import read_samples
from rgsd.inference import SamplingConfig, TransformersGenerator
from rgsd.judges import Judgement, Usage
from rgsd.prompts.messages import student_messages
from rgsd.rubrics import Verdict
from rgsd.runs import create_run, open_run


class ScriptedJudge:
    """Meets the first criterion of every response, and leaves the second unscored where `skips` says so."""

    name = "scripted"

    def __init__(self, skips=(), error=None):
        self.skips, self.error, self.judged = set(skips), error, 0

    def judge_all(self, tasks, done=None):
        if self.error is not None:
            raise self.error
        self.judged += len(tasks)
        return [
            Judgement(
                [Verdict(True), Verdict(None if e.id in self.skips else False)],
                usage=Usage(calls=1, price=0.25),
                problem="timeout" if e.id in self.skips else "",
            )
            for e, _ in tasks
        ]


def scorer(tmp_path, tokenizer, examples, judge, *, max_new_tokens=6, divergence=None):
    run = create_run(tmp_path / "run", {})
    generator = TransformersGenerator(tiny_model(tokenizer), tokenizer, SamplingConfig(max_new_tokens))
    prompts = [student_messages(e) for e in examples]
    return DevelopmentScorer(run, examples, prompts, generator, judge, divergence=divergence)


def test_a_step_is_scored_and_stored_with_its_step(tmp_path, tokenizer, examples):
    read = []
    made = scorer(tmp_path, tokenizer, examples, ScriptedJudge(), divergence=lambda rs: read.extend(rs) or 0.5)
    made.score(3)
    found = made.score(6)
    assert found.pop("eval_runtime") >= 0
    truncated = sum(r.is_truncated for r in read[8:]) / 8
    assert found == {
        "eval_rubric_score": 1.0, "eval_coverage": 1.0, "eval_divergence": 0.5, "eval_prompts": 8.0,
        "eval_response_length": sum(r.n_tokens for r in read[8:]) / 8, "eval_truncated_share": truncated,
        "eval_judge/calls": 8.0, "eval_judge/dollars": 2.0,
    }  # fmt: skip
    stored = read_development(open_run(made.run.folder))
    assert list(stored) == [3, 6]
    assert [s.example_id for s in stored[6]] == [e.id for e in examples]
    assert [s.response for s in stored[6]] == [r.text for r in read[8:]]
    assert stored[3] == stored[6]  # greedy: the same weights say the same
    assert not read_samples(made.run)


def test_unscored_criteria_lower_the_coverage(tmp_path, tokenizer, examples):
    found = scorer(tmp_path, tokenizer, examples, ScriptedJudge(skips=["e0", "e1"])).score(1)
    assert found["eval_coverage"] == 14 / 16
    assert "eval_divergence" not in found


def test_a_judge_that_cannot_be_afforded_leaves_the_step_unscored(tmp_path, tokenizer, examples, capsys):
    found = scorer(tmp_path, tokenizer, examples, ScriptedJudge(error=BudgetExhausted("the budget is spent"))).score(4)
    assert "eval_rubric_score" not in found
    assert found["eval_coverage"] == 0.0
    assert "Step 4: the development prompts were not scored: the budget is spent" in capsys.readouterr().out


def test_scores_of_another_judge_length_or_prompt_have_another_identity(tmp_path, tokenizer, examples):
    def identity(name, judge=None, **settings):
        return scorer(
            tmp_path / name, tokenizer, settings.pop("on", examples), judge or ScriptedJudge(), **settings
        ).identity

    other = ScriptedJudge()
    other.name = "other"
    found = [
        identity("a"), identity("b", other), identity("c", max_new_tokens=7), identity("d", on=examples[:7]),
    ]  # fmt: skip
    assert len(set(found)) == 4
    assert identity("e") == found[0]


def test_a_prompt_without_room_is_refused_before_training(tmp_path, tokenizer, examples):
    with pytest.raises(PromptTooLong, match="remove the prompt"):
        scorer(tmp_path, tokenizer, examples, ScriptedJudge(), max_new_tokens=1020)


@pytest.mark.parametrize(
    ("n", "now", "expected"),
    [(40, 0.3, "20.0 points (95 % interval"), (40, 0.5, None), (40, 0.7, None), (20, 0.3, None)],
)
def test_a_fall_is_told_by_the_rule_of_verdicts(tmp_path, tokenizer, examples, n, now, expected):
    """Only from 30 prompts on, and where the interval says so."""
    made = scorer(tmp_path, tokenizer, examples, ScriptedJudge())
    for step, mean in ((10, 0.5), (20, now)):
        rows = [sample(f"e{i}", mean + 0.1 * (-1) ** (i // (1 + step // 20)), arm="development") for i in range(n)]
        made.run.append("development.jsonl", [{"step": step, **s.to_row()} for s in rows])
    found = made.fall(10, 20)
    assert (found is None) == (expected is None)
    assert found is None or (found.startswith(expected) and "40 prompts" in found)
    assert made.fall(10, 30) is None


def test_a_row_without_its_step_is_refused(tmp_path, tokenizer, examples):
    made = scorer(tmp_path, tokenizer, examples, ScriptedJudge())
    made.score(1)
    path = made.run.folder / "development.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    del row["step"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(RunError, match="step is missing"):
        read_development(made.run)
