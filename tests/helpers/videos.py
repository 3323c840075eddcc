"""Small videos, written with PyAV: every frame shows its own number as a shade of grey."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


SHADES = 8  # between one frame and the next; H.264 keeps flat areas to within 2


def shade(index: int) -> int:
    return 20 + SHADES * (index % 25)


def picture(index: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """(height, width, 3) of the frame's shade, with a white patch top left that tells which way is up."""
    pixels = np.full((size[1], size[0], 3), shade(index), np.uint8)
    pixels[:16, :16] = 255
    return pixels


def numbers(frames: np.ndarray) -> list[int]:
    """Numbers (modulo 25) of (frames, height, width, 3), read from the middle of each."""
    height, width = frames.shape[1:3]
    middle = frames[:, height // 2, width // 2].astype(float).mean(axis=-1)
    return np.rint((middle - 20) / SHADES).astype(int).tolist()


def write_video(
    path: Path,
    num_frames: int = 20,
    size: tuple[int, int] = (64, 48),
    rate: int = 10,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,
    rotation: int | None = None,
    sound_seconds: float = 0.0,
    options: dict[str, str] | None = None,
    **muxer: str,
) -> str:
    """A video of `num_frames`, key frames 5 apart.

    Args:
        pts: of each frame, in milliseconds, for a varying rate.
        muxer: options of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {"crf": "12", "g": "5"} if options is None else options
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000) if sound_seconds else None
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index, size), format="rgb24")
            if pts is not None:
                frame.time_base, frame.pts = Fraction(1, 1000), pts[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for index in range(round(sound_seconds * 16000 / 1024)):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.rate, samples.pts = 16000, 1024 * index
            container.mux(sound.encode(samples))
        if sound is not None:
            container.mux(sound.encode(None))
    return str(path)
