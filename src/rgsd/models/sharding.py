"""Parameters that FSDP2 or ZeRO-3 shards across processes: gathering, placing, and loading from other layouts."""

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
    """This process's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered, or the tensor itself if it is not sharded. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    """Gather a parameter that ZeRO-3 shards, inside the context. Every process must enter it."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 shards the model's parameters."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Release gathered parameters: only shards can be written to."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full value, sharded like a parameter. Rank 0's value is distributed, and every process must call."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    # A process that holds no value (on `meta`) still needs a tensor of the right shape to receive rank 0's.
    device = parameter.to_local().device
    value = torch.empty(value.shape, dtype=value.dtype, device=device) if value.is_meta else value.to(device)
    return distribute_tensor(value.contiguous(), parameter.device_mesh, parameter.placements)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the trained weights of a checkpoint into a model that may be sharded.

    Args:
        model: The model, unwrapped.
        folder: A checkpoint that transformers or PEFT saved.

    Raises:
        RunError: If the checkpoint does not hold this model's weights.
    """
    files = sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")])
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    n_loaded = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            value = next((state[n] for n in _saved_names(name) if n in state), None)
            if value is None or value.shape != parameter.shape:
                raise RunError(
                    f"{folder} has no weights of {name!r} with shape {tuple(parameter.shape)}: resume with the run's "
                    "own model and LoRA settings"
                )
            parameter.copy_(placed_like(value.to(parameter.dtype), parameter))
            n_loaded += 1
    if not n_loaded:
        raise RunError(
            f"{folder} cannot be loaded, because no parameter of the model is trained: enable LoRA or full training"
        )


def _saved_names(name: str) -> list[str]:
    """The names under which PEFT and transformers may save a parameter."""
    # In memory PEFT adds the adapter's name, which its files leave out.
    plain = name.replace(".modules_to_save", "").replace(".default", "")
    return [name, name.replace(".default", ""), plain]


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer that another number of processes saved.

    Args:
        model: The model, unwrapped.
        optimizer: Its optimizer.
        state: An optimizer's state dict, with numbered parameters (one process) or named ones (FSDP).

    Raises:
        RunError: If the state belongs to other parameters.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    groups = state["param_groups"]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if len(groups) != len(optimizer.param_groups) or sum(len(g["params"]) for g in groups) != len(own):
        raise RunError(
            f"the optimizer in the checkpoint has {sum(len(g['params']) for g in groups)} parameters in {len(groups)} "
            f"groups, this run's has {len(own)} in {len(optimizer.param_groups)}: resume with the run's own model and "
            "LoRA settings"
        )
    saved = [key for group in groups for key in group["params"]]
    by_name = bool(saved) and isinstance(saved[0], str)
    for parameter, key in zip(own, saved, strict=True):
        values = state["state"].get(names[id(parameter)] if by_name else key)
        if values is None:
            continue
        # Moments have the shape of their parameter and are sharded like it. The step count stays as it is.
        moments = {k: v for k, v in values.items() if torch.is_tensor(v) and v.shape == parameter.shape}
        moments = {k: placed_like(v.to(parameter.device), parameter) for k, v in moments.items()}
        optimizer.state[parameter] = {**values, **moments}
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in kept.items() if k != "params"})
