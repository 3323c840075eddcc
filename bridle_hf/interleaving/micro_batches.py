"""Micro batches: the parts that a process's batch is cut into, and what each counts for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from bridle_hf import BridleConfig
from bridle_hf.patching_bridle import INPUT_NAMES, mask_rows, patch_attention_mask


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a batch, on the device.

    Args:
        inputs: the modality's input, (samples, ...).
        attention_mask: (samples, frames) of audio, or `None` where the whole batch has no padding.
        bool_masked_pos: (samples, patches), or (samples, masks, patches), True = hidden.
        bool_decoded_pos: of the same shape, True = hidden and decoded; `None`: all that are hidden.
        first: which sample of this process's batch the first of these is.
        num_visible, num_decoded: patches that each mask leaves visible, and that are decoded of each, where all masks
            are alike; else `None`.
    """

    inputs: torch.Tensor
    attention_mask: torch.Tensor | None
    bool_masked_pos: torch.Tensor
    bool_decoded_pos: torch.Tensor | None
    first: int
    num_visible: int | None
    num_decoded: int | None

    @property
    def masks_per_sample(self) -> int:
        return self.bool_masked_pos.shape[:-1].numel() // len(self.inputs)

    def real(self, config: BridleConfig) -> torch.Tensor | None:
        """(samples, patches) bool, which patches are real, or `None` where all are."""
        return None if self.attention_mask is None else patch_attention_mask(self.attention_mask, config)


def micro_batches(
    batch: dict[str, Any], modality: str, size: int | None, device: torch.device
) -> Iterator[MicroBatch]:
    """A batch, `size` samples at a time; `None`: all at once."""
    inputs, attention_mask = batch[INPUT_NAMES[modality]], batch.get("attention_mask")
    # Decided on the CPU, where the batch still is, and alike in every micro batch.
    padded = attention_mask is not None and not bool(attention_mask.all())
    size = size or len(inputs)
    masks = batch["bool_masked_pos"], batch.get("bool_decoded_pos")
    num_visible = None if padded else _equal_number(~masks[0].bool())
    decoded = masks[0] if masks[1] is None else masks[0].bool() & masks[1].bool()
    num_decoded = None if padded else _equal_number(decoded)
    for first in range(0, len(inputs), size):
        tensors = (inputs, attention_mask if padded else None, *masks)
        yield MicroBatch(
            *(
                None if tensor is None else tensor[first : first + size].to(device, non_blocking=True)
                for tensor in tensors
            ),
            first,
            num_visible,
            num_decoded,
        )


def _equal_number(masks: torch.Tensor) -> int | None:
    """How many patches each of the masks marks, if all mark as many."""
    numbers = masks.sum(dim=-1).unique().tolist()
    return numbers[0] if len(numbers) == 1 else None


def shares(parts: list[MicroBatch], config: BridleConfig, accelerator: Accelerator) -> torch.Tensor:
    """(micro batches, 2): what each holds of the decoded and of the real patches of all processes' batch.

    Times the number of processes, because gradients are averaged over them.
    """
    counts = []
    for part in parts:
        real = part.real(config)
        if real is None:
            real = part.bool_masked_pos.new_ones(len(part.inputs), part.bool_masked_pos.shape[-1], dtype=torch.bool)
        decoded = part.bool_masked_pos if part.bool_decoded_pos is None else part.bool_decoded_pos
        counts.append(torch.stack([mask_rows(decoded.bool(), real).sum(), real.sum()]))
    counts = torch.stack(counts).float()
    return counts * accelerator.num_processes / accelerator.reduce(counts.sum(dim=0), "sum")
