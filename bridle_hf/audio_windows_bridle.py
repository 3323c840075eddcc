"""Audio windows: recordings of any format, rate and length read in blocks, mixed down, resampled and cut.

    read_blocks ─► (samples, channels) at the file's rate ─► mono_blocks ─► (samples,) at the model's ─► cut_windows

However long a recording is, no more of it is held than a window and what it overlaps with. Every error is a
`ValueError` that says what is wrong with the recording, without its name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .audio_decoding_bridle import MIN_RATE
from .configuration_bridle import BridleEncoderConfig
from .feature_extraction_bridle import check_channels, num_frames, num_samples, to_float


BLOCK = 1 << 16  # samples


# --- Reading ---


def media_of_mapping(item: Mapping[str, Any]) -> Any:
    """What a mapping holds, as `datasets` has them: (array, sampling rate), bytes, or a path.

    Args:
        item: with `raw` or `array` and `sampling_rate`, or with `bytes` or `path`.

    Raises:
        ValueError: it lacks what is needed.
    """
    array = item.get("array") if item.get("raw") is None else item["raw"]
    if array is not None and item.get("sampling_rate") is not None:
        return array, item["sampling_rate"]
    media = item.get("bytes") or item.get("path")
    if array is not None or media is None:
        raise ValueError(f"a mapping with {sorted(item)}: give `raw` and `sampling_rate`, `bytes` or `path`")
    return media


def array_blocks(waveform: Any, crop: Callable[[int], tuple[int, int]] | None = None) -> Iterator[np.ndarray]:
    """Blocks (samples, channels) float32 of a waveform (samples,) or (channels, samples), of any type that
    [`BridleFeatureExtractor`] takes, and refused as there; `crop` chooses (start, count) of its samples, if given."""
    waveform = to_float(waveform, "the waveform")
    check_channels(waveform, "the waveform")
    waveform = np.atleast_2d(waveform)
    first, count = crop(waveform.shape[1]) if crop else (0, waveform.shape[1])
    for start in range(first, first + count, BLOCK):
        yield waveform[:, start : min(start + BLOCK, first + count)].T


def mono_blocks(
    blocks: Iterable[np.ndarray], source_rate: float, rate: int, downmix: bool = True
) -> Iterator[np.ndarray]:
    """Blocks (samples, channels) at one rate as blocks (samples,) at another: what resampling the whole would give.

    Raises:
        ValueError: several channels without `downmix`; a rate that is none; samples that are not finite; none at all.
        ImportError: the rates differ and soxr is not installed.
    """
    if not source_rate >= MIN_RATE:
        raise ValueError(f"has a sampling rate of {source_rate} Hz")
    resample = _identity if source_rate == rate else _Resampler(source_rate, rate)
    count = 0
    for block in blocks:
        if block.shape[1] > 1 and not downmix:
            raise ValueError(f"has {block.shape[1]} channels, and the feature extractor has `downmix=False`")
        if not np.isfinite(block).all():
            raise ValueError("holds NaN or infinite samples")
        count += len(block)
        yield resample(block.mean(axis=1))
    if count == 0:
        raise ValueError("holds no samples")
    yield resample(np.empty(0, np.float32), last=True)


def _identity(block: np.ndarray, last: bool = False) -> np.ndarray:
    return block


class _Resampler:
    def __init__(self, source_rate: float, rate: int):
        try:
            import soxr
        except ImportError as error:
            raise ImportError(f"resampling {source_rate} Hz to {rate} Hz: pip install soxr") from error
        self._stream = soxr.ResampleStream(source_rate, rate, 1, dtype="float32")

    def __call__(self, block: np.ndarray, last: bool = False) -> np.ndarray:
        return self._stream.resample_chunk(block, last=last)


# --- Windows and times ---


def whole_or_crop(samples: int, wanted: int, rng: np.random.Generator | None = None) -> tuple[int, int]:
    """[`crop_bounds`] of a recording; all of one that is up to twice as long, of which the frames are cropped."""
    return (0, samples) if samples <= 2 * wanted else crop_bounds(samples, wanted, rng)


def fit_features(
    features: torch.Tensor, length: int, rng: np.random.Generator | None = None
) -> dict[str, torch.Tensor]:
    """Model input of (frames, num_mel_bins): cropped, see [`crop_bounds`], or padded to `length` frames.

    Returns:
        `input_values` (length, num_mel_bins) and `attention_mask` (length,).
    """
    start, count = crop_bounds(len(features), length, rng)
    input_values = features.new_zeros(length, features.shape[1])
    input_values[:count] = features[start : start + count]
    attention_mask = torch.zeros(length, dtype=torch.int64)
    attention_mask[:count] = 1
    return {"input_values": input_values, "attention_mask": attention_mask}


def check_length(samples: int, rate: int) -> None:
    """Raise a `ValueError` for a recording that is shorter than a frame."""
    if num_frames(samples, rate) < 1:
        raise ValueError(f"has {samples} samples at {rate} Hz, less than a frame of {num_samples(1, rate)}")


def crop_bounds(length: int, wanted: int, rng: np.random.Generator | None = None) -> tuple[int, int]:
    """(start, count) of at most `wanted` of `length`: at random, or the middle where there is no `rng`."""
    spare = length - wanted
    if spare <= 0:
        return 0, length
    return (spare // 2 if rng is None else int(rng.integers(spare + 1))), wanted


def cut_windows(
    blocks: Iterable[np.ndarray], config: BridleEncoderConfig, rate: int, overlap: float = 0.25
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a recording into windows of `config.max_length` frames that overlap, as its blocks come.

    Windows begin on whole patches, and the last one ends with the recording: each is as long as the model takes, but
    for that of a shorter recording, and a few frames of the last one.

    Args:
        blocks: (samples,) each, at `rate` Hz.
        overlap: fraction of a window that the next one shares, rounded to whole patches.

    Yields:
        First frame of the window in the recording, and its samples.

    Raises:
        ValueError: the recording is shorter than a frame.
    """
    patch = config.patch_shape[1]
    hop = patch * max(round(config.patch_grid[0] * (1 - overlap)), 1)
    shift, length = frame_shift(rate), num_samples(config.max_length, rate)
    buffer, start = np.empty(0, np.float32), 0
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) >= length + hop * shift:
            yield start, buffer[:length]
            start, buffer = start + hop, buffer[hop * shift :]
    frames = num_frames(len(buffer), rate)
    check_length(len(buffer), rate)
    yield start, buffer[:length]
    if frames > config.max_length:
        rest = -(-(frames - config.max_length) // patch) * patch
        yield start + rest, buffer[rest * shift :][:length]


def frame_shift(rate: int) -> int:
    """Samples from one frame to the next."""
    return num_samples(2, rate) - num_samples(1, rate)


def seconds_per_step(config: BridleEncoderConfig, rate: int) -> float:
    """Seconds from one patch to the next: `config.seconds_per_frame` where 10 ms are whole samples at `rate` Hz."""
    return config.patch_shape[1] * frame_shift(rate) / rate


def patch_times(config: BridleEncoderConfig, num_steps: int | None = None, rate: int = 16000) -> np.ndarray:
    """Times of the patches of a recording, one for each step along the first axis of the grid.

    Args:
        config: of an audio model.
        num_steps: how many; those of a full-length clip if not given.
        rate: of the feature extractor, in Hz.

    Returns:
        (num_steps,) float64, in seconds: the middle of the samples that the frames of a patch are made of.

    Raises:
        ValueError: the modality is not audio, whose patches alone have times of their own.
    """
    if config.modality != "audio":
        raise ValueError(f"patches of {config.modality} have no times of their own")
    patch = config.patch_shape[1]
    steps = np.arange(config.patch_grid[0] if num_steps is None else num_steps)
    return (steps * patch * frame_shift(rate) + num_samples(patch, rate) / 2) / rate


def stitch_steps(starts: Sequence[int], windows: Sequence[np.ndarray], config: BridleEncoderConfig) -> np.ndarray:
    """Values of every step of a recording from those of windows that overlap, each for what is nearest its middle.

    Args:
        starts: first frame of each window, as [`cut_windows`] gives them.
        windows: (steps, ...) of each, without padding.

    Returns:
        (steps of the recording, ...).
    """
    firsts = [start // config.patch_shape[1] for start in starts]
    ends = [first + len(window) for first, window in zip(firsts, windows)]
    cuts = [0, *((end + first) // 2 for end, first in zip(ends, firsts[1:])), ends[-1]]
    return np.concatenate([
        window[cut - first : end - first] for window, first, cut, end in zip(windows, firsts, cuts, cuts[1:])
    ])  # fmt: skip


def find_events(
    scores: np.ndarray, seconds_per_step: float, threshold: float = 0.5, start: float = 0.0
) -> list[tuple[float, float, int, float]]:
    """Events in the scores of the classes over time: where one of them stays at the threshold or over it.

    Args:
        scores: (steps, classes).
        start: second at which the first step begins.

    Returns:
        Onset and offset in seconds, class, and mean score of each, in the order of their onsets.
    """
    active = np.pad(scores >= threshold, ((1, 1), (0, 0)))
    found = []
    for number in range(scores.shape[1]):
        bounds = np.flatnonzero(active[1:, number] != active[:-1, number]).reshape(-1, 2).tolist()
        for first, end in bounds:
            times = start + first * seconds_per_step, start + end * seconds_per_step
            found.append((*times, number, float(scores[first:end, number].mean())))
    return sorted(found)


__all__ = [
    "array_blocks",
    "cut_windows",
    "find_events",
    "media_of_mapping",
    "mono_blocks",
    "patch_times",
    "seconds_per_step",
    "stitch_steps",
]
