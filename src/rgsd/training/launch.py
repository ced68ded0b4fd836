"""One command, many processes: TRL's launcher, which is accelerate's, with TRL's configurations by their names.

`rgsd train --accelerate_config fsdp2 ...` starts `rgsd train ...` once for every accelerator, as `accelerate launch`
would, and the processes find each other. What is launched runs the same code as a single process does.
"""

from __future__ import annotations

import gc
import importlib.resources
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rgsd.errors import ConfigError
from rgsd.progress import say
from rgsd.settings import setting

ALIASES = {"ddp": "multi_gpu", "fsdp": "fsdp2", "zero": "zero2"}
SECONDS_TO_STOP = 1800
"""How long a process that was told to stop may take to finish its step and save; torch's own limit is 30."""


@dataclass
class LaunchConfig:
    """How many processes, on which machines, joined by what. Unset: one process, this one."""

    accelerate_config: str | None = setting(
        None, "Train in several processes: ddp, fsdp2, zero2, zero3, or an accelerate configuration file."
    )
    num_processes: int | None = setting(
        None, "Processes on all machines together. Unset: one for each accelerator of each machine."
    )
    num_machines: int | None = setting(None, "Machines. Unset: 1. Start the same command on each of them.")
    machine_rank: int | None = setting(None, "Which of the machines this is, counted from 0.")
    main_process_ip: str | None = setting(None, "Address of machine 0.")
    main_process_port: int | None = setting(None, "A free port of machine 0. Unset: 29500, on one machine any.")
    gpu_ids: str | None = setting(None, "Accelerators to use on this machine, e.g. 0,1. Unset: all.")


def is_launched() -> bool:
    """Whether a launcher (this one, torchrun, accelerate) has started this process as one of several."""
    return "LOCAL_RANK" in os.environ and "RANK" in os.environ


def config_file(name: str) -> Path:
    """The accelerate configuration that a name or a path means.

    Raises:
        ConfigError: when there is none.
    """
    if Path(name).is_file():
        return Path(name)
    folder = importlib.resources.files("trl") / "accelerate_configs"
    file = folder / f"{ALIASES.get(name, name)}.yaml"
    if not file.is_file():
        known = sorted({"ddp", *(Path(str(f)).stem for f in folder.iterdir() if str(f).endswith(".yaml"))})
        raise ConfigError(f"accelerate_config {name!r} is neither a file nor one of {', '.join(known)}")
    return Path(str(file))


def accelerate_arguments(launch: LaunchConfig, command: str, argv: Sequence[str]) -> Any:
    """What `accelerate launch` would have parsed: one `python -m rgsd COMMAND ...` a process.

    Raises:
        ConfigError: when the settings contradict each other or this machine.
    """
    from accelerate.commands.launch import launch_command_parser

    file = config_file(launch.accelerate_config or "ddp")
    settings = yaml.safe_load(file.read_text("utf-8"))
    machines = launch.num_machines or 1
    own_file = launch.accelerate_config is not None and Path(launch.accelerate_config).is_file()
    processes = launch.num_processes or (settings.get("num_processes") if own_file else _accelerators() * machines)
    machines = launch.num_machines or (settings.get("num_machines", 1) if own_file else 1)
    if not processes:
        raise ConfigError(
            "this machine has no accelerator to count: say how many processes, as --num_processes 2 (on CPUs)"
        )
    if processes % machines:
        raise ConfigError(f"{processes} processes cannot be shared evenly by {machines} machines: change num_processes")
    if machines > 1 and (launch.machine_rank is None or launch.main_process_ip is None) and not own_file:
        raise ConfigError(
            f"{machines} machines need --machine_rank (0 to {machines - 1}, another on each) and --main_process_ip "
            "(the address of machine 0)"
        )
    here = processes // machines
    if 0 < _accelerators() < here and launch.gpu_ids is None:
        raise ConfigError(f"{here} processes a machine are asked for, this one has {_accelerators()} accelerators")
    _check_engine(settings)
    port = launch.main_process_port
    words = ["--config_file", str(file), "--num_processes", str(processes), "--num_machines", str(machines)]
    # bf16 is a setting of the recipe: the trainer tells accelerate.
    words += [
        "--mixed_precision",
        "no",
        "--main_process_port",
        str(port if port is not None else 29500 * (machines > 1)),
    ]
    for name in ("machine_rank", "main_process_ip", "gpu_ids"):
        value = getattr(launch, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return launch_command_parser().parse_args([*words, "--module", "rgsd", command, *argv])


def _accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _check_engine(settings: dict[str, Any]) -> None:
    kind = settings.get("distributed_type", "NO")
    if kind == "DEEPSPEED":
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise ConfigError(
                "this configuration is DeepSpeed's, which is not installed: pip install 'rgsd[deepspeed]'"
            )
    elif kind == "FSDP" and not _accelerators():
        say("No accelerator here: on CPUs, accelerate replaces FSDP by plain data parallelism")


def launch(settings: LaunchConfig, command: str, argv: Sequence[str]) -> int:
    """Start the processes and wait for them; the exit code is that of the first that failed, 0 if none did.

    Raises:
        ConfigError: as `accelerate_arguments`.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = accelerate_arguments(settings, command, argv)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    say(f"Starting {arguments.num_processes} processes on {arguments.num_machines} machine(s)")
    try:
        launch_command(arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
        print(f"rgsd {command}: process {rank} ended with code {code}; its reason stands above", file=sys.stderr)
        return code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def leave_group() -> None:
    """Leave gloo's group of processes, if this process is in one, and end its threads. They would outlive the
    interpreter, and one that then wants it takes the process down with SIGABRT, after all of its work was done.

    NCCL's is left to the end of the process: leaving it waits for the others, and the first measures on alone.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        gc.collect()  # wrapped models, which hold on to the group, are in cycles


__all__ = ["LaunchConfig", "launch", "leave_group"]
