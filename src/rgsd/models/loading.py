"""Loads models, tokenizers, and the policies that runs have trained.

One module, because these call each other: the base model of a run may be another run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rgsd.errors import ModelError
from rgsd.models import adapters
from rgsd.models.identity import fingerprint, trained_identity
from rgsd.models.integrity import check_finite, readable
from rgsd.models.lineage import ancestors, base_of, is_run
from rgsd.models.sharding import is_partitioned
from rgsd.models.sources import EMBEDDED_WARM, refuse_adapter, refuse_kernel, source_of, warmstart_adapter
from rgsd.progress import say
from rgsd.rows import BadRow, loads
from rgsd.runs import ADAPTER, MODEL, Run, open_run

MIN_KEPT = 0.95
"""The share of a run's update below which loading it in half precision warns of the loss."""


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, with left padding for generation.

    Args:
        name, revision: As in `load_model`.
        trust_remote_code: Whether to run code that comes with the tokenizer.

    Raises:
        ModelError: If it cannot be loaded, or has no chat template.
    """
    if is_run(name):
        name = str(_trained_folder(open_run(name)))
    source, options = source_of(name, revision)
    with readable(name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "left"
    # Padding is masked, so any token serves.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {name!r} has no chat template, so it cannot encode conversations: use an "
            "instruction-tuned model, or set tokenizer.chat_template and save the tokenizer with the model"
        )
    return tokenizer


def as_dtype(name: str | None) -> torch.dtype:
    """A dtype by its name in torch.

    Raises:
        ModelError: If there is none of that name.
    """
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return found


def load_model(
    name: str,
    *,
    dtype: str | None = "float32",
    revision: str = "main",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        name: A hub id, a folder, a .gguf file, `embedded`, `embedded-warm` or `nano`. Or a finished run, whose trained
            policy is loaded as one plain model, with its adapter merged in float32.
        dtype: The name of a torch dtype, or "auto" for that of the files.
        revision: A branch, tag or commit, for hub ids only.
        attn_implementation: As in transformers.
        trust_remote_code: Whether to run code that comes with the model.
        **kwargs: More arguments of transformers' `from_pretrained`.

    Raises:
        ModelError: If it cannot be loaded, or a weight is not finite.
        RunError: If it is a run that is not finished.
    """
    if is_run(name):
        kwargs |= {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        return _load_run(name, dtype, **kwargs)
    source, options = source_of(name, revision)
    refuse_adapter(name, source)
    if not trust_remote_code:
        refuse_kernel(name, source)
    target = "auto" if dtype == "auto" else as_dtype(dtype)
    with readable(name):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            **options,
            # The adapter of the warm start is merged in float32, and the result rounded once.
            dtype=torch.float32 if name == EMBEDDED_WARM else target,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            **kwargs,
        )
    # transformers has dequantized the weights by now.
    if "gguf_file" in options:
        forget_gguf(model)
    if name == EMBEDDED_WARM:
        with warmstart_adapter() as adapter:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore
        if isinstance(target, torch.dtype):
            model = model.to(target)
    model.config._name_or_path = name
    check_finite(model, name)
    return model


def forget_gguf(model: PreTrainedModel) -> None:
    """Remove the mark of quantization: transformers dequantizes GGUF weights, but saves them as if it had not."""
    untyped: Any = model
    untyped.hf_quantizer = None
    untyped.is_quantized = False
    if hasattr(untyped.config, "quantization_config"):
        del untyped.config.quantization_config


# --- Trained policies ---------------------------------------------------------------------------------------------


def load_trained(
    run: Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a run's trained policy: the full saved model, or the base model with its adapter.

    The adapter is merged if that is exact in the weights' precision (`adapters.policy`).

    Args:
        run: The run folder.
        dtype: Of the weights. Unset: as in the run, or for a fully trained model as in its files.
        trust_remote_code: Whether to run code that comes with the model. The run's own setting is ignored.

    Raises:
        ModelError: If the run has no trained policy yet, or the base model has changed since.
    """
    student, tokenizer = load_student(run, dtype, trust_remote_code)
    return adapters.policy(student), tokenizer


def load_student(
    run: Path, dtype: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Like `load_trained`, with the adapter never merged. Takes the other arguments of `load_model` too."""
    record = open_run(run)
    folder = _trained_folder(record)
    warn_of_ignored_trust(record, trust_remote_code)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    kwargs["trust_remote_code"] = trust_remote_code
    if folder.name == MODEL:
        # Its files hold the float32 master weights, even if the base was loaded in half precision.
        return load_model(str(folder), dtype=dtype or "auto", **kwargs), tokenizer
    run_dtype = record.settings.get("dtype") or "float32"
    name, revision = base_of(record), record.settings.get("model_revision") or "main"
    base = load_model(name, dtype=dtype or run_dtype, revision=revision, **kwargs)
    _check_base(record, name, base, is_as_trained=(dtype or run_dtype) == run_dtype)
    _check_adapter(folder)
    with readable(str(folder)):
        student: Any = PeftModel.from_pretrained(base, str(folder))
    check_finite(student, str(run))
    return student, tokenizer


def warn_of_ignored_trust(run: Run, trust_remote_code: bool) -> None:
    """Warn that a run's own `trust_remote_code` is ignored: anybody who wrote the folder could have set it."""
    if run.settings.get("trust_remote_code") and not trust_remote_code:
        say(
            f"Ignoring trust_remote_code in {run.folder}: if you trust the model's code, pass --trust_remote_code true "
            "to this command"
        )


def _trained_folder(run: Run) -> Path:
    """The folder in a run that holds its trained policy: an adapter, or a full model."""
    for name in (ADAPTER, MODEL):
        if (run.folder / name).is_dir():
            return run.folder / name
    raise ModelError(
        f"the run in {run.folder} is {run.meta.get('status')!r} and has no trained model (neither {ADAPTER}/ nor "
        f"{MODEL}/): finish it with --resume_from_checkpoint true, or evaluate {run.folder}:base"
    )


def _check_adapter(folder: Path) -> None:
    """Require a folder to hold a complete LoRA adapter.

    PEFT asks the Hub for files that a folder lacks, under the folder's name, which a stranger may own there. Other
    kinds of adapters name further models to load, and rgsd trains only LoRA.

    Raises:
        ModelError: If a file is missing, or the adapter is of another kind.
    """
    path = folder / "adapter_config.json"
    remedy = "restore the folder, or train the run again"
    if not path.is_file() or not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise ModelError(f"{folder} lacks adapter_config.json or its weights (adapter_model.safetensors): {remedy}")
    try:
        config = loads(path.read_bytes())
    except BadRow as error:
        raise ModelError(f"{path} cannot be read ({error}): {remedy}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ModelError(f"{path} has the peft_type {kind!r}, expected 'LORA', which is all that rgsd trains: {remedy}")


def _check_base(run: Run, name: str, base: Any, *, is_as_trained: bool) -> None:
    """Require the base model to be the one that the run's adapter was trained on.

    Raises:
        ModelError: If it is another one.
    """
    if line := ancestors(run):
        # Compare the parent's files: merging its adapter may round differently on another machine.
        actual, expected, what = trained_identity(Path(name)), line[0].weights, "weights"
    elif is_as_trained and run.meta.get("model_fingerprint"):
        # A fingerprint samples rounded values, so it is only comparable in the same precision.
        actual, expected, what = fingerprint(base), run.meta["model_fingerprint"], "fingerprint"
    else:
        return
    if actual != expected:
        raise ModelError(
            f"{name!r} is not the model that {run.folder} was trained from (its {what} is {actual}, the run's is "
            f"{expected}): restore that revision, the adapter fits no other"
        )


def _load_run(name: str, dtype: str | None, **kwargs: Any) -> PreTrainedModel:
    """Load a finished run's trained policy as one plain model.

    The adapter is merged in float32 over the base as it was trained, and each weight is rounded once to `dtype`.
    """
    run = open_run(name, finished=True)
    is_full_model = _trained_folder(run).name == MODEL
    model, _ = load_student(run.folder, dtype if is_full_model else None, **kwargs)
    if not is_full_model:
        if is_partitioned(model) or any(p.is_meta for p in model.parameters()):
            raise ModelError(
                f"the adapter of {name} cannot be merged while the weights are sharded across processes: write the "
                f"merged model first, `rgsd export {name} --output_dir FOLDER --dtype float32`, and start from FOLDER"
            )
        target = model.dtype if dtype == "auto" else as_dtype(dtype)
        model, kept = adapters.merge_and_unload(model, target)
        if kept.share < MIN_KEPT:
            say(
                f"Rounded to {str(target).removeprefix('torch.')}, {name} keeps {100 * kept.share:.0f} % of its "
                "training: load it with --dtype float32 to keep all of it"
            )
    model.config._name_or_path = name
    return model
