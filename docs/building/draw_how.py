"""Pictures of docs/how.md, drawn with the package's own parts: `make figures`.

What is drawn is a melody of notes (`bridle_hf.demos.data`); no model is trained.
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from bridle_hf import BridleConfig, BridleFeatureExtractor, BridleTokenizerConfig
from bridle_hf.common.recipes import find_recipe
from bridle_hf.configuration_bridle import MASK_TYPES
from bridle_hf.demos.data import render_notes
from bridle_hf.masking_bridle import make_mask
from bridle_hf.patching_bridle import patchify
from bridle_hf.quantization_bridle import BridleResidualQuantizer, kmeans


FOLDER = Path(__file__).parents[1] / "how"
MELODY = [(0, 60), (0, 64), (0, 67), (40, 60), (40, 64), (40, 67), (56, 72)]  # piano, violin, trumpet: program, key
ENCODER, TOKENIZER, GREY = "#3f51b5", "#e6850e", "#777777"
CONFIG = BridleConfig(max_length=368)


def main() -> None:
    """Draw all of them."""
    matplotlib.rcParams.update({"svg.hashsalt": "bridle", "font.size": 9})
    FOLDER.mkdir(exist_ok=True)
    notes = Path(render_notes(programs=(0, 40, 56), pitches=range(48, 84)))
    save(draw_parts(), "parts.svg")
    save(draw_schedule("audio_base"), "schedule.svg")
    melody = log_mel([notes / "audio" / f"{program:03d}_{pitch:03d}.wav" for program, pitch in MELODY])
    save(draw_masks(melody), "masks.png")
    everything = log_mel(sorted((notes / "audio").glob("*.wav")))
    save(draw_levels(melody, everything), "levels.png")


def save(figure: Figure, name: str) -> None:
    if name.endswith(".svg"):
        figure.savefig(FOLDER / name, metadata={"Date": None})
    else:
        content = io.BytesIO()
        figure.savefig(content, dpi=110)
        Image.open(content).convert("RGB").quantize(256).save(FOLDER / name)  # a third of the size
    print(f"{name}: {(FOLDER / name).stat().st_size / 1000:.0f} kB")


def log_mel(paths: list[Path]) -> torch.Tensor:
    """The first half second of each recording, one after the other: (frames, mel bins), normalised."""
    wave = np.concatenate([soundfile.read(path)[0][:8000] for path in paths])
    extractor = BridleFeatureExtractor(max_length=len(wave) // 160 + 1)
    values = extractor(wave, sampling_rate=16000, padding="longest", return_tensors="pt").input_values[0]
    return values[: len(values) // 16 * 16]


def draw_parts() -> Figure:
    """The four parts, and what is learned from what."""
    figure = Figure(figsize=(8.4, 3.7))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 84), ylim=(0, 37))
    ax.axis("off")

    def box(x, y, width, text, color):
        style = {"boxstyle": "round,pad=0.3", "facecolor": color + "22", "edgecolor": color, "linewidth": 1.4}
        ax.add_patch(FancyBboxPatch((x, y - 2.2), width, 4.4, **style))
        ax.text(x + width / 2, y, text, ha="center", va="center")

    def arrow(start, end, color=GREY, dashed=False):
        style = {"arrowstyle": "-|>", "color": color, "linestyle": "--" if dashed else "-", "linewidth": 1.3}
        ax.annotate("", end, start, arrowprops=style)

    note = {"va": "center", "fontsize": 8}
    box(1, 21, 10, "input,\nin patches", GREY)
    box(20, 32, 14, "encoder\n(visible patches)", ENCODER)
    box(43, 32, 15, "decoder\n(and mask tokens)", ENCODER)
    box(68, 32, 14, "a code per hidden\npatch and level", ENCODER)
    box(20, 15, 14, "tokenizer\n(all patches)", TOKENIZER)
    box(43, 15, 15, "residual\nquantizer", TOKENIZER)
    box(68, 15, 14, "codes of\nall patches", TOKENIZER)
    box(43, 4, 15, "estimator", TOKENIZER)
    arrow((11.5, 22), (19.5, 31.5))
    arrow((11.5, 20), (19.5, 15.5))
    for row in (32, 15):
        arrow((34.5, row), (42.5, row))
        arrow((58.5, row), (67.5, row))
    arrow((50.5, 12.3), (50.5, 6.6))
    arrow((75, 17.7), (75, 29.3), ENCODER, dashed=True)
    arrow((27, 29.3), (42.3, 4.6), TOKENIZER, dashed=True)
    ax.text(74, 23.5, "cross-entropy: trains\nencoder and decoder", color=ENCODER, ha="right", **note)
    ax.text(34, 23.5, "features of the whole input;\ncosine loss: trains tokenizer,\nquantizer and estimator",
            color=TOKENIZER, ha="left", **note)  # fmt: skip
    return figure


def draw_schedule(recipe: str) -> Figure:
    """The phases of a recipe over its epochs."""
    phases = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))["phases"]
    figure = Figure(figsize=(8.4, 1.9), layout="constrained")
    ax = figure.subplots()
    start, iteration = 0, 0
    for phase in phases:
        iteration += phase["train"] == "tokenizer"
        row, color = (1, ENCODER) if phase["train"] == "encoder" else (0, TOKENIZER)
        ax.barh(row, phase["epochs"], left=start, height=0.7, color=color + "33", edgecolor=color)
        ax.text(start + phase["epochs"] / 2, row, f"{phase['train']} {iteration}", ha="center", va="center")
        start += phase["epochs"]
    ax.set(yticks=[], ylim=(-0.6, 1.6), xlim=(0, start), xlabel=f"epochs ({recipe})")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_masks(values: torch.Tensor) -> Figure:
    """What the encoder sees of a melody, by kind of mask."""
    kinds = MASK_TYPES["audio"]
    figure = Figure(figsize=(8.4, 5), layout="constrained")
    grid = (len(values) // 16, 8)
    for ax, kind in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, kinds):
        hidden = make_mask(kind, grid, CONFIG.mask_ratio, torch.Generator().manual_seed(1)).view(grid)
        pixels = hidden.repeat_interleave(16, 0).repeat_interleave(16, 1)
        draw(ax, np.ma.masked_array(values, pixels), f"{kind}: {(~hidden).sum()} of {hidden.numel()} patches visible")
        ax.set_facecolor("#b4cadb")
    return figure


def draw_levels(values: torch.Tensor, everything: torch.Tensor) -> Figure:
    """A melody's patches rebuilt from their codes, of one level and of more; codebooks by k-means on all notes."""
    config = BridleTokenizerConfig(
        max_length=len(values), code_dim=256, codebook_normalization="none", codebook_size=256
    )
    quantizer = BridleResidualQuantizer(config).eval()
    torch.manual_seed(0)
    rest, _ = patchify(everything[None], config)
    rest = rest[0]
    for codebook in quantizer.codebooks:
        codebook.copy_(kmeans(rest, config.codebook_size, iterations=10))
        rest = rest - codebook[torch.cdist(rest, codebook).argmin(dim=1)]
    patches, (rows, columns) = patchify(values[None], config)
    codes = quantizer(patches[0]).codes
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True).flat
    draw(axes[0], values, "a melody's log-mel")
    for level, ax in zip((1, 2, 4), axes[1:]):
        rebuilt = sum(codebook[codes[:, q]] for q, codebook in enumerate(quantizer.codebooks[:level]))
        left = ((patches[0] - rebuilt) ** 2).sum() / ((patches[0] - patches[0].mean()) ** 2).sum()
        picture = rebuilt.view(rows, columns, 16, 16).permute(0, 2, 1, 3).reshape(values.shape)
        draw(ax, picture, f"from {level} level{'s' * (level > 1)}: {left:.0%} of the variance is left over")
    return figure


def draw(ax, values, title: str) -> None:
    extent = (0, len(values) / 100, 0, values.shape[1])
    ax.imshow(values.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-1.2, vmax=1.2)
    ax.set_title(title, fontsize=9)
    ax.set(xlabel="s", ylabel="mel bin")
    ax.label_outer()


if __name__ == "__main__":
    main()
