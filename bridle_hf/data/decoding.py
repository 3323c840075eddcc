"""Decoding of files and parts of shards: recordings by libsndfile and PyAV, images by Pillow, videos by PyAV.

    Sample ─► read_audio ─► waveform (channels, samples)
         ─► read_image ─► pixels (height, width, channels)
         ─► read_video ─► the frames chosen (frames, height, width, channels)

How they are read, and what is refused, stands in `audio_decoding_bridle.py` and `pixel_decoding_bridle.py`, where the
pipelines have it, too; here, errors get the name of the file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import soxr
from torch.utils.data import get_worker_info

from bridle_hf import pixel_decoding_bridle
from bridle_hf.audio_decoding_bridle import open_sound
from bridle_hf.common.errors import MediaError


# --- Audio ---


def read_audio(
    media: str | bytes, name: str | None = None, crop: Callable[[int, int], tuple[int, int]] | None = None
) -> tuple[np.ndarray, int]:
    """Decode a recording with libsndfile (wav, flac, ogg, opus, mp3, aiff and more) or PyAV (m4a, aac, wma and more).

    Args:
        media: path of the file, or its bytes.
        name: how errors call it; the path if absent.
        crop: given (samples, sampling_rate), chooses (start, count) of the samples to decode; all if absent.

    Returns:
        Waveform (channels, samples), float32 in [-1, 1] (floating-point files may go beyond), and the sampling rate in
        Hz.

    Raises:
        MediaError: see `audio_decoding_bridle.open_sound`.
    """
    (found,) = read_crops(media, name, lambda samples, rate: [crop(samples, rate) if crop else (0, samples)])
    return found


def read_crops(
    media: str | bytes, name: str | None, crops: Callable[[int, int], Sequence[tuple[int, int]]]
) -> Iterator[tuple[np.ndarray, int]]:
    """Several crops of one recording, which `crops` chooses in order and not overlapping: see `read_audio`."""
    with _named(media, name), open_sound(media) as sound:
        for start, count in crops(sound.length, sound.rate):
            waveform, found = np.empty((count, sound.channels), np.float32), 0
            for block in sound.blocks(start, count):
                waveform[found : found + len(block)] = block
                found += len(block)
            # Not by `librosa.load`, which would lose much of the above: it reads no bytes without a file object, falls
            # back to other decoders on an error, and can neither crop by the number of samples nor read an unknown
            # length.
            yield waveform[:found].T, sound.rate


def check_audio(media: str | bytes, name: str | None = None) -> None:
    """Decode a recording from end to end, a block at a time, and keep nothing.

    Raises:
        MediaError: see `read_audio`.
    """
    with _named(media, name), open_sound(media) as sound:
        for _ in sound.blocks():
            pass


def resample(waveform: np.ndarray, source_rate: float, target_rate: float) -> np.ndarray:
    """Resample at soxr's high quality: by librosa where it is installed, else by soxr itself, to the same samples.

    Loader workers leave librosa out, whose import would cost each of them seconds.

    Args:
        waveform: (channels, samples) or (samples,), float32, finite.
        source_rate, target_rate: in Hz.

    Returns:
        As many channels of about samples * target_rate / source_rate samples, float32.
    """
    librosa_resample = None
    if get_worker_info() is None:
        with suppress(ImportError):
            from librosa import resample as librosa_resample  # takes seconds to import: only where a rate differs
    if librosa_resample is None:
        return soxr.resample(waveform.T, source_rate, target_rate).T
    # `fix` would pad with zeros what soxr rounds down to one sample less.
    return librosa_resample(waveform, orig_sr=source_rate, target_sr=target_rate, res_type="soxr_hq", fix=False)


# --- Images and video ---


def read_image(media: str | bytes, name: str | None = None, num_channels: int = 3) -> np.ndarray:
    """A still as (height, width, num_channels) uint8, see `pixel_decoding_bridle.read_image`.

    Args:
        media: path of the file, or its bytes.
        name: how errors call it; the path if absent.
        num_channels: 3 for colour, 1 for grey; see `image_to_array` for what is converted, and how.

    Raises:
        MediaError: what cannot be read, or would take too much memory.
    """
    with _named(media, name):
        return pixel_decoding_bridle.read_image(media, num_channels)


Choose = Callable[[int, float], np.ndarray]


def read_video(media: str | bytes, name: str | None = None, choose: Choose | None = None) -> np.ndarray:
    """Decode chosen frames of a video.

    Args:
        media: path of the file, or its bytes.
        name: how errors call it; the path if absent.
        choose: given (number of frames, mean rate in 1/s), chooses indices in 0 .. number - 1, an integer array of any
            shape and order, several clips at once included. All if absent: for short videos only.

    Returns:
        (*shape of the choice, height, width, 3) uint8, RGB.

    Raises:
        MediaError: see `pixel_decoding_bridle.open_video`.
        IndexError: `choose` left the video.
    """
    with open_video(media, name) as video:
        return video.read(np.arange(video.total) if choose is None else np.asarray(choose(video.total, video.rate)))


@contextmanager
def open_video(media: str | bytes, name: str | None = None) -> Iterator[Any]:
    """A video, see `pixel_decoding_bridle.open_video`, whose errors are MediaErrors."""
    with _named(media, name), pixel_decoding_bridle.open_video(media) as video:
        yield video


@contextmanager
def _named(media: str | bytes, name: str | None) -> Iterator[None]:
    """Whatever is wrong with a file, with its name."""
    try:
        yield
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError(name or (media if isinstance(media, str) else "<bytes>"), str(error)) from error
