"""The trainer's fast paths against its plain ones: the same gradients, the precision that was asked for."""

import copy

import pytest
import torch
from conftest import stir_adapters, tiny_model
from test_trainer import LORA, config, first_gradient, scripted

from rgsd import batching
from rgsd.fast import decoding, products
from rgsd.trainer import RGSDTrainer


def gradient(tmp_path, tokenizer, examples, **kwargs):
    return first_gradient(
        scripted(
            tmp_path,
            tokenizer,
            examples,
            max_steps=1,
            shuffle_dataset=False,
            per_device_train_batch_size=4,
            teacher_kind="live",
            **kwargs,
        )
    )


@pytest.mark.parametrize("peft", [None, LORA])
def test_fast_products_and_slices_change_no_gradient(tmp_path, tokenizer, examples, peft, monkeypatch):
    monkeypatch.setenv("RGSD_FAST", "0")
    plain = gradient(tmp_path, tokenizer, examples, peft_config=peft)
    monkeypatch.setenv("RGSD_FAST", "1")
    monkeypatch.setattr(products, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(batching, "LEAST_TOKENS", 1)
    monkeypatch.setattr(batching, "MOST_PADDING", 0.0)
    passes = []
    real = RGSDTrainer._hidden

    def counted(self, unwrapped, batch):
        passes.append(len(batching.slices(batch["attention_mask"].sum(-1).tolist())))
        return real(self, unwrapped, batch)

    monkeypatch.setattr(RGSDTrainer, "_hidden", counted)
    fast = gradient(tmp_path, tokenizer, examples, peft_config=peft)
    assert max(passes) > 1
    assert plain.keys() == fast.keys()
    assert any(g.abs().max() > 1e-6 for g in plain.values())
    for name, want in plain.items():
        torch.testing.assert_close(fast[name], want, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_the_precision_of_rollouts_teacher_and_student(tmp_path, tokenizer, examples, bf16, monkeypatch):
    seen = []
    hidden, generate = RGSDTrainer._hidden, decoding.generate

    def noted(self, *inputs):
        out = hidden(self, *inputs)
        seen.append(torch.is_autocast_enabled("cpu"))
        return out

    monkeypatch.setattr(RGSDTrainer, "_hidden", noted)
    monkeypatch.setattr(decoding, "generate", lambda *a: seen.append(torch.is_autocast_enabled("cpu")) or generate(*a))
    trainer = RGSDTrainer(
        tiny_model(tokenizer),
        args=config(tmp_path, bf16=bf16, max_steps=1),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(LORA),
    )
    trainer.train()
    assert seen == [bf16] * 5  # one rollout, two teacher passes, two student passes
    assert trainer.state.log_history[0]["loss"] > 0


def test_rollouts_come_from_the_decode_loop_and_leave_adapters_and_weights_alone(tmp_path, tokenizer, examples):
    trainer = RGSDTrainer(
        tiny_model(tokenizer),
        args=config(tmp_path),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(LORA),
    )
    stir_adapters(trainer.model, 0.2)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    prompts = trainer._tokenize_messages([r["prompt"] for r in trainer.train_dataset])
    student = trainer.accelerator.unwrap_model(trainer.model)
    torch.manual_seed(5)
    first = trainer._decoded(student, prompts)
    torch.manual_seed(5)
    assert trainer._generate_single_turn(prompts, None, {}) == first
    assert trainer._generate_single_turn(prompts, None, {}) != first
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    trainer.args.merge_lora_for_rollouts = False
    assert trainer._decoded(student, prompts) is None
