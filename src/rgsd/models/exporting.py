"""Writes a run's trained policy as a plain model, and measures what rounding its weights costs."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgsd.errors import RunError
from rgsd.models import adapters
from rgsd.models.loading import as_dtype, forget_gguf, load_student
from rgsd.runs import ADAPTER, open_run

COSTLY_SHARE = 0.05
"""KL(trained || exported) as a share of KL(trained || base) above which an export counts as a different model."""
ROUNDING = "rounding.json"
"""The file in an exported folder that holds the cost of rounding."""
N_PROBES, PROBE_TOKENS = 4, 96
"""Bundled prompts with answers on which that cost is measured, and the tokens read of each."""


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """Write a folder that transformers and vLLM can load.

    Args:
        model, tokenizer: The model and its tokenizer.
        folder: Where to write.
        state: The gathered weights, for a model that is sharded.
    """
    forget_gguf(model)
    model.config.architectures = [type(model).__name__]  # the class of a GGUF file's model is not in its config
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Rounding:
    """The cost of rounding a trained policy's weights, measured on a few prompts with answers.

    Both policies compute in float32, so only the weights differ.

    Args:
        dtype: Of the written weights.
        max_logit_difference, mean_logit_difference: Between the logits of the trained and the written model.
        kl: KL(trained || written), in nats per token.
        kl_base: KL(trained || base), in nats per token: how far training went. None after full training.
        update_kept: The share of the adapters' update that survives in the written weights (`adapters.Kept`). None
            after full training.
    """

    dtype: str
    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    kl_base: float | None = None
    update_kept: float | None = None

    @property
    def is_costly(self) -> bool:
        """Whether rounding undoes more than a twentieth of the distance from the base."""
        return self.kl_base is not None and self.kl > COSTLY_SHARE * self.kl_base

    def __str__(self) -> str:
        text = (
            f"Rounding to {self.dtype}: logits differ by up to {self.max_logit_difference:.3g}, on average "
            f"{self.mean_logit_difference:.3g}; KL(trained || exported) {self.kl:.3g} nats per token"
        )
        if self.kl_base is not None and self.update_kept is not None:
            text += f", KL(trained || base) {self.kl_base:.3g}; {100 * self.update_kept:.1f} % of the update is kept"
        if self.is_costly:
            text += (
                ".\nThe exported model differs measurably from the trained one: export with --dtype float32, or serve "
                f"the base model with the adapter in the run's {ADAPTER} folder"
            )
        return text + "."


def export(
    run: str | Path, out: str | Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[Path, Rounding]:
    """Write a run's trained model, adapter merged, with its tokenizer, for transformers and vLLM.

    The adapter is merged in float32, one layer at a time, and each weight is rounded once.

    Args:
        run: The folder of a finished run.
        out: A folder that does not exist or is empty.
        dtype: Of the saved weights. Unset: as in the run.
        trust_remote_code: Whether to run code that comes with the base model. The run's own setting is ignored.

    Returns:
        The folder, and the cost of rounding, which is also in the folder's rounding.json.

    Raises:
        RunError: If the run is missing or unfinished, or `out` is in use or cannot be written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} exists and is not an empty folder: choose another one for the export")
    record = open_run(run, finished=True)
    student, tokenizer = load_student(record.folder, trust_remote_code=trust_remote_code)
    name = dtype or str(record.settings.get("dtype") or "float32")
    saved_dtype = student.dtype if name == "auto" else as_dtype(name)
    # All logits of the unmerged policy come first, because merging uses the student up.
    probes = _probes(tokenizer)
    trained_logits = _logits(student, probes)
    kl_base = kept = None
    if isinstance(student, PeftModel):
        with student.disable_adapter():
            kl_base = _kl(trained_logits, _logits(student, probes))
        model, kept = adapters.merge_and_unload(student, saved_dtype)
    else:
        model = student.to(saved_dtype)  # pyright: ignore[reportArgumentType]
    written_logits = _logits(model, probes)
    differences = [(a - b).abs() for a, b in zip(trained_logits, written_logits, strict=True)]
    cost = Rounding(
        dtype=str(saved_dtype).removeprefix("torch."),
        max_logit_difference=max(float(d.max()) for d in differences),
        mean_logit_difference=sum(float(d.mean()) for d in differences) / len(differences),
        kl=_kl(trained_logits, written_logits),
        kl_base=kl_base,
        update_kept=None if kept is None else kept.share,
    )
    _write_export(model, tokenizer, cost, target)
    return target, cost


def _write_export(model: Any, tokenizer: Any, cost: Rounding, target: Path) -> None:
    """Write the folder completely or not at all.

    A killed export leaves only a hidden folder next to the target, which the next export removes.
    """
    place = target.resolve()
    partial = place.with_name(f".{place.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        save_model(model, tokenizer, partial)
        (partial / ROUNDING).write_text(json.dumps(asdict(cost), indent=1) + "\n", "utf-8")
        if place.exists():  # `export` made sure that it is empty
            place.rmdir()
        partial.rename(place)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"cannot write the model to {target}: {error.strerror or error}. Free some space, or choose another folder"
        ) from error


def _probes(tokenizer: Any) -> list[Tensor]:
    """(1, T) token ids of each probe: a bundled prompt with its reference answer, as a conversation."""
    lines = (files("rgsd.data") / "bundled" / "medicine.jsonl").read_text("utf-8").splitlines()[:N_PROBES]
    probes = []
    for row in map(json.loads, lines):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["reference"]}]
        probes.append(torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)[:PROBE_TOKENS]]))
    return probes


@torch.no_grad()
def _logits(model: Any, probes: list[Tensor]) -> list[Tensor]:
    """(T, V) logits of each probe, computed in float32 for weights of any precision."""
    model.eval()
    with adapters.computing_in_float32(model):
        return [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in probes]


def _kl(own: list[Tensor], other: list[Tensor]) -> float:
    """KL(own || other), in nats per token."""
    per_token = [
        F.kl_div(b.double().log_softmax(-1), a.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for a, b in zip(own, other, strict=True)
    ]
    return float(torch.cat(per_token).mean())
