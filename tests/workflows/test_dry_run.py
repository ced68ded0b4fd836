"""The dry run: the paper's recipes on the real configurations, and the memory estimate against a measured run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import together
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from rgsd.cli import main
from rgsd.cli.train import parse_recipe
from rgsd.errors import ConfigError
from rgsd.models import batching
from rgsd.training import loss as divergence
from rgsd.training.grpo import RubricGRPOConfig
from rgsd.training.launch import LaunchConfig
from rgsd.workflows import costs
from rgsd.workflows.dry_run import dry_run, small

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "paper").glob("*.yaml"))
REAL = {  # from the models' published config.json
    "qwen2.5-3b": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32_768, tie_word_embeddings=False,
    ),
    "qwen3-4b-thinking": Qwen3Config(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262_144, tie_word_embeddings=True,
    ),
    "qwen3-8b-thinking": Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=False,
    ),
}  # fmt: skip


def folder_of(config, path):
    config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "recipe",
    [p if p.stem == "qwen3-8b-thinking" else pytest.param(p, marks=pytest.mark.slow) for p in RECIPES],
    ids=lambda p: p.stem,
)
def test_a_recipe_of_the_paper_runs_dry(recipe, tmp_path, capsys):
    model = folder_of(REAL[recipe.stem], tmp_path / "model")
    argv = ["train", "--config", str(recipe), "--model_name_or_path", model, "--held_out", "0.1", "--dry_run"]
    launch = ["--accelerate_config", "fsdp2", "--num_processes", "8", "--output_dir", str(tmp_path / "run")]
    assert main([*argv, *launch]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "One step of a small model of the same kind: loss" in printed
    assert "8 device(s)" in printed
    assert "fits on a device with 74.5 GiB" in printed
    assert not (tmp_path / "run").exists()


def test_the_recipes_of_the_paper_are_its_four_models_and_its_settings():
    assert {p.stem for p in RECIPES} == set(REAL)
    for path in RECIPES:
        recipe = parse_recipe(["--config", str(path)])
        args = recipe.training
        assert (args.beta, args.clip, args.clip_threshold, args.teacher_model_kind, args.template) == (
            0.5, "entry", 0.05, "base", "paper",
        )  # fmt: skip
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
        assert costs.Architecture.of(REAL[path.stem]) in costs.PAPERS_MODELS.values()


def test_the_architectures_have_the_published_numbers_of_parameters():
    """Billions of parameters, from the model cards: 3.09, 7.61, 4.0, 8.2."""
    found = [a.parameters / 1e9 for a in costs.PAPERS_MODELS.values()]
    assert found == pytest.approx([3.09, 7.61, 4.02, 8.19], abs=0.02)


def test_parameters_and_lora_are_counted_as_torch_counts_them():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shape = costs.Architecture.of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert shape.lora_parameters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "config",
    [
        *REAL.values(),
        LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256),
        Gemma3TextConfig(
            vocab_size=262_208, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256,
        ),
    ],
    ids=lambda c: c.model_type,
)  # fmt: skip
def test_a_small_model_keeps_the_vocabulary_the_ratio_of_heads_and_the_kinds_of_layers(config):
    made = small(config)
    assert made.vocab_size == config.vocab_size
    assert (
        made.num_attention_heads / made.num_key_value_heads == config.num_attention_heads / config.num_key_value_heads
    )
    assert made.num_hidden_layers == 2
    if getattr(config, "layer_types", None):
        assert set(made.layer_types) == set(config.layer_types)
    assert costs.Architecture.of(made).parameters < 0.1 * costs.Architecture.of(config).parameters


def test_a_missing_config_and_another_method_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    recipe = ["train", "--config", str(RECIPES[0]), "--held_out", "0.1", "--dry_run", "true", "--model_name_or_path"]
    assert main([*recipe, str(tmp_path / "empty")]) == 1
    assert "weights are not needed" in capsys.readouterr().err
    recipe = parse_recipe(["--config", str(RECIPES[0])])
    grpo = RubricGRPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, per_device_train_batch_size=16)
    with pytest.raises(ConfigError, match="dry_run"):
        dry_run(replace(recipe, training=grpo), LaunchConfig())


def test_an_estimate_above_the_devices_memory_is_reported(tmp_path, capsys):
    model = folder_of(REAL["qwen2.5-7b"], tmp_path / "model")
    argv = ["train", "--config", str(RECIPES[1]), "--model_name_or_path", model, "--held_out", "0.1", "--dry_run"]
    assert main([*argv, "--no_use_peft", "--dtype", "float32", "--device_gib", "40"]) == 0
    assert "exceeds the 40 GiB" in capsys.readouterr().out


# --- The estimate against a run ---------------------------------------------------------------------------------------

TOLERANCE = 0.15
"""The estimate's distance from the measured peak, of either."""


def measure(folder, lora):
    """Added peak memory of a run of 3 steps in this process, and the estimate; bytes."""
    import ctypes
    import gc

    import torch
    from conftest import examples
    from peft import LoraConfig
    from support.training import Scripted, config
    from transformers import AutoTokenizer, LlamaForCausalLM

    def resident(field):
        return (
            int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)).split()[1])
            * 1024
        )

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=16_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    response = 64

    class Long(Scripted):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            return [[40 + k for k in range(response)] for _ in prompt_ids]

    made = examples.__wrapped__() if hasattr(examples, "__wrapped__") else examples.__pytest_wrapped__.obj()

    def run(shape):
        trainer = Long(
            LlamaForCausalLM(shape),
            args=config(
                Path(folder) / "run",
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=3,
                gradient_checkpointing=True,
            ),
            train_dataset=made,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear") if lora else None,
        )
        trainer.train()
        return trainer

    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed memory returns to the system at once
    run(small(shape))  # warm up: imports, compilation and caches are not the model's memory
    gc.collect()
    # The estimate is of an accelerator, which takes all of a chunk and of a micro-batch at once.
    divergence.BLOCK_ELEMENTS, divergence.CPU_CHUNK_ELEMENTS = 1 << 40, divergence.CHUNK_ELEMENTS
    batching.PASS_TOKENS["cpu"] = batching.ACCELERATOR_PASS_TOKENS
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    trainer = run(shape)
    peak = resident("VmHWM") - before
    prompts = [len(t) for t in trainer._tokenize_messages(list(trainer.train_dataset["prompt"]))]
    teachers = [len(t) for t in trainer._tokenize_messages(list(trainer.train_dataset["teacher_prompt"]))]
    layout = costs.Layout(
        engine="ddp", lora_rank=16 if lora else None, weight_bytes=4, trained_bytes=4, compute_bytes=4, rows=4,
        rollout_rows=8, prompt=max(prompts), teacher_prompt=max(teachers), response=response, checkpointing=True,
        teacher_copy=not lora, samples_here=False,
    )  # fmt: skip
    parts = costs.memory(costs.Architecture.of(shape), layout)
    return peak, {k: v for k, v in parts.items() if k != "runtime"}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_estimate_is_near_a_measured_run(tmp_path, tokenizer, lora):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ((peak, parts),) = together(measure, tmp_path, world=1, folder=str(tmp_path), lora=lora)
    print(json.dumps({k: round(v / 1e6) for k, v in parts.items()}), round(peak / 1e6))
    assert sum(parts.values()) == pytest.approx(peak, rel=TOLERANCE)


# --- docs/SCALE.md ----------------------------------------------------------------------------------------------------


def test_the_documents_tables_are_what_the_cost_model_says():
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.cost_model import DOCUMENT, filled

    text = DOCUMENT.read_text("utf-8")
    assert filled(text) == text, "run `python -m benchmarks.cost_model --write`"


def test_one_response_costs_less_than_sixteen_and_no_judge_costs_nothing():
    shape, work, hardware = costs.QWEN25_7B, costs.Work(), costs.Hardware()
    rgsd, grpo = (costs.run_cost(shape, work, hardware, 8, method=m) for m in ("rgsd", "grpo"))
    assert grpo["tokens sampled"] == 16 * rgsd["tokens sampled"]
    assert grpo["judge calls"] == 16 * 12_519
    assert rgsd["judge calls"] == rgsd["dollars judge"] == 0
    assert grpo["FLOPs"] / rgsd["FLOPs"] == pytest.approx(13.3, abs=0.3)
    single = costs.run_cost(shape, work, hardware, 1, method="rgsd")
    assert (
        1 < single["seconds rollout"] / rgsd["seconds rollout"] < 1.5
    )  # reading the weights takes as long for 8 sequences as for 64
