"""Sharding of models and optimizers over processes (FSDP2)."""

from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard each layer, and what is left of each part that is called by itself, in place.

    The teacher is the encoder without its decoder, and codes are looked up without the estimator: so the parts stand
    side by side, and the model as a whole is no unit.
    """
    for part in model.children():
        if any(True for _ in part.parameters()):
            for unit in (*getattr(part, "layers", ()), part):
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return model


def gathered_state(state: Any) -> Any:
    """A tensor, or a structure of them, with what is sharded gathered; all processes must call it."""
    return recursively_apply(lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, state)


def sharded_like(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The whole state of an optimizer, laid out as its parameters are."""
    entries = dict(state["state"])
    for number, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        if isinstance(parameter, DTensor) and number in entries:
            entries[number] = {
                # Moments have the shape of the parameter; the number of steps is a scalar.
                name: distribute_tensor(value, parameter.device_mesh, parameter.placements) if value.dim() else value
                for name, value in entries[number].items()
            }
    return {**state, "state": entries}
