"""Pictures: emoji of 9 categories, and clothes of 10 kinds (Fashion-MNIST, its 10,000 test images)."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from bridle_hf.sets.fetching import Package, fetched
from bridle_hf.sets.making import content_hash, made_once, write_table


EMOJI = Package(
    "npm", "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
)
FASHION = Package(
    "apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)  # fmt: skip
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def make_emoji(cache_dir: str | os.PathLike | None = None) -> str:
    """Write the emoji once and return their folder; a later call finds it ready.

    `CACHE_DIR/emoji-<hash>` holds `images/<code>.png` (64x64, on white) and `metadata.csv` with `file_name` and
    `label` (9 categories; 1,906 pictures, skin tones left out).

    Raises:
        RuntimeError: the package cannot be fetched.
    """
    name = f"emoji-{content_hash(EMOJI.sha256)}"
    return made_once(cache_dir, name, lambda folder: _write_emoji(folder, fetched(EMOJI, cache_dir) / "package"))


def _write_emoji(folder: Path, package: Path) -> None:
    (folder / "images").mkdir()
    rows = []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        if entry["category"] == "Component" or not entry["has_img_google"]:
            continue
        picture = Image.open(package / "img" / "google" / "64" / entry["image"]).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        white.convert("RGB").save(folder / "images" / entry["image"])
        rows.append((f"images/{entry['image']}", entry["category"]))
    write_table(folder, ("file_name", "label"), rows)


def make_fashion(cache_dir: str | os.PathLike | None = None) -> str:
    """Write the clothes once and return their folder; a later call finds it ready.

    `CACHE_DIR/fashion-<hash>` holds `images/<number>.png` (28x28, grey) and `metadata.csv` with `file_name` and
    `label` (10).

    Raises:
        RuntimeError: the package cannot be fetched.
    """
    name = f"fashion-{content_hash(FASHION.sha256)}"
    package = "usr/share/datasets/fashion-mnist"
    return made_once(cache_dir, name, lambda folder: _write_fashion(folder, fetched(FASHION, cache_dir) / package))


def _write_fashion(folder: Path, package: Path) -> None:
    (folder / "images").mkdir()
    images = read_idx(package / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(package / "t10k-labels-idx1-ubyte.gz")
    rows = []
    for number, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image).save(folder / f"images/{number:05d}.png")
        rows.append((f"images/{number:05d}.png", CLOTHES[label]))
    write_table(folder, ("file_name", "label"), rows)


def read_idx(path: Path) -> np.ndarray:
    """uint8 of an IDX file: two zeros, the type, the number of axes, their lengths, then the values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: is no IDX file of bytes")
    shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)
