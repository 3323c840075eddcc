"""Creatures: clips of game sprites (Flare) that stand, run, strike, cast, are hit or die, seen from 8 directions."""

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from bridle_hf.sets.fetching import Package, fetched
from bridle_hf.sets.making import content_hash, made_once, write_table


FLARE = Package("apt", "flare-game", "1.14-1", "4ab6a8298276013d35a0806257e130d992761af1b749041433b409c3dafec508")
ACTIONS = {
    "stance": "stance", "run": "run", "swing": "swing", "shoot": "cast", "cast": "cast", "hit": "hit", "die": "die",
    "critdie": "die",
}  # fmt: skip
FRAMES, PIXELS, RATE, GREY = 8, 48, 8, 128
# As the moving digits: nearly lossless.
ENCODER = {"crf": "12", "preset": "veryfast", "threads": "1"}
COLUMNS = ("file_name", "label", "group", "direction")
# Of a frame: place on the sheet, size, and where its origin lies within it.
Frame = tuple[int, int, int, int, int, int]


def make_creatures(cache_dir: str | os.PathLike | None = None) -> str:
    """Write the clips once and return their folder; a later call finds it ready.

    `CACHE_DIR/creatures-<hash>` holds `clips/<number>.mp4` (8 frames of 48x48 on grey; a creature has one scale) and
    `metadata.csv` with `file_name`, `label` (6 actions), `group` (the creature) and `direction` (0 to 7). Clips that
    are alike to the pixel are there once.

    Raises:
        RuntimeError: the package cannot be fetched.
    """
    name = f"creatures-{content_hash(FLARE.sha256, ACTIONS, FRAMES, PIXELS, GREY, ENCODER, COLUMNS)}"
    package = fetched(FLARE, cache_dir) / "usr" / "share" / "games" / "flare" / "mods"
    return made_once(cache_dir, name, lambda folder: _write_creatures(folder, package))


def _write_creatures(folder: Path, package: Path) -> None:
    (folder / "clips").mkdir()
    rows, seen = [], set()
    for path in sorted(package.glob("*/animations/enemies/*.txt")):
        sheet, actions = read_animations(path)
        picture = path.parents[2] / sheet
        if not actions or not picture.is_file():
            continue  # a creature that borrows another's frames
        image = Image.open(picture).convert("RGBA")
        scale, origin = fitted([frame for clips in actions.values() for clip in clips.values() for frame in clip])
        for action, clips in actions.items():
            for direction, frames in sorted(clips.items()):
                chosen = [frames[round(place)] for place in np.linspace(0, len(frames) - 1, FRAMES)]
                pixels = np.stack([drawn(image, frame, scale, origin) for frame in chosen])
                if pixels.tobytes() in seen:
                    continue
                seen.add(pixels.tobytes())
                file_name = f"clips/{len(rows):05d}.mp4"
                write_video(folder / file_name, pixels)
                rows.append((file_name, ACTIONS[action], path.stem, direction))
    write_table(folder, COLUMNS, rows)


def read_animations(path: Path) -> tuple[str, dict[str, dict[int, list[Frame]]]]:
    """The sheet, and by action of `ACTIONS` and direction the frames in their order."""
    sheet, section, found = "", "", {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("=")
        if line.startswith("["):
            section = line.strip("[] \t")
        elif key == "image":
            sheet = value.strip()
        elif key == "frame" and section in ACTIONS:
            _, direction, *frame = map(int, value.split(","))
            found.setdefault(section, {}).setdefault(direction, []).append(tuple(frame))
    return sheet, found


def fitted(frames: list[Frame]) -> tuple[float, tuple[float, float]]:
    """The scale at which all of these frames fit on the canvas, and where on it their origin then lies."""
    _, _, width, height, left, top = np.array(frames).T
    before, after = (left.max(), top.max()), ((width - left).max(), (height - top).max())
    sizes = [start + end for start, end in zip(before, after)]
    scale = PIXELS / max(sizes)
    return scale, tuple((PIXELS - scale * size) / 2 + scale * start for size, start in zip(sizes, before))


def drawn(sheet: Image.Image, frame: Frame, scale: float, origin: tuple[float, float]) -> np.ndarray:
    """One frame on the canvas, (PIXELS, PIXELS, 3) uint8."""
    x, y, width, height, left, top = frame
    size = max(1, round(scale * width)), max(1, round(scale * height))
    sprite = sheet.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.BILINEAR)
    canvas = Image.new("RGBA", (PIXELS, PIXELS), (GREY, GREY, GREY, 255))
    overlay = Image.new("RGBA", canvas.size)
    overlay.paste(sprite, (round(origin[0] - scale * left), round(origin[1] - scale * top)))
    return np.asarray(Image.alpha_composite(canvas, overlay).convert("RGB"))


def write_video(path: Path, frames: np.ndarray, options: Mapping[str, str] = ENCODER) -> None:
    """(frames, height, width, 3) uint8 as H.264, by these options of the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options=dict(options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
