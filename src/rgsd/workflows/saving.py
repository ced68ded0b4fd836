"""Save the trained policy into its run."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from rgsd import models
from rgsd.models import adapters
from rgsd.runs import ADAPTER, MODEL, Run


def save_policy(trainer: Any, tokenizer: Any, run: Run) -> Any:
    """Save the adapter, or the whole model, into the run. Every process must call this.

    Returns:
        The trained policy, or None when this process does not hold all of it.

    Raises:
        TrainingDiverged: If a weight is not finite.
    """
    trainer.check_weights()
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    # Gathering the shards is a collective operation; only process 0 receives the result.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None
    if trainer.args.process_index != 0:
        return None
    if not isinstance(model, PeftModel):
        models.save_model(model, tokenizer, run.folder / MODEL, state)
    else:
        with adapters.saved_without_the_hub():
            model.save_pretrained(str(run.folder / ADAPTER), state_dict=state)
        tokenizer.save_pretrained(run.folder / ADAPTER)
    return None if is_sharded else adapters.policy(model)
