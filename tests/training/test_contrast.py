"""The contrastive teacher in the trainer: its second prompt, its loss, and what is refused."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from support.training import LORA, config, first_gradient, scripted

from rgsd.errors import ConfigError, PromptTooLong
from rgsd.prompts.messages import PromptSettings, training_rows
from rgsd.training.loss import DivergenceSpec, divergence
from rgsd.training.trainer import RGSDTrainer


def test_the_second_prompt_is_the_mismatched_controls(examples):
    rows = training_rows(examples, PromptSettings(seed=3), with_contrast=True)
    mismatched = training_rows(examples, PromptSettings(seed=3, privileged_context="mismatched"))
    assert [r["contrast_prompt"] for r in rows] == [r["teacher_prompt"] for r in mismatched]
    plain = training_rows(examples, PromptSettings(seed=3))
    assert [{k: v for k, v in r.items() if k != "contrast_prompt"} for r in rows] == plain
    assert all(r["contrast_prompt"] != r["teacher_prompt"] for r in rows)


@pytest.mark.parametrize("peft", [None, LORA])
def test_the_loss_is_the_formula_over_the_response_tokens(tmp_path, tokenizer, examples, peft):
    """The logged loss equals the plain divergence, computed here from three full forward passes of each prompt."""
    settings = {"max_steps": 1, "shuffle_dataset": False, "beta": 0.5, "teacher_contrast": 1.5}
    trainer = scripted(tmp_path, tokenizer, examples[:4], peft_config=peft, loss_temperature=0.8, **settings)
    model = copy.deepcopy(trainer.model).eval()
    spec = DivergenceSpec(0.5, "none", temperature=0.8, contrast=1.5)
    total, count = 0.0, 0
    for row in trainer.train_dataset:
        names = ("prompt", "teacher_prompt", "contrast_prompt")
        prompts = trainer._tokenize_messages([row[name] for name in names])
        response = trainer._generate_single_turn([prompts[0]], None, {})[0]
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([p + response])).logits[0, len(p) - 1 : -1] for p in prompts]
        out = divergence(logits[0], logits[1], spec, logits[2])
        total, count = total + out.total.item(), count + out.count
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    assert total > 0


@pytest.mark.parametrize("split", [(4, 2), (1, 8)])
def test_no_split_into_micro_batches_changes_the_gradient(tmp_path, tokenizer, examples, split):
    kwargs = {"shuffle_dataset": False, "max_steps": 1, "teacher_contrast": 1.0}
    batches = [{"per_device_train_batch_size": b, "gradient_accumulation_steps": g} for b, g in ((8, 1), split)]
    whole, parts = (first_gradient(scripted(tmp_path, tokenizer, examples, **b, **kwargs)) for b in batches)
    plain = first_gradient(scripted(tmp_path, tokenizer, examples, **batches[0], **kwargs | {"teacher_contrast": 0.0}))
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4)
    assert any(not torch.allclose(whole[n], g, atol=1e-4) for n, g in plain.items())


def test_top_k_and_the_clip_work_with_it(tmp_path, tokenizer, examples):
    settings = {"teacher_contrast": 1.0, "loss_top_k": 8, "clip": "entry", "clip_threshold": 0.02, "beta": 0.5}
    trainer = scripted(tmp_path, tokenizer, examples, **settings)
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["clipped_divergence"] < log["divergence"]


@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan])
def test_a_gamma_out_of_range_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="teacher_contrast"):
        config(tmp_path, teacher_contrast=value)


@pytest.mark.parametrize("context", ["mismatched", "none", "both", "reference"])
def test_it_needs_the_right_rubric(tmp_path, context):
    with pytest.raises(ConfigError, match="--teacher_contrast 0"):
        config(tmp_path, teacher_contrast=1.0, privileged_context=context)
    assert config(tmp_path, teacher_contrast=0.0, privileged_context=context).teacher_contrast == 0.0


def test_a_dataset_without_the_second_prompt_is_refused(tmp_path, tokenizer, model, examples):
    rows = Dataset.from_list(training_rows(examples, PromptSettings()))
    with pytest.raises(ConfigError, match="contrast_prompt"):
        RGSDTrainer(model, args=config(tmp_path, teacher_contrast=1.0), train_dataset=rows, processing_class=tokenizer)


def test_a_second_prompt_that_is_too_long_is_refused(tmp_path, tokenizer, model, examples):
    rows = training_rows(examples, PromptSettings(), with_contrast=True)
    rows[2]["contrast_prompt"][-1]["content"] += " and then" * 200
    args = config(tmp_path, teacher_contrast=1.0, max_teacher_length=400)
    with pytest.raises(PromptTooLong, match="e2"):
        RGSDTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
