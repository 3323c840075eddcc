"""Labelled sets of tiny images and videos that a tiny model can tell apart in a few steps, and such a model."""

import csv
from pathlib import Path

import av
import numpy as np
from helpers.sounds import TINY
from PIL import Image

from bridle_hf import BridleConfig, BridleForPreTraining, make_image_processor


# Grey images; videos are always in colour.
PIXELS = {
    "image": {"modality": "image", "image_size": 16, "patch_size": 8, "num_channels": 1},
    "video": {"modality": "video", "image_size": 32, "patch_size": 16, "num_frames": 4},
}


def pixel_config(modality: str, **fields) -> BridleConfig:
    return BridleConfig(**{**TINY, **PIXELS[modality], **fields})


def frames_of(name: str, rng: np.random.Generator, num_frames: int = 8) -> np.ndarray:
    """A "dark" or "bright" video (frames, 32, 48) uint8."""
    middle = {"dark": 60, "bright": 190}[name]
    return rng.normal(middle, 20, (num_frames, 32, 48)).clip(0, 255).astype(np.uint8)


def write_sample(path: Path, name: str, rng: np.random.Generator) -> str:
    """One image (.png) or video (.mp4) of that name."""
    if path.suffix == ".png":
        Image.fromarray(frames_of(name, rng, 1)[0]).save(path)
        return str(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in frames_of(name, rng):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))
    return str(path)


def write_pixels(folder: Path, modality: str, per_class: int = 8) -> str:
    """`folder` with images or videos of both names; columns `label` and `group`, 0 or 1."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = [("file_name", "label", "group")]
    for name in ("bright", "dark"):
        for index in range(per_class):
            path = f"{name}_{index}.{'png' if modality == 'image' else 'mp4'}"
            write_sample(folder / path, name, rng)
            rows.append((path, name, index % 2))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(folder)


def save_pixel_encoder(folder: Path, modality: str, **fields) -> str:
    """A pretraining model with its processor, as pretraining leaves it."""
    config = pixel_config(modality, **fields)
    BridleForPreTraining(config).save_pretrained(folder)
    make_image_processor(config).save_pretrained(folder)
    return str(folder)
