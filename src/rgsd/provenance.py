"""Provenance of a result for run.json: versions, machine, commit and command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rgsd.redaction import redact_arguments

PACKAGES = ("rgsd", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """The versions of the packages, the machine, and the commit of the code."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        **_commit(),
    }


def _commit() -> dict[str, Any]:
    """The commit of the running code and whether it has uncommitted changes; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(status.strip())}


def command_line() -> str:
    """The command line of this process, without credentials."""
    return " ".join([Path(sys.argv[0]).name, *redact_arguments(sys.argv[1:])])
