"""Which patches are hidden from the encoder. Pure functions of a grid, a ratio and a random generator.

Every mask of one kind, grid and ratio hides the same number of patches, so that batches stay rectangular.
"""

import math

import torch


def random_mask(grid: tuple[int, ...], ratio: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Patches drawn uniformly (MAE). Returns (patches,) bool, True = hidden."""
    num_patches = math.prod(grid)
    return _hide_highest(torch.rand(num_patches, generator=generator), num_hidden(num_patches, ratio))


def time_frequency_mask(grid: tuple[int, ...], ratio: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Whole time columns and whole mel rows, the last one in part so that the count is exact (Audio-MAE).

    A patch is as hidden as the more hidden of its column and its row. Returns (time * mel,) bool, True = hidden.
    """
    time, mel = _two_axes(grid, "time_frequency")
    columns, rows = torch.rand(time, 1, generator=generator), torch.rand(1, mel, generator=generator)
    return _hide_highest(torch.maximum(columns, rows).flatten(), num_hidden(time * mel, ratio))


def mel_band_mask(grid: tuple[int, ...], ratio: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Whole mel rows over the whole time, as many as come nearest to `ratio`, at least one hidden and one visible.

    On steady sounds a random mask is solved by copying along time; this one is not.
    Returns (time * mel,) bool, True = hidden.
    """
    time, mel = _two_axes(grid, "mel_band")
    if mel < 2:
        raise ValueError(f"mask 'mel_band' needs at least 2 rows of patches along mel, the grid is {grid}")
    hidden = min(max(round(mel * ratio), 1), mel - 1)
    rows = _hide_highest(torch.rand(mel, generator=generator), hidden)
    return rows.expand(time, mel).flatten()


def tube_mask(grid: tuple[int, ...], ratio: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """One random spatial mask for all frames (VideoMAE). Returns (time * height * width,) bool, True = hidden."""
    if len(grid) != 3:
        raise ValueError(f"mask 'tube' needs a (time, height, width) grid, got {grid}")
    return random_mask(grid[1:], ratio, generator).repeat(grid[0])


def block_mask(grid: tuple[int, ...], ratio: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Rectangles of random size and aspect (BEiT) until the count is reached; the same for all frames of a video.

    Returns (patches,) bool, True = hidden.
    """
    height, width = grid[-2:]
    count = num_hidden(height * width, ratio)
    # The order in which patches were covered, so that the last rectangle can be trimmed to the exact count.
    order = torch.zeros(height, width)
    covered = 0
    while covered < count:
        area = math.exp(_uniform(math.log(min(4, count)), math.log(max(4, count / 2)), generator))
        aspect = math.exp(_uniform(math.log(0.3), math.log(1 / 0.3), generator))
        block_height = min(height, max(1, round(math.sqrt(area * aspect))))
        block_width = min(width, max(1, round(math.sqrt(area / aspect))))
        top = int(_uniform(0, height - block_height + 1, generator))
        left = int(_uniform(0, width - block_width + 1, generator))
        block = order[top : top + block_height, left : left + block_width]
        block[block == 0] = 1.0 / (covered + 1)
        covered = int((order > 0).sum())
    spatial = _hide_highest((order + 1e-6 * torch.rand(order.shape, generator=generator)).flatten(), count)
    return spatial.repeat(math.prod(grid[:-2]))


MASKS = {
    "random": random_mask,
    "time_frequency": time_frequency_mask,
    "mel_band": mel_band_mask,
    "tube": tube_mask,
    "block": block_mask,
}


def make_mask(
    kind: str,
    grid: tuple[int, ...],
    ratio: float,
    generator: torch.Generator | None = None,
    padded_grid: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """A mask of one of `MASKS` over the real `grid`, padding (never hidden) appended along the first axis.

    Args:
        padded_grid: grid of the batch; it may be longer than `grid` along the first axis alone.

    Returns:
        (patches of `padded_grid`,) bool, True = hidden.

    Raises:
        ValueError: the kind is unknown, or does not fit the grid.
    """
    if kind not in MASKS:
        raise ValueError(f"mask '{kind}' is unknown; choose from {sorted(MASKS)}")
    mask = MASKS[kind](grid, ratio, generator)
    if padded_grid is None or tuple(padded_grid) == tuple(grid):
        return mask
    if tuple(padded_grid[1:]) != tuple(grid[1:]) or padded_grid[0] < grid[0]:
        raise ValueError(f"a mask over {grid} cannot be padded to {padded_grid}")
    return torch.cat([mask, mask.new_zeros(math.prod(padded_grid) - mask.numel())])


def num_hidden(num_patches: int, ratio: float) -> int:
    """Patches hidden of `num_patches`: all but `floor(num_patches * (1 - ratio))`, at least one kept.

    MAE rounds so; VideoMAE hides `floor(num_patches * ratio)`: of 196 at 0.9 it keeps 20, this 19.
    """
    # Rounded first: in floating point, 10 * (1 - 0.8) is a little under 2.
    return num_patches - max(1, math.floor(round(num_patches * (1 - ratio), 6)))


def visible_patches(visible: torch.Tensor, number: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the visible patches, in grid order, as a rectangle.

    Args:
        visible: (batch, patches) bool.
        number: how many there are in each row, where all rows have as many. Not to be counted, they keep no host
            waiting for its device.

    Returns:
        `indices` (batch, most visible in any row) int64, and `valid` of the same shape: False where a row has fewer;
        the index there points at some patch that is not visible.

    Raises:
        ValueError: no row has a visible patch.
    """
    if number is not None:
        return _first_of(visible, number)
    most = visible.sum(dim=1).max().item()
    # torch's own check, because torch.compile learns from it that there is at least one.
    torch._check_value(most > 0, lambda: "no patch is visible: the mask hides all of them")
    return _first_of(visible, most)


def chosen_patches(chosen: torch.Tensor, number: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`visible_patches`], of any choice of patches; one column that is not valid where none is chosen."""
    if number:
        return _first_of(chosen, number)
    most = chosen.sum(dim=1).max().clamp(min=1).item()
    torch._check(most > 0)
    return _first_of(chosen, most)


def _first_of(chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)[:, :most]
    return indices, chosen.gather(1, indices)


def draw_share(chosen: torch.Tensor, share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """A random `share` of the chosen patches of each row, rounded, at least one; all of them where it is 1.

    Args:
        chosen: (rows, patches) bool.

    Returns:
        (rows, patches) bool.
    """
    if share == 1.0:
        return chosen
    scores = torch.rand(chosen.shape, generator=generator, device=chosen.device).masked_fill(~chosen, -1.0)
    ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
    kept = (chosen.sum(dim=1, keepdim=True) * share).round().clamp(min=1)
    return chosen & (ranks < kept)


def _hide_highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask


def _two_axes(grid: tuple[int, ...], kind: str) -> tuple[int, int]:
    if len(grid) != 2:
        raise ValueError(f"mask '{kind}' needs a (time, mel) grid, got {grid}")
    return grid[0], grid[1]


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


__all__ = [
    "MASKS",
    "block_mask",
    "chosen_patches",
    "draw_share",
    "make_mask",
    "mel_band_mask",
    "num_hidden",
    "random_mask",
    "time_frequency_mask",
    "tube_mask",
    "visible_patches",
]
