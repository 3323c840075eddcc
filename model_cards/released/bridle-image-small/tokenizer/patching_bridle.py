"""Patches: the input of any modality cut into them, their grid, positions, attention mask and embeddings.

This is the one place of the model where audio, image and video differ: all three are seen as (batch, channels,
frames, height, width), with time as height and mel as width for audio, and one frame for audio and images.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_bridle import BridleEncoderConfig
from .masking_bridle import visible_patches


INPUT_NAMES = {"audio": "input_values", "image": "pixel_values", "video": "pixel_values_videos"}
_LAYOUTS = {
    "audio": "(batch, frames, mel bins)",
    "image": "(batch, channels, height, width)",
    "video": "(batch, frames, channels, height, width)",
}


def select_input(
    config: BridleEncoderConfig,
    inputs: torch.Tensor | None = None,
    input_values: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    pixel_values_videos: torch.Tensor | None = None,
) -> torch.Tensor:
    """The one input that was given, by position or by a name that fits the modality.

    Raises:
        ValueError: none, several, or one of another modality was given.
    """
    named = {
        "inputs": inputs,
        "input_values": input_values,
        "pixel_values": pixel_values,
        "pixel_values_videos": pixel_values_videos,
    }
    given = [name for name, value in named.items() if value is not None]
    # `pixel_values` for video is what VideoMAE's processor returns.
    accepted = {"inputs", INPUT_NAMES[config.modality]} | ({"pixel_values"} if config.modality == "video" else set())
    if len(given) != 1 or given[0] not in accepted:
        raise ValueError(
            "exactly one of `input_values` (audio), `pixel_values` (image) and `pixel_values_videos` (video) must be "
            f"given, and this model is for {config.modality}: pass `{INPUT_NAMES[config.modality]}`; "
            f"got {given or 'none'}"
        )
    return named[given[0]]


def patch_grid_of(values: torch.Tensor, config: BridleEncoderConfig) -> tuple[int, ...]:
    """The grid of patches that an input has, from its shape alone: (time, mel), (height, width) or (time, height,
    width). Audio counts as padded to whole patches in time.

    Raises:
        ValueError: wrong number of dimensions, channels or mel bins, or a size that patches do not divide.
    """
    if values.dim() != {"audio": 3, "image": 4, "video": 5}[config.modality]:
        raise ValueError(
            f"`{INPUT_NAMES[config.modality]}` must be {_LAYOUTS[config.modality]}, got shape {tuple(values.shape)}"
        )
    if config.modality == "audio":
        frames, mel_bins = values.shape[1:]
        if mel_bins != config.num_mel_bins:
            raise ValueError(f"`input_values` has {mel_bins} mel bins, the model was built for {config.num_mel_bins}")
        channels, sizes = 1, (1, whole_patches(frames, config), mel_bins)
    elif config.modality == "image":
        channels, sizes = values.shape[1], (1, *values.shape[2:])
    else:
        channels, sizes = values.shape[2], (values.shape[1], *values.shape[3:])
    if channels != config.num_channels:
        raise ValueError(f"the input has {channels} channels, the model was built for {config.num_channels}")
    if values.numel() == 0 or any(size % patch for size, patch in zip(sizes, config.patch_shape)):
        raise ValueError(
            f"an input of (frames, height, width) {tuple(sizes)} cannot be cut into patches of {config.patch_shape}"
        )
    grid = tuple(size // patch for size, patch in zip(sizes, config.patch_shape))
    return grid if config.modality == "video" else grid[1:]


def whole_patches(frames: int, config: BridleEncoderConfig) -> int:
    """Frames of audio, padded to whole patches. So written, torch.export sees that any number divides."""
    time = config.patch_shape[1]
    return (frames + time - 1) // time * time


def patchify(values: torch.Tensor, config: BridleEncoderConfig) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Cut an input into its patches.

    Returns:
        Patches (batch, patches, channels * frames * height * width of a patch), in row-major order of the grid, and
        the grid: (time, mel), (height, width) or (time, height, width).

    Raises:
        ValueError: as [`patch_grid_of`].
    """
    grid = patch_grid_of(values, config)
    volume = to_volume(values, config)
    frames, height, width = config.patch_shape
    times, rows, columns = grid if config.modality == "video" else (1, *grid)
    patches = volume.reshape(*volume.shape[:2], times, frames, rows, height, columns, width)
    # By way of one axis: merging some of several, torch.export asks for proofs about the length that it cannot find.
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten()
    return patches.view(values.shape[0], math.prod(grid), config.patch_dim), grid


def to_volume(values: torch.Tensor, config: BridleEncoderConfig) -> torch.Tensor:
    """Any modality as (batch, channels, frames, height, width); audio is padded with 0 to whole patches in time.

    Raises:
        ValueError: as [`patch_grid_of`].
    """
    patch_grid_of(values, config)
    if config.modality == "audio":
        padding = whole_patches(values.shape[1], config) - values.shape[1]
        return nn.functional.pad(values, (0, 0, 0, padding))[:, None, None]
    return values[:, :, None] if config.modality == "image" else values.transpose(1, 2)


def silence_padding(values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros where `attention_mask` says padding: what it holds must not leak into the patch of the clip's end.

    Raises:
        ValueError: `attention_mask` does not fit `values`.
    """
    if attention_mask is None:
        return values
    if attention_mask.shape != values.shape[:2]:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; for this input it must be "
            f"{tuple(values.shape[:2])}: (batch, frames)"
        )
    return values.masked_fill(~attention_mask.bool()[:, :, None], 0.0)


def patch_attention_mask(attention_mask: torch.Tensor, config: BridleEncoderConfig) -> torch.Tensor:
    """Which patches are real: those with at least one real frame.

    Args:
        attention_mask: (batch, frames) of audio, non-zero = real, padding at the end.

    Returns:
        (batch, patches) bool.

    Raises:
        ValueError: the modality takes no `attention_mask`.
    """
    if config.modality != "audio":
        raise ValueError("`attention_mask` counts the frames of audio; images and video take none")
    time, mel = config.patch_shape[1], config.patch_grid[1]
    padding = whole_patches(attention_mask.shape[1], config) - attention_mask.shape[1]
    frames = nn.functional.pad(attention_mask.bool(), (0, padding))
    steps = frames.unflatten(1, (-1, time)).any(dim=2)
    return steps[:, :, None].expand(-1, -1, mel).flatten().view(steps.shape[0], steps.shape[1] * mel)


def sincos_positions(grid: tuple[int, ...], dim: int) -> torch.Tensor:
    """Fixed sin-cos positions, (patches, dim) float32.

    A 2-D grid has half of the channels for the column and half for the row, each sines then cosines (MAE); a 3-D grid
    has 1-D positions over the flattened grid, sines and cosines interleaved (VideoMAE).
    """
    if len(grid) == 3:
        positions = torch.arange(math.prod(grid), dtype=torch.float64)
        rates = 10000.0 ** (-2.0 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
        angles = positions[:, None] * rates
        table = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())
    else:
        rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
        rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
        angles = [axis.flatten()[:, None] * rates for axis in (columns, rows)]
        if torch.compiler.is_exporting():
            # Not every runtime has sines of float64.
            angles = [(angle % (2 * math.pi)).float() for angle in angles]
        table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    # float64 up to here: an angle of thousands of radians is not exact enough in float32.
    return table.float()


class BridlePositions(nn.Module):
    """Positions of a grid of patches: the table of the full-size grid, or computed where the grid is another one."""

    def __init__(self, config: BridleEncoderConfig, dim: int):
        super().__init__()
        self.grid, self.dim = config.patch_grid, dim
        self.cuts_time = config.modality == "audio"
        self.stored = config.position_embedding_type == "table"
        # Buffers: a table that can be computed need not be saved.
        self.register_buffer("table", sincos_positions(self.grid, dim), persistent=self.stored)

    def reset(self) -> None:
        init.copy_(self.table, sincos_positions(self.grid, self.dim))

    def resize(self, grid: tuple[int, ...]) -> None:
        """Take `grid` for the full-size one: a stored table goes to it, and any other is that which is computed."""
        if tuple(grid) != tuple(self.grid):
            table = self(grid, interpolate=True)[0] if self.stored else sincos_positions(grid, self.dim)
            self.grid, self.table = grid, table.to(self.table)

    def forward(self, grid: tuple[int, ...], interpolate: bool = False) -> torch.Tensor:
        """(1, patches of `grid`, dim) float32; with `interpolate`, of another grid than the table's, between its.

        A recording that is shorter than the table has the table's first steps, interpolated or not.
        """
        # An exported program takes any length: comparing lengths would hold it to one side of the table's.
        exported = torch.compiler.is_exporting() and not self.stored
        is_prefix = not exported and tuple(grid[1:]) == tuple(self.grid[1:]) and grid[0] <= self.grid[0]
        if interpolate and tuple(grid) != tuple(self.grid) and not (is_prefix and self.cuts_time):
            return self._interpolated(grid)
        if is_prefix:
            # Row-major order: fewer steps along the first axis are a prefix.
            return self.table[None, : math.prod(grid)]
        if self.stored:
            raise ValueError(
                f"this checkpoint stores positions for a grid of {self.grid} patches and cannot take {tuple(grid)}; "
                "shorten the input, pass interpolate_pos_encoding=True, or build the model with "
                "position_embedding_type='sincos'"
            )
        return sincos_positions(grid, self.dim).to(self.table.device)[None]

    def _interpolated(self, grid: tuple[int, ...]) -> torch.Tensor:
        """(1, patches, dim), bicubic; of videos trilinear."""
        table = self.table.float().unflatten(0, self.grid).movedim(-1, 0)[None]
        mode = "bicubic" if len(grid) == 2 else "trilinear"
        table = nn.functional.interpolate(table, size=tuple(grid), mode=mode, align_corners=False)
        return table.flatten(2).transpose(1, 2)


class BridleEmbeddings(nn.Module):
    """Visible patches, projected and with their positions, after the class token."""

    def __init__(self, config: BridleEncoderConfig):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.patch_dim, config.hidden_size)
        self.positions = BridlePositions(config, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_class_token else None

    def forward(
        self,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_visible: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            values: the modality's input.
            attention_mask: (batch, frames) of audio, 1 = real.
            bool_masked_pos: (batch, patches) bool, True = hidden; or (batch, masks, patches).
            interpolate_pos_encoding, num_visible: see [`BridleModel.forward`].

        Returns:
            Embeddings (batch, [class] + visible patches, hidden), and which of them are real (same shape without
            hidden, bool), or `None` where all are. Of several masks, batch * masks rows, those of a sample in a row.
        """
        patches, grid = patchify(silence_padding(values, attention_mask), self.config)
        real = None if attention_mask is None else patch_attention_mask(attention_mask, self.config)
        positions = self.positions(grid, interpolate_pos_encoding).expand(patches.shape[0], -1, -1)
        indices = None
        if bool_masked_pos is not None:
            check_mask_shape("bool_masked_pos", bool_masked_pos, patches.shape[0], grid)
            indices, real = visible_patches(mask_rows(~bool_masked_pos.bool(), real), num_visible)
            real = real if num_visible is None else None
        # One mask: visible patches alone are projected. Several: all patches, once.
        once = indices is not None and bool_masked_pos.dim() == 3
        if indices is not None and not once:
            patches, positions = (take_patches(tensor, indices) for tensor in (patches, positions))
        dtype = parameter_dtype(self)
        embeddings = self.projection(patches.to(dtype)) + positions.to(dtype)
        if once:
            embeddings = take_patches(embeddings, indices.reshape(patches.shape[0], -1)).view(*indices.shape, -1)
        if self.cls_token is not None:
            cls = self.cls_token.expand(embeddings.shape[0], -1, -1).to(embeddings.dtype)
            embeddings = torch.cat([cls, embeddings], dim=1)
            real = None if real is None else nn.functional.pad(real, (1, 0), value=True)
        return embeddings, real


def mask_rows(masks: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Masks (batch, patches) or (batch, masks, patches), of `real` (batch, patches) alone, as rows of patches."""
    if real is not None:
        masks = masks & (real if masks.dim() == 2 else real[:, None])
    return masks.flatten(0, -2)


def take_patches(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of (batch, patches, dim) named by `indices` (batch, some)."""
    return tensor.gather(1, indices[:, :, None].expand(-1, -1, tensor.shape[-1]))


def check_patch_shape(name: str, tensor: torch.Tensor, batch: int, grid: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless `tensor` is (`batch`, patches of `grid`, ...)."""
    expected = (batch, math.prod(grid))
    if tensor.shape[:2] != expected:
        raise ValueError(
            f"`{name}` has shape {tuple(tensor.shape)}; for this input it must start with {expected}: "
            f"(batch, patches of the grid {tuple(grid)})"
        )


def check_mask_shape(name: str, mask: torch.Tensor, batch: int, grid: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless `mask` is (`batch`, patches of `grid`) or (`batch`, masks, patches of `grid`)."""
    expected = (batch, math.prod(grid))
    if mask.dim() not in (2, 3) or (mask.shape[0], mask.shape[-1]) != expected or mask.numel() == 0:
        raise ValueError(
            f"`{name}` has shape {tuple(mask.shape)}; for this input it must be {expected}, (batch, patches of the "
            f"grid {tuple(grid)}), or the same with several masks of each sample between the two"
        )


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """What a module computes in: the dtype of its first floating-point parameter.

    Never that of one `Linear.weight`: quantizers put integers, or a method, in its place. Where they left no
    floating-point parameter, float32.
    """
    return next((entry.dtype for entry in module.parameters() if entry.is_floating_point()), torch.float32)


__all__ = [
    "INPUT_NAMES",
    "BridleEmbeddings",
    "BridlePositions",
    "check_mask_shape",
    "check_patch_shape",
    "mask_rows",
    "parameter_dtype",
    "patch_attention_mask",
    "patch_grid_of",
    "patchify",
    "select_input",
    "silence_padding",
    "sincos_positions",
    "take_patches",
    "to_volume",
]
