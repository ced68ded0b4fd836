"""Which settings of a run may change when it goes on from a checkpoint, and which may not.

What decides the weights stays as it was: otherwise the run is neither the old one nor the new one, and its config.yaml
describes neither. What decides when to stop, what is written, how the policy is measured and where servers are may
change, and each change is recorded with the step from which it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rgsd.errors import RunError

UPWARD = ("max_steps", "num_train_epochs")
"""Training may go on for longer. Fewer steps would be another schedule of the learning rate for steps already taken."""
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
"""These and the number of processes may change together, as long as an optimizer step sees as many responses."""
PROCESSES = "processes"
FREE_PREFIXES = (
    "save_", "logging_", "log_", "eval_", "dataloader_", "hub_", "push_to_hub", "ddp_", "fsdp", "vllm_server_",
    "trackio_", "wandb_",
)  # fmt: skip
FREE = frozenset(
    {
        "report_to", "run_name", "project", "disable_tqdm", "per_device_eval_batch_size", "do_eval", "evaluate",
        "max_eval_prompts", "keep_rollouts", "control", "report", "log_completions", "trust_remote_code",
        # The same numbers for less memory or in other pieces.
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "loss_chunk_tokens", "torch_empty_cache_steps",
        "dataset_num_proc", "vllm_gpu_memory_utilization", "vllm_group_port",
        # How many processes, joined by what: checked by `processes` and by the checkpoint itself.
        "deepspeed", "accelerator_config",
        # Where the model and the data lie. That they are the same is told by their fingerprints.
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
"""What the judge costs and where it is. Under GRPO, where the judge is the reward, nothing else of it may change."""
SAMPLES_WITH = "eval_generation_batch_size"
"""SFT samples what it learns from in batches of this size, so there it is a setting of the training."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that another value was given when the run went on."""

    setting: str
    old: Any
    new: Any

    def row(self, step: int) -> dict[str, Any]:
        """As run.json keeps it; `step` is the optimizer step after which it holds."""
        return {"step": step, "setting": self.setting, "from": self.old, "to": self.new}


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any], *, kind: str, run: str
) -> list[Change]:
    """What differs between the settings of a run and those it is to go on with.

    Args:
        old: the run's config.yaml, and `processes`.
        new: the settings now, likewise.
        defaults: of settings that one of the two does not hold.
        kind: "rgsd", "grpo" or "sft".
        run: the run's folder, for the error.

    Raises:
        RunError: when a setting differs that must not, naming each with both values and the remedy.
    """
    found = []
    for name in sorted((old.keys() | new.keys()) - {"output_dir"}):
        was, now = old.get(name, defaults.get(name)), new.get(name, defaults.get(name))
        if _plain(was) != _plain(now):
            found.append(Change(name, was, now))
    same_batch = _batch(old, defaults) == _batch(new, defaults)
    refused = [c for c in found if not _may(c, kind, same_batch)]
    if refused:
        raise RunError(
            f"{run} cannot go on with other settings: "
            + "; ".join(f"{c.setting} is {c.new!r}, the run began with {c.old!r}" for c in refused)
            + f". {_hint(refused)}Set them back, or start anew with --overwrite true or in another output_dir"
        )
    return found


def _may(change: Change, kind: str, same_batch: bool) -> bool:
    name = change.setting
    if name in UPWARD:
        return _is_more(change)
    if name in BATCH or name == PROCESSES:
        return same_batch
    if name == SAMPLES_WITH:
        return kind != "sft"
    if name == "judge" or name.startswith("judge_"):
        return kind != "grpo" or name in JUDGE_COST
    return name in FREE or name.startswith(FREE_PREFIXES)


def _is_more(change: Change) -> bool:
    # max_steps below 1 means "as num_train_epochs says": neither more nor less than a number of steps.
    return all(isinstance(v, int | float) and v > 0 for v in (change.old, change.new)) and change.new > change.old


def _batch(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Any, Any]:
    """Responses an optimizer step, and optimizer steps a rollout."""
    each, times, shared = (settings.get(name, defaults.get(name)) for name in BATCH)
    responses = (each or 1) * (times or 1) * (settings.get(PROCESSES) or 1)
    return responses, (shared or times or 1) / (times or 1)


def _hint(refused: list[Change]) -> str:
    names = {c.setting for c in refused}
    if names & {*BATCH, PROCESSES}:
        return (
            f"{', '.join(BATCH[:2])} and the number of processes may change only together, so that their product, the "
            "responses of an optimizer step, stays the same. "
        )
    return "Training may be made longer, not shorter. " if names & set(UPWARD) else ""


def _plain(value: Any) -> Any:
    """Comparable, whether it comes from YAML or from a dataclass; unset and empty are the same."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()} or None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value] or None
    value = getattr(value, "value", value)
    return None if value == "" else value


def recorded(before: list[dict[str, Any]], found: list[Change], step: int) -> list[dict[str, Any]]:
    """The run's changes with these added; one that a killed process had already recorded is not added again."""
    rows = [change.row(step) for change in found]
    return [*before, *(row for row in rows if row not in before)]
