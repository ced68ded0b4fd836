"""Small updates survive rounding: in rollouts, evaluation, exports, the sync to vLLM, and the optimizer."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import stir_adapters, tiny_model, write_recipes
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.training import LORA, config
from transformers import AutoModelForCausalLM
from trl import DistillationTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from rgsd import models
from rgsd.cli import main
from rgsd.errors import ConfigError, ModelError
from rgsd.models import adapters
from rgsd.models.kernels import decoding, linears, products
from rgsd.runs import ADAPTER, MODEL
from rgsd.training.grpo import RubricGRPOConfig, RubricGRPOTrainer
from rgsd.training.sft import RubricSFTConfig, RubricSFTTrainer
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows.saving import save_policy

SMALL = 3e-4
"""Deviation of B after some steps at lr 5e-5: the update lies far below a bfloat16 step of the weights."""


def student_of(tokenizer, *, dtype=torch.bfloat16, std=SMALL, **overrides):
    """A model with small adapter updates, and its float32 merge, which rounds nothing."""
    base = tiny_model(tokenizer).to(dtype)
    torch.manual_seed(1)
    student = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **overrides))
    stir_adapters(student, std)
    return student.eval(), copy.deepcopy(student).float().eval()


def trainer_of(tmp_path, tokenizer, examples, model=None, peft_config=None, **kwargs):
    return RGSDTrainer(
        model or tiny_model(tokenizer).to(torch.bfloat16),
        args=config(tmp_path, **kwargs),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
    )


@torch.no_grad()
def logits(model, ids=None):
    """Computed in float32, so that only weights tell models apart."""
    ids = torch.arange(3, 60)[None] if ids is None else ids
    with adapters.computing_in_float32(model):
        return model(input_ids=ids).logits[0].float()


def survived(own, other, base):
    """The share of the logits' update that survives in another policy."""
    update, found = own - base, other - base
    return float((found * update).sum() / update.square().sum())


def kl(own, other):
    a, b = own.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def base_logits(student):
    with student.disable_adapter():
        return logits(student)


# --- Rollouts


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_rollouts_of_a_half_precision_model_come_from_the_student(
    tmp_path, tokenizer, examples, monkeypatch, fast, bf16
):
    """Sampling runs base and adapter separately, so its logits are the student's, including the update."""
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    monkeypatch.setenv("RGSD_FAST", "1" if fast else "0")
    trainer = trainer_of(tmp_path, tokenizer, examples, peft_config=LORA, bf16=bf16)
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    stir_adapters(student, SMALL)
    seen = {}
    ids = torch.arange(3, 60)[None]

    @torch.no_grad()
    def read(model):
        # The base model's forward is what every decode loop calls; in float32 arithmetic, only weights matter.
        network = model.get_base_model()
        return network(input_ids=ids).logits[0].float()

    def sample(self, prompt_ids, *_):
        with self.accelerator.autocast():
            seen["rollout"] = read(student)
        return [[50, 51] for _ in prompt_ids]

    def decode(model, prompts, *_, **__):
        seen["rollout"] = read(model)
        return [[50, 51] for _ in prompts]

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", sample)
    monkeypatch.setattr(decoding, "decode", decode)
    with torch.no_grad(), trainer.accelerator.autocast():
        want = read(student)
    trainer._generate_single_turn([[5, 6, 7]], None, {})
    got = seen["rollout"]
    # Only under autocast does the fast path round once where peft rounds twice; a merge differs by 4e-4 and more.
    assert torch.equal(got, want) or (fast and bf16)
    assert kl(want, got) < 5e-5


def test_packed_layers_are_pefts_in_each_precision(tokenizer, monkeypatch):
    monkeypatch.setattr(products, "MIN_WEIGHT", 1)
    student, _ = student_of(tokenizer, std=0.3)
    ids = torch.arange(3, 40)[None]
    for low in (None, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low is not None):
            want = student(input_ids=ids).logits
            with linears.packed(student, 4, low):
                got = student(input_ids=ids).logits
        assert got.dtype == want.dtype
        assert kl(want[0].float(), got[0].float()) < 1e-2


def test_trained_biases_stay_trained_through_rollouts(tmp_path, tokenizer, examples, monkeypatch):
    monkeypatch.setenv("RGSD_FAST", "0")  # the path of transformers, which merges in place
    trainer = trainer_of(
        tmp_path,
        tokenizer,
        examples,
        model=tiny_model(tokenizer, attention_bias=True),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all"),
        learning_rate=0.05,
        max_steps=3,
    )
    biases = {n: p for n, p in trainer.model.named_parameters() if n.endswith("base_layer.bias")}
    assert biases
    assert all(p.requires_grad for p in biases.values())
    after_steps = []
    rollouts = RGSDTrainer._generate_single_turn

    def noted(self, *args, **kwargs):
        before = {n: p.detach().clone() for n, p in biases.items()}
        out = rollouts(self, *args, **kwargs)
        after_steps.append(all(torch.equal(biases[n], v) for n, v in before.items()))
        return out

    monkeypatch.setattr(RGSDTrainer, "_generate_single_turn", noted)
    trainer.train()
    assert after_steps == [True] * 3
    assert all(p.detach().abs().max() > 0.05 for p in biases.values())


# --- Evaluation and export


def test_the_policy_that_is_evaluated_is_the_student(tmp_path, tokenizer, examples):
    trainer = trainer_of(tmp_path, tokenizer, examples, peft_config=LORA)
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    stir_adapters(student, SMALL)
    want, base = logits(student), base_logits(student)
    evaluated = save_policy(trainer, tokenizer, SimpleNamespace(folder=tmp_path / "run"))
    assert survived(want, logits(evaluated), base) > 0.999
    assert kl(want, logits(evaluated)) < 1e-3 * kl(want, base)


RUBRIC = [{"criterion": "Advises rest.", "weight": 5, "check": {"any": ["rest"]}}]


def write_world(folder, tokenizer):
    rows = [{"id": f"p{i}", "prompt": f"How do I rest {i} times?", "rubric": RUBRIC} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_recipes(folder, tokenizer)


@pytest.fixture
def bf16_run(tmp_path, tokenizer, examples):
    """A run in bfloat16 whose adapter is then given a small update: its folder, the student, the base's logits."""
    write_world(tmp_path, tokenizer)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe |= {"dtype": "bfloat16", "evaluate": False, "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    student = PeftModel.from_pretrained(base, str(tmp_path / "run" / ADAPTER), is_trainable=True)
    torch.manual_seed(3)
    stir_adapters(student, SMALL / 4)
    student.save_pretrained(str(tmp_path / "run" / ADAPTER))
    return tmp_path / "run", student.eval(), base_logits(student)


def test_a_loaded_run_is_the_student_and_so_is_a_float32_export(bf16_run, tmp_path, capsys):
    run, student, base = bf16_run
    want = logits(student)
    loaded, _ = models.load_trained(run)
    assert survived(want, logits(loaded), base) > 0.999
    assert kl(want, logits(loaded)) < 1e-3 * kl(want, base)

    folder, cost = models.export(run, tmp_path / "exact", dtype="float32")
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert exported.dtype == torch.float32
    assert survived(want, logits(exported), base) > 0.999
    assert kl(want, logits(exported)) < 1e-3 * kl(want, base)
    assert cost.update_kept == pytest.approx(1, abs=1e-3)
    assert not cost.is_costly


def test_a_half_precision_export_says_what_rounding_cost(bf16_run, tmp_path, capsys):
    run, student, base = bf16_run
    want = logits(student)
    assert main(["export", str(run), "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    cost = json.loads((tmp_path / "out" / "rounding.json").read_text())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16
    # Every weight is the float32 merge, rounded once.
    for name, layer in adapters.layers(student):
        own = exported.get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(own, adapters.merged(layer)["weight"].to(torch.bfloat16)), name
    assert cost["dtype"] == "bfloat16"
    assert 0 <= cost["update_kept"] < 0.5  # so small an update cannot live in bfloat16 weights
    assert 0 < cost["mean_logit_difference"] < cost["max_logit_difference"]
    assert survived(want, logits(exported), base) < 0.9
    assert f"{cost['max_logit_difference']:.3g}" in said
    assert "--dtype float32" in said  # the remedy, because much was lost


def test_a_merge_of_tied_weights_changes_the_adapted_module_alone(tokenizer):
    base = tiny_model(tokenizer, tied=True)
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"])).eval()
    stir_adapters(student, 0.3)
    assert not adapters.merges_exactly(student)
    want = logits(student)
    plain, kept = adapters.merge_and_unload(student, torch.float32)
    torch.testing.assert_close(logits(plain), want, atol=1e-4, rtol=1e-4)
    assert not plain.config.tie_word_embeddings
    assert kept.share == pytest.approx(1)


# --- vLLM


def engine_of(model):
    """TRL's sync to vLLM, without vLLM."""
    engine = object.__new__(VLLMGeneration)
    engine.model, engine.accelerator = model, Accelerator(cpu=True)
    engine._dist = DistributedBackend(engine.accelerator)
    return engine


def test_trls_own_sync_rounds_twice_and_moves_the_base_weights(tokenizer):
    """What docs/training.md says of TRL 1.16: it merges in place, in the base weights' precision, and subtracts."""
    student, exact = student_of(tokenizer)
    before = {n: m.get_base_layer().weight.detach().clone() for n, m in adapters.layers(student)}
    kept = adapters.Kept()
    sent = {name: value.clone() for name, value in engine_of(student)._iter_named_params()}
    for name, layer in adapters.layers(exact):
        own = sent[name.removeprefix("base_model.model.") + ".weight"]
        kept.add(before[name], adapters.merged(layer)["weight"], own)
    assert kept.share < 0.5
    assert any(not torch.equal(before[n], m.get_base_layer().weight) for n, m in adapters.layers(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vllm_gets_float32_merges_rounded_once_and_base_weights_stay(tmp_path, tokenizer, examples, dtype):
    trainer = trainer_of(tmp_path, tokenizer, examples, model=tiny_model(tokenizer).to(dtype), peft_config=LORA)
    student = trainer.accelerator.unwrap_model(trainer.model)
    stir_adapters(student, 1e-3)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    trainer.vllm_generation = engine_of(student)
    plain = {n for n, _ in trainer.vllm_generation._iter_named_params()}
    with torch.no_grad():
        for n, p in student.named_parameters():
            p.copy_(before[n])
    trainer._send_exact_merges()
    sent = dict(trainer.vllm_generation._iter_named_params())
    assert sent.keys() == plain
    for name, layer in adapters.layers(student):
        delta = layer.get_delta_weight("default")
        want = (layer.get_base_layer().weight.float() + delta).to(dtype)
        assert torch.equal(sent[name.removeprefix("base_model.model.") + ".weight"], want)
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())
    assert 0 < trainer._update_kept < 1.5
    logs = {"loss": 1.0}
    trainer.log(logs)
    assert trainer.state.log_history[-1]["engine/update_kept"] == trainer._update_kept
    student.merge_adapter()  # peft's own again
    assert all(layer.merged for _, layer in adapters.layers(student))


def test_a_tied_head_with_an_adapter_cannot_be_sent(tokenizer):
    student = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ModelError, match="lm_head"):
        list(adapters.merged_values(student, engine_of(student)._iter_named_params))


# --- What is trained


def trained(trainer):
    """The share of trained values that a run changes."""
    before = {n: p.detach().clone().float() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = {n: p.detach().float() for n, p in trainer.model.named_parameters() if p.requires_grad}
    changed = sum(int((after[n] != before[n]).sum()) for n in before)
    return changed / sum(p.numel() for p in before.values())


def rgsd_engine(tmp_path, tokenizer, examples, model, peft_config):
    return trainer_of(tmp_path, tokenizer, examples, model, peft_config, learning_rate=1e-6, max_steps=5)


SMALL_RUN = {
    "per_device_train_batch_size": 2,
    "max_steps": 5,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
}


def grpo_engine(tmp_path, tokenizer, examples, model, peft_config):
    args = RubricGRPOConfig(str(tmp_path), num_generations=2, max_completion_length=6, **SMALL_RUN)
    return RubricGRPOTrainer(
        model,
        args=args,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        train_dataset=Dataset.from_list([{"prompt": list(e.messages), "example_id": e.id} for e in examples]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def sft_engine(tmp_path, tokenizer, examples, model, peft_config):
    rows = [{"input_ids": list(range(5, 20 + i)), "labels": list(range(5, 20 + i))} for i in range(8)]
    return RubricSFTTrainer(
        model,
        args=RubricSFTConfig(str(tmp_path), **SMALL_RUN),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("engine", [rgsd_engine, grpo_engine, sft_engine])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_half_precision_parameters_are_trained_in_float32(tmp_path, tokenizer, examples, engine, kind):
    model = tiny_model(tokenizer).to(torch.bfloat16)
    if kind == "lora":  # as peft makes them when told not to upcast
        model = get_peft_model(model, copy.deepcopy(LORA), autocast_adapter_dtype=False)
    trainer = engine(tmp_path, tokenizer, examples, model, None)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert trained(trainer) > (0.9 if kind == "full" else 0.4)  # A waits for B


def test_half_precision_parameters_that_share_a_layer_with_frozen_ones_are_refused(tmp_path, tokenizer, examples):
    for peft in (
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
    ):
        model = tiny_model(tokenizer, tied=False, attention_bias=True).to(torch.bfloat16)
        with pytest.raises(ConfigError, match="dtype float32"):
            trainer_of(tmp_path, tokenizer, examples, model, peft)


@pytest.mark.integration
def test_a_model_that_was_trained_whole_in_bf16_is_kept_in_float32(tmp_path, tokenizer):
    write_world(tmp_path, tokenizer)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe |= {"dtype": "bfloat16", "use_peft": False, "learning_rate": 1e-6, "evaluate": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    saved = load_file(tmp_path / "run" / MODEL / "model.safetensors")
    base = load_file(tmp_path / "model" / "model.safetensors")
    changed = sum(int((v.float() != base[n].to(torch.bfloat16).float()).sum()) for n, v in saved.items())
    assert changed > 0.9 * sum(v.numel() for v in saved.values())
    loaded, _ = models.load_trained(tmp_path / "run")
    assert all(torch.equal(p, saved[n]) for n, p in loaded.named_parameters())
