"""Heads of other model families match their own forward pass, and Qwen3 with its real tokenizer trains."""

import re

import pytest
import torch
from peft import LoraConfig
from support.qwen3_tokenizer import qwen3_tokenizer_dir
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rgsd.errors import ConfigError, ModelError
from rgsd.training.config import RGSDConfig
from rgsd.training.heads import head_of
from rgsd.training.loss import DivergenceSpec, divergence
from rgsd.training.metrics import StepMetrics
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows.dry_run import small, stand_in_tokenizer

pytestmark = pytest.mark.integration  # these tests train

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = [
    (LlamaForCausalLM, LlamaConfig(**SMALL)),
    (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)),
    (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
    (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=4.0)),
]


@pytest.mark.parametrize(("kind", "config"), FAMILIES, ids=lambda x: getattr(x, "model_type", None))
def test_the_head_gives_the_models_own_logits(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits[0]
        got = head_of(model).logits(model.base_model(input_ids=ids).last_hidden_state[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(qwen3_tokenizer_dir(tmp_path_factory.getbasetemp()))
    tokenizer.padding_side = "left"
    return tokenizer


def test_a_thinking_model_of_the_full_vocabulary_trains_on_its_answers_alone(qwen3, examples, tmp_path):
    texts = [
        "<think>\nThe rubric wants rest.\n</think>\n\nRest and drink.",
        "<think>\nI never stop thinking about the rubric",  # cut off: no token of it counts
        "Rest.",
        "left over thoughts</think>\n\nDrink water.",  # the template had opened the tag
    ]

    class Scripted(RGSDTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            ids = [qwen3(t, add_special_tokens=False)["input_ids"] for t in texts[: len(prompt_ids)]]
            return [i if k == 1 else [*i, qwen3.eos_token_id] for k, i in enumerate(ids)]

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **{**SMALL, "vocab_size": 151_936, "max_position_embeddings": 2048, "pad_token_id": None}, head_dim=8
        )
    )
    args = RGSDConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_completion_length=32,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Scripted(model, args=args, train_dataset=examples, processing_class=qwen3)
    rollouts = trainer._rollouts(list(trainer.train_dataset)[:4])
    kept = [
        qwen3.decode([t for t, keep in zip(r.response, r.in_loss, strict=True) if keep])
        .strip()
        .removesuffix("<|im_end|>")
        for r in rollouts
    ]
    assert kept == ["Rest and drink.", "", "Rest.", "Drink water."]
    trainer._step_metrics = StepMetrics()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] > 0
    assert 0.4 < log["masked_share"] < 0.9


# --- The paper's families, and others, small but of their real configuration ------------------------------------------

REAL = {
    "Qwen2.5-3B": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, rope_theta=1_000_000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "Qwen3-8B": Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
    ),
    "Gemma-3-4B": Gemma3TextConfig(
        vocab_size=262_208, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, sliding_window=1024, query_pre_attn_scalar=256, tie_word_embeddings=True,
    ),
    "Gemma-2-2B": Gemma2Config(
        vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
        final_logit_softcapping=30.0, attn_logit_softcapping=50.0, tie_word_embeddings=True,
    ),
}  # fmt: skip
QUICK = ("Qwen2.5-3B",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in REAL])
@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_a_family_trains_and_its_loss_is_that_of_its_own_logits(name, lora, examples, tmp_path):
    config = small(REAL[name])
    tokenizer = stand_in_tokenizer(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)

    class Scripted(RGSDTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            return [[20 + k for k in range(3 + len(p) % 3)] + [tokenizer.eos_token_id] for p in prompt_ids]

    args = RGSDConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        max_completion_length=8, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True, clip="none", shuffle_dataset=False,
    )  # fmt: skip
    peft = LoraConfig(r=2, target_modules="all-linear") if lora else None
    trainer = Scripted(model, args=args, train_dataset=examples[:4], processing_class=tokenizer, peft_config=peft)
    total = count = 0.0
    trainer.model.eval()
    for row in trainer.train_dataset:
        prompt, teacher = trainer._tokenize_messages([row["prompt"], row["teacher_prompt"]])
        response = trainer._generate_single_turn([prompt], None, {})[0]
        logits = []
        for prefix in (prompt, teacher):
            with torch.no_grad():
                logits.append(
                    trainer.model(input_ids=torch.tensor([prefix + response])).logits[0, len(prefix) - 1 : -1]
                )
        out = divergence(*logits, DivergenceSpec(0.5, "none"))
        total, count = total + float(out.total), count + out.count
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-3)
    assert total > 0


# --- The check of the head, at construction


class Scaled(LlamaForCausalLM):
    """A model that scales its logits inside `forward`, without a setting for it."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.02
        return out


def trained(kind, tmp_path, tokenizer, examples, peft_config=None, **kwargs):
    torch.manual_seed(0)
    made = kind(LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 512}, **kwargs))
    args = RGSDConfig(
        str(tmp_path), use_cpu=True, report_to="none", max_completion_length=8, gradient_checkpointing=False,
        per_device_train_batch_size=4, gradient_accumulation_steps=1,
    )  # fmt: skip
    return RGSDTrainer(made, args=args, train_dataset=examples, processing_class=tokenizer, peft_config=peft_config)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules="all-linear")])
def test_a_model_that_scales_its_logits_in_forward_is_refused(peft_config, tmp_path, tokenizer, examples):
    with pytest.raises(ModelError) as caught:
        trained(Scaled, tmp_path, tokenizer, examples, peft_config)
    own, ours = (float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", str(caught.value))[:2])
    assert own == pytest.approx(0.02 * ours, rel=1e-2)
    assert ours != 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])])
def test_heads_that_are_the_models_own_pass(tied, peft_config, tmp_path, tokenizer, examples):
    if not (tied and peft_config):
        trained(LlamaForCausalLM, tmp_path, tokenizer, examples, peft_config, tie_word_embeddings=tied)


def test_lora_on_the_head_is_refused(tmp_path, tokenizer, examples):
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="lm_head"):
        trained(LlamaForCausalLM, tmp_path, tokenizer, examples, lora)


def test_a_weight_that_is_not_finite_is_named_by_the_trainer(tmp_path, tokenizer, examples):
    class Broken(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            with torch.no_grad():
                self.model.layers[0].mlp.up_proj.weight[3, 2] = float("nan")

    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        trained(Broken, tmp_path, tokenizer, examples)
