"""Pixel decoding: pictures by Pillow and chosen frames of videos by PyAV, upright, in bounded memory.

    read_image ─► pixels (height, width, channels)
    open_video ─► the frames chosen (frames, height, width, channels)

A video is seen as a grid of frames at its mean rate: frame i is the one shown nearest to i / rate seconds. Where the
rate is constant these are its frames; where it varies, timestamps decide. Nothing but the frames chosen, and those
that the decoder needs to get there, is ever decoded or held. Every error of a file is a `ValueError` that says what is
wrong with it, without its name.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from .image_processing_bridle import check_size, image_to_array


# Not at the top, nor outside of a `try`: remote code whose imports are not there does not load.
try:
    from PIL import Image
except ImportError:
    Image = None

# A video that ends this long before its header says is truncated, not just badly rounded.
TRUNCATION_SECONDS = 0.5
# A frame of a video counts many times, as decoders keep up to 16 of them: 4K, and no more.
MAX_FRAME_PIXELS = 4096 * 2304
MAX_DECODED_PIXELS = 10**10  # from a key frame on to the one that is wanted: 4,800 frames of 1080p, some ten seconds
_BOUNDS = {"max_pixels": str(MAX_FRAME_PIXELS)}
# Containers whose header has no duration: libav guesses it from the last packets that have a timestamp.
_GUESSED_DURATIONS = ("mpeg", "mpegts")
# Without an index of key frames, decoding on is taken to be cheaper than a seek over less than this.
BLIND_SEEK_SECONDS = 5.0


# --- Images ---


def read_image(media: Any, num_channels: int = 3) -> np.ndarray:
    """Decode a still with Pillow, upright.

    Args:
        media: path of the file, its bytes, or a Pillow image, whose current picture is taken.
        num_channels: 3 for colour, 1 for grey; see `image_to_array` for what is converted, and how.

    Returns:
        (height, width, num_channels) uint8.

    Raises:
        ValueError: missing, undecodable, truncated, animated (which frame is meant cannot be known), or what
            `image_to_array` refuses: too many pixels, too thin, more than 8 bits a channel.
    """
    if Image is None:
        raise ImportError("reading pictures needs Pillow: pip install pillow")
    if isinstance(media, str) and not os.path.isfile(media):
        raise ValueError("no such file")
    try:
        if isinstance(media, Image.Image):
            pixels = image_to_array(media, num_channels)
        else:
            with Image.open(_source(media)) as image:
                _check_is_one(image)
                pixels = image_to_array(image, num_channels)
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet: OSError, SyntaxError, TypeError, ...
        raise ValueError(f"cannot be decoded: {error}") from error
    if pixels.size == 0:
        raise ValueError("holds no pixels")
    return pixels


def _check_is_one(image: Any) -> None:
    check_size(image.height, image.width)  # before the pictures are counted
    frames = getattr(image, "n_frames", 1)
    # The further pictures of an MPO, a camera's JPEG, are previews of the first.
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"holds {frames} pictures where one is expected: save the one that is meant")


# --- Video ---


@contextmanager
def open_video(media: str | bytes) -> Iterator["_Video"]:
    """Open a video, and close it at the end; its sound and cover pictures are not looked at.

    Args:
        media: path of the file, or its bytes.

    Raises:
        ValueError: missing, undecodable, truncated, without video or timestamps, turned by other than quarters, or of
            frames that are too large or too thin; here, or while frames are read.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install av") from error
    if isinstance(media, str) and not os.path.isfile(media):
        raise ValueError("no such file")
    try:
        # Tags in an unknown encoding are no reason to refuse a video. The bounds hold for what libav decodes to find
        # out what is in the file, and for frames that are larger than the header says.
        with av.open(_source(media), metadata_errors="replace", options=_BOUNDS) as container:
            yield _Video(container, av)
    except (av.error.FFmpegError, OSError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"cannot be decoded: {getattr(error, 'strerror', None) or error}") from error


class _Video:
    """The video stream of an open file: by its header, `total` frames of (height, width) at a mean `rate` in 1/s."""

    def __init__(self, container: Any, av: Any):
        self.container = container
        self.stream = container.streams.best("video")  # a cover picture only where there is nothing else
        if self.stream is None or self.stream.disposition & av.stream.Disposition.attached_pic:
            raise ValueError("holds no video")
        codec = self.stream.codec_context
        if codec is None:
            raise ValueError("has video of a codec that libav does not know")
        self.height, self.width = codec.height, codec.width
        self._check_size(self.height, self.width)
        codec.options = _BOUNDS
        # Workers are what runs in parallel; threads of a decoder's own would get in their way.
        codec.thread_count = 1
        self.start = self.stream.start_time or 0
        rate = self.stream.average_rate or self.stream.guessed_rate
        if not rate:
            raise ValueError("says nothing about its frame rate: remux it into a container that does, as mp4")
        self.rate = float(rate)
        self._decoder = self._before = self._after = None
        self._reached = 0  # the last time that was asked for, in ticks
        # One for all frames, and one thread: a frame's own would be set up anew each time, at many times the cost.
        self._reformatter = av.video.reformatter.VideoReformatter()
        self.has_own_duration = True
        self.total = max(round(self._seconds() * self.rate), 1)
        if 0 < container.size < self.total:
            # Whoever goes through all of it would never end.
            raise ValueError(
                f"claims {self.total} frames in {container.size} bytes: its timestamps or its frame rate are wrong"
            )

    def read(self, chosen: np.ndarray, view: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """Frames by their indices, an integer array of any shape and order.

        Frames that differ in size from the first one read (the stream changed) are resized to it.

        Args:
            view: makes of each frame, (height, width, 3) uint8 RGB, what is kept of it, so that no more than one is
                ever held in full size; called in the order of the frames, once for each that differs from the last.

        Returns:
            (*shape of the choice, *shape of a frame or of its view).
        """
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.total:
            raise IndexError(f"frames {chosen.min()} .. {chosen.max()} were chosen out of {self.total}")
        indices, places = np.unique(chosen, return_inverse=True)
        found = None
        for index, pixels in enumerate(self._convert(self._nearest(indices), view)):
            if found is None:
                found = np.empty((*chosen.shape, *pixels.shape), pixels.dtype)
            found[places.reshape(chosen.shape) == index] = pixels
        return found

    def _check_size(self, height: int, width: int) -> None:
        check_size(height, width, MAX_FRAME_PIXELS)

    def _seconds(self) -> float:
        if self.stream.duration and self.container.format.name not in _GUESSED_DURATIONS:
            return float(self.stream.duration * self.stream.time_base)
        if "DURATION" in self.stream.metadata:  # Matroska has it in a tag, as 00:01:02.5
            with suppress(ValueError):
                hours, minutes, seconds = map(float, self.stream.metadata["DURATION"].split(":"))
                if np.isfinite(duration := 3600 * hours + 60 * minutes + seconds):
                    return duration
        if self.container.duration and not self.stream.duration:  # in microseconds, that of the longest stream
            self.has_own_duration = False  # its sound may be what is longer
            return self.container.duration / 1e6
        # The timestamps of packets tell, undecoded: of the last ones, or of all of a live recording.
        if guessed := self.stream.duration or 0:
            self.container.seek(self.start + guessed, stream=self.stream)
        stamps = [packet.pts for packet in self.container.demux(self.stream) if packet.pts is not None]
        self.container.seek(0)
        if not stamps:
            raise ValueError("holds no timestamps: remux it into a container that does, as mp4")
        ticks = max(stamps) - (self.start if guessed else min(stamps))
        return max(float(ticks * self.stream.time_base) + 1 / self.rate, float(guessed * self.stream.time_base))

    def _nearest(self, indices: np.ndarray) -> Iterator[Any]:
        """For each of the sorted `indices`, the frame whose timestamp is nearest to index / rate."""
        for index in indices:
            tick = self.start + round(int(index) / self.rate / self.stream.time_base)
            if self._decoder is None or tick < self._reached or self._key_frame_between(tick):
                self._seek(tick, self.stream)
                if self._after is None or self._after.pts > tick:
                    self._seek(0)  # it landed behind, as it may without an index: from the beginning, then
            self._reached = tick
            decoded = 0
            while self._after is not None and self._after.pts < tick:
                self._before, self._after = self._after, self._next()
                decoded += self._before.width * self._before.height
                if decoded > MAX_DECODED_PIXELS:
                    raise ValueError("has too few key frames: write it anew with one every few seconds")
            if self._after is None:
                self._check_end(tick)
            if self._after is None or (self._before and tick - self._before.pts < self._after.pts - tick):
                yield self._before
            else:
                yield self._after

    def _seek(self, time: int, stream: Any = None) -> None:
        """To the key frame at or before `time`, in ticks of `stream` (without it, microseconds of the file)."""
        self.container.seek(time, stream=stream)
        self._decoder = self.container.decode(self.stream)
        self._before, self._after = None, None
        self._after = self._next()

    def _next(self) -> Any:
        frame = next(self._decoder, None)
        if frame is not None and (frame.pts is None or (self._after and frame.pts < self._after.pts)):
            raise ValueError("has timestamps missing or out of order: remux it into another container")
        return frame

    def _key_frame_between(self, tick: int) -> bool:
        """Whether a seek to `tick` saves decoding."""
        if self._after is None or self._after.pts >= tick:
            return False
        index = self.stream.index_entries
        if not len(index):
            return float((tick - self._after.pts) * self.stream.time_base) > BLIND_SEEK_SECONDS
        position = index.search_timestamp(tick, backward=True)
        return position >= 0 and index[position].timestamp > self._after.pts

    def _check_end(self, tick: int) -> None:
        """No frame is left: is this where the video should end?"""
        if self._before is None:
            raise ValueError("holds no frames that can be decoded")
        missing = float((tick - self._before.pts) * self.stream.time_base)
        if self.has_own_duration and missing > max(TRUNCATION_SECONDS, 2 / self.rate):
            raise ValueError(f"is truncated: it ends {missing:.1f} s before a frame that it should have")

    def _convert(self, frames: Iterator[Any], view: Callable[[np.ndarray], np.ndarray] | None) -> Iterator[np.ndarray]:
        """Decoded frames as (height, width, 3) uint8 RGB, upright and of one size, or their views."""
        last, size = None, None
        for frame in frames:
            if frame is not last:
                if frame.is_corrupt:
                    raise ValueError(f"has a corrupt frame at {frame.time:.2f} s")
                if frame.rotation % 90:
                    raise ValueError(f"is turned by {frame.rotation} degrees: give it quarter turns")
                if size is None:
                    size = (frame.width, frame.height)
                    self._check_size(frame.height, frame.width)
                rgb = self._reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
                last, array = frame, np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))
                array = array if view is None else view(array)
            yield array


def stride_indices(total: int, num_frames: int, stride: int, position: float) -> np.ndarray:
    """Every `stride`-th frame, (num_frames,) int64; `position` in [0, 1] says where the clip lies in the video.

    A video that is too short gives indices behind its end.
    """
    spare = max(total - (num_frames - 1) * stride - 1, 0)
    return min(int(position * (spare + 1)), spare) + stride * np.arange(num_frames)


def segment_indices(total: int, num_frames: int, positions: float | np.ndarray) -> np.ndarray:
    """One frame of each of `num_frames` equal parts of the video, (num_frames,) int64; `positions` within each
    part."""
    return np.minimum((np.arange(num_frames) + positions) * total / num_frames, total - 1).astype(np.int64)


def _source(media: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(media) if isinstance(media, bytes) else media


__all__ = ["open_video", "read_image", "segment_indices", "stride_indices"]
