"""Evaluation during training: it leaves no trace, the best step is kept and loaded, and patience ends."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig
from safetensors.torch import load_file
from support.development import make_split_world
from support.killing import assert_same, outcome, run
from support.training import Scripted, config

from rgsd.cli import main
from rgsd.errors import RunError
from rgsd.evaluation.development import read_development
from rgsd.runs import open_run
from rgsd.training.trainer import RGSDTrainer

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "lora_target_modules": "all-linear"}
BY_SCORE = {"metric_for_best_model": "rubric_score", "greater_is_better": True}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, **BY_SCORE}


class Fake:
    """Scores by step, as a test wants them; draws random numbers and switches modes as a generator may."""

    def __init__(self, trainer, scores, *, coverage=1.0, identity="a", fall=None):
        self.trainer, self.scores, self.coverage, self.identity = trainer, scores, coverage, identity
        self.asked, self._fall = [], fall

    def score(self, step):
        self.asked.append(step)
        random.random(), np.random.rand(), torch.rand(3)
        self.trainer.model.eval()
        found = {"eval_coverage": self.coverage, "eval_prompts": 4.0, "eval_response_length": 5.0}
        found |= {"eval_truncated_share": 0.0, "eval_divergence": 1.0 / (step + 1)}
        value = self.scores[step - 1]
        return found if value is None else found | {"eval_rubric_score": value}

    def fall(self, best, step):
        return self._fall


def trainer_of(folder, tokenizer, examples, scores=None, kind=Scripted, fake=None, **settings):
    if scores is not None:
        settings = {**EVALUATED, "max_steps": len(scores), **settings}
    return kind(
        tiny_model(tokenizer),
        args=config(folder, learning_rate=0.05, **settings),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear"),
        development=None if scores is None else lambda t: Fake(t, scores, **(fake or {})),
    )


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_it_leaves_no_trace_in_training(tmp_path, tokenizer, examples):
    class Drawing(RGSDTrainer):
        def _rollouts(self, rows):
            self.drawn.append((random.random(), np.random.rand(), self.model.training))
            return super()._rollouts(rows)

    def run(scores, folder):
        trainer = trainer_of(folder, tokenizer, examples, scores, kind=Drawing, max_steps=3)
        trainer.drawn = []
        trainer.train()
        return trainer

    plain, evaluated = run(None, tmp_path / "a"), run([0.1, 0.3, 0.2], tmp_path / "b")
    assert evaluated._development.asked == [1, 2, 3]
    assert plain.drawn == evaluated.drawn
    assert same(weights(plain), weights(evaluated))
    timed = ("seconds/", "per_second", "step_time")

    def steps(trainer):
        rows = [h for h in trainer.state.log_history if "loss" in h]
        return [{k: v for k, v in h.items() if not any(t in k for t in timed)} for h in rows]

    assert steps(plain) == steps(evaluated)
    assert [h["eval_rubric_score"] for h in evaluated.state.log_history if "eval_coverage" in h] == [0.1, 0.3, 0.2]


def test_the_best_step_is_saved_between_checkpoints_kept_and_loaded(tmp_path, tokenizer, examples, capsys):
    scores = [0.1, 0.5, 0.3, 0.2, 0.4, 0.3]
    saved = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, tokenizer, examples, scores, **saved)
    trainer.train()
    assert trainer.best == {"step": 2, "metric": "rubric_score", "value": 0.5}
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    of_best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    of_last = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    own = {n.replace(".default", ""): w for n, w in weights(trainer).items()}
    assert own.keys() == of_best.keys()
    assert all(torch.equal(own[n], of_best[n]) for n in own)
    assert not all(torch.equal(own[n], of_last[n]) for n in own)
    assert "The weights are those of step 2 of 6, the best by rubric_score (0.5000)" in capsys.readouterr().out


def test_a_best_step_without_a_checkpoint_changes_nothing_where_it_is_not_loaded(tmp_path, tokenizer, examples):
    saved = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = trainer_of(tmp_path, tokenizer, examples, [0.5, 0.4, 0.3, 0.2], **saved)
    trainer.train()
    assert trainer.best["step"] == 1
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(last[n.replace(".default", "")], w) for n, w in weights(trainer).items())


def test_the_lowest_divergence_is_the_best(tmp_path, tokenizer, examples):
    by_divergence = {"metric_for_best_model": "divergence", "greater_is_better": False}
    trainer = trainer_of(tmp_path, tokenizer, examples, [0.9, 0.1, 0.1], **by_divergence)
    trainer.train()
    assert trainer.best == {"step": 3, "metric": "divergence", "value": 0.25}


@pytest.mark.parametrize(
    ("scores", "threshold", "last"),
    [([0.5, 0.4, 0.4, 0.6, 0.7], 0.0, 3), ([0.5, 0.51, 0.52, 0.6, 0.7], 0.05, 3), ([0.5, 0.4, 0.6, 0.5, 0.4], 0.0, 5)],
)
def test_patience_counts_evaluations_without_a_gain_above_the_threshold(
    tmp_path, tokenizer, examples, capsys, scores, threshold, last
):
    early = {"early_stopping_patience": 2, "early_stopping_threshold": threshold}
    trainer = trainer_of(tmp_path, tokenizer, examples, scores, **early)
    trainer.train()
    assert trainer.state.global_step == last
    assert ("Stopping early after step 3 of 5" in capsys.readouterr().out) == (last < 5)


def test_a_step_that_was_not_scored_is_neither_better_nor_worse(tmp_path, tokenizer, examples):
    early = {"early_stopping_patience": 2}
    trainer = trainer_of(tmp_path / "a", tokenizer, examples, [0.5, None, 0.4, None, 0.6], **early)
    trainer.train()
    assert trainer.best["step"] == 5
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    few = trainer_of(tmp_path / "b", tokenizer, examples, [0.5, 0.6], fake={"coverage": 0.9}, **saved)
    few.train()  # too few criteria were scored: the last step stays
    assert few.best is None


def test_a_fall_of_the_score_while_the_divergence_falls_is_told_once(tmp_path, tokenizer, examples, capsys):
    fall = {"fall": "8.1 points (95 % interval 2.0 to 14.0, 40 prompts)"}
    trainer = trainer_of(tmp_path, tokenizer, examples, [0.5, 0.4, 0.3], fake=fall)
    trainer.train()
    (warned,) = [w for w in trainer.warnings if w["kind"] == "over-optimisation"]
    assert warned["step"] == 2
    assert f"The development score fell by {fall['fall']} since step 1, while" in warned["text"]
    assert "while the divergence still fell, from 0.5000 to 0.3333 nats" in warned["text"]
    assert capsys.readouterr().out.count("Warning, step 2: The development score fell") == 1


@pytest.mark.parametrize(
    ("then", "identity", "damage", "anew"),
    [({}, "a", False, None), ({}, "b", False, "the judge, its settings"), ({}, "a", True, "cannot be used")],
)
def test_the_best_step_and_patience_survive_a_resume_unless_they_no_longer_compare(
    tmp_path, tokenizer, examples, capsys, then, identity, damage, anew
):
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 2}
    scores = [0.5, 0.4, 0.3, 0.2]
    first = trainer_of(tmp_path, tokenizer, examples, scores[:2], **saved)
    first.train()
    if damage:
        (tmp_path / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"")
    again = trainer_of(tmp_path, tokenizer, examples, scores, fake={"identity": identity}, **saved)
    capsys.readouterr()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    out = capsys.readouterr().out
    if anew is None:  # one evaluation without a gain before, one after
        assert (again.best["step"], again.state.global_step, again._development.asked) == (1, 3, [3])
        done = trainer_of(tmp_path, tokenizer, examples, scores, **saved)
        done.train(resume_from_checkpoint=True)  # it had stopped
        assert (done.state.global_step, done._development.asked) == (3, [])
        assert same(weights(done), weights(again))
    else:
        assert "The best step is sought anew from step 2 on" in out
        assert anew in out
        assert again.best["step"] == 3


def test_a_best_checkpoint_that_is_damaged_at_the_end_is_an_error(tmp_path, tokenizer, examples):
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, tokenizer, examples, [0.5, 0.4], **saved)
    damage = trainer._development.score

    def score(step):
        if step == 2:
            (tmp_path / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"")
        return damage(step)

    trainer._development.score = score
    with pytest.raises(RunError, match="checkpoint-1, the best step, cannot be loaded"):
        trainer.train()


def test_the_divergence_on_greedy_responses_is_that_of_a_plain_computation(tmp_path, tokenizer, examples):
    from rgsd.inference import Response, replay
    from rgsd.prompts.messages import training_rows
    from rgsd.training.loss import divergence

    trainer = trainer_of(tmp_path, tokenizer, examples, max_steps=1)
    trainer.train()
    rows = training_rows(examples, trainer.args.prompt_settings())
    said = [Response("Drink water and rest." + " now" * i, 5, bool(i % 2)) for i in range(8)]
    total = count = 0.0
    for row, response in zip(rows, said, strict=True):
        ids = replay.replay(response, tokenizer).ids
        student, teacher = (
            replay.logits(trainer.model, replay.prompt_ids(tokenizer, row[name]), ids, row["example_id"])
            for name in ("prompt", "prompt")
        )
        with trainer.teacher.active():
            teacher = replay.logits(trainer.model, replay.prompt_ids(tokenizer, row["teacher_prompt"]), ids, "e")
        found = divergence(student, teacher, trainer.args.divergence_spec())
        total, count = total + float(found.unclipped_N.sum()), count + len(ids)
    before = weights(trainer)
    assert trainer.divergence_on(rows, said) == pytest.approx(total / count, rel=1e-4)
    assert same(before, weights(trainer))


# --- The whole command


def rows_of(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


COMMANDS = {
    "train": {},
    "grpo": {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    "sft": {"max_completion_length": 400, "drop_leaks": False},
}


@pytest.mark.integration
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_with_evaluations_is_the_run_without_them(tmp_path, tokenizer, command):
    """Weights, optimizer, random numbers and logged steps; held-out prompts are read before and after alone."""
    settings = {**LORA, **COMMANDS[command], "max_steps": 4, "save_steps": 4, "evaluate": command == "train"}
    recipe = make_split_world(tmp_path, tokenizer, **settings)
    argv = [command, "--config", str(recipe)]
    assert main([*argv, "--output_dir", str(tmp_path / "plain")]) == 0
    assert main([*argv, "--output_dir", str(tmp_path / "run"), "--eval_strategy", "steps", "--eval_steps", "2"]) == 0
    plain, evaluated = outcome(tmp_path / "plain", 4), outcome(tmp_path / "run", 4)
    for part in ("metrics", "history"):
        evaluated[part] = [r for r in evaluated[part] if "eval_prompts" not in r]
    assert_same(evaluated, plain)
    run = open_run(tmp_path / "run")
    logged = [r for r in rows_of(run.folder, "metrics.jsonl") if "eval_prompts" in r]
    assert [r["step"] for r in logged] == [2, 4]
    assert all(("eval_divergence" in r) == (command == "train") for r in logged)
    stored = read_development(run)
    assert {step: [s.example_id for s in samples] for step, samples in stored.items()} == {
        step: ["r6", "r7", "r8", "r9"] for step in (2, 4)
    }
    for row in logged:
        scores = [s.score for s in stored[row["step"]]]
        assert row["eval_rubric_score"] == pytest.approx(sum(scores) / 4)
        assert row["eval_coverage"] == 1.0
    split = json.loads((run.folder / "split.json").read_text())
    assert split["development"] == ["r6", "r7", "r8", "r9"]
    assert not set(split["development"]) & {*split["train"], *split["held_out"]}
    best = max(logged, key=lambda r: r["eval_rubric_score"])  # the first of equals
    assert run.meta["best"] == {
        "step": best["step"], "metric": "rubric_score", "value": best["eval_rubric_score"], "is_loaded": False,
        "n_prompts": 4,
    }  # fmt: skip
    if command == "train":
        assert {r["arm"] for r in rows_of(run.folder, "samples.jsonl")} == {"base", "base+rubric", "trained"}
        assert {r["example_id"] for r in rows_of(run.folder, "samples.jsonl")} == {"r10", "r11"}


@pytest.mark.integration
def test_a_killed_run_finds_the_same_best_step(tmp_path, tokenizer):
    """Killed after an evaluation, in the save of the best checkpoint, and after it had stopped early."""
    chosen = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 2}
    saved = {"save_steps": 2, "save_total_limit": 1, "max_steps": 9, "eval_max_new_tokens": 12}
    recipe = make_split_world(tmp_path, tokenizer, **LORA, **chosen, **saved)
    argv = ["train", "--config", str(recipe), "--output_dir"]
    code, text = run([*argv, str(tmp_path / "whole")], tmp_path)
    assert code == 0, text
    want = open_run(tmp_path / "whole").meta
    resumed = [*argv, str(tmp_path / "killed"), "--resume_from_checkpoint", "true"]
    for place, nth in [("backward", 3), ("before the rename", 1), ("final save", 1)]:
        code, text = run(resumed, tmp_path, place, nth)
        assert code == -9, (place, text)
    code, text = run(resumed, tmp_path)
    assert code == 0, text
    got = open_run(tmp_path / "killed").meta
    assert want["steps"] < 9
    assert (got["best"], got["steps"], got.get("warnings")) == (want["best"], want["steps"], want.get("warnings"))
    assert want["best"]["is_loaded"]
    last = want["steps"]
    assert_same(outcome(tmp_path / "killed", last), outcome(tmp_path / "whole", last))
    names = "adapter/adapter_model.safetensors", f"checkpoint-{want['best']['step']}/adapter_model.safetensors"
    saved, of_best = (load_file(tmp_path / "killed" / name) for name in names)
    assert saved.keys() == of_best.keys()
    assert all(torch.equal(saved[n], of_best[n]) for n in saved)
    steps = [r["step"] for r in rows_of(tmp_path / "killed", "development.jsonl")]
    assert steps == [step for step in range(1, last + 1) for _ in range(4)]


@pytest.mark.integration
def test_without_a_judge_the_divergence_chooses(tmp_path, tokenizer, capsys):
    chosen = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 1}
    recipe = make_split_world(tmp_path, tokenizer, checked=False, **LORA, **chosen, max_steps=2)
    assert main(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "so the divergence is measured instead of a score" in out
    run = open_run(tmp_path / "run")
    logged = {r["step"]: r["eval_divergence"] for r in rows_of(run.folder, "metrics.jsonl") if "eval_prompts" in r}
    assert run.meta["best"]["metric"] == "divergence"
    assert run.meta["best"]["step"] == min(logged, key=logged.__getitem__)
    assert not (run.folder / "development.jsonl").exists()
    assert main(["sft", "--config", str(recipe), "--output_dir", str(tmp_path / "sft")]) == 1
    assert "the development prompts cannot be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--development_tags=[]"], "there are no development prompts"),
        (["--metric_for_best_model", "reward"], "'reward'"),
    ],
)
def test_what_cannot_be_evaluated_ends_before_anything_is_loaded(tmp_path, tokenizer, capsys, flags, match):
    chosen = {"eval_strategy": "steps", "eval_steps": 1}
    recipe = make_split_world(tmp_path, tokenizer, **chosen)
    if "tags" in flags[0]:
        text = recipe.read_text().replace("development_tags:\n- split:dev\n", "")
        recipe.write_text(text)
        flags = []
    assert main(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run"), *flags]) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_steps_without_eval_steps_is_refused(tmp_path, tokenizer, capsys):
    recipe = make_split_world(tmp_path, tokenizer, eval_strategy="steps")
    assert main(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 1
    assert "eval_steps is unset" in capsys.readouterr().err


def test_a_dry_run_says_what_the_evaluations_cost(tmp_path, tokenizer, capsys):
    chosen = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "early_stopping_patience": 2}
    recipe = make_split_world(tmp_path, tokenizer, **LORA, **chosen, max_steps=5)
    assert main(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    said = "Development: 4 prompts, 3 times in 5 steps: 12 greedy responses, judged, beside 10 rollouts"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
