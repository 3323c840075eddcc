"""Micro batches: the parts that a process's batch is cut into, by length, and what each counts for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from bridle_hf import BridleConfig
from bridle_hf.common.length_buckets import cut_inputs, length_buckets, real_patches
from bridle_hf.patching_bridle import INPUT_NAMES, mask_rows, patch_attention_mask, patch_grid_of


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a batch, on the device.

    Args:
        inputs: the modality's input, (samples, ...).
        attention_mask: (samples, frames) of audio, or `None` where no patch is padding.
        bool_masked_pos: (samples, patches), or (samples, masks, patches), True = hidden.
        bool_decoded_pos: of the same shape, True = hidden and decoded; `None`: all that are hidden.
        bool_dropped_pos: (samples, patches), True = left out where a tokenizer is trained; `None`: none are.
        samples: which samples of this process's batch these are.
        num_real: of each, how many of its patches are no padding.
        num_kept: of each, how many of those are not dropped.
        all_decoded, all_visible: how many patches are decoded, and left visible, of all masks.
        num_visible, num_decoded: patches that each mask leaves visible, and that are decoded of each, where all masks
            are alike; else `None`.
    """

    inputs: torch.Tensor
    attention_mask: torch.Tensor | None
    bool_masked_pos: torch.Tensor
    bool_decoded_pos: torch.Tensor | None
    bool_dropped_pos: torch.Tensor | None
    samples: list[int]
    num_real: list[int]
    num_kept: list[int]
    all_decoded: int
    all_visible: int
    num_visible: int | None
    num_decoded: int | None

    @property
    def masks_per_sample(self) -> int:
        return self.bool_masked_pos.shape[:-1].numel() // len(self.inputs)

    @property
    def num_patches(self) -> int:
        """Patches of all samples, padding included."""
        return len(self.inputs) * self.bool_masked_pos.shape[-1]

    @property
    def dropout(self) -> dict[str, Any]:
        """What teacher and tokenizer are told of the patches that are left out, by name of the argument."""
        if self.bool_dropped_pos is None:
            return {}
        return {"bool_masked_pos": self.bool_dropped_pos, "num_visible": _equal_number(self.num_kept)}

    def real(self, config: BridleConfig) -> torch.Tensor | None:
        """(samples, patches) bool, which patches are real, or `None` where all are."""
        return None if self.attention_mask is None else patch_attention_mask(self.attention_mask, config)


def micro_batches(
    batch: dict[str, Any],
    config: BridleConfig,
    size: int | None,
    device: torch.device,
    by_length: bool = True,
    agree: Callable[[int], int] | None = None,
) -> Iterator[MicroBatch]:
    """A batch in parts, each of as many patches as `size` samples of full length have, or fewer; `None`: of all.

    Args:
        by_length: samples of which some are padded are put together by length, see [`length_buckets`], and cut to the
            longest of their part. Else a part is `size` samples in the batch's order, with all of their padding.
        agree: given how many parts there are, says how many to make: not fewer, and not more than samples.
    """
    inputs, attention_mask = batch[INPUT_NAMES[config.modality]], batch.get("attention_mask")
    count, full = len(inputs), math.prod(patch_grid_of(inputs, config))
    size = size or count
    # All of this on the CPU, where the batch still is: no host waits for its device.
    num_real = real_patches(inputs, attention_mask, config)
    by_length = by_length and min(num_real) < full
    groups = [list(range(count))[first : first + size] for first in range(0, count, size)]
    if by_length:
        groups = length_buckets(num_real, size * full)
    if agree is not None:
        groups = _split(groups, agree(len(groups)))
    for samples in groups:
        numbers = [num_real[sample] for sample in samples]
        yield _micro_batch(batch, config, samples, numbers, max(numbers) if by_length else full, device)


def _split(groups: list[list[int]], number: int) -> list[list[int]]:
    """Into `number` groups, by halves of the largest."""
    groups = list(groups)
    while len(groups) < number:
        largest = max(range(len(groups)), key=lambda place: len(groups[place]))
        half = len(groups[largest]) // 2
        groups[largest : largest + 1] = groups[largest][:half], groups[largest][half:]
    return groups


def _micro_batch(
    batch: dict[str, Any],
    config: BridleConfig,
    samples: list[int],
    num_real: list[int],
    patches: int,
    device: torch.device,
) -> MicroBatch:
    """Some samples of a batch, cut to the first `patches`."""
    inputs, attention_mask = cut_inputs(
        batch[INPUT_NAMES[config.modality]], batch.get("attention_mask"), samples, num_real, patches, config
    )
    masked, decoded, dropped = (
        None if masks is None else masks[samples, ..., :patches]
        for masks in (batch["bool_masked_pos"], batch.get("bool_decoded_pos"), batch.get("bool_dropped_pos"))
    )
    real = torch.arange(patches) < torch.tensor(num_real)[:, None]
    counted = masked.bool() if decoded is None else masked.bool() & decoded.bool()
    visible, counted = (mask_rows(masks, real).sum(dim=1).tolist() for masks in (~masked.bool(), counted))
    return MicroBatch(
        *(
            None if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (inputs, attention_mask, masked, decoded, dropped)
        ),
        samples=samples,
        num_real=num_real,
        num_kept=num_real if dropped is None else (real & ~dropped).sum(dim=1).tolist(),
        all_decoded=sum(counted),
        all_visible=sum(visible),
        num_visible=_equal_number(visible),
        num_decoded=_equal_number(counted),
    )


def _equal_number(numbers: list[int]) -> int | None:
    """That of every row, if all are alike, and not 0."""
    return (numbers[0] or None) if len(set(numbers)) == 1 else None


def sample_order(parts: list[MicroBatch], kept: bool = False) -> torch.Tensor | None:
    """(real patches,) int64: what brings the real patches of all parts, or those that are `kept`, into the order of
    the batch's samples; `None` where they are."""
    samples = [sample for part in parts for sample in part.samples]
    if samples == sorted(samples):
        return None
    num_real = torch.tensor([number for part in parts for number in (part.num_kept if kept else part.num_real)])
    order = torch.tensor(samples).repeat_interleave(num_real).argsort(stable=True)
    return order.to(parts[0].inputs.device, non_blocking=True)


def shares(parts: list[MicroBatch], accelerator: Accelerator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What each of the micro batches holds of all processes' batch, and how much of that is padding.

    Returns:
        (micro batches, 3): shares of the decoded, the kept and the visible patches, times the number of processes,
        because gradients are averaged over them. And metrics: `input/padding`, the share of the patches that is
        padding, and `input/patches`, how many a sample has, padding included.
    """
    counts = [
        [part.all_decoded, sum(part.num_kept), part.all_visible, sum(part.num_real), part.num_patches,
         len(part.samples)]
        for part in parts
    ]  # fmt: skip
    counts = torch.tensor(counts, dtype=torch.float32, device=accelerator.device)
    _, _, _, real, patches, samples = total = accelerator.reduce(counts.sum(dim=0), "sum")
    metrics = {"input/padding": 1 - real / patches, "input/patches": patches / samples}
    return counts[:, :3] * accelerator.num_processes / total[:3], metrics
