"""Heads of other families are read as their own forward applies them; and Qwen3 with its real tokenizer trains."""

import pytest
import torch
from qwen3_tokenizer import qwen3_tokenizer_dir
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rgsd.config import RGSDConfig
from rgsd.trainer import RGSDTrainer, _head

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
        got = _head(model).logits(model.base_model(input_ids=ids).last_hidden_state[0])
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
    trainer._sums.clear()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] > 0
    assert 0.4 < log["masked_share"] < 0.9
