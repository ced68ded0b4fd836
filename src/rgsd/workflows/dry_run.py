"""`rgsd train --dry_run`: check in a minute on a CPU, without the weights, that a recipe runs and fits in memory.

The dry run uses the recipe's data, prompts, tokenizer and settings. From the model's config.json it builds a small
model of the same kind, with the real vocabulary and the real ratio of heads, but with two layers and narrow heads. It
takes one step of the real trainer, then estimates the memory of the full model (`rgsd.workflows.costs.memory`).
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PrinterCallback
from trl import get_peft_config

from rgsd import models
from rgsd.data.config import load_split
from rgsd.errors import ConfigError, ModelError
from rgsd.progress import say
from rgsd.prompts.messages import training_rows
from rgsd.settings import setting
from rgsd.training.config import RGSDConfig
from rgsd.training.launch import LaunchConfig, config_file
from rgsd.training.selection import RUBRIC_SCORE, metric_of
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows import costs
from rgsd.workflows.development import plan_development
from rgsd.workflows.recipe import Recipe

LAYERS, HEAD_DIM = 2, 8
MOST_RESPONSE = 16
"""Tokens sampled per prompt. A few are enough to reach every part of the step."""
MOST_PROMPTS = 4


@dataclasses.dataclass
class DryRunConfig:
    """Whether to check a recipe instead of running it."""

    dry_run: bool = setting(
        False, "Take one step with a small model built from the real config, and estimate the memory."
    )
    device_gib: float = setting(74.5, "Memory of a device in GiB, for the estimate.")


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a dry run.

    Args:
        architecture: The real model's shape.
        trained: How many of its parameters are trained.
        longest: Tokens of the longest "student" prompt and of the longest "teacher" prompt.
        loss: Loss of the small model's only step.
        layout: How the recipe uses each device.
        parts: Bytes per device, by part.
    """

    architecture: costs.Architecture
    trained: int
    longest: dict[str, int]
    loss: float
    layout: costs.Layout
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes per device."""
        return sum(self.parts.values())


def dry_run(recipe: Recipe, launch: LaunchConfig, *, device_gib: float = 74.5) -> Report:
    """Check a recipe, and print and return the report.

    Raises:
        RGSDError: For anything that would keep the run from starting.
    """
    args = recipe.training
    if not isinstance(args, RGSDConfig):
        raise ConfigError("--dry_run works with `rgsd train` only; run `rgsd grpo` or `rgsd sft` with --max_steps 1")
    name = str(recipe.model.model_name_or_path)
    config = _config(name, recipe)
    split = load_split(recipe.data, holds_out=recipe.evaluation.evaluate)
    train_set = split.train
    if plan_development(recipe, split) is not None:
        say(_development_cost(recipe, launch, len(split.development), len(train_set)))
    tokenizer = _tokenizer(name, recipe, config)
    rows = training_rows(train_set, args.prompt_settings(), with_contrast=args.teacher_contrast > 0)
    longest = {
        "student": _longest(tokenizer, [r["prompt"] for r in rows]),
        # Two prompts a row with a contrastive teacher.
        "teacher": _longest(tokenizer, [r[c] for r in rows for c in ("teacher_prompt", "contrast_prompt") if c in r]),
    }
    say(f"Longest prompts: student {longest['student']:,}, teacher {longest['teacher']:,} tokens")
    loss = _one_step(recipe, config, tokenizer, rows[:MOST_PROMPTS])
    say(f"One step of a small model of the same kind: loss {loss:.4f}")
    shape = costs.Architecture.of(config)
    layout = layout_of(recipe, launch, longest)
    parts = costs.memory(shape, layout, device_gib * costs.GIB)
    trained = shape.parameters if layout.lora_rank is None else shape.lora_parameters(layout.lora_rank)
    report = Report(shape, trained, longest, loss, layout, parts)
    show(report, device_gib)
    return report


def _config(name: str, recipe: Recipe) -> Any:
    source, options = models.source_of(name, recipe.model.model_revision)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=recipe.training.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the config of {name!r}: give a hub id that this machine can reach, or a folder with the "
            "model's config.json; weights are not needed"
        ) from error


def _tokenizer(name: str, recipe: Recipe, config: Any) -> PreTrainedTokenizerBase:
    try:
        return models.load_tokenizer(name, recipe.model.model_revision, recipe.training.trust_remote_code)
    except ModelError:
        say(f"{name} has no tokenizer here: a byte-level one replaces it, so lengths are about four times too high")
        return stand_in_tokenizer(config)


def stand_in_tokenizer(config: Any) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a ChatML template, whose ids all lie within the model's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(alphabet)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials[:3])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        padding_side="left",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def small(config: Any) -> Any:
    """A config of the same kind and vocabulary, with two layers and a head dimension of eight."""
    values = config.to_dict()
    text = values.get("text_config") or values
    head_dim = getattr(config.get_text_config(), "head_dim", None) or text["hidden_size"] // text["num_attention_heads"]
    text |= {
        "num_hidden_layers": LAYERS,
        "hidden_size": max(HEAD_DIM, text["hidden_size"] * HEAD_DIM // head_dim // 8 * 8),
        "intermediate_size": max(8, text["intermediate_size"] * HEAD_DIM // head_dim),
    }
    if text.get("head_dim"):
        text["head_dim"] = HEAD_DIM
    if text.get("query_pre_attn_scalar"):
        text["query_pre_attn_scalar"] = HEAD_DIM
    if text.get("layer_types"):  # One layer of each kind, so that the step exercises all of them.
        kinds = list(dict.fromkeys(text["layer_types"]))
        text["layer_types"] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
        text["num_hidden_layers"] = len(text["layer_types"])
    return type(config).from_dict(values)


def _one_step(recipe: Recipe, config: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    args: Any = recipe.training
    torch.manual_seed(args.seed)
    model: Any = AutoModelForCausalLM.from_config(small(config), trust_remote_code=args.trust_remote_code)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as folder:
        one_step = dataclasses.replace(
            args,
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=min(len(rows), 2),
            max_completion_length=min(args.max_completion_length or MOST_RESPONSE, MOST_RESPONSE),
            use_vllm=False,
            save_strategy="no",
            eval_strategy="no",
            load_best_model_at_end=False,
            early_stopping_patience=None,
            early_stopping_threshold=0.0,
            report_to="none",
            logging_steps=1,
            resume_from_checkpoint=None,
        )
        trainer = RGSDTrainer(
            model,
            args=one_step,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            peft_config=get_peft_config(recipe.model),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])


def _development_cost(recipe: Recipe, launch: LaunchConfig, n_prompts: int, n_train: int) -> str:
    """How many responses the development prompts take beside the rollouts."""
    args: Any = recipe.training
    processes = launch.num_processes or 1
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    steps_per_epoch = max(1, n_train // per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    if args.eval_strategy == "epoch":
        every = steps_per_epoch
    else:
        every = args.eval_steps if args.eval_steps >= 1 else max(1, math.ceil(args.eval_steps * steps))
    times = math.ceil(steps / every)
    judged = "judged" if metric_of(args) == f"eval_{RUBRIC_SCORE}" else "whose divergence is measured"
    return (
        f"Development: {n_prompts} prompts, {times} times in {steps:,} steps: {times * n_prompts:,} greedy responses, "
        f"{judged}, beside {steps * per_step:,} rollouts"
    )


def _longest(tokenizer: Any, conversations: Sequence[Any]) -> int:
    return max(
        len(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in conversations
    )


def layout_of(recipe: Recipe, launch: LaunchConfig, longest: dict[str, int]) -> costs.Layout:
    """How the recipe uses each device under these launch settings."""
    args: Any = recipe.training
    name = Path(str(config_file(launch.accelerate_config or "ddp"))).stem
    engine: costs.Engine = name if name in ("fsdp2", "zero2", "zero3") else "ddp"  # pyright: ignore[reportAssignmentType]
    weight = costs.BYTES.get(str(recipe.model.dtype), 2)
    lora = recipe.model.lora_r if recipe.model.use_peft else None
    return costs.Layout(
        engine=engine,
        devices=launch.num_processes or 1,
        lora_rank=lora,
        weight_bytes=weight,
        # Trained weights are always float32 (`adapters.use_float32_master_weights`).
        trained_bytes=4,
        compute_bytes=2 if args.bf16 or args.fp16 or (weight == 2 and lora is not None) else 4,
        rows=args.per_device_train_batch_size,
        rollout_rows=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        prompt=longest["student"],
        teacher_prompt=longest["teacher"],
        response=args.max_completion_length or 512,
        checkpointing=args.gradient_checkpointing,
        teacher_copy=args.teacher_model_kind == "ema" or (args.teacher_model_kind == "base" and lora is None),
        teacher_passes=2 if args.teacher_contrast else 1,
        loss_chunk_tokens=args.loss_chunk_tokens,
        vllm_share=args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == "colocate" else 0.0,
        samples_here=not args.use_vllm,
    )


def show(report: Report, device_gib: float) -> None:
    """Print the estimate as a table, and whether it fits."""
    layout = report.layout
    view = Table(title=f"Estimated memory of each of {layout.devices} device(s), {layout.engine}")
    view.add_column("part")
    view.add_column("GiB", justify="right")
    for name, value in report.parts.items():
        if value:
            view.add_row(name, f"{value / costs.GIB:.2f}")
    view.add_row("total", f"{report.total / costs.GIB:.2f}")
    Console(width=110).print(view)
    say(f"{report.architecture.parameters / 1e9:.2f} billion parameters, {report.trained / 1e6:.1f} million trained.")
    if report.total > device_gib * costs.GIB:
        say(
            f"This exceeds the {device_gib:g} GiB of a device: use LoRA, fsdp2 on more devices, a smaller "
            "per_device_train_batch_size with more gradient_accumulation_steps, or gradient_checkpointing."
        )
    else:
        say(f"This fits on a device with {device_gib:g} GiB.")


__all__ = ["DryRunConfig", "Report", "dry_run", "small", "stand_in_tokenizer"]
