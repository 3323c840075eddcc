"""Gradient norms by the parts of a model."""

import torch
from torch import nn


# Parts of a model by what their parameters' names hold; all else is `layers`.
PARTS = ("embeddings", "decoder", "projection", "estimator")


def gradient_norms(model: nn.Module, side: str) -> dict[str, torch.Tensor]:
    """Norm of the gradients of each part of an encoder or tokenizer: `SIDE/grad_norm/PART`, scalars on the device.

    The parts are `embeddings`, `layers` (with the norm after the last), `decoder`, `projection` and `estimator`, as
    far as the model has them.
    """
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(f"{side}/grad_norm/{part_of(name)}", []).append(parameter.grad)
    return {name: nn.utils.get_total_norm(found) for name, found in gradients.items()}


def part_of(name: str) -> str:
    """The part of an encoder or tokenizer that a parameter of this name belongs to."""
    return next((part for part in PARTS if f"{part}." in name), "layers")
