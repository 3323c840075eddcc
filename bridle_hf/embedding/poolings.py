"""Poolings of hidden states: means over the patches, mean and deviation, per mel band or region, of chosen layers.

Pure functions of tokens (batch, patches, dim), the grid that they lie on in row-major order, and which of them are
real (batch, patches; all of them if not given): whole steps along the grid's first axis, the time of audio.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch


# Cells per side of an image or of the frames of a video, for `region_mean`; no more than there are patches.
REGIONS_A_SIDE = 4

Layers = int | Sequence[int] | Literal["mean", "all"]
# (tokens, grid, real) -> (batch, features)
Pooling = Callable[..., torch.Tensor]


def pool_cells(
    tokens: torch.Tensor, grid: Sequence[int], real: torch.Tensor | None, cells: Sequence[int]
) -> torch.Tensor:
    """Means over the cells of a coarser grid.

    Cells along an axis are those of `torch.nn.functional.adaptive_avg_pool2d`: equal up to one patch, which two
    neighbours then share. Along the first axis they divide what is real of a sample, not its padding.

    Args:
        cells: how many along each axis of `grid`.

    Returns:
        (batch, cells, dim), row-major.

    Raises:
        ValueError: more cells than (real) patches along an axis, or tokens that are not those of the grid.
    """
    if tokens.shape[1] != math.prod(grid) or len(cells) != len(grid):
        raise ValueError(f"{tokens.shape[1]} tokens, a grid of {tuple(grid)} and {tuple(cells)} cells do not fit")
    positions = [torch.arange(size, device=tokens.device).expand(len(tokens), -1) for size in grid]
    sizes = [tokens.new_full((len(tokens),), size, dtype=torch.int64) for size in grid]
    if real is not None:
        steps = real.view(len(tokens), grid[0], -1).any(dim=2).long()
        positions[0], sizes[0] = steps.cumsum(dim=1) - 1, steps.sum(dim=1)
    weights = tokens.new_ones(len(tokens), 1, 1)
    for position, size, count in zip(positions, sizes, cells):
        if (size < count).any():
            raise ValueError(f"{count} cells along an axis of the grid {tuple(grid)}, which has fewer real patches")
        members = _members(position, size, count).to(tokens.dtype)
        weights = torch.einsum("bcp,bkl->bckpl", weights, members).flatten(3).flatten(1, 2)
    if real is not None:
        weights = weights * real[:, None].to(tokens.dtype)
    return torch.bmm(weights / weights.sum(dim=2, keepdim=True), tokens)


def _members(position: torch.Tensor, size: torch.Tensor, count: int) -> torch.Tensor:
    """(batch, count, length) bool: which `position` (batch, length) of `size` (batch,) is in which cell."""
    position, size = position[:, None], size[:, None, None]
    cell = torch.arange(count, device=size.device)[None, :, None]
    return (position >= cell * size // count) & (position < -((cell + 1) * size // -count))


def mean(tokens: torch.Tensor, grid: Sequence[int], real: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, dim)."""
    return pool_cells(tokens, grid, real, [1] * len(grid))[:, 0]


def mean_std(tokens: torch.Tensor, grid: Sequence[int], real: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, 2 * dim): the mean, then the standard deviation."""
    average = mean(tokens, grid, real)
    variance = mean((tokens - average[:, None]).square(), grid, real)
    return torch.cat([average, variance.sqrt()], dim=1)


def band_mean(tokens: torch.Tensor, grid: Sequence[int], real: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, bands * dim): the mean over time of each mel band, the lowest first. Pitch lives there."""
    return pool_cells(tokens, grid, real, (1, grid[1])).flatten(1)


def region_mean(tokens: torch.Tensor, grid: Sequence[int], real: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, regions * dim): the mean of each of 4 x 4 regions of an image, or of a video's frames over time."""
    *times, height, width = grid
    cells = (*(1 for _ in times), min(height, REGIONS_A_SIDE), min(width, REGIONS_A_SIDE))
    return pool_cells(tokens, grid, real, cells).flatten(1)


def with_deviation(pooling: Pooling) -> Pooling:
    """A pooling, and after it the standard deviation over all patches."""

    def pooled(tokens: torch.Tensor, grid: Sequence[int], real: torch.Tensor | None = None) -> torch.Tensor:
        deviation = mean_std(tokens, grid, real)[:, tokens.shape[2] :]
        return torch.cat([pooling(tokens, grid, real), deviation], dim=1)

    return pooled


POOLINGS: dict[str, Pooling] = {"mean": mean, "mean_std": mean_std, "band_mean": band_mean, "region_mean": region_mean}

# Those that mean something for a modality's grid.
POOLINGS_OF = {
    "audio": ("mean", "mean_std", "band_mean"),
    "image": ("mean", "mean_std", "region_mean"),
    "video": ("mean", "mean_std", "region_mean"),
}


def merge_windows(pooling: str, parts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """What pooling a whole recording gives, from its windows, pooled one by one.

    Args:
        parts: (windows, ..., features).
        weights: of each window, how much of the recording it stands for.

    Returns:
        (..., features), of the type of `parts`.
    """
    if len(parts) == 1:
        return parts[0]
    average = np.average(parts.astype(np.float64), axis=0, weights=weights)
    if pooling == "mean_std":
        means, deviations = np.split(parts.astype(np.float64), 2, axis=-1)
        half = average.shape[-1] // 2
        variance = np.average(deviations**2 + (means - average[..., :half]) ** 2, axis=0, weights=weights)
        average[..., half:] = np.sqrt(variance)
    return average.astype(parts.dtype)


def select_layers(states: Sequence[torch.Tensor], layers: Layers = -1) -> torch.Tensor:
    """One tensor of the layers chosen.

    Args:
        states: (batch, tokens, dim) each: the embedding, then the output of each layer; that of the last one is the
            encoder's, after its final norm.
        layers: an index into `states`; several, which are concatenated along `dim` in the order given; "mean", the
            mean of all layers but the embedding; or "all", each of `states` for itself.

    Returns:
        (batch, tokens, dim times the number of indices); for "all" (batch, states, tokens, dim).

    Raises:
        ValueError: there is no such layer, or none is asked for.
    """
    if layers == "all":
        return torch.stack(tuple(states), dim=1)
    if layers == "mean":
        return torch.stack(tuple(states[1:])).mean(dim=0)
    indices = [layers] if isinstance(layers, int) else layers
    if isinstance(indices, str) or not indices or not all(isinstance(index, int) for index in indices):
        raise ValueError(f"layers {layers!r}: give an index, several, 'mean' or 'all'")
    if wrong := [index for index in indices if not -len(states) <= index < len(states)]:
        raise ValueError(
            f"layers {layers!r}: there is no layer {wrong[0]}, but 0 (the embedding) to {len(states) - 1}"
        )
    return torch.cat([states[index] for index in indices], dim=-1)
