"""Pictures of inputs: which patches are hidden, their codes, and the predicted codes beside the true ones; of several
beside each other; and of what sounds when.

Every function takes clips, images or videos without their batch dimension and returns a matplotlib `Figure` that
belongs to no window: `figure.savefig("codes.png")` writes it. Needs matplotlib, and librosa for the mel axis of audio:
`pip install 'bridle_hf[viz,audio]'`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .audio_windows_bridle import frame_shift, seconds_per_step
from .configuration_bridle import BridleEncoderConfig
from .feature_extraction_bridle import mel_bin_edges
from .patching_bridle import to_volume


try:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import ListedColormap, hsv_to_rgb, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError:
    Figure = None  # An extra: remote code must load without it.


# A blue-grey that neither a grey picture nor the colours of a spectrogram hold.
HIDDEN_COLOR, HATCH_COLOR = "#b4cadb", "#6d8ca5"
# Told apart by colour-blind readers too.
RIGHT_COLOR, WRONG_COLOR, NEUTRAL_COLOR = "#0072b2", "#f0b04a", "#ececec"
EVENT_COLOR = "#d55e00"
# With more patches than this, the number of a code no longer fits into its patch.
MAX_NUMBERED_PATCHES = 150
TITLE_SIZE = 10


def plot_masked_input(
    values: torch.Tensor,
    bool_masked_pos: torch.Tensor,
    config: BridleEncoderConfig,
    title: str | None = None,
    sampling_rate: int = 16000,
) -> "Figure":
    """An input beside (where it is wide: above) what the encoder sees of it.

    Args:
        values: what the processor returns, of one input: (frames, mel bins) of audio, (channels, height, width) of an
            image, (frames, channels, height, width) of a video, drawn as a strip of the first frame of each patch.
        bool_masked_pos: (patches,) bool, True = hidden from the encoder.
        sampling_rate: of audio, in Hz: its half is where the mel axis ends.
    """
    volume = to_volume(torch.as_tensor(values).detach().float().cpu()[None], config)[0].numpy()
    grid = tuple(size // patch for size, patch in zip(volume.shape[1:], config.patch_shape))
    hidden = _to_grid("bool_masked_pos", bool_masked_pos, config, grid).astype(bool)
    canvas = _Canvas(config, grid, sampling_rate)
    figure, axes = canvas.figure(panels=2)
    figure.suptitle(title or "One input and what the encoder sees of it")
    style = {"cmap": "magma" if config.modality == "audio" else "gray"}
    for ax in axes:
        image = canvas.draw(ax, _displayable(volume[:, :: config.patch_shape[0]]), **style)
    if config.modality == "audio":
        figure.colorbar(image, ax=axes, label="log-mel energy (normalised)", pad=0.02)
    axes[0].set_title("The whole input", fontsize=TITLE_SIZE)
    axes[1].set_title(f"Visible: {(~hidden).sum()} of {hidden.size} patches; the rest hatched", fontsize=TITLE_SIZE)
    cells = np.ma.masked_equal(canvas.arrange(hidden), False)
    color = ListedColormap([HIDDEN_COLOR])
    axes[1].pcolor(*canvas.edges(), cells, cmap=color, edgecolors=HATCH_COLOR, hatch="////", linewidth=0.4)
    return figure


def plot_codes(
    codes: torch.Tensor,
    config: BridleEncoderConfig,
    grid: Sequence[int] | None = None,
    title: str | None = None,
    sampling_rate: int = 16000,
) -> "Figure":
    """The codes of one input as colours on its grid of patches, one panel per level of the quantizer.

    Args:
        codes: (patches, num_codebooks) int: one row of what `BridleTokenizerModel.encode` returns.
        config: of the tokenizer or of the model that predicts its codes.
        grid: patches along each axis; those of a full-size input if not given.
        sampling_rate: of audio, in Hz.
    """
    cells = _to_grid("codes", codes, config, grid)
    canvas = _Canvas(config, cells.shape[:3], sampling_rate)
    figure, axes = canvas.figure(panels=cells.shape[3])
    figure.suptitle(title or "The code of each patch, by level (in a panel, same colour = same code)")
    for level, ax in enumerate(axes):
        _draw_codes(ax, cells[..., level], canvas)
        different = len(np.unique(cells[..., level]))
        ax.set_title(
            f"Level {level + 1}: {different} different codes (of {config.codebook_size})", fontsize=TITLE_SIZE
        )
    return figure


def plot_predictions(
    codes: torch.Tensor,
    predicted: torch.Tensor,
    bool_masked_pos: torch.Tensor,
    config: BridleEncoderConfig,
    grid: Sequence[int] | None = None,
    level: int = 0,
    title: str | None = None,
    sampling_rate: int = 16000,
) -> "Figure":
    """True codes, predicted codes and where they agree at one level; the accuracy of every level against chance.

    Args:
        codes, predicted: (patches, num_codebooks) int; predicted ones are the argmax of the logits.
        bool_masked_pos: (patches,) bool, True = hidden, so that the code had to be predicted.
        config: of the tokenizer or of the model that predicts its codes.
        grid: patches along each axis; those of a full-size input if not given.
        level: the level whose codes are drawn, from 0.
        sampling_rate: of audio, in Hz.
    """
    codes, predicted = _to_grid("codes", codes, config, grid), _to_grid("predicted", predicted, config, grid)
    hidden = _to_grid("bool_masked_pos", bool_masked_pos, config, grid).astype(bool)
    right = (codes == predicted) & hidden[..., None]
    accuracy = right.sum(axis=(0, 1, 2)) / max(hidden.sum(), 1)
    canvas = _Canvas(config, hidden.shape, sampling_rate)
    figure, axes = canvas.figure(panels=4)
    counted = f"{right[..., level].sum()} of {hidden.sum()} hidden patches right at level {level + 1}"
    chance = f"{accuracy[level]:.0%}; chance {1 / config.codebook_size:.1%}"
    figure.suptitle(f"{title or 'Predicted codes'}: {counted} ({chance})")
    _draw_codes(axes[0], codes[..., level], canvas)
    axes[0].set_title(f"True codes, level {level + 1}", fontsize=TITLE_SIZE)
    _draw_codes(axes[1], predicted[..., level], canvas, drawn=hidden)
    axes[1].set_title(f"Predicted codes, level {level + 1} (grey: not hidden)", fontsize=TITLE_SIZE)
    _draw_hits(axes[2], right[..., level], hidden, canvas)
    _draw_accuracy(axes[3], accuracy, codes[hidden], config.codebook_size)
    return figure


def plot_inputs(
    inputs: Sequence[torch.Tensor],
    titles: Sequence[str],
    config: BridleEncoderConfig,
    title: str | None = None,
    sampling_rate: int = 16000,
) -> "Figure":
    """Several inputs beside each other, as a query and its nearest neighbours.

    Args:
        inputs: as `values` of [`plot_masked_input`]; recordings may be of any lengths.
        titles: of each of them.
    """
    columns = min(len(inputs), {"audio": 3, "image": 4, "video": 1}[config.modality])
    rows = math.ceil(len(inputs) / columns)
    figure = _new_figure((9.0, rows * (2.1 if config.modality != "video" else 1.6) + 0.5))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[len(inputs) :]:
        unused.remove()
    for number, (values, name) in enumerate(zip(inputs, titles, strict=True)):
        volume = to_volume(torch.as_tensor(values).detach().float().cpu()[None], config)[0].numpy()
        grid = tuple(size // patch for size, patch in zip(volume.shape[1:], config.patch_shape))
        style = {"cmap": "magma" if config.modality == "audio" else "gray"}
        ax = axes[number]
        _Canvas(config, grid, sampling_rate).draw(ax, _displayable(volume[:, :: config.patch_shape[0]]), **style)
        if config.modality == "audio":
            seconds = len(values) * frame_shift(sampling_rate) / sampling_rate
            ax.set_xlim(0, seconds)  # without what fills the last patch
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_ylabel("" if number % columns else ax.get_ylabel(), fontsize=8)
        ax.set_xlabel(ax.get_xlabel() if number + columns >= len(inputs) else "", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=TITLE_SIZE)
    return figure


def plot_timeline(found: Mapping[str, Any], title: str | None = None, most: int = 10) -> "Figure":
    """Label scores over time, and events as frames around them.

    Args:
        found: what `pipeline("audio-classification")` of our models returns with `return_timeline=True`. A label that
            is not among the `top_k` of a window is blank there.
        most: how many labels are drawn, those of the highest scores.
    """
    names = [entry["label"] for entry in found["labels"][:most]]
    spans = np.array([(entry["start"], entry["end"]) for entry in found["timeline"]])
    # Windows that overlap meet in the middle of what they share.
    bounds = [spans[0, 0], *((spans[:-1, 1] + spans[1:, 0]) / 2), spans[-1, 1]]
    scores = np.full((len(names), len(spans)), np.nan)
    for column, entry in enumerate(found["timeline"]):
        for label in entry["labels"]:
            if label["label"] in names:
                scores[names.index(label["label"]), column] = label["score"]
    figure = _new_figure((9.0, 0.32 * len(names) + 1.3))
    ax = figure.subplots()
    mesh = ax.pcolormesh(bounds, np.arange(len(names) + 1), np.ma.masked_invalid(scores), cmap="viridis",
                         vmin=0.0, vmax=max(1.0, float(np.nanmax(scores))))  # fmt: skip
    ax.hlines(np.arange(1, len(names)), bounds[0], bounds[-1], color="white", linewidth=2, zorder=1)
    for event in found.get("events", ()):
        if event["label"] in names:
            corner, length = (event["start"], names.index(event["label"])), event["end"] - event["start"]
            ax.add_patch(Rectangle(corner, length, 1, fill=False, edgecolor=EVENT_COLOR, linewidth=2, zorder=2))
    if found.get("events"):
        handle = Patch(facecolor="none", edgecolor=EVENT_COLOR, linewidth=2, label="event")
        ax.legend(handles=[handle], fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.invert_yaxis()
    ax.set(xlabel="time (s)")
    ax.set_title(title or "What sounds when", fontsize=TITLE_SIZE)
    figure.colorbar(mesh, ax=ax, label="score", pad=0.02)
    return figure


def _new_figure(size: tuple[float, float]) -> "Figure":
    if Figure is None:
        raise ImportError("pictures need matplotlib: pip install 'bridle_hf[viz]'")
    return Figure(figsize=size, dpi=120, layout="constrained")


def code_colors(codes: np.ndarray) -> np.ndarray:
    """A fixed colour for every code number: (...) int -> (..., 3) RGB in 0..1. Numbers that follow differ clearly."""
    # The R2 sequence fills the plane of hue and lightness evenly, however many codes there are.
    hue, light = codes * 0.7548776662 % 1, codes * 0.5698402910 % 1
    return hsv_to_rgb(np.stack([hue, 0.95 - 0.6 * light, 0.45 + 0.53 * light], axis=-1))


@dataclass(frozen=True)
class _Canvas:
    """How an input lies on paper: the one place that knows the modality. `grid` is (time steps, height, width), with
    time as height and mel as width for audio, as in `to_volume`."""

    config: BridleEncoderConfig
    grid: tuple[int, int, int]
    sampling_rate: int

    def arrange(self, cells: np.ndarray) -> np.ndarray:
        """(time steps, height, width, ...) of pixels or patches -> one picture (rows, columns, ...): audio with time
        along the columns and the lowest mel bin as first row, the time steps of a video side by side."""
        if self.config.modality == "audio":
            return cells[0].swapaxes(0, 1)
        return np.concatenate(list(cells), axis=1)

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """The edges of the patches along x and y, in the units of the axes."""
        steps, rows, columns = self.grid
        _, height, width = self.config.patch_shape
        if self.config.modality == "audio":
            return np.arange(rows + 1) * seconds_per_step(self.config, self.sampling_rate), self._hertz()[::width]
        return np.arange(steps * columns + 1) * width, np.arange(rows + 1) * height

    def middle_rows(self) -> np.ndarray:
        """The middle of the patches along y."""
        if self.config.modality == "audio":
            width = self.config.patch_shape[2]
            return self._hertz()[width // 2 :: width]
        _, y = self.edges()
        return (y[1:] + y[:-1]) / 2

    def _hertz(self) -> np.ndarray:
        """The edges of the mel bins, (bins + 1,)."""
        return mel_bin_edges(self.grid[2] * self.config.patch_shape[2], self.sampling_rate)

    def label(self, ax: "Axes") -> None:
        """Axes with their units; for images and video the first row on top, for video a line between time steps."""
        steps, _, columns = self.grid
        frames, _, width = self.config.patch_shape
        x, y = self.edges()
        if self.config.modality == "audio":
            ax.set(xlabel="time (s)", ylabel="frequency (Hz, mel scale)")
            return
        ax.set_yticks(y[:: max(1, (len(y) - 1) // 4)])
        ax.invert_yaxis()
        ax.set(xlabel="column (pixels)", ylabel="row (pixels)", aspect="equal")
        if self.config.modality == "image":
            ax.set_xticks(x[:: max(1, columns // 4)])
            return
        ax.set_xlabel(f"frame of the clip (each picture stands for {frames})" if frames > 1 else "frame of the clip")
        ax.set_xticks((np.arange(steps) + 0.5) * columns * width, np.arange(steps) * frames)
        for edge in x[columns:-1:columns]:
            ax.axvline(edge, color="white", linewidth=4)

    def draw(self, ax: "Axes", cells: np.ndarray, **style) -> "AxesImage | QuadMesh":
        """Draw (time steps, height, width, [RGB]) of pixels or patches, every patch between its edges."""
        x, y = self.edges()
        if self.config.modality == "audio":
            image = self._draw_spectrogram(ax, self.arrange(cells), style)
        else:
            extent, look = (x[0], x[-1], y[0], y[-1]), {"origin": "lower", "interpolation": "nearest"}
            image = ax.imshow(self.arrange(cells), extent=extent, aspect="auto", **look, **style)
        self.label(ax)
        return image

    def _draw_spectrogram(self, ax: "Axes", picture: np.ndarray, style: dict[str, str]) -> "QuadMesh":
        """Draw (mel bins or patches, frames or patches, [RGB])."""
        try:
            from librosa.display import specshow
        except ImportError as error:
            raise ImportError("pictures of audio need librosa: pip install 'bridle_hf[viz,audio]'") from error
        if picture.ndim == 3:  # it takes numbers
            colors, numbers = np.unique(picture.reshape(-1, 3), axis=0, return_inverse=True)
            style = {"cmap": ListedColormap(colors), "vmin": -0.5, "vmax": len(colors) - 0.5}
            picture = numbers.reshape(picture.shape[:2])
        x, y = self.edges()
        seconds, hertz = np.linspace(x[0], x[-1], picture.shape[1] + 1), self._hertz()
        hertz = y if len(picture) == len(y) - 1 else hertz
        mesh = specshow(
            picture, x_coords=seconds, y_coords=hertz, x_axis="s", y_axis="mel", shading="flat", ax=ax, **style
        )
        ax.xaxis.set_major_locator(MaxNLocator(6))  # more would run into each other in narrow panels
        return mesh

    def figure(self, panels: int) -> tuple["Figure", list["Axes"]]:
        """A figure with so many panels: one above the other where they are wide, else beside each other."""
        x, y = self.edges()
        aspect = (len(x) - 1) / (len(y) - 1)
        columns = 1 if aspect >= 1.8 else min(2, panels)
        width = 8.0 / columns
        height = max((width - 0.8) / max(aspect, 0.8), 1.4) + 0.8
        rows = math.ceil(panels / columns)
        figure = _new_figure((8.0, rows * height + 0.5))
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for unused in axes[panels:]:
            unused.remove()
        return figure, axes[:panels]


def _draw_codes(ax: "Axes", codes: np.ndarray, canvas: _Canvas, drawn: np.ndarray | None = None) -> None:
    """`codes` (time steps, height, width) as colours, where `drawn`; with their numbers where there is room."""
    drawn = np.ones_like(codes, dtype=bool) if drawn is None else drawn
    colors = np.where(drawn[..., None], code_colors(codes), to_rgb(NEUTRAL_COLOR))
    canvas.draw(ax, colors)
    if codes.size > MAX_NUMBERED_PATCHES:
        return
    x, middle = canvas.edges()[0], canvas.middle_rows()
    numbers, drawn = canvas.arrange(codes), canvas.arrange(drawn)
    dark = canvas.arrange(colors) @ (0.299, 0.587, 0.114) < 0.5
    for row, column in np.argwhere(drawn):
        ax.text(
            (x[column] + x[column + 1]) / 2,
            middle[row],
            numbers[row, column],
            color="white" if dark[row, column] else "black",
            fontsize=7,
            ha="center",
            va="center",
        )


def _draw_hits(ax: "Axes", right: np.ndarray, hidden: np.ndarray, canvas: _Canvas) -> None:
    """`right` and `hidden` (time steps, height, width) bool as three colours with a legend."""
    names = {NEUTRAL_COLOR: "not hidden", WRONG_COLOR: "wrong", RIGHT_COLOR: "right"}
    canvas.draw(ax, np.array([to_rgb(color) for color in names])[hidden.astype(int) + right.astype(int)])
    handles = [Patch(facecolor=color, edgecolor="grey", label=name) for color, name in names.items()]
    # In the place of a title, where it covers neither patches nor labels.
    style = {"ncols": 3, "fontsize": 8, "frameon": False, "columnspacing": 1.0, "title_fontsize": TITLE_SIZE}
    ax.legend(
        handles=handles, title="Where the prediction is right", loc="lower center", bbox_to_anchor=(0.5, 1), **style
    )


def _draw_accuracy(ax: "Axes", accuracy: np.ndarray, codes: np.ndarray, codebook_size: int) -> None:
    """Bars of `accuracy` (num_codebooks,), and what two ways to guess `codes` (hidden patches, num_codebooks) get."""
    levels = np.arange(1, len(accuracy) + 1)
    most_counts = [np.unique(column, return_counts=True)[1].max(initial=0) for column in codes.T]
    most = np.array(most_counts) / max(len(codes), 1)
    guesses = {"predicted": (accuracy, RIGHT_COLOR), "always this input's most common code": (most, WRONG_COLOR)}
    for index, (label, (shares, color)) in enumerate(guesses.items()):
        bars = ax.bar(levels + 0.4 * (index - 0.5), 100 * shares, width=0.36, color=color, label=label)
        ax.bar_label(bars, fmt="%.0f%%", fontsize=8, padding=2)
    ax.axhline(100 / codebook_size, color="black", linestyle="--", label=f"chance (1 of {codebook_size} codes)")
    ax.set_title("Hidden patches right, by level", fontsize=TITLE_SIZE)
    ax.set(xlabel="level", ylabel="hidden patches (%)", xticks=levels)
    ax.set_ylim(0, 1.7 * max(100 * accuracy.max(), 100 * most.max(), 5))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper right")


def _displayable(volume: np.ndarray) -> np.ndarray:
    """(channels, time steps, height, width) -> (time steps, height, width), or (..., 3) in 0..1 of three channels."""
    if volume.shape[0] != 3:
        return volume.mean(axis=0)
    low, high = volume.min(), volume.max()
    return np.moveaxis((volume - low) / max(high - low, 1e-6), 0, -1)


def _to_grid(name: str, values: torch.Tensor, config: BridleEncoderConfig, grid: Sequence[int] | None) -> np.ndarray:
    """(patches, ...) -> (time steps, height, width, ...)."""
    values = torch.as_tensor(values).detach().cpu().numpy()
    grid = tuple(config.patch_grid if grid is None else grid)
    if values.shape[0] != math.prod(grid):
        raise ValueError(
            f"`{name}` has shape {values.shape}; a grid of {grid} patches needs {math.prod(grid)} rows: give one "
            "input without its batch dimension, and the `grid` of a clip that is not of full length"
        )
    return values.reshape((1,) * (3 - len(grid)) + grid + values.shape[1:])


__all__ = ["code_colors", "plot_codes", "plot_inputs", "plot_masked_input", "plot_predictions", "plot_timeline"]
