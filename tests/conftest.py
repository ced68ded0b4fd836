"""Shared fixtures: a tokenizer and a model small enough for a unit test, built on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rgsd.rubrics import Criterion, Example, Rubric

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with a ChatML template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        ["What helps with a cough? Drink water and rest. See a doctor if it lasts."] * 4,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        padding_side="left",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def tiny_model(tokenizer, *, tied=True, seed=0, **overrides) -> LlamaForCausalLM:
    """A random two-layer Llama over the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **overrides,
    )
    return LlamaForCausalLM(config)


def stir_adapters(model, std: float, *, biases: bool = False) -> None:
    """Put random values where LoRA starts with zeros (and into biases), so that adapters have an effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (biases and name.endswith("bias")):
                parameter.normal_(std=std)


def write_recipes(folder, tokenizer, *, run: str = "run") -> None:
    """FOLDER/model, and recipes of two steps on FOLDER/data.jsonl: recipe.yaml (RGSD) and grpo.yaml."""
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "held_out": 4,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "output_dir": str(folder / run),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "learning_rate": 0.01,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grpo = recipe | {"output_dir": str(folder / "grpo"), "num_generations": 4, "per_device_train_batch_size": 4}
    (folder / "grpo.yaml").write_text(yaml.safe_dump(grpo))


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_model(tokenizer)


@pytest.fixture
def examples() -> list[Example]:
    """Eight prompts of different lengths, two criteria each."""
    return [
        Example(
            id=f"e{i}",
            messages=({"role": "user", "content": "What helps with a cough" + " now" * i + "?"},),
            rubric=Rubric(
                (
                    Criterion("Advises rest.", 5, check={"any": ["rest"]}),
                    Criterion(f"Recommends {'syrup' if i % 2 else 'tea'}.", -3, check={"any": ["syrup", "tea"]}),
                )
            ),
        )
        for i in range(8)
    ]
