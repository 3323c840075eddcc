"""Gradient norms by the parts of a model."""

import torch
from torch import nn

from bridle_hf.modeling_bridle import BridlePreTrainedModel


def gradient_norms(model: BridlePreTrainedModel, side: str) -> dict[str, torch.Tensor]:
    """Norm of the gradients of each part of an encoder or tokenizer: `SIDE/grad_norm/PART`, scalars on the device.

    Parts (see `BridlePreTrainedModel.parameters_by_part`) of which nothing has a gradient are left out.
    """
    norms = {}
    for part, parameters in model.parameters_by_part().items():
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            norms[f"{side}/grad_norm/{part}"] = nn.utils.get_total_norm(gradients)
    return norms
