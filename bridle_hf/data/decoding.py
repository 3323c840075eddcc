"""Decoding of files and parts of shards: recordings by libsndfile, images by Pillow, videos by PyAV.

    Sample ─► read_audio ─► waveform (channels, samples)
         ─► read_image ─► pixels (height, width, channels)
         ─► read_video ─► the frames chosen (frames, height, width, channels)

A video is seen as a grid of frames at its mean rate: frame i is the one shown nearest to i / rate seconds. Where the
rate is constant these are its frames; where it varies, timestamps decide. Nothing but the frames chosen, and those
that the decoder needs to get there, is ever decoded or held.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import soundfile
import soxr
from torch.utils.data import get_worker_info

from bridle_hf.common.errors import MediaError
from bridle_hf.image_processing_bridle import image_to_array


# A video that ends this long before its header says is truncated, not just badly rounded.
TRUNCATION_SECONDS = 0.5
# Without an index of key frames, decoding on is taken to be cheaper than a seek over less than this.
BLIND_SEEK_SECONDS = 5.0
MIN_RATE = 100  # Hz; a lower one is a broken header's, and has no samples for a frame of 25 ms
# What libsndfile says where the header does not know how many samples follow, as of FLAC that went through a pipe.
UNKNOWN_LENGTH = 2**63 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Audio
# ---------------------------------------------------------------------------------------------------------------------


def read_audio(
    media: str | bytes, name: str | None = None, crop: Callable[[int, int], tuple[int, int]] | None = None
) -> tuple[np.ndarray, int]:
    """Decode a recording with libsndfile (wav, flac, ogg, opus, mp3, aiff and more).

    Args:
        media: path of the file, or its bytes.
        name: how errors call it; the path if absent.
        crop: given (samples, sampling_rate), chooses (start, count) of the samples to decode; all if absent.

    Returns:
        Waveform (channels, samples), float32 in [-1, 1], and the sampling rate in Hz.

    Raises:
        MediaError: missing, undecodable, empty, or with NaN or infinite samples.
    """
    name = name or (media if isinstance(media, str) else "<bytes>")
    if isinstance(media, str) and not os.path.isfile(media):
        raise MediaError(name, "no such file")
    try:
        with _SoundFile(io.BytesIO(media) if isinstance(media, bytes) else media) as file:
            rate, whole = file.samplerate, None
            if rate < MIN_RATE:
                raise MediaError(name, f"has a sampling rate of {rate} Hz")
            if file.frames == UNKNOWN_LENGTH:
                whole = file.read_to_end()
            start, count = crop(file.frames if whole is None else len(whole), rate) if crop else (0, None)
            waveform = file.read_from(start, count) if whole is None else whole[start:][:count]
    except (soundfile.SoundFileError, OSError, MemoryError) as error:  # memory: a broken header promises terabytes
        raise MediaError(name, f"cannot be decoded: {error}") from error
    # Not by `librosa.load`, which would lose much of the above: it reads no bytes without a file object, falls back to
    # other decoders on an error, and can neither crop by the number of samples nor read an unknown length.
    if waveform.size == 0:
        raise MediaError(name, "holds no samples")
    if not np.isfinite(waveform).all():
        raise MediaError(name, "holds NaN or infinite samples")
    return waveform.T, rate


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


class _SoundFile(soundfile.SoundFile):
    """Also reads what does not say how long it is: there libsndfile fails to seek once it is at the end."""

    def seekable(self) -> bool:
        return self.frames != UNKNOWN_LENGTH and super().seekable()

    def read_from(self, start: int, count: int | None) -> np.ndarray:
        """(count, channels) float32; all that follow if no count is given."""
        if start:
            self.seek(start)
        return self.read(-1 if count is None else count, dtype="float32", always_2d=True)

    def read_to_end(self) -> np.ndarray:
        """(samples, channels) float32, however many there are."""
        blocks = [np.empty((0, self.channels), np.float32)]
        while len(block := self.read(1 << 16, dtype="float32", always_2d=True)):
            blocks.append(block)
        return np.concatenate(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def read_image(media: str | bytes, name: str | None = None, num_channels: int = 3) -> np.ndarray:
    """Decode a still with Pillow, upright.

    Args:
        media: path of the file, or its bytes.
        name: how errors call it; the path if absent.
        num_channels: 3 for colour, 1 for grey; see `image_to_array` for what is converted, and how.

    Returns:
        (height, width, num_channels) uint8.

    Raises:
        MediaError: missing, undecodable, truncated, animated (which frame is meant cannot be known), or with pixels
            whose conversion would be a guess.
    """
    from PIL import Image

    name = name or (media if isinstance(media, str) else "<bytes>")
    if isinstance(media, str) and not os.path.isfile(media):
        raise MediaError(name, "no such file")
    try:
        with Image.open(io.BytesIO(media) if isinstance(media, bytes) else media) as image:
            frames = getattr(image, "n_frames", 1)
            # The further pictures of an MPO, a camera's JPEG, are previews of the first.
            if frames > 1 and image.format != "MPO":
                raise MediaError(name, f"holds {frames} pictures where one is expected: save the one that is meant")
            pixels = image_to_array(image, num_channels)
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError(name, str(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever they meet: OSError, SyntaxError, TypeError, ...
        raise MediaError(name, f"cannot be decoded: {error}") from error
    if pixels.size == 0:
        raise MediaError(name, "holds no pixels")
    return pixels


# ---------------------------------------------------------------------------------------------------------------------
# Video
# ---------------------------------------------------------------------------------------------------------------------

Choose = Callable[[int, float], np.ndarray]


def read_video(media: str | bytes, name: str | None = None, choose: Choose | None = None) -> np.ndarray:
    """Decode chosen frames of a video with PyAV, upright; its sound and cover pictures are not looked at.

    Frames that differ in size from the first one chosen (the stream changed) are resized to it.

    Args:
        media: path of the file, or its bytes.
        name: how errors call it; the path if absent.
        choose: given (number of frames, mean rate in 1/s), chooses indices in 0 .. number - 1, an integer array of any
            shape and order, several clips at once included. All if absent: for short videos only.

    Returns:
        (*shape of the choice, height, width, 3) uint8, RGB.

    Raises:
        MediaError: missing, undecodable, truncated, without video or timestamps, or turned by other than quarters.
        IndexError: `choose` left the video.
    """
    name = name or (media if isinstance(media, str) else "<bytes>")
    if isinstance(media, str) and not os.path.isfile(media):
        raise MediaError(name, "no such file")
    with _open_video(media, name) as video:
        chosen = np.arange(video.total) if choose is None else np.asarray(choose(video.total, video.rate))
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < video.total:
            raise IndexError(f"{name}: frames {chosen.min()} .. {chosen.max()} were chosen out of {video.total}")
        indices, inverse = np.unique(chosen, return_inverse=True)
        frames = video.convert(video.nearest(indices))
    return frames[inverse.reshape(chosen.shape)]


@contextmanager
def _open_video(media: str | bytes, name: str) -> Iterator["_Video"]:
    """A video, closed at the end; whatever libav raises while it is open is a MediaError."""
    import av

    try:
        # Tags in an unknown encoding are no reason to refuse a video.
        source = io.BytesIO(media) if isinstance(media, bytes) else media
        with av.open(source, metadata_errors="replace") as container:
            yield _Video(container, name)
    except MediaError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(name, f"cannot be decoded: {error.strerror or error}") from error


class _Video:
    """The video stream of an open file: `total` frames at a mean `rate` in 1/s, as far as its header tells."""

    def __init__(self, container: Any, name: str):
        from av.stream import Disposition

        self.container, self.name = container, name
        self.stream = container.streams.best("video")  # a cover picture only where there is nothing else
        if self.stream is None or self.stream.disposition & Disposition.attached_pic:
            raise MediaError(name, "holds no video")
        if self.stream.codec_context is None:
            raise MediaError(name, "has video of a codec that libav does not know")
        # Workers are what runs in parallel; threads of a decoder's own would get in their way.
        self.stream.codec_context.thread_count = 1
        self.start = self.stream.start_time or 0
        rate = self.stream.average_rate or self.stream.guessed_rate
        if not rate:
            raise MediaError(name, "says nothing about its frame rate: remux it into a container that does, as mp4")
        self.rate = float(rate)
        self.total = max(round(self._seconds() * self.rate), 1)
        self._decoder = self._before = self._after = None

    def _seconds(self) -> float:
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        if "DURATION" in self.stream.metadata:  # Matroska has it in a tag, as 00:01:02.5
            with suppress(ValueError):
                hours, minutes, seconds = self.stream.metadata["DURATION"].split(":")
                return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        if self.container.duration:  # in microseconds, that of the longest stream
            return self.container.duration / 1e6
        # A live recording: its packets tell, undecoded.
        stamps = [packet.pts for packet in self.container.demux(self.stream) if packet.pts is not None]
        if not stamps:
            raise MediaError(self.name, "holds no timestamps: remux it into a container that does, as mp4")
        self.container.seek(0)
        return float((max(stamps) - min(stamps)) * self.stream.time_base) + 1 / self.rate

    def nearest(self, indices: np.ndarray) -> Iterator[Any]:
        """For each of the sorted `indices`, the frame whose timestamp is nearest to index / rate."""
        for index in indices:
            tick = self.start + round(int(index) / self.rate / self.stream.time_base)
            if self._decoder is None or self._key_frame_between(tick):
                self._seek(tick, self.stream)
                if self._after is None or self._after.pts > tick:
                    self._seek(0)  # it landed behind, as it may without an index: from the beginning, then
            while self._after is not None and self._after.pts < tick:
                self._before, self._after = self._after, self._next()
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
            raise MediaError(self.name, "has timestamps missing or out of order: remux it into another container")
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
            raise MediaError(self.name, "holds no frames that can be decoded")
        missing = float((tick - self._before.pts) * self.stream.time_base)
        # Without a duration of its own, its sound may be what is longer.
        if self.stream.duration and missing > max(TRUNCATION_SECONDS, 2 / self.rate):
            raise MediaError(self.name, f"is truncated: it ends {missing:.1f} s before a frame that it should have")

    def convert(self, frames: Iterator[Any]) -> np.ndarray:
        """Decoded frames as (frames, height, width, 3) uint8 RGB, upright and of one size."""
        from av.video.reformatter import VideoReformatter

        # One for all frames, and one thread: a frame's own would be set up anew each time, at many times the cost.
        reformatter = VideoReformatter()
        arrays, last, size = [], None, None
        for frame in frames:
            if frame is not last:
                if frame.is_corrupt:
                    raise MediaError(self.name, f"has a corrupt frame at {frame.time:.2f} s")
                if frame.rotation % 90:
                    raise MediaError(self.name, f"is turned by {frame.rotation} degrees: give it quarter turns")
                size = size or (frame.width, frame.height)
                rgb = reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
                last, array = frame, np.rot90(rgb, frame.rotation // 90)
            arrays.append(array)
        return np.stack(arrays)
