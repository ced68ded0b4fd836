"""Which settings may change when a run resumes.

Settings that decide the weights must stay the same: otherwise config.yaml would describe neither the old run nor the
new one. Settings about when to stop, what to write, how to evaluate and where servers are may change. Each change is
recorded with the step from which it applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rgsd.errors import RunError

INCREASABLE = ("max_steps", "num_train_epochs")
"""Training may continue for longer. Fewer steps would mean another learning rate in the steps already taken."""
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
"""These and the number of processes may change together, if an optimizer step still sees as many responses."""
PROCESSES = "processes"
FREE_PREFIXES = (
    "save_", "logging_", "log_", "eval_", "dataloader_", "hub_", "push_to_hub", "ddp_", "fsdp", "vllm_server_",
    "trackio_", "wandb_",
)  # fmt: skip
FREE = frozenset(
    {
        "report_to", "run_name", "project", "disable_tqdm", "per_device_eval_batch_size", "do_eval", "evaluate",
        "max_eval_prompts", "max_development_prompts", "early_stopping_patience", "early_stopping_threshold",
        "keep_rollouts", "control", "report", "log_completions", "trust_remote_code",
        # The same numbers with less memory, or in other pieces.
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "loss_chunk_tokens", "torch_empty_cache_steps",
        "dataset_num_proc", "vllm_gpu_memory_utilization", "vllm_group_port",
        # How processes work together: `processes` and the checkpoint itself are checked instead.
        "deepspeed", "accelerator_config",
        # Paths of model and data: their fingerprints are compared instead.
        "model_name_or_path", "data",
    }
)  # fmt: skip
JUDGE_COST = frozenset(
    {
        "judge_api_base", "judge_api_key_env", "judge_test_call", "judge_concurrency", "judge_timeout", "judge_retries",
        "judge_retry_max_wait", "judge_give_up_after", "judge_cache", "judge_budget", "judge_max_calls",
        "judge_price_input", "judge_price_output",
    }
)  # fmt: skip
"""The judge's costs and address. Under GRPO the judge is the reward, so none of its other settings may change."""
BEST_STEP_CHOICE = ("metric_for_best_model", "greater_is_better")
"""What chooses the best step. It may be set where it was unset, or the reverse: two metrics have two scales."""
SFT_SAMPLING_BATCH = "eval_generation_batch_size"
"""SFT samples its training responses in batches of this size, so there it decides the weights."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting whose value changed when the run resumed."""

    setting: str
    old: Any
    new: Any

    def row(self, step: int) -> dict[str, Any]:
        """The change as run.json stores it, from the optimizer step after which it applies."""
        return {"step": step, "setting": self.setting, "from": self.old, "to": self.new}


def allowed_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any], *, kind: str, run: str
) -> list[Change]:
    """The differences between the settings of a run and those it is to resume with.

    Args:
        old: The run's config.yaml, and `processes`.
        new: The settings now, likewise.
        defaults: Values of settings that `old` or `new` lacks.
        kind: "rgsd", "grpo" or "sft".
        run: The run's folder, for the error.

    Raises:
        RunError: If a setting differs that must not, naming each with both values.
    """
    differing = []
    for name in sorted((old.keys() | new.keys()) - {"output_dir"}):
        was, now = old.get(name, defaults.get(name)), new.get(name, defaults.get(name))
        if _plain(was) != _plain(now):
            differing.append(Change(name, was, now))
    is_same_batch = _batch(old, defaults) == _batch(new, defaults)
    refused = [c for c in differing if not _is_allowed(c, kind, is_same_batch)]
    if refused:
        raise RunError(
            f"{run} cannot resume with different settings: "
            + "; ".join(f"{c.setting} is {c.new!r}, but the run started with {c.old!r}" for c in refused)
            + f". {_hint(refused)}Restore these settings, or start over with --overwrite true or another output_dir"
        )
    return differing


def _is_allowed(change: Change, kind: str, is_same_batch: bool) -> bool:
    name = change.setting
    if name in INCREASABLE:
        return _is_increase(change)
    if name in BATCH or name == PROCESSES:
        return is_same_batch
    if name in BEST_STEP_CHOICE:
        return change.old is None or change.new is None
    if name == SFT_SAMPLING_BATCH:
        return kind != "sft"
    if name == "judge" or name.startswith("judge_"):
        return kind != "grpo" or name in JUDGE_COST
    return name in FREE or name.startswith(FREE_PREFIXES)


def _is_increase(change: Change) -> bool:
    # max_steps below 1 means "use num_train_epochs", which is neither more nor less than a number of steps.
    return all(isinstance(v, int | float) and v > 0 for v in (change.old, change.new)) and change.new > change.old


def _batch(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Any, Any]:
    """Responses per optimizer step, and optimizer steps per rollout."""
    per_device, accumulation, per_generation = (settings.get(name, defaults.get(name)) for name in BATCH)
    responses = (per_device or 1) * (accumulation or 1) * (settings.get(PROCESSES) or 1)
    return responses, (per_generation or accumulation or 1) / (accumulation or 1)


def _hint(refused: list[Change]) -> str:
    names = {c.setting for c in refused}
    if names & {*BATCH, PROCESSES}:
        return (
            f"{', '.join(BATCH[:2])} and the number of processes may change only together: their product, the number "
            "of responses per optimizer step, must stay the same. "
        )
    return "Training may become longer, not shorter. " if names & set(INCREASABLE) else ""


def _plain(value: Any) -> Any:
    """The value in a form that compares equal whether read from YAML or a dataclass, and unset or empty."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()} or None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value] or None
    value = getattr(value, "value", value)
    return None if value == "" else value


def recorded(before: list[dict[str, Any]], new: list[Change], step: int) -> list[dict[str, Any]]:
    """The changes in run.json plus these, without repeating one that a killed process had already recorded."""
    rows = [change.row(step) for change in new]
    return [*before, *(row for row in rows if row not in before)]
