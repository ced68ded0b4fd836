"""Settings that choose a step, and warnings read off a log."""

import pytest
from support.training import config

from rgsd.errors import ConfigError
from rgsd.training.changes import allowed_changes as changes
from rgsd.training.grpo import RubricGRPOConfig
from rgsd.training.selection import metric_of, settle_metric
from rgsd.training.sft import RubricSFTConfig
from rgsd.training.warnings import RUNAWAY, WINDOW, over_optimisation, warnings_of

STEPS = {"eval_strategy": "steps", "eval_steps": 2}
SAVED = {**STEPS, "save_strategy": "steps", "save_steps": 4}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"load_best_model_at_end": True},
            "load_best_model_at_end needs evaluations during training.*eval_strategy",
        ),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations during training"),
        ({**STEPS, "early_stopping_patience": 0}, "at least 1 evaluation, got 0"),
        ({**STEPS, "early_stopping_patience": 1, "early_stopping_threshold": -0.1}, "at least 0, got -0.1"),
        ({**STEPS, "early_stopping_threshold": 0.1}, "set early_stopping_patience too"),
        ({**STEPS, "load_best_model_at_end": True}, "needs checkpoints, but save_strategy is 'no': set save_strategy"),
        ({**STEPS, "save_strategy": "epoch", "load_best_model_at_end": True}, "'epoch' and eval_strategy is 'steps'"),
        ({**SAVED, "save_steps": 5, "load_best_model_at_end": True}, "save_steps is 5, which is not a multiple of"),
        ({**SAVED, "save_steps": 0.5, "load_best_model_at_end": True}, "not a multiple of eval_steps"),
    ],
)
def test_contradictions_fail_at_construction_with_the_remedy(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        config(tmp_path, **settings)


@pytest.mark.parametrize("kind", [RubricGRPOConfig, RubricSFTConfig])
def test_the_baselines_refuse_them_too(tmp_path, kind):
    with pytest.raises(ConfigError, match="needs checkpoints"):
        kind(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", load_best_model_at_end=True, **STEPS)


def test_what_is_right_passes(tmp_path):
    made = config(tmp_path, **SAVED, load_best_model_at_end=True, early_stopping_patience=2)
    assert made.unset_for_selection == {"metric_for_best_model", "greater_is_better"}
    assert config(tmp_path, eval_strategy="steps").unset_for_selection >= {"eval_steps"}
    shares = {"eval_strategy": "steps", "eval_steps": 0.1, "save_strategy": "steps", "save_steps": 0.3}
    config(tmp_path, **shares, load_best_model_at_end=True)
    # TRL wants an evaluation's batch to hold whole groups of 16.
    RubricGRPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=16, **STEPS)


def test_the_metric_is_the_score_where_there_is_one(tmp_path):
    judged = config(tmp_path, **SAVED, load_best_model_at_end=True)
    settle_metric(judged, judged.unset_for_selection, ["rubric_score", "divergence"])
    assert (metric_of(judged), judged.greater_is_better) == ("eval_rubric_score", True)
    unjudged = config(tmp_path, **SAVED, load_best_model_at_end=True)
    settle_metric(unjudged, unjudged.unset_for_selection, ["divergence"])
    assert (metric_of(unjudged), unjudged.greater_is_better) == ("eval_divergence", False)
    chosen = config(tmp_path, **SAVED, metric_for_best_model="divergence")
    settle_metric(chosen, chosen.unset_for_selection, ["rubric_score", "divergence"])
    assert chosen.greater_is_better is False


@pytest.mark.parametrize(
    ("settings", "available", "match"),
    [
        ({"metric_for_best_model": "loss"}, ["rubric_score", "divergence"], "'loss'.*rubric_score and divergence"),
        ({"metric_for_best_model": "eval_rubric_score"}, ["divergence"], "name an LLM judge"),
        ({"metric_for_best_model": "divergence"}, ["rubric_score"], "by rubric_score: leave it out"),
        ({"greater_is_better": False}, ["rubric_score"], "a greater rubric_score is better"),
    ],
)
def test_a_metric_that_the_prompts_do_not_have_is_refused(tmp_path, settings, available, match):
    made = config(tmp_path, **SAVED, **settings)
    with pytest.raises(ConfigError, match=match):
        settle_metric(made, made.unset_for_selection, available)


def test_patience_may_change_on_resume_and_the_metric_may_not():
    def differ(old, new):
        return changes(old, new, {}, kind="rgsd", run="RUN")

    assert differ({"early_stopping_patience": 2}, {"early_stopping_patience": 3})
    assert differ({"max_development_prompts": None}, {"max_development_prompts": 3})
    assert differ({}, {"metric_for_best_model": "rubric_score", "greater_is_better": True})
    for name, old, new in (
        ("metric_for_best_model", "rubric_score", "divergence"),
        ("load_best_model_at_end", False, True),
        ("development", 0.1, 0.2),
    ):
        with pytest.raises(Exception, match=name):
            differ({name: old}, {name: new})


# --- Warnings


def log(lengths=(), truncated=()):
    rows = [{"step": n + 1, "loss": 1.0} for n in range(max(len(lengths), len(truncated)))]
    for row, n in zip(rows, lengths, strict=False):
        row |= {"response_length": n, "completions/mean_length": n}  # TRL's name beside ours
    for row, share in zip(rows, truncated, strict=False):
        row |= {"truncated_share": share, "completions/clipped_ratio": share}
    return rows


def kinds(rows):
    return [kind for kind, _ in warnings_of(rows)]


def test_truncation_above_a_third_is_a_warning():
    assert kinds(log(truncated=[0.9] * (WINDOW - 1))) == []  # a few steps are a few responses
    assert kinds(log(truncated=[0.9] * WINDOW)) == ["truncation"]
    assert kinds(log(truncated=[0.9] * WINDOW + [0.1] * WINDOW)) == []
    ((kind, text),) = warnings_of([{"step": 4, "eval_truncated_share": 0.5}])
    assert kind == "development truncation"
    assert text.startswith("50 % of the development responses were cut off")
    assert "eval_max_new_tokens" in text


def test_a_length_that_runs_away_is_a_warning_with_its_multiple():
    assert kinds(log(lengths=[50] * WINDOW + [50 * RUNAWAY] * WINDOW)) == []
    ((kind, text),) = warnings_of(log(lengths=[50] * WINDOW + [130] * WINDOW))
    assert kind == "length"
    assert "2.6 times as long as in the first 5 logged steps (130 against 50 tokens; the warning comes above 2)" in text
    grpo = [{"step": n, "completions/mean_length": 50 if n < WINDOW else 130} for n in range(2 * WINDOW)]
    assert kinds(grpo) == ["length"]


def test_a_divergence_that_still_falls_is_told_with_both_values():
    rows = [{"step": 10, "eval_divergence": 0.2}, {"step": 20, "eval_divergence": 0.1}, {"step": 30, "loss": 1}]
    assert "from 0.2000 to 0.1000 nats" in over_optimisation(rows, 10, 20)
    assert over_optimisation(rows, 20, 10) is None
    assert over_optimisation(rows, 10, 30) is None
