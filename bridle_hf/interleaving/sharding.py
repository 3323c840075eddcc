"""Sharding of models and optimizers over processes (FSDP2), or whole models in each (DDP, or a single process)."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Sharding:
    """How what is trained lies over the processes.

    Args:
        shard: each process holds a part of what is trained, of its gradients and of its optimizer (FSDP2). What is
            frozen, and the codebooks, are whole in each.

    Raises:
        ValueError: `shard` with fp16, whose gradient scaler would see another part in each process.
    """

    def __init__(self, accelerator: Accelerator, shard: bool):
        if shard and accelerator.mixed_precision == "fp16":
            raise ValueError("--mixed_precision is fp16: models that are sharded (FSDP) are trained in bf16 or no")
        self.accelerator = accelerator
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,)) if shard else None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, ready to be trained."""
        return self.accelerator.prepare(model) if self.mesh is None else self.lay_out(model)

    def lay_out(self, model: nn.Module) -> nn.Module:
        """The model, over the processes as what is trained is."""
        if self.mesh is None:
            return model
        # Each layer, and what is left of each part that is called by itself: the teacher is the encoder without its
        # decoder, and codes are looked up without the estimator. So the parts stand side by side, and the model as a
        # whole is no unit.
        for part in model.children():
            if any(True for _ in part.parameters()):
                for unit in (*getattr(part, "layers", ()), part):
                    fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)
        return model

    def synchronized(self, models: Iterable[nn.Module], last: bool) -> contextlib.ExitStack:
        """Exchange gradients in the last micro batch alone; sharded, a process has no room for whole gradients."""
        stack = contextlib.ExitStack()
        if not last and self.mesh is None:
            for model in models:
                stack.enter_context(self.accelerator.no_sync(model))
        return stack


def whole_model(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """`model` if it is whole, or a new one from `build` with its weights; all processes must call it."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    whole = build()
    whole.load_state_dict(gathered_state(model.state_dict()))
    return whole


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
