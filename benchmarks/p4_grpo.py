"""P4: time per prompt of GRPO with 16 rollouts and of RGSD, with a judge that takes no time.

GRPO is TRL's GRPOTrainer with rgsd's rubric reward from programmatic checks; one step is 16 responses to one prompt.
One step of RGSD is 8 prompts with one response each. Model, LoRA and maximum response length are the same.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import GRPOTrainer

from benchmarks import common, p1_step
from rgsd import RGSDConfig, RGSDTrainer
from rgsd.data import load
from rgsd.judges import JudgeConfig, build_judge
from rgsd.training.grpo import RubricGRPOConfig, RubricReward, grpo_rows

PROMPTS, ROLLOUTS = 8, 16


def run(quick: bool) -> dict[str, Any]:
    most = 16 if quick else 80
    timed = common.alternate({"rgsd": rgsd(most), "grpo": grpo(most)}, rounds=1 if quick else 3)
    return {
        "setting": {"max_completion_length": most, "grpo_rollouts": ROLLOUTS, "rgsd_prompts_a_step": PROMPTS},
        "seconds": timed,
        "grpo/rgsd": common.ratios(timed, "grpo", "rgsd"),
        "target": "10 or more",
    }


def _shared(most: int, rows: int) -> dict[str, Any]:
    return {
        **p1_step.SHARED,
        "output_dir": common.scratch(),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "max_completion_length": most,
    }


def rgsd(most: int) -> Any:
    timer = p1_step.StepTimer()
    with common.quiet():
        trainer = RGSDTrainer(
            common.model(),
            args=RGSDConfig(**_shared(most, PROMPTS)),
            train_dataset=Dataset.from_list(common.rows(PROMPTS)),
            processing_class=common.tokenizer(),
            peft_config=common.lora(),
            callbacks=[timer],
        )
    return _per_prompt(p1_step._step(trainer, timer), PROMPTS)


def grpo(most: int) -> Any:
    examples = load("bundled").examples[:PROMPTS]
    timer = p1_step.StepTimer()
    reward = RubricReward(examples, build_judge(JudgeConfig()))
    with common.quiet():
        trainer: Any = GRPOTrainer(
            common.model(),
            args=RubricGRPOConfig(num_generations=ROLLOUTS, **_shared(most, ROLLOUTS)),
            reward_funcs=reward,  # pyright: ignore[reportArgumentType]
            train_dataset=Dataset.from_list(grpo_rows(examples)),
            processing_class=common.tokenizer(),
            peft_config=common.lora(),
            callbacks=[timer],
        )
    return _per_prompt(p1_step._step(trainer, timer), 1)


def _per_prompt(step: Any, prompts: int) -> Any:
    return lambda: {kind: seconds / prompts for kind, seconds in step().items()}
