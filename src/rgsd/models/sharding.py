"""Parameters that FSDP2 has cut among processes: values in, values out, and states saved by another number of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rgsd.errors import RunError


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a whole tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered (every process must call); a whole tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    """Within it, a parameter that ZeRO-3 has cut among processes is whole; every process must enter."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model's parameters, of which this process then has only a part."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters, so that the model holds its parts, which alone can be written to."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value, cut as a parameter is cut. Rank 0's value counts; every process must call."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    device = parameter.to_local().device
    value = torch.empty(value.shape, dtype=value.dtype, device=device) if value.is_meta else value.to(device)
    return distribute_tensor(value.contiguous(), parameter.device_mesh, parameter.placements)


def load_weights(model: nn.Module, folder: Path) -> None:
    """The weights that transformers or peft saved in a checkpoint, into a model that may be sharded.

    Raises:
        RunError: when the checkpoint's weights are not this model's.
    """
    files = sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")])
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    found = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            value = next((state[n] for n in _names_in_files(name) if n in state), None)
            if value is None or value.shape != parameter.shape:
                raise RunError(
                    f"{folder} holds no weights of {name!r} with shape {tuple(parameter.shape)}: resume with the model "
                    "and the LoRA settings that the run had"
                )
            parameter.copy_(placed_like(value.to(parameter.dtype), parameter))
            found += 1
    if not found:
        raise RunError(f"{folder} has nothing for this model, none of whose parameters is trained")


def _names_in_files(name: str) -> list[str]:
    """What peft and transformers call a parameter in their files."""
    plain = name.replace(".modules_to_save", "").replace(".default", "")
    return [name, name.replace(".default", ""), plain]


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """An optimizer's state, saved by one process (numbered parameters) or by FSDP (named ones), into this run's.

    Raises:
        RunError: when it belongs to other parameters.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    groups = state["param_groups"]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if len(groups) != len(optimizer.param_groups) or sum(len(g["params"]) for g in groups) != len(own):
        raise RunError(
            f"the checkpoint's optimizer has {sum(len(g['params']) for g in groups)} parameters in {len(groups)} "
            f"groups, this run's {len(own)} in {len(optimizer.param_groups)}: resume with the same model and LoRA "
            "settings"
        )
    saved = [key for group in groups for key in group["params"]]
    by_name = bool(saved) and isinstance(saved[0], str)
    for parameter, key in zip(own, saved, strict=True):
        values = state["state"].get(names[id(parameter)] if by_name else key)
        if values is None:
            continue
        moments = {k: v for k, v in values.items() if torch.is_tensor(v) and v.shape == parameter.shape}
        moments = {k: placed_like(v.to(parameter.device), parameter) for k, v in moments.items()}
        optimizer.state[parameter] = {**values, **moments}
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in kept.items() if k != "params"})
