"""The trainer: what reaches the loss, and that splits, merges, resumes and teachers change nothing else."""

import copy
import json
import random
import time

import numpy as np
import pytest
import torch
from conftest import stir_adapters, tiny_model
from datasets import Dataset
from peft import LoraConfig
from support.training import LORA, Scripted, config, first_gradient, scripted, sync_of
from trl import DistillationTrainer

from rgsd.errors import ConfigError, ModelError, PromptTooLong
from rgsd.training.loss import DivergenceSpec, divergence
from rgsd.training.metrics import StepMetrics
from rgsd.training.trainer import TEACHER_FILE, RGSDTrainer

pytestmark = pytest.mark.integration  # these tests train

LOGGED = [
    *("loss", "divergence", "clipped_share", "masked_share", "student_entropy", "teacher_entropy", "agreement"),
    *("response_length", "truncated_share", "leak_rate", "tokens_per_second"),
    *("seconds/rollout", "seconds/teacher", "seconds/student", "seconds/update"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("peft", [None, LORA])
@pytest.mark.parametrize("split", [(4, 2), (1, 8)])
def test_no_split_into_micro_batches_changes_the_gradient(tmp_path, tokenizer, examples, split, peft, checkpointing):
    kwargs = {"shuffle_dataset": False, "max_steps": 1, "peft_config": peft, "teacher_model_kind": "live"}
    whole = first_gradient(
        scripted(tmp_path, tokenizer, examples, per_device_train_batch_size=8, gradient_accumulation_steps=1, **kwargs)
    )
    parts = first_gradient(
        scripted(
            tmp_path,
            tokenizer,
            examples,
            per_device_train_batch_size=split[0],
            gradient_accumulation_steps=split[1],
            gradient_checkpointing=checkpointing,
            **kwargs,
        )
    )
    assert whole.keys() == parts.keys()
    assert any(g.abs().max() > 1e-6 for g in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_formula_over_the_response_tokens(tmp_path, tokenizer, examples):
    """The logged loss equals the plain divergence, computed here prompt by prompt from two full forward passes."""
    trainer = scripted(tmp_path, tokenizer, examples[:4], max_steps=1, shuffle_dataset=False, beta=0.5)
    model = copy.deepcopy(trainer.model).eval()
    total, count = 0.0, 0
    for row in trainer.train_dataset:
        prompt, teacher = trainer._tokenize_messages([row["prompt"], row["teacher_prompt"]])
        response = trainer._generate_single_turn([prompt], None, {})[0]

        def response_logits(prefix, response=response):
            with torch.no_grad():
                return model(input_ids=torch.tensor([prefix + response])).logits[0, len(prefix) - 1 : -1]

        out = divergence(response_logits(prompt), response_logits(teacher), DivergenceSpec(0.5, "none"))
        total, count = total + out.total.item(), count + out.count
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    assert trainer.state.log_history[0]["divergence"] == pytest.approx(total / count, rel=1e-4)
    assert total > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])])
def test_a_trained_head_is_the_bases_in_the_teacher(tmp_path, tokenizer, examples, tied, peft):
    if tied and peft is not None:
        peft = LORA
    base = tiny_model(tokenizer, tied=tied)
    before = copy.deepcopy(base).eval()
    trainer = scripted(tmp_path, tokenizer, examples, model=base, peft_config=peft, learning_rate=0.05, max_steps=2)
    trainer.train()
    rollouts = trainer._rollouts(list(trainer.train_dataset)[:1])
    trainer._run_teacher(rollouts, 1)
    (r,) = rollouts
    with torch.no_grad():
        logits = before(input_ids=torch.tensor([r.teacher_prompt + r.response])).logits[
            0, len(r.teacher_prompt) - 1 : -1
        ]
    torch.testing.assert_close(trainer._teacher_head.logits(r.teacher_hidden_NH), logits, atol=1e-5, rtol=1e-4)
    if not tied:
        head = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
        assert not torch.equal(head, before.lm_head.weight)  # the student's was trained


def test_no_privileged_context_gives_no_loss(tmp_path, tokenizer, examples):
    trainer = scripted(tmp_path, tokenizer, examples, privileged_context="none", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["base", "ema", "live"])
@pytest.mark.parametrize("peft", [None, LORA])
def test_a_real_run_logs_what_is_promised_and_moves_the_student(tmp_path, tokenizer, examples, kind, peft):
    model = tiny_model(tokenizer)
    trainer = RGSDTrainer(
        model,
        args=config(tmp_path, teacher_model_kind=kind),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history[1]
    for name in [
        "loss",
        "divergence",
        "clipped_share",
        "masked_share",
        "student_entropy",
        "teacher_entropy",
        "agreement",
        "response_length",
        "truncated_share",
        "leak_rate",
        "seconds/rollout",
        "seconds/teacher",
        "seconds/student",
        "seconds/update",
        "tokens_per_second",
    ]:
        assert isinstance(log[name], float), name
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if n in moved)


def test_merged_rollouts_leave_the_base_weights_bit_for_bit(tmp_path, tokenizer, examples):
    model = tiny_model(tokenizer).to(torch.bfloat16)
    trainer = RGSDTrainer(
        model,
        args=config(tmp_path, learning_rate=0.05),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(LORA),
    )
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    for name, value in frozen.items():
        assert torch.equal(dict(trainer.model.named_parameters())[name], value), name


def test_an_engine_that_is_sent_merged_weights_leaves_them_too_and_may_return_nothing(
    tmp_path, tokenizer, examples, monkeypatch
):
    sent = []

    def engine(self, prompt_ids, *_):  # TRL's weight sync to vLLM; one response is empty
        if not sent:
            self.vllm_generation = sync_of(self)
            self._send_exact_merges()
        sent.append(len(list(self.vllm_generation._iter_named_params())))
        return [[50, 51, 52] if k else [] for k in range(len(prompt_ids))]

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", engine)
    trainer = RGSDTrainer(
        tiny_model(tokenizer).to(torch.bfloat16),
        args=config(tmp_path, learning_rate=0.05, max_steps=3, merge_lora_for_rollouts=False),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(LORA),
    )
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(dict(trainer.model.named_parameters())[n], v) for n, v in frozen.items())
    assert trainer.state.log_history[0]["response_length"] == pytest.approx((1 + 3 * 3) / 4)
    assert len(sent) == 3


def test_merged_and_unmerged_rollouts_agree(tmp_path, tokenizer, examples):
    trainer = RGSDTrainer(
        tiny_model(tokenizer),
        args=config(tmp_path),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(LORA),
    )
    stir_adapters(trainer.model, 0.2)
    trainer.generation_config.do_sample = False
    prompts = trainer._tokenize_messages([r["prompt"] for r in trainer.train_dataset])
    merged = trainer._generate_single_turn(prompts, None, {})
    trainer.args.merge_lora_for_rollouts = False
    assert merged == trainer._generate_single_turn(prompts, None, {})


def test_reasoning_is_left_out_of_the_loss(tmp_path, tokenizer, examples):
    text = "<think>the rubric wants rest</think>Rest."

    class Thinking(RGSDTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            unclosed = tokenizer("<think>never ends", add_special_tokens=False)["input_ids"]
            return [[*ids, tokenizer.eos_token_id] if i else unclosed for i in range(len(prompt_ids))]

    trainer = Thinking(
        tiny_model(tokenizer), args=config(tmp_path, max_steps=1), train_dataset=examples, processing_class=tokenizer
    )
    rollouts = trainer._rollouts(list(trainer.train_dataset)[:2])
    assert not any(rollouts[0].in_loss)
    kept = [t for t, keep in zip(rollouts[1].response, rollouts[1].in_loss, strict=True) if keep]
    assert tokenizer.decode(kept) == "Rest.<|im_end|>"
    trainer._step_metrics = StepMetrics()
    trainer.train()
    assert 0 < trainer.state.log_history[0]["masked_share"] < 1


def test_a_step_without_any_token_in_the_loss_still_runs(tmp_path, tokenizer, examples):
    class Unclosed(RGSDTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            return [tokenizer("<think>never ends", add_special_tokens=False)["input_ids"] for _ in prompt_ids]

    trainer = Unclosed(
        tiny_model(tokenizer), args=config(tmp_path, max_steps=1), train_dataset=examples, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert trainer.state.log_history[0]["masked_share"] == 1


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_resume_gives_the_same_weights_as_no_stop(tmp_path, tokenizer, examples, kind):
    def run(folder, steps, resume=None):
        trainer = RGSDTrainer(
            tiny_model(tokenizer),
            args=config(
                folder,
                teacher_model_kind=kind,
                save_strategy="steps",
                save_steps=2,
                max_steps=steps,
                teacher_update_rate=0.5,
            ),
            train_dataset=examples,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4)
    stopped = run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", 4, resume=str(tmp_path / "stopped" / "checkpoint-2"))
    assert stopped.state.global_step == 2
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(v, resumed.teacher.state_dict()[n]) for n, v in whole.teacher.state_dict().items())
    assert (tmp_path / "whole" / "checkpoint-4" / TEACHER_FILE).is_file() == (kind == "ema")


def test_resuming_an_ema_run_from_a_checkpoint_without_it_is_refused(tmp_path, tokenizer, examples):
    trainer = scripted(tmp_path, tokenizer, examples, save_strategy="steps", save_steps=2)
    trainer.train()
    again = scripted(tmp_path, tokenizer, examples, teacher_model_kind="ema", max_steps=4)
    with pytest.raises(ModelError, match="teacher_model_kind 'ema'"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_prompt_that_is_too_long_is_refused_before_training(tmp_path, tokenizer, examples):
    with pytest.raises(PromptTooLong, match=r"8 teacher prompts.* 50 tokens: e0 \(.*max_teacher_length"):
        scripted(tmp_path, tokenizer, examples, max_teacher_length=50)
    with pytest.raises(PromptTooLong, match=r"student prompts.* 5 tokens"):
        scripted(tmp_path, tokenizer, examples, max_prompt_length=5)
    with pytest.raises(PromptTooLong, match="max_completion_length"):
        scripted(tmp_path, tokenizer, examples, max_completion_length=1020)


def test_fewer_prompts_than_a_step_takes_is_refused(tmp_path, tokenizer, examples):
    with pytest.raises(ConfigError, match=r"16 prompts.*training set has 8"):
        scripted(tmp_path, tokenizer, examples, gradient_accumulation_steps=8)


def test_a_dataset_without_the_columns_is_refused(tmp_path, tokenizer):
    data = Dataset.from_list([{"prompt": "x", "rubric": ["y"]}])
    with pytest.raises(ConfigError, match="'teacher_prompt'"):
        scripted(tmp_path, tokenizer, data)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"beta": 2.0}, "beta"),
        ({"clip": "both"}, "clip"),
        ({"privileged_context": "nothing"}, "privileged_context"),
        ({"template": "no-such"}, "no-such"),
        ({"generation_kwargs": {"num_return_sequences": 4}}, "num_return_sequences=4"),
        ({"think_open_tag": " "}, "think_open_tag"),
        ({"max_teacher_length": 0}, "max_teacher_length"),
    ],
)
def test_contradictory_settings_fail_at_construction(tmp_path, kwargs, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, **kwargs)


def test_evaluation_reports_the_divergence_on_held_out_prompts(tmp_path, tokenizer, examples):
    trainer = Scripted(
        tiny_model(tokenizer),
        args=config(tmp_path, per_device_eval_batch_size=4),
        train_dataset=examples,
        eval_dataset=examples[:4],
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert json.dumps(metrics)


# --- Evaluation inside training


def weights_of(trainer):
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_evaluation_between_steps_changes_no_weight(tmp_path, tokenizer, examples):
    """Rollouts and dropout draw from torch's random numbers; evaluation must not consume any of them."""

    class Drawing(RGSDTrainer):
        def _rollouts(self, rows):  # some callback or dataset may well draw from these
            self.drawn.append((random.random(), np.random.rand()))
            return super()._rollouts(rows)

    def run(folder, **kwargs):
        trainer = Drawing(
            tiny_model(tokenizer),
            args=config(folder, max_steps=3, learning_rate=0.05, per_device_eval_batch_size=4, **kwargs),
            train_dataset=examples,
            eval_dataset=examples[:4],
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear"),
        )
        trainer.drawn = []
        return weights_of(trainer), trainer

    plain, without = run(tmp_path / "plain")
    evaluated, trainer = run(tmp_path / "evaluated", eval_strategy="steps", eval_steps=1)
    assert [h["step"] for h in trainer.state.log_history if "eval_loss" in h] == [1, 2, 3]
    assert same(plain, evaluated)
    assert set(without.drawn) <= set(trainer.drawn)


def test_evaluations_time_is_not_the_next_steps(tmp_path, tokenizer, examples):
    class Slow(Scripted):
        def _generate_single_turn(self, *args):
            if not self.model.training:
                time.sleep(0.5)
            return super()._generate_single_turn(*args)

        def _run_teacher(self, rollouts, groups):
            super()._run_teacher(rollouts, groups)
            if not self.model.training:
                self._step_metrics._seconds["teacher"] += 100.0

    trainer = Slow(
        tiny_model(tokenizer),
        args=config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4),
        train_dataset=examples,
        eval_dataset=examples[:4],
        processing_class=tokenizer,
    )
    trainer.train()
    steps = [h for h in trainer.state.log_history if "loss" in h]
    assert len(steps) == 2
    assert all(h["seconds/rollout"] < 0.5 for h in steps)
    assert all(h["seconds/teacher"] < 100 for h in steps)
    assert steps[1]["tokens_per_second"] > 0.05 * steps[0]["tokens_per_second"]
