"""Adapters of low rank (LoRA): what fine-tuning trains in the place of the encoder's weights."""

from typing import Any

from torch import nn

from bridle_hf.common.errors import ArgumentError


# The linear layers of an encoder's blocks: attention and MLP.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def add_adapters(encoder: nn.Module, rank: int) -> Any:
    """Freeze an encoder and put an adapter beside each linear layer of its blocks, in place.

    Args:
        encoder: a `BridleModel`.
        rank: of the adapters, which are scaled by 2.

    Returns:
        peft's tuner: its `merge_and_unload()` makes of both, in place, an encoder as it was.

    Raises:
        ArgumentError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ArgumentError("--lora_rank needs peft: pip install 'bridle_hf[lora]'") from error
    encoder.requires_grad_(False)
    return LoraModel(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), "default")
