"""Pictures that the released image encoder is trained on: drawings, one to three at a time, on varied grounds.

Every picture is a function of the seed and of its number.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from bridle_hf.release.materials import DRAWINGS
from bridle_hf.sets.fetching import fetched
from bridle_hf.sets.making import content_hash, made_once, write_table


SIDE = 80  # a crop of it is what the encoder sees
COUNTS = {1: 0.7, 2: 0.2, 3: 0.1}
SIZES = (0.5, 1.0)  # of a drawing, in parts of the picture's side
GROUNDS = {"plain": 0.5, "gradient": 0.15, "texture": 0.15, "drawing": 0.2}
WHITE, BLACK = 0.35, 0.3  # of plain grounds
TURNED, MOST_DEGREES = 0.3, 30
GREY = 0.3
MOST_PIXELS = 4_000_000  # of a drawing; the largest of the package have hundreds of millions, of one colour nearly


def make_drawings(cache_dir: str | os.PathLike | None = None, count: int = 16_000, seed: int = 0) -> str:
    """Compose the pictures once and return their folder; a later call with the same arguments finds it ready.

    The folder, `CACHE_DIR/release_drawings-<hash>`, holds `images/<number>.png` (80x80) and `metadata.csv` with
    `file_name` and `label`, the folder of the first drawing. The first pictures of a larger count are those of a
    smaller one.

    Raises:
        RuntimeError: the drawings cannot be fetched.
    """
    rules = [SIDE, COUNTS, SIZES, GROUNDS, WHITE, BLACK, TURNED, MOST_DEGREES, GREY, MOST_PIXELS]
    folder = drawings_folder(cache_dir)
    name = f"release_drawings-{content_hash(DRAWINGS.package.sha256, rules, count, seed)}"
    return made_once(cache_dir, name, lambda into: write_pictures(into, Drawings(folder, SIDE), count, seed))


def drawings_folder(cache_dir: str | os.PathLike | None) -> Path:
    return fetched(DRAWINGS.package, cache_dir) / "usr" / "share" / "openclipart" / "png"


def write_pictures(folder: Path, drawings: "Drawings", count: int, seed: int) -> None:
    (folder / "images").mkdir()
    rows = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        picture, labels = ground(rng, drawings, SIDE), []
        for _ in range(rng.choice(list(COUNTS), p=list(COUNTS.values()))):
            drawing, label = drawings.draw(rng)
            put(picture, drawing, rng)
            labels.append(label)
        if rng.random() < GREY:
            picture = grey(picture, negative=rng.random() < 0.5)
        picture.save(folder / f"images/{number:05d}.png")
        rows.append((f"images/{number:05d}.png", labels[0]))
    write_table(folder, ("file_name", "label"), rows)


def pixels_of(path: Path) -> int:
    """Of a PNG file, from its header: Pillow would warn of a large one, or refuse to open it."""
    with open(path, "rb") as file:
        header = file.read(24)
    return int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big")


class Drawings:
    """PNG files below a folder, as RGBA without transparent borders; those of more than `MOST_PIXELS` are left out.

    Args:
        side: longest side that they are reduced to.
    """

    def __init__(self, folder: Path, side: int):
        self.side = side
        by_folder: dict[str, list[Path]] = {}
        for path in sorted(path for path in folder.rglob("*.png") if pixels_of(path) <= MOST_PIXELS):
            by_folder.setdefault(str(path.parent.relative_to(folder)), []).append(path)
        self.paths = [path for paths in by_folder.values() for path in paths]
        self.labels = [label for label, paths in by_folder.items() for _ in paths]
        # Of a folder of a thousand stars each comes less often than of one of ten birds.
        weights = np.array([len(paths) ** -0.5 for paths in by_folder.values() for _ in paths])
        self.shares = weights / weights.sum()
        self._read = cache(self._read)

    def draw(self, rng: np.random.Generator) -> tuple[Image.Image, str]:
        """A drawing, and its folder."""
        number = rng.choice(len(self.paths), p=self.shares)
        return self._read(number), self.labels[number]

    def _read(self, number: int) -> Image.Image:
        picture = Image.open(self.paths[number]).convert("RGBA")
        picture = picture.crop(picture.getchannel("A").getbbox())
        picture.thumbnail((self.side, self.side))
        return picture


# --- What a picture is made of ---


def ground(rng: np.random.Generator, drawings: Drawings, side: int) -> Image.Image:
    """(side, side) RGB without an object."""
    kind = rng.choice(list(GROUNDS), p=list(GROUNDS.values()))
    if kind == "plain":
        shade = rng.random()
        plain = (255, 255, 255) if shade < WHITE else (0, 0, 0) if shade < WHITE + BLACK else colour(rng)
        return Image.new("RGB", (side, side), plain)
    if kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(float(rng.uniform(0, 360)))
        return ImageOps.colorize(ramp.crop((38, 38, 218, 218)).resize((side, side)), colour(rng), colour(rng))
    if kind == "texture":
        cells = int(rng.choice([3, 8, 20]))
        coarse = Image.fromarray(rng.integers(256, size=(cells, cells, 3), dtype=np.uint8))
        return toned(coarse.resize((side, side), Image.Resampling.BICUBIC), rng, 0.2, 0.9)
    drawing, _ = drawings.draw(rng)
    plain = Image.new("RGB", drawing.size, colour(rng))
    plain.paste(drawing, mask=drawing)
    soft = plain.resize((side, side)).filter(ImageFilter.GaussianBlur(side / 20))
    return toned(soft, rng, 0, 0.7)


def toned(picture: Image.Image, rng: np.random.Generator, least: float, most: float) -> Image.Image:
    """Under a random colour, as strong as said."""
    return Image.blend(picture, Image.new("RGB", picture.size, colour(rng)), float(rng.uniform(least, most)))


def colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(rng.integers(256, size=3).tolist())


def put(picture: Image.Image, drawing: Image.Image, rng: np.random.Generator) -> None:
    """Paste a drawing of a random size somewhere into a picture, perhaps turned."""
    if rng.random() < TURNED:
        drawing = drawing.rotate(float(rng.uniform(-MOST_DEGREES, MOST_DEGREES)), Image.Resampling.BILINEAR, True)
    scale = picture.width * rng.uniform(*SIZES) / max(drawing.size)
    size = [max(1, round(scale * length)) for length in drawing.size]
    place = [int(rng.integers(picture.width - length + 1)) for length in size]
    drawing = drawing.resize(size)
    picture.paste(drawing, tuple(place), drawing)


def grey(picture: Image.Image, negative: bool) -> Image.Image:
    """Without colours."""
    picture = picture.convert("L")
    return (ImageOps.invert(picture) if negative else picture).convert("RGB")
