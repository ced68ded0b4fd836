"""Trainers small enough for a unit test: settings, scripted rollouts, first gradients."""

import copy

from conftest import tiny_model
from peft import LoraConfig
from trl.generation.vllm_generation import VLLMGeneration

from rgsd.training.config import RGSDConfig
from rgsd.training.trainer import RGSDTrainer

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")


def config(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "max_completion_length": 10,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "clip": "none",
    }
    return RGSDConfig(**{**defaults, **kwargs})


class Scripted(RGSDTrainer):
    """The trainer with scripted responses of unequal lengths instead of sampling."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        return [[40 + (sum(p) + k) % 200 for k in range(2 + sum(p) % 7)] + [self.eos_token_ids[0]] for p in prompt_ids]


def sync_of(trainer):
    """TRL's weight sync to vLLM, without vLLM."""
    sync = object.__new__(VLLMGeneration)
    sync.model, sync.accelerator = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator
    sync._dist = trainer._dist
    return sync


def scripted(tmp_path, tokenizer, examples, model=None, **kwargs):
    peft = kwargs.pop("peft_config", None)
    return Scripted(
        model or tiny_model(tokenizer),
        args=config(tmp_path, **kwargs),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft),
    )


def first_gradient(trainer):
    """The gradient of the first optimizer step, before clipping and the optimizer."""
    seen = {}

    def keep(optimizer, *_):
        if not seen:
            seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.args.max_grad_norm = 0.0
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return seen
