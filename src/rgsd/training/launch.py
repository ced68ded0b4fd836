"""One command, many processes: accelerate's launcher, with TRL's accelerate configurations by name.

`rgsd train --accelerate_config fsdp2 ...` starts `rgsd train ...` once per accelerator, as `accelerate launch` would.
Each process runs the same code as a single-process run.
"""

from __future__ import annotations

import gc
import importlib.resources
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rgsd.errors import ConfigError
from rgsd.progress import say
from rgsd.rows import BadRow, read_yaml
from rgsd.settings import setting

ALIASES = {"ddp": "multi_gpu", "fsdp": "fsdp2", "zero": "zero2"}
SECONDS_TO_STOP = 1800
"""How long a process may take to finish its step and save after SIGTERM. torch allows 30 seconds by default."""
GLOO_SECONDS = 0.5
"""How long gloo's threads get to free the tensors of their last collectives before the group is destroyed."""


@dataclass
class LaunchConfig:
    """How many processes to train in, where, and with which strategy. Unset: in this process alone."""

    accelerate_config: str | None = setting(
        None, "Train in several processes: ddp, fsdp2, zero2, zero3, or the path of an accelerate configuration."
    )
    num_processes: int | None = setting(
        None, "Number of processes on all machines together. Unset: one per accelerator."
    )
    num_machines: int | None = setting(None, "Number of machines. Start the same command on each. Unset: 1.")
    machine_rank: int | None = setting(None, "Index of this machine, from 0.")
    main_process_ip: str | None = setting(None, "Address of machine 0.")
    main_process_port: int | None = setting(
        None, "A free port of machine 0. Unset: 29500, or with one machine any free port."
    )
    gpu_ids: str | None = setting(None, "Accelerators of this machine to use, e.g. 0,1. Unset: all.")


def is_launched() -> bool:
    """Whether a launcher (this one, torchrun or accelerate) started this process as one of several."""
    return "LOCAL_RANK" in os.environ and "RANK" in os.environ


def config_file(name: str) -> Path:
    """The accelerate configuration file behind a name or a path.

    Raises:
        ConfigError: If there is none.
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
    """The parsed arguments of `accelerate launch` that run `python -m rgsd COMMAND ...` in each process.

    Args:
        launch: The settings.
        command: The command of rgsd, e.g. "train".
        argv: Its arguments.

    Raises:
        ConfigError: If the settings contradict each other or this machine.
    """
    from accelerate.commands.launch import launch_command_parser

    file = config_file(launch.accelerate_config or "ddp")
    try:
        settings = read_yaml(file)
    except (OSError, BadRow, yaml.YAMLError) as error:
        raise ConfigError(f"accelerate_config {file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"accelerate_config {file} must be a mapping, as `accelerate config` writes it")
    # Numbers in a user's file count. Those in TRL's files are examples: 8 processes on 1 machine.
    is_own_file = launch.accelerate_config is not None and Path(launch.accelerate_config).is_file()
    machines = launch.num_machines or (settings.get("num_machines", 1) if is_own_file else 1)
    processes = launch.num_processes or (settings.get("num_processes") if is_own_file else _accelerators() * machines)
    if not processes:
        raise ConfigError(
            "this machine has no accelerators, so num_processes has no default: set it, e.g. --num_processes 2"
        )
    if processes % machines:
        raise ConfigError(f"num_processes {processes} is not a multiple of num_machines {machines}: change one of them")
    if machines > 1 and (launch.machine_rank is None or launch.main_process_ip is None) and not is_own_file:
        raise ConfigError(
            f"{machines} machines need --machine_rank (0 to {machines - 1}, different on each) and --main_process_ip "
            "(the address of machine 0)"
        )
    here = processes // machines
    if 0 < _accelerators() < here and launch.gpu_ids is None:
        raise ConfigError(
            f"num_processes asks for {here} processes per machine, but this one has {_accelerators()} accelerators"
        )
    _check_engine(settings)
    port = launch.main_process_port
    options = {"config_file": file, "num_processes": processes, "num_machines": machines}
    options["mixed_precision"] = "no"  # bf16 is a setting of the recipe, and the trainer passes it to accelerate
    options["main_process_port"] = port if port is not None else 29500 if machines > 1 else 0  # 0: any free port
    options |= {name: getattr(launch, name) for name in ("machine_rank", "main_process_ip", "gpu_ids")}
    flags = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return launch_command_parser().parse_args([*flags, "--module", "rgsd", command, *argv])


def _accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _check_engine(settings: dict[str, Any]) -> None:
    kind = settings.get("distributed_type", "NO")
    if kind == "DEEPSPEED":
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise ConfigError(
                "accelerate_config is for DeepSpeed, which is not installed: pip install 'rgsd[deepspeed]'"
            )
    elif kind == "FSDP" and not _accelerators():
        say("There is no accelerator: on CPUs, accelerate replaces FSDP with plain data parallelism")


def launch(settings: LaunchConfig, command: str, argv: Sequence[str]) -> int:
    """Start the processes and wait for them.

    Returns:
        The exit code of the first process that failed, or 0.

    Raises:
        ConfigError: As in `accelerate_arguments`.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = accelerate_arguments(settings, command, argv)
    # Otherwise torch kills the processes long before a large model is saved.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    say(f"Starting {arguments.num_processes} processes on {arguments.num_machines} machine(s)")
    try:
        launch_command(arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        # torch reports a signal as a negative exit code, a shell as 128 plus its number.
        code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
        print(f"rgsd {command}: process {rank} exited with code {code}; see its error above", file=sys.stderr)
        return code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def leave_group() -> None:
    """Leave the process group if it is gloo's, and end its threads.

    These threads would outlive the interpreter and then crash the process with SIGABRT, although its work is done.
    An NCCL group stays until the process ends: leaving it waits for the other processes, and the first one still
    evaluates alone.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        # gloo's threads free the tensors of their last collective under the group's lock, and need the GIL for it. The
        # group's destructor waits for that lock and does not release the GIL. So let them finish first.
        time.sleep(GLOO_SECONDS)
        dist.destroy_process_group()
        gc.collect()  # wrapped models hold the group, and are in reference cycles


__all__ = ["LaunchConfig", "launch", "leave_group"]
