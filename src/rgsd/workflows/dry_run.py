"""`rgsd train --dry_run true`: will this recipe run, and does it fit? Without the weights, in a minute, on a CPU.

Everything is built from the recipe: its data, prompts, tokenizer and settings, and a model of the same kind from its
own config.json, with the real vocabulary and the real ratio of heads, but two layers and narrow heads. One step of the
real trainer is taken. What the whole model will need on each device is worked out by `rgsd.workflows.costs.memory`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import get_peft_config

from rgsd import models
from rgsd.data.config import load_split
from rgsd.errors import ConfigError, ModelError
from rgsd.progress import say
from rgsd.prompts.messages import training_rows
from rgsd.training.config import RGSDConfig
from rgsd.training.launch import LaunchConfig, config_file
from rgsd.training.trainer import RGSDTrainer
from rgsd.workflows import costs
from rgsd.workflows.recipe import Recipe

LAYERS, HEAD_DIM = 2, 8
MOST_RESPONSE = 16
"""Tokens sampled a prompt: enough for every path of the step."""
MOST_PROMPTS = 4


@dataclasses.dataclass
class DryRunConfig:
    """Whether to try a recipe out instead of running it."""

    dry_run: bool = dataclasses.field(
        default=False,
        metadata={"help": "Build everything small from the real config, take one step, and estimate the memory."},
    )
    device_gib: float = dataclasses.field(default=74.5, metadata={"help": "Memory of a device, for that estimate."})


@dataclasses.dataclass(frozen=True)
class Report:
    """What a dry run found.

    Args:
        architecture: of the real model.
        parameters: of the real model, and how many of them are trained.
        longest: tokens of the longest student and teacher prompts.
        loss: of the one step of the small model.
        parts: bytes a device, part by part.
    """

    architecture: costs.Architecture
    parameters: int
    trained: int
    longest: dict[str, int]
    loss: float
    plan: costs.Plan
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes a device."""
        return sum(self.parts.values())


def dry_run(recipe: Recipe, launch: LaunchConfig, *, device_gib: float = 74.5) -> Report:
    """Try a recipe out; print and return what was found.

    Raises:
        RGSDError: whatever would keep the run from starting.
    """
    args = recipe.training
    if not isinstance(args, RGSDConfig):
        raise ConfigError("dry_run tries `rgsd train` out: GRPO and SFT have none yet")
    name = str(recipe.model.model_name_or_path)
    config = _config(name, recipe)
    train_set = load_split(recipe.data, holds_out=recipe.evaluation.evaluate).train
    tokenizer = _tokenizer(name, recipe, config)
    rows = training_rows(train_set, args.prompt_settings())
    longest = {
        "student": _longest(tokenizer, [r["prompt"] for r in rows]),
        "teacher": _longest(tokenizer, [r["teacher_prompt"] for r in rows]),
    }
    say(f"Longest prompts: student {longest['student']:,}, teacher {longest['teacher']:,} tokens")
    loss = _one_step(recipe, config, tokenizer, rows[:MOST_PROMPTS])
    say(f"One step of a small model of the same kind: loss {loss:.4f}")
    shape = costs.Architecture.of(config)
    plan = plan_of(recipe, launch, longest)
    parts = costs.memory(shape, plan, device_gib * costs.GIB)
    trained = shape.parameters if plan.lora_rank is None else shape.lora_parameters(plan.lora_rank)
    report = Report(shape, shape.parameters, trained, longest, loss, plan, parts)
    show(report, device_gib)
    return report


def _config(name: str, recipe: Recipe) -> Any:
    source, options = models.source_of(name, recipe.model.model_revision)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=recipe.training.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the config of {name!r}: give a hub id that this machine can reach, or a folder with its "
            "config.json; weights are not needed"
        ) from error


def _tokenizer(name: str, recipe: Recipe, config: Any) -> PreTrainedTokenizerBase:
    try:
        return models.load_tokenizer(name, recipe.model.model_revision, recipe.training.trust_remote_code)
    except ModelError:
        say(f"{name} has no tokenizer here: bytes stand in for tokens, and lengths come out about four times too long")
        return stand_in_tokenizer(config)


def stand_in_tokenizer(config: Any) -> PreTrainedTokenizerBase:
    """Bytes as tokens, with a ChatML template; every id lies within the model's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(alphabet)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials[:3])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        padding_side="left",
    )
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def small(config: Any) -> Any:
    """A configuration of the same kind and vocabulary with two layers and heads of eight values."""
    values = config.to_dict()
    text = values.get("text_config") or values
    heads, width = text["num_attention_heads"], config.get_text_config()
    old = getattr(width, "head_dim", None) or text["hidden_size"] // heads
    text |= {
        "num_hidden_layers": LAYERS,
        "hidden_size": max(HEAD_DIM, text["hidden_size"] * HEAD_DIM // old // 8 * 8),
        "intermediate_size": max(8, text["intermediate_size"] * HEAD_DIM // old),
    }
    if text.get("head_dim"):
        text["head_dim"] = HEAD_DIM
    if text.get("query_pre_attn_scalar"):
        text["query_pre_attn_scalar"] = HEAD_DIM
    if text.get("layer_types"):  # one of each kind
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
        tried = dataclasses.replace(
            args,
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=min(len(rows), 2),
            max_completion_length=min(args.max_completion_length or MOST_RESPONSE, MOST_RESPONSE),
            use_vllm=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            resume_from_checkpoint=None,
        )
        trainer = RGSDTrainer(
            model,
            args=tried,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            peft_config=get_peft_config(recipe.model),
        )
        trainer.remove_callback(_printer())
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def _longest(tokenizer: Any, conversations: Sequence[Any]) -> int:
    return max(
        len(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in conversations
    )


def plan_of(recipe: Recipe, launch: LaunchConfig, longest: dict[str, int]) -> costs.Plan:
    """How the recipe, launched so, uses each device."""
    args: Any = recipe.training
    name = Path(str(config_file(launch.accelerate_config or "ddp"))).stem
    engine: costs.Engine = name if name in ("fsdp2", "zero2", "zero3") else "ddp"  # pyright: ignore[reportAssignmentType]
    weight = costs.BYTES.get(str(recipe.model.dtype), 2)
    lora = recipe.model.lora_r if recipe.model.use_peft else None
    return costs.Plan(
        engine=engine,
        devices=launch.num_processes or 1,
        lora_rank=lora,
        weight_bytes=weight,
        # Whatever is trained is float32 (`adapters.use_float32_master_weights`).
        trained_bytes=4,
        compute_bytes=2 if args.bf16 or args.fp16 or (weight == 2 and lora is not None) else 4,
        rows=args.per_device_train_batch_size,
        rollout_rows=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        prompt=longest["student"],
        teacher_prompt=longest["teacher"],
        response=args.max_completion_length or 512,
        checkpointing=args.gradient_checkpointing,
        teacher_copy=args.teacher_model_kind == "ema" or (args.teacher_model_kind == "base" and lora is None),
        loss_chunk_tokens=args.loss_chunk_tokens,
        vllm_share=args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == "colocate" else 0.0,
        samples_here=not args.use_vllm,
    )


def show(report: Report, device_gib: float) -> None:
    """The estimate as a table, and whether it fits."""
    plan = report.plan
    view = Table(title=f"Memory of each of {plan.devices} device(s), {plan.engine}, estimated")
    view.add_column("part")
    view.add_column("GiB", justify="right")
    for name, value in report.parts.items():
        if value:
            view.add_row(name, f"{value / costs.GIB:.2f}")
    view.add_row("all", f"{report.total / costs.GIB:.2f}")
    Console(width=110).print(view)
    say(f"{report.parameters / 1e9:.2f} billion parameters, {report.trained / 1e6:.1f} million trained.")
    if report.total > device_gib * costs.GIB:
        say(
            f"That is more than the {device_gib:g} GiB of a device: use LoRA, fsdp2 on more devices, a smaller "
            "per_device_train_batch_size with more gradient_accumulation_steps, or gradient_checkpointing"
        )
    else:
        say(f"It fits a device of {device_gib:g} GiB.")


__all__ = ["DryRunConfig", "Report", "dry_run", "small", "stand_in_tokenizer"]
