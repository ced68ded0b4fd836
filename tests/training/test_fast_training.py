"""The trainer's fast paths against its plain ones: equal gradients, and the requested precision."""

import copy

import pytest
import torch
from conftest import stir_adapters, tiny_model
from peft import LoraConfig, get_peft_model
from support.training import LORA, config, first_gradient, scripted

from rgsd.models import batching
from rgsd.models.kernels import decoding, linears, products
from rgsd.training.trainer import RGSDTrainer


def gradient(tmp_path, tokenizer, examples, **kwargs):
    return first_gradient(
        scripted(
            tmp_path,
            tokenizer,
            examples,
            max_steps=1,
            shuffle_dataset=False,
            per_device_train_batch_size=4,
            teacher_model_kind="live",
            **kwargs,
        )
    )


@pytest.mark.parametrize("peft", [None, LORA])
def test_fast_products_and_slices_change_no_gradient(tmp_path, tokenizer, examples, peft, monkeypatch):
    monkeypatch.setenv("RGSD_FAST", "0")
    plain = gradient(tmp_path, tokenizer, examples, peft_config=peft)
    monkeypatch.setenv("RGSD_FAST", "1")
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    monkeypatch.setitem(batching.PASS_TOKENS, "cpu", 0)
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
    seen.clear()  # of the head's check at construction
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


@pytest.mark.parametrize("bias", [False, True])
def test_lora_added_in_place_is_pefts_lora(bias, monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias))
    model = get_peft_model(layer, LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
    stir_adapters(model, 0.3)
    x, pull = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 20)
    trained = [p for p in model.parameters() if p.requires_grad]
    want = model(x)
    want_grads = torch.autograd.grad((want * pull).sum(), [x, *trained])
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "MIN_WEIGHT", 1)
        patch.setattr(
            linears, "_adapted_forward", lambda *a, real=linears._adapted_forward: calls.append(a) or real(*a)
        )
        with linears.frozen(model):
            got = model(x)
    assert len(calls) == 1
    got_grads = torch.autograd.grad((got * pull).sum(), [x, *trained])
    torch.testing.assert_close(got, want)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.merge_adapter(),
        lambda m: setattr(m.base_model.model[0].lora_dropout["default"], "p", 0.5),
        lambda m: m.base_model.model[0].get_base_layer().weight.requires_grad_(True),
        lambda m: m.base_model.model[0].lora_B["default"].to(torch.float64),
        lambda m: (
            m.add_adapter("two", LoraConfig(r=2, target_modules=["0"])),
            m.base_model.set_adapter(["default", "two"]),
        ),
    ],
)
def test_other_lora_is_left_to_peft(change, monkeypatch):
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(12, 20))
    model = get_peft_model(layer, LoraConfig(r=3, lora_dropout=0.1, target_modules=["0"]))
    adapted = model.base_model.model[0]
    adapted.lora_dropout["default"].p = 0.0
    with linears.frozen(model):
        assert "forward" in vars(adapted)
    change(model)
    with linears.frozen(model):
        assert "forward" not in vars(adapted)
