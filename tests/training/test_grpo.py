"""The GRPO baseline: TRL's trainer, the judge's score as reward, unscored responses left out of their group."""

import copy
import dataclasses
import json
import types

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from trl import GRPOTrainer

from rgsd.errors import ConfigError
from rgsd.judges import ChecksJudge, Judgement, Usage
from rgsd.prompts.leaks import mentions_rubric
from rgsd.rubrics import Verdict
from rgsd.training.grpo import RubricGRPOConfig, RubricGRPOTrainer, RubricReward, grpo_rows

pytestmark = pytest.mark.integration  # these tests train


class ScriptedJudge:
    """Verdicts depend on the response's length; every third response is unscored; each call costs a cent."""

    name = "scripted"

    def __init__(self):
        self.seen = []

    def judge_all(self, tasks, done=None):
        made = []
        for _, response in tasks:
            self.seen.append(response)
            lost = len(self.seen) % 3 == 0
            met = None if lost else len(response) % 2 == 0
            verdicts = [Verdict(met=met), Verdict(met=None if lost else False)]
            usage = Usage(calls=1, prompt_tokens=100, completion_tokens=10, price=0.01)
            made.append(Judgement(verdicts, ("reply",), usage, "timeout" if lost else ""))
        return made


def arguments(folder, **overrides):
    return RubricGRPOConfig(
        output_dir=str(folder),
        num_generations=6,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_completion_length=8,
        learning_rate=1e-2,
        temperature=1.5,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **overrides,
    )


def test_an_unscored_response_has_no_advantage_and_no_share_in_its_group(tokenizer, examples, tmp_path):
    judge = ScriptedJudge()
    log = tmp_path / "rollouts.jsonl"
    trainer = GRPOTrainer(
        tiny_model(tokenizer),
        args=arguments(tmp_path / "out"),
        reward_funcs=RubricReward(examples, judge, log=log),
        train_dataset=Dataset.from_list(grpo_rows(examples)),
        processing_class=tokenizer,
    )
    assert type(trainer) is GRPOTrainer
    trainer.train()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 24
    rewards = torch.tensor([float("nan") if r["reward"] is None else r["reward"] for r in rows])
    assert torch.equal(rewards.isnan(), torch.tensor([(i + 1) % 3 == 0 for i in range(24)]))
    advantages = torch.tensor(list(trainer._logs["advantages"]))
    groups = rewards.view(-1, 6)
    mean = groups.nanmean(1, keepdim=True)
    n = (~groups.isnan()).sum(1, keepdim=True)
    deviation = (((groups - mean).nan_to_num() ** 2).sum(1, keepdim=True) / (n - 1)).sqrt()
    expected = ((groups - mean) / (deviation + 1e-4)).nan_to_num().flatten()
    torch.testing.assert_close(advantages, expected[-12:], atol=1e-4, rtol=1e-4)
    assert (expected[rewards.isnan()] == 0).all()
    assert expected.abs().sum() > 0

    history = [h for h in trainer.state.log_history if "judge/calls" in h]
    assert [h["judge/total_calls"] for h in history] == [12, 24]
    assert history[-1]["judge/total_dollars"] == pytest.approx(0.24)
    assert history[0]["unscored_share"] == pytest.approx(1 / 3)


def test_a_response_scored_in_part_has_no_reward(examples):
    class Half(ScriptedJudge):
        def judge_all(self, tasks, done=None):
            return [Judgement([Verdict(met=True), Verdict(met=None)], problem="timeout") for _ in tasks]

    assert RubricReward(examples, Half())(completions=["Rest."], example_id=["e0"]) == [None]


def test_reasoning_is_taken_out_before_judging(examples):
    judge = ScriptedJudge()
    reward = RubricReward(examples, judge, starts_in_thinking=True)
    chat = [
        [{"role": "assistant", "content": "hm, rest</think>Sleep."}],
        [{"role": "assistant", "content": "rest, re"}],
    ]
    reward(completions=chat, example_id=["e0", "e1"])
    assert judge.seen == ["Sleep.", ""]


def test_the_reward_is_the_datasets_score_and_metrics_are_logged(examples):
    logged = {}
    reward = RubricReward(examples, ChecksJudge())
    found = reward(
        completions=["Rest.", "Drink tea.", "Nothing."],
        example_id=["e0", "e0", "e1"],
        log_metric=logged.__setitem__,
        trainer_state=types.SimpleNamespace(global_step=3),
    )
    assert found == [1.0, pytest.approx(-0.6), 0.0]
    assert logged["coverage"] == 1.0
    assert logged["judge/calls"] == 0.0


def test_one_response_a_prompt_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_generations"):
        RubricGRPOConfig(output_dir=str(tmp_path), num_generations=1, use_cpu=True, report_to="none")


def tagged(tokenizer):
    """The tokenizer with think tags as special tokens, like Mistral's reasoning models."""
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    return special


def test_reasoning_between_special_tokens_is_taken_out_of_the_completions_ids(tokenizer, examples):
    special, judge = tagged(tokenizer), ScriptedJudge()
    ids = [
        [*special.encode("[THINK]the rubric wants rest[/THINK]Sleep.", add_special_tokens=False), special.eos_token_id],
        special.encode("[THINK]never closed", add_special_tokens=False),
    ]
    texts = special.batch_decode(ids, skip_special_tokens=True)  # what TRL passes
    assert texts[0] == "the rubric wants restSleep."
    reward = RubricReward(examples, judge, tokenizer=special, think_tags=("[THINK]", "[/THINK]"))
    reward(completions=texts, completion_ids=ids, example_id=["e0", "e1"])
    assert judge.seen == ["Sleep.", ""]


def test_trl_hands_over_the_ids(tokenizer, tmp_path, examples):
    """End to end: the judged text is decoded from the ids, including special tags."""
    special, judge = tagged(tokenizer), ScriptedJudge()
    close = special.convert_tokens_to_ids("[/THINK]")

    class Reasoning(RubricGRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *_):
            answer = special.encode("Sleep.", add_special_tokens=False)
            return [[50, 51, close, *answer, special.eos_token_id] for _ in prompt_ids], None

    model = tiny_model(special)
    Reasoning(
        model,
        args=arguments(tmp_path),
        reward_funcs=RubricReward(
            examples, judge, tokenizer=special, think_tags=("[THINK]", "[/THINK]"), starts_in_thinking=True
        ),
        train_dataset=Dataset.from_list(grpo_rows(examples)),
        processing_class=special,
    ).train()
    assert set(judge.seen) == {"Sleep."}


def test_the_leak_meter_knows_the_question_as_in_rgsd(examples):
    """An answer to a question about grading criteria is no leak."""
    asking = dataclasses.replace(
        examples[0], messages=({"role": "user", "content": "What are the grading criteria for this essay?"},)
    )
    logged = {}
    answer = "The grading criteria are clarity and depth."
    RubricReward([asking], ScriptedJudge())(
        completions=[answer, "Your rubric wants rest."], example_id=["e0", "e0"], log_metric=logged.__setitem__
    )
    assert mentions_rubric(answer)
    assert logged["leak_rate"] == 0.5


def test_evaluation_between_steps_changes_no_weight(tokenizer, examples, tmp_path):
    def run(folder, **overrides):
        trainer = RubricGRPOTrainer(
            tiny_model(tokenizer),
            args=arguments(folder, per_device_eval_batch_size=6, **overrides),
            reward_funcs=RubricReward(examples, ChecksJudge()),
            train_dataset=Dataset.from_list(grpo_rows(examples)),
            eval_dataset=Dataset.from_list(grpo_rows(examples[:2])),
            processing_class=tokenizer,
        )
        trainer.reward_funcs = [lambda completions, **kwargs: [float(len(c[-1]["content"])) for c in completions]]
        trainer.train()
        return trainer

    plain, evaluated = run(tmp_path / "a"), run(tmp_path / "b", eval_strategy="steps", eval_steps=1)
    assert any("eval_loss" in h for h in evaluated.state.log_history)
    for (name, a), (_, b) in zip(plain.model.named_parameters(), evaluated.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
