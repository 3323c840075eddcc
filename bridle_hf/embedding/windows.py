"""Windows of inputs: a recording, image or video of any length as pieces that a model takes, with their times.

    what a user has ─► as_media ─► path, bytes, (array, rate) or image ─► make_reader ─► Window, Window, ...

A recording or video that is longer than a model's input is cut into windows that overlap; of each overlap, the first
half belongs to the window before and the second to the one after.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers.image_utils import is_pil_image

from bridle_hf.audio_decoding_bridle import read_blocks
from bridle_hf.audio_windows_bridle import (
    array_blocks,
    cut_windows,
    frame_shift,
    media_of_mapping,
    mono_blocks,
    patch_times,
)
from bridle_hf.common.errors import MediaError, reason_of
from bridle_hf.configuration_bridle import BridleConfig
from bridle_hf.data.sample import Sample
from bridle_hf.image_processing_bridle import fit_channels
from bridle_hf.pixel_decoding_bridle import open_video, read_image


@dataclass(frozen=True)
class Window:
    """A piece of an input that a model takes.

    Args:
        values: (frames, mel bins) of audio, (channels, height, width) or (frames, channels, height, width), float32.
        first: its first step, along the first axis of the grid of patches, in the whole input.
        steps: how many steps it has.
        own: the steps of the whole input, from and to, that are taken from it.
        times: (steps,) float64, seconds in the whole input; None for images.
    """

    values: torch.Tensor
    first: int
    steps: int
    own: tuple[int, int]
    times: np.ndarray | None


Read = Callable[[Any], Iterator[Window]]


def as_media(item: Any, sampling_rate: float | None = None) -> Any:
    """One input of a user as a path (str), bytes, (array, rate) or an image.

    Args:
        item: any of these; a `Sample`; a path object; a mapping with `array` or `raw` and `sampling_rate`, or with
            `bytes` or `path` (a row of `datasets`).
        sampling_rate: of arrays that come without one, in Hz (of videos: frames per second).

    Raises:
        MediaError: a sample without its bytes. ValueError: a mapping without what is needed.
    """
    if isinstance(item, Sample):
        return item.media()
    if isinstance(item, os.PathLike):
        return os.fspath(item)
    if isinstance(item, Mapping):
        return media_of_mapping(item)
    if isinstance(item, np.ndarray | torch.Tensor) and sampling_rate is not None:
        return item, sampling_rate
    return item


def is_one(inputs: Any) -> bool:
    """Whether this is a single input, not several."""
    pair = isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], Real)
    single = (str, bytes, os.PathLike, Mapping, np.ndarray, torch.Tensor, Sample)
    return pair or isinstance(inputs, single) or not isinstance(inputs, Iterable)


def name_of(item: Any, index: int) -> str:
    """How errors call an input: its path, or its place."""
    path = item.get("path") if isinstance(item, Mapping) else getattr(item, "path", item)
    return os.fspath(path) if isinstance(path, str | os.PathLike) else f"input {index}"


def make_reader(config: BridleConfig, processor: Any, overlap: float, stride: int) -> Read:
    """The function from media (see `as_media`) to its windows, in order.

    Args:
        config: of the model.
        processor: of the model.
        overlap: fraction of a window that the next one shares, 0 to under 1; rounded to whole patches.
        stride: frames of a video from one that the model sees to the next.

    The function raises ValueError (MediaError with a name) for what cannot be read, before or between windows.
    """
    if not 0 <= overlap < 1 or stride < 1:
        raise ValueError(f"overlap {overlap} and stride {stride}: from 0 to under 1, and at least 1")
    readers = {"audio": _audio_windows, "image": _image_window, "video": _video_windows}

    def read(media: Any) -> Iterator[Window]:
        try:
            yield from _with_owners(readers[config.modality](media, config, processor, overlap, stride))
        except (MediaError, OSError) as error:
            raise ValueError(reason_of(error)) from error

    return read


def _with_owners(windows: Iterator[Window]) -> Iterator[Window]:
    """Share each overlap between the two windows that see it."""
    before = next(windows)
    for window in windows:
        middle = (window.first + before.first + before.steps) // 2
        yield replace(before, own=(before.own[0], middle))
        before = replace(window, own=(middle, window.own[1]))
    yield before


def _audio_windows(media: Any, config: BridleConfig, extractor: Any, overlap: float, stride: int) -> Iterator[Window]:
    if isinstance(media, str | bytes):
        source_rate, blocks = read_blocks(media)
    elif isinstance(media, tuple):
        source_rate, blocks = media[1], array_blocks(media[0])
    else:
        raise ValueError(f"is a {type(media).__name__}: give a path, bytes, or (array, sampling rate)")
    rate, patch = extractor.sampling_rate, config.patch_shape[1]
    blocks = mono_blocks(blocks, source_rate, rate, extractor.downmix)
    for start, waveform in cut_windows(blocks, config, rate, overlap):
        batch = extractor([waveform], sampling_rate=rate, padding=False, truncation=False, return_tensors="pt")
        values = batch["input_values"][0]
        steps, first = -(-len(values) // patch), start // patch
        times = patch_times(config, steps, rate) + start * frame_shift(rate) / rate
        yield Window(values, first, steps, (first, first + steps), times)


def _image_window(media: Any, config: BridleConfig, processor: Any, overlap: float, stride: int) -> Iterator[Window]:
    if isinstance(media, str | bytes) or is_pil_image(media):
        pixels = read_image(media, config.num_channels)
    elif isinstance(media, np.ndarray | torch.Tensor):
        pixels = _pixels(media, 3)
        pixels = fit_channels(pixels, config.num_channels)
    else:
        raise ValueError(f"is a {type(media).__name__}: give a path, bytes, a PIL image, or an array")
    values = _process(pixels[None], processor)[0]
    steps = values.shape[1] // config.patch_shape[1]
    yield Window(values, 0, steps, (0, steps), None)


def _video_windows(media: Any, config: BridleConfig, processor: Any, overlap: float, stride: int) -> Iterator[Window]:
    """Every `stride`-th frame; of a video too short for a window, the last one is repeated, but none of its steps
    taken."""
    tubelet, length = config.tubelet_size, config.num_frames
    hop = tubelet * max(round(length * (1 - overlap) / tubelet), 1)

    def view(frame: np.ndarray) -> np.ndarray:
        return _process(fit_channels(frame, config.num_channels)[None], processor)[0].numpy()

    with _open_frames(media) as (total, rate, read):
        count = -(-total // stride)
        start, last = 0, max(-(-count // tubelet) * tubelet - length, 0)
        views: dict[int, np.ndarray] = {}
        while start <= last:
            chosen = np.minimum(stride * (start + np.arange(length)), total - 1)
            # Of the frames that the window before has seen, none is decoded again.
            if new := sorted(set(chosen.tolist()) - views.keys()):
                views.update(zip(new, read(np.array(new), view)))
            views = {index: views[index] for index in chosen.tolist()}
            values = torch.from_numpy(np.stack([views[index] for index in chosen.tolist()]))
            first, steps = start // tubelet, -(-min(count - start, length) // tubelet)
            times = chosen.reshape(-1, tubelet).mean(axis=1) / rate
            yield Window(values, first, length // tubelet, (first, first + steps), times)
            start = start + hop if start == last else min(start + hop, last)


@contextmanager
def _open_frames(media: Any) -> Iterator[tuple[int, float, Callable]]:
    """Of a video: how many frames, how many in a second, and what reads views of those with the indices given."""
    if isinstance(media, tuple):
        frames = _pixels(media[0], 4)
        yield len(frames), float(media[1]), lambda indices, view: [view(frames[index]) for index in indices]
    elif isinstance(media, str | bytes):
        with open_video(media) as video:
            yield video.total, video.rate, video.read
    else:
        raise ValueError(f"is a {type(media).__name__}: give a path, bytes, or (array, frames per second)")


def _pixels(array: Any, dims: int) -> np.ndarray:
    """(height, width, channels), of a video (frames, height, width, channels), uint8."""
    pixels = np.asarray(array)
    if dims == 3 and pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != dims or pixels.dtype != np.uint8 or pixels.size == 0:
        layout = ("frames, " if dims == 4 else "") + "height, width, channels"
        raise ValueError(f"is an array {pixels.shape} of {pixels.dtype}: give ({layout}) of uint8")
    return pixels


def _process(frames: np.ndarray, processor: Any) -> torch.Tensor:
    """(frames, height, width, channels) uint8 to (frames, channels, height, width) float32."""
    batch = processor(list(frames), return_tensors="pt", input_data_format="channels_last")
    return batch["pixel_values"].reshape(len(frames), -1, *batch["pixel_values"].shape[-2:])
