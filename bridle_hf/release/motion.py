"""Videos that the released video encoder is trained on: drawings that move by simple physics, on varied grounds.

They go straight, turn, grow, are squeezed, fall, bounce off the edges and off each other, before a ground that may
move too. Every video is a function of the seed and of its number.
"""

import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from bridle_hf.release.drawings import Drawings, drawings_folder, grey, ground
from bridle_hf.release.materials import DRAWINGS
from bridle_hf.sets.creatures import ENCODER, write_video
from bridle_hf.sets.making import content_hash, made_once, write_table


FRAMES, SIDE = 12, 64
COUNTS = {1: 0.5, 2: 0.3, 3: 0.2}
SIZES, FASTEST = (14, 40), 5.0  # pixels, and pixels a frame
# Shares of videos in which it falls, of bodies that turn, grow or are squeezed, and by how much at most.
FALLING, GRAVITY = 0.25, 0.6
TURNING, MOST_DEGREES = 0.4, 25.0
GROWING, MOST_GROWTH = 0.3, 0.06
SQUEEZED, MOST_SQUEEZE = 0.25, 0.35
PANNING, FASTEST_PAN = 0.2, 2.5
GREY = 0.3
# Without looking ahead, which makes libx264 choose otherwise from one call to the next.
OPTIONS = {**ENCODER, "tune": "zerolatency"}
EDGES = {"bounce": 0.4, "wrap": 0.4, "leave": 0.2}


@dataclass
class Body:
    """A drawing in motion: pixels, frames and degrees. It is round to the touch, and all bodies weigh the same."""

    drawing: Image.Image
    size: float
    position: np.ndarray
    velocity: np.ndarray
    degrees: float = 0.0
    turn: float = 0.0
    growth: float = 0.0
    squeeze: float = 0.0


def make_motion(cache_dir: str | os.PathLike | None = None, count: int = 12_000, seed: int = 0) -> str:
    """Render the videos once and return their folder; a later call with the same arguments finds it ready.

    The folder, `CACHE_DIR/release_motion-<hash>`, holds `clips/<number>.mp4` (12 frames of 64x64) and `metadata.csv`
    with `file_name` and `label`, what the edges do. The first videos of a larger count are those of a smaller one.

    Raises:
        RuntimeError: the drawings cannot be fetched.
    """
    rules = [FRAMES, SIDE, COUNTS, SIZES, FASTEST, FALLING, GRAVITY, TURNING, MOST_DEGREES, GROWING, MOST_GROWTH,
             SQUEEZED, MOST_SQUEEZE, PANNING, FASTEST_PAN, GREY, EDGES, OPTIONS]  # fmt: skip
    folder = drawings_folder(cache_dir)
    name = f"release_motion-{content_hash(DRAWINGS.package.sha256, rules, count, seed)}"
    return made_once(cache_dir, name, lambda into: write_videos(into, Drawings(folder, max(SIZES)), count, seed))


def write_videos(folder: Path, drawings: Drawings, count: int, seed: int) -> None:
    (folder / "clips").mkdir()
    rows = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        edges = str(rng.choice(list(EDGES), p=list(EDGES.values())))
        file_name = f"clips/{number:05d}.mp4"
        write_video(folder / file_name, video(rng, drawings, edges), OPTIONS)
        rows.append((file_name, edges))
    write_table(folder, ("file_name", "label"), rows)


def video(rng: np.random.Generator, drawings: Drawings, edges: str) -> np.ndarray:
    """(FRAMES, SIDE, SIDE, 3) uint8."""
    pan = rng.uniform(-FASTEST_PAN, FASTEST_PAN, size=2) if rng.random() < PANNING else np.zeros(2)
    behind = ground(rng, drawings, 2 * SIDE)
    gravity = rng.uniform(0.1, GRAVITY) if rng.random() < FALLING else 0.0
    bodies = [body(rng, drawings) for _ in range(rng.choice(list(COUNTS), p=list(COUNTS.values())))]
    is_grey, negative = rng.random(2) < (GREY, 0.5)
    frames = []
    for number in range(FRAMES):
        left, top = (SIDE // 2 + pan * (number - FRAMES / 2)).round().astype(int).tolist()
        frame = behind.crop((left, top, left + SIDE, top + SIDE))
        for moving in bodies:
            put(frame, moving, number, edges)
        frames.append(np.asarray(grey(frame, negative) if is_grey else frame))
        step(bodies, gravity, edges)
    return np.stack(frames)


def body(rng: np.random.Generator, drawings: Drawings) -> Body:
    """A drawing somewhere, on its way in any direction."""
    drawing, _ = drawings.draw(rng)
    size, speed, angle = rng.uniform(*SIZES), rng.uniform(0, FASTEST), rng.uniform(0, 2 * np.pi)
    made = Body(
        drawing, size, rng.uniform(size / 2, SIDE - size / 2, 2), speed * np.array([np.cos(angle), np.sin(angle)])
    )
    if rng.random() < TURNING:
        made.turn = rng.uniform(-MOST_DEGREES, MOST_DEGREES)
    if rng.random() < GROWING:
        made.growth = rng.uniform(-MOST_GROWTH, MOST_GROWTH)
    if rng.random() < SQUEEZED:
        made.squeeze = rng.uniform(0, MOST_SQUEEZE)
    return made


# --- Physics ---


def step(bodies: list[Body], gravity: float, edges: str) -> None:
    """One frame on. With edges that bounce, bodies bounce off each other too."""
    if edges == "bounce":
        for first, second in combinations(bodies, 2):
            collide(first, second)
    for moving in bodies:
        moving.velocity = moving.velocity + np.array([0.0, gravity])
        moving.position = moving.position + moving.velocity
        moving.degrees += moving.turn
        moving.size = float(np.clip(moving.size * (1 + moving.growth), 4, SIDE))
        if edges == "bounce":
            bounce(moving)
        elif edges == "wrap":
            moving.position = moving.position % SIDE


def collide(first: Body, second: Body) -> None:
    """An elastic push of two that touch and near each other: they exchange their speeds along the line between."""
    between = second.position - first.position
    distance = float(np.linalg.norm(between))
    if not 0 < distance < (first.size + second.size) / 2:
        return
    line = between / distance
    nearing = float((first.velocity - second.velocity) @ line)
    if nearing > 0:
        first.velocity = first.velocity - nearing * line
        second.velocity = second.velocity + nearing * line


def bounce(moving: Body) -> None:
    """Back from the edges that it has come to, and within them."""
    low, high = moving.size / 2, SIDE - moving.size / 2
    outward = ((moving.position < low) & (moving.velocity < 0)) | ((moving.position > high) & (moving.velocity > 0))
    moving.velocity = np.where(outward, -moving.velocity, moving.velocity)
    moving.position = np.clip(moving.position, low, max(low, high))


# --- Frames ---


def put(frame: Image.Image, moving: Body, number: int, edges: str) -> None:
    """Paste a body as it is in frame `number`; where the edges wrap, what leaves on one side comes in on the other."""
    squeeze = 1 + moving.squeeze * np.sin(2 * np.pi * number / FRAMES * 2)
    scale = moving.size / max(moving.drawing.size)
    width, height = (scale * length for length in moving.drawing.size)
    drawing = moving.drawing.resize((max(1, round(width * squeeze)), max(1, round(height / squeeze))))
    if moving.turn:
        drawing = drawing.rotate(moving.degrees, Image.Resampling.BILINEAR, expand=True)
    left, top = (round(float(place) - length / 2) for place, length in zip(moving.position, drawing.size))
    shifts = (-SIDE, 0, SIDE) if edges == "wrap" else (0,)
    for right in shifts:
        for down in shifts:
            frame.paste(drawing, (left + right, top + down), drawing)
