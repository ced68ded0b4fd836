"""P1: one full step (rollout, teacher, student, update) against TRL's SDFTTrainer, and against a naive loop.

All train SmolLM2-135M with LoRA r = 16 in float32 on the same rows, with one response per prompt, the full vocabulary
and beta = 0.5. Response lengths are drawn beforehand from a log-normal distribution and are equal in all. transformers
keeps decoding finished rows until the longest response ends; that time counts. The naive loop processes one row at a
time.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks import common
from rgsd import RGSDConfig, RGSDTrainer
from rgsd.models.kernels import decoding
from rgsd.models.kernels.sampling import Sampling
from rgsd.training.loss import DivergenceSpec, divergence


class StepTimer(TrainerCallback):
    """Wall and CPU seconds of the last optimizer step."""

    wall = cpu = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._at = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.wall, self.cpu = time.perf_counter() - self._at[0], time.process_time() - self._at[1]


SHARED = {
    "max_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "shuffle_dataset": False,
    "temperature": 1.0,
    "dataloader_num_workers": 0,
}


def run(quick: bool) -> dict[str, Any]:
    """Compare steps of one micro-batch, also with the naive loop, and steps of four, which are closer to real ones."""
    one = _compared(4 if quick else 8, 1, quick)
    return {**one, "large": _compared(8 if quick else 32, 4, quick), "target": "rgsd/sdft at most 0.5"}


def _compared(n: int, micro_batches: int, quick: bool) -> dict[str, Any]:
    rows = common.rows(n)
    wanted = common.lengths(n, median=24 if quick else 56, most=48 if quick else 160)
    subjects = {
        "rgsd": rgsd_step(rows, wanted, micro_batches=micro_batches),
        "sdft": sdft_step(rows, wanted, micro_batches=micro_batches),
    }
    if micro_batches == 1:
        subjects["naive"] = naive_step(rows, wanted)
    timed = common.alternate(subjects, rounds=1 if quick else 3)
    return {
        "setting": {
            "rows": n,
            "micro_batches": micro_batches,
            "response_tokens": sum(wanted),
            "longest": max(wanted),
        },
        "seconds": timed,
        **{f"rgsd/{other}": common.ratios(timed, "rgsd", other) for other in subjects if other != "rgsd"},
    }


def rgsd_step(rows: list[dict[str, Any]], wanted: list[int], model: Any = None, micro_batches: int = 1) -> Any:
    return _step(*rgsd_trainer(rows, wanted, model, micro_batches))


def rgsd_trainer(
    rows: list[dict[str, Any]], wanted: list[int], model: Any = None, micro_batches: int = 1
) -> tuple[Any, StepTimer]:
    tokenizer = common.tokenizer()
    model = model or common.model()

    class Timed(RGSDTrainer):
        def _decoded(self, student: Any, prompt_ids: Any) -> list[list[int]]:
            draws_BT = torch.rand(len(prompt_ids), max(wanted), dtype=torch.float64)
            what = decoding.DecodingSettings(Sampling(1.0), (), max(wanted))
            with decoding.ready(student, len(prompt_ids)):
                return decoding.decode(
                    student, prompt_ids, what, rows=len(prompt_ids), draws=lambda i: draws_BT[i], limits=wanted
                )

    timer = StepTimer()
    args = RGSDConfig(
        output_dir=common.scratch(),
        per_device_train_batch_size=len(rows) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_completion_length=max(wanted),
        beta=0.5,
        clip="none",
        **SHARED,  # pyright: ignore[reportArgumentType]
    )
    with common.quiet():
        trainer = Timed(
            model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=common.lora(),
            callbacks=[timer],
        )
    return trainer, timer


def sdft_step(rows: list[dict[str, Any]], wanted: list[int], model: Any = None, micro_batches: int = 1) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer = common.tokenizer()
    model = model or common.model()
    model.generation_config.eos_token_id = None

    class Timed(SDFTTrainer):
        def _generate_transformers(self, prompt_ids: list[list[int]]) -> Any:
            prompts, responses = super()._generate_transformers(prompt_ids)
            return prompts, [r[:n] for r, n in zip(responses, wanted, strict=True)]

    timer = StepTimer()
    data = [{"prompt": r["prompt"], "privileged_context": _beside(r)} for r in rows]
    args = SDFTConfig(
        output_dir=common.scratch(),
        per_device_train_batch_size=len(rows) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=1,
        max_prompt_length=None,
        max_completion_length=max(wanted),
        distillation_mode="full_logits",
        distillation_topk=None,
        distillation_alpha=0.5,
        teacher_prompt_template="{prompt}{privileged_context}",  # the same text that rgsd's teacher reads
        **{k: v for k, v in SHARED.items() if k in SDFTConfig.__dataclass_fields__},
    )
    with common.quiet():
        trainer: Any = Timed(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=common.lora(),
            callbacks=[timer],
        )
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = None
    trainer.generation_config.max_new_tokens = max(wanted)
    return _step(trainer, timer)


def _beside(row: dict[str, Any]) -> str:
    """The teacher's prompt without the question."""
    before, question, after = row["teacher_prompt"][-1]["content"].partition(row["prompt"][-1]["content"])
    assert question
    return before + after


def _step(trainer: Any, timer: StepTimer) -> Any:
    def step() -> dict[str, float]:
        with common.quiet():
            trainer.train()
        return {"wall": timer.wall, "cpu": timer.cpu}

    return step


def naive_step(rows: list[dict[str, Any]], wanted: list[int]) -> Any:
    from peft import get_peft_model

    base, tokenizer = common.model(), common.tokenizer()
    base.generation_config.eos_token_id = None
    model: Any = get_peft_model(base, common.lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    students = common.tokenized(tokenizer, [r["prompt"] for r in rows])
    teachers = common.tokenized(tokenizer, [r["teacher_prompt"] for r in rows])

    def step() -> None:
        optimizer.zero_grad()
        for student, teacher, n in zip(students, teachers, wanted, strict=True):
            model.eval()
            with torch.no_grad():
                ids = torch.tensor([student])
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=n
                )
                response = out[0, len(student) :].tolist()
                with model.disable_adapter():
                    wished = model(input_ids=torch.tensor([teacher + response])).logits[0, len(teacher) - 1 : -1]
            model.train()
            got = model(input_ids=torch.tensor([student + response])).logits[0, len(student) - 1 : -1]
            (divergence(got, wished, DivergenceSpec(0.5, "none")).total / sum(wanted)).backward()
        optimizer.step()

    return step
