"""Digests that tell models apart, so that a stored result is never reused for other weights.

`fingerprint` samples the values of a loaded model, and is fast. `weights_digest` reads all of them. `identity` and its
relatives read a model's files without loading them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from rgsd.errors import ModelError
from rgsd.models.lineage import base_of, is_run
from rgsd.models.sharding import gathered
from rgsd.models.sources import EMBEDDED_WARM, source_of, warmstart_adapter
from rgsd.runs import ADAPTER, MODEL, open_run

N_SAMPLED_VALUES = 4096
"""How many values of each tensor enter a fingerprint, at even strides."""
WEIGHT_FILES = (".safetensors", ".bin")
NOT_WEIGHTS = frozenset({"optimizer.bin", "training_args.bin", "scheduler.bin"})
SETTING_FILES = frozenset(
    {"config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
     "chat_template.jinja"}
)  # fmt: skip
"""Files in a model's folder, other than weights and code, that change its responses."""


def fingerprint(model: torch.nn.Module) -> str:
    """A short digest of the names and shapes of a model's tensors, and of values sampled from each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with gathered(tensor):
            flat = tensor.detach().flatten()
            # In float32, since numpy has no bfloat16.
            sampled = flat[:: max(1, flat.numel() // N_SAMPLED_VALUES)].float().cpu().contiguous()
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of all values of a model in memory, of its configuration and of its adapters' settings.

    Reads one tensor at a time, and takes about 3 seconds per GiB on one core.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    adapters = {k: v.to_dict() for k, v in (getattr(model, "peft_config", None) or {}).items()}
    digest.update(
        _canonical_json({"config": config.to_dict() if config is not None else None, "adapters": adapters}).encode()
    )
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with gathered(tensor):
            flat = tensor.detach().flatten().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(flat.view(torch.uint8).numpy())  # as bytes, since numpy has no bfloat16
    return digest.hexdigest()[:32]


def identity(name: str, revision: str = "main") -> str | None:
    """The identity of the weights behind a model's name, without loading them.

    Args:
        name, revision: As in `load_model`.

    Returns:
        A digest of all bytes of the model's files. For a hub model, its commit, or None if it is not in the cache.

    Raises:
        ModelError: If the name cannot refer to a model.
    """
    if is_run(name):
        return trained_identity(Path(name))
    source, options = source_of(name, revision)
    path = Path(source)
    if "gguf_file" in options:
        digest = _digest_of([path / options["gguf_file"]])
    elif path.is_dir():
        digest = digest_of_folder(path)
    else:
        # Only the local cache is read: an identity must not cost a download.
        commit = _cached_commit(name, revision)
        return None if commit is None else f"hub:{name}@{commit}"
    if name == EMBEDDED_WARM:
        with warmstart_adapter() as adapter:
            digest = combined(digest, digest_of_folder(adapter))
    return digest


def trained_identity(folder: Path, base: str | None = None) -> str:
    """The identity of a run's trained policy: of its adapter together with its base, or of the full saved model.

    Args:
        folder: The run folder.
        base: The base's identity, if known.

    Raises:
        RunError: If the folder is not a run.
        ModelError: If the run has no trained policy.
    """
    if (folder / ADAPTER).is_dir():
        return combined(base or base_identity(folder), digest_of_folder(folder / ADAPTER))
    if (folder / MODEL).is_dir():
        return digest_of_folder(folder / MODEL)
    status = open_run(folder).meta.get("status")
    raise ModelError(
        f"the run in {folder} is {status!r} and has no trained policy yet: finish it, or use {folder}:base"
    )


def base_identity(folder: Path) -> str:
    """The identity of the model that a run was trained from.

    For a hub model that is no longer in the cache, this is what the run recorded when it started.
    """
    run = open_run(folder)
    current = identity(base_of(run), run.settings.get("model_revision") or "main")
    return current or run.meta.get("base_identity") or f"fingerprint:{run.meta.get('model_fingerprint')}"


def combined(*parts: str) -> str:
    """One digest of several."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def digest_of_folder(folder: Path) -> str:
    """A digest of the files in a folder that determine the model's responses: weights, settings, tokenizer and code."""
    return _digest_of(
        [
            p
            for p in sorted(folder.iterdir())
            if (p.suffix in WEIGHT_FILES and p.name not in NOT_WEIGHTS)
            or p.name in SETTING_FILES
            or p.name.endswith((".index.json", ".py"))
        ]
    )


def _digest_of(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            if path.name == "adapter_config.json":  # PEFT writes sets, whose order changes from process to process
                content = hashlib.sha256(_canonical_json(json.load(file)).encode()).hexdigest()
            else:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([path.name, content]).encode())
    return digest.hexdigest()[:32]


def _canonical_json(value: Any) -> str:
    return json.dumps(_sorted(value), sort_keys=True, default=str)


def _sorted(value: Any) -> Any:
    """The value with string keys and with lists of strings in alphabetical order."""
    if isinstance(value, dict):
        return {str(k): _sorted(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        members = [_sorted(v) for v in value]
        return sorted(members) if all(isinstance(v, str) for v in members) else members
    return value


def _cached_commit(name: str, revision: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a hub id
        return None
    return Path(path).parent.name if isinstance(path, str) else None  # snapshots/COMMIT/config.json
