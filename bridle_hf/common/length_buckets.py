"""Length buckets: inputs of many lengths in groups of similar ones, so that little of what is computed is padding."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from bridle_hf import BridleConfig
from bridle_hf.patching_bridle import patch_attention_mask, patch_grid_of, silence_padding


MOST_PADDING = 0.05  # share of a group


def length_buckets(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of `lengths` in groups, longest first; those of equal length stay in their order.

    A group, padded to its longest, is of `most` in all or less (unless one alone is longer), of which `MOST_PADDING`
    or less is padding.
    """
    groups: list[list[int]] = []
    filled = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        padded = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else math.inf
        filled += lengths[place]
        if padded <= most and filled >= (1 - MOST_PADDING) * padded:
            groups[-1].append(place)
        else:
            groups.append([place])
            filled = lengths[place]
    return groups


def real_patches(inputs: torch.Tensor, attention_mask: torch.Tensor | None, config: BridleConfig) -> list[int]:
    """Of each input, how many patches are no padding: its first ones."""
    if attention_mask is None:
        return [math.prod(patch_grid_of(inputs, config))] * len(inputs)
    return patch_attention_mask(attention_mask, config).sum(dim=1).tolist()


def cut_inputs(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    places: list[int],
    num_real: list[int],
    patches: int,
    config: BridleConfig,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some of the inputs, cut to their first `patches`; and their attention mask, `None` where no patch is padding.

    Args:
        num_real: of those inputs, see [`real_patches`].
    """
    consecutive = places == list(range(places[0], places[0] + len(places)))
    rows = slice(places[0], places[0] + len(places)) if consecutive else places
    inputs = inputs[rows]
    if attention_mask is None:
        return inputs, None
    frames = patches // config.patch_grid[1] * config.patch_shape[1]
    inputs, attention_mask = inputs[:, :frames], attention_mask[rows, :frames]
    if min(num_real) < patches:
        return inputs, attention_mask
    # What is left of padding lies within an input's last patch.
    return silence_padding(inputs, None if attention_mask.all() else attention_mask), None


def parts_by_length(
    inputs: torch.Tensor, attention_mask: torch.Tensor | None, config: BridleConfig
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor | None]]:
    """A batch in [`length_buckets`]: the places of some inputs, those inputs, cut to the longest, and their attention
    mask, `None` where no patch is padding."""
    num_real = real_patches(inputs, attention_mask, config)
    for places in length_buckets(num_real, len(inputs) * max(num_real)):
        numbers = [num_real[place] for place in places]
        yield places, *cut_inputs(inputs, attention_mask, places, numbers, max(numbers), config)


def in_batch_order(places: Iterable[list[int]], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """What became of the parts of a batch, (inputs of a part, ...) each, as one tensor in the order of the batch."""
    order = torch.tensor([place for part in places for place in part]).argsort()
    return torch.cat(list(rows))[order.to(rows[0].device)]
