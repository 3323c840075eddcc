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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import soundfile
import soxr
from torch.utils.data import get_worker_info

from bridle_hf import pixel_decoding_bridle
from bridle_hf.common.errors import MediaError
from bridle_hf.feature_extraction_bridle import MAX_AMPLITUDE


MIN_RATE = 100  # Hz; a lower one is a broken header's, and has no samples for a frame of 25 ms
# Numbers in a second, of all channels together: eight at 500 kHz, eighty at 48. It bounds what a crop takes.
MAX_NUMBERS_PER_SECOND = 4_000_000
NUMBERS_PER_BLOCK = 2**22  # of what is decoded at a time: 16 MB
# What libsndfile says where the header does not know how many samples follow, as of FLAC that went through a pipe.
UNKNOWN_LENGTH = 2**63 - 1


# --- Audio ---


def read_audio(
    media: str | bytes, name: str | None = None, crop: Callable[[int, int], tuple[int, int]] | None = None
) -> tuple[np.ndarray, int]:
    """Decode a recording with libsndfile (wav, flac, ogg, opus, mp3, aiff and more).

    Args:
        media: path of the file, or its bytes.
        name: how errors call it; the path if absent.
        crop: given (samples, sampling_rate), chooses (start, count) of the samples to decode; all if absent.

    Returns:
        Waveform (channels, samples), float32 in [-1, 1] (floating-point files may go beyond), and the sampling rate in
        Hz.

    Raises:
        MediaError: missing, undecodable or empty; samples that are NaN, infinite or over `MAX_AMPLITUDE`;
            a sampling rate that is too low, or too high for its channels.
    """
    (found,) = read_crops(media, name, lambda samples, rate: [crop(samples, rate) if crop else (0, samples)])
    return found


def read_crops(
    media: str | bytes, name: str | None, crops: Callable[[int, int], Sequence[tuple[int, int]]]
) -> Iterator[tuple[np.ndarray, int]]:
    """Several crops of one recording, which `crops` chooses in order and not overlapping: see `read_audio`."""
    with _open_sound(media, name) as file:
        for start, count in crops(file.length, file.samplerate):
            waveform, found = np.empty((count, file.channels), np.float32), 0
            for block in file.read_blocks(start, count):
                waveform[found : found + len(block)] = block
                found += len(block)
            # Not by `librosa.load`, which would lose much of the above: it reads no bytes without a file object, falls
            # back to other decoders on an error, and can neither crop by the number of samples nor read an unknown
            # length.
            yield waveform[:found].T, file.samplerate


def check_audio(media: str | bytes, name: str | None = None) -> None:
    """Decode a recording from end to end, a block at a time, and keep nothing.

    Raises:
        MediaError: see `read_audio`.
    """
    with _open_sound(media, name) as file:
        for _ in file.read_blocks(0, file.length):
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


@contextmanager
def _open_sound(media: str | bytes, name: str | None) -> Iterator["_SoundFile"]:
    """A recording, closed at the end; whatever soundfile raises while it is open is a MediaError."""
    name = name or (media if isinstance(media, str) else "<bytes>")
    if isinstance(media, str) and not os.path.isfile(media):
        raise MediaError(name, "no such file")
    try:
        with _SoundFile(media, name) as file:
            yield file
    except MediaError:
        raise
    # Beside its own errors soundfile raises ValueError and others; memory: a broken header promises terabytes.
    except (RuntimeError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise MediaError(name, f"cannot be decoded: {error}") from error


class _SoundFile(soundfile.SoundFile):
    """A recording with its true `length` in samples, be its header silent about it or wrong."""

    def __init__(self, media: str | bytes, name: str):
        self.path, self.position = name, 0
        try:
            super().__init__(_source(media))
        except soundfile.LibsndfileError:
            # Of an mp3 that claims to be shorter than its encoder's padding, libsndfile says that it cannot be opened.
            if (mended := mend_mp3_length(media, 0)) is None:
                raise
            super().__init__(_source(mended))
        rate, channels = self.samplerate, self.channels
        if rate < MIN_RATE or rate * channels > MAX_NUMBERS_PER_SECOND:
            raise MediaError(name, f"has a sampling rate of {rate} Hz" + f" in {channels} channels" * (channels > 1))
        self.length = self.frames
        if self.frames == UNKNOWN_LENGTH:
            self.length = sum(map(len, self._blocks(UNKNOWN_LENGTH)))
            self._open_again(media)  # there libsndfile fails to seek once it is at the end
        elif self.format == "MP3" and (mended := mend_mp3_length(media, self.frames)) is not None:
            self._open_again(mended)
            self.length = self.frames

    def _open_again(self, media: str | bytes) -> None:
        self.close()
        super().__init__(_source(media))
        self.position = 0

    def seekable(self) -> bool:
        return self.frames != UNKNOWN_LENGTH and super().seekable()

    def read_blocks(self, start: int, count: int) -> Iterator[np.ndarray]:
        """`count` samples from `start` on, in pieces (samples, channels) float32.

        Raises:
            MediaError: see `read_audio`.
        """
        if start != self.position and self.seekable():
            self.position = self.seek(start)
        elif start != self.position:  # GSM 6.10 and others go on, and never back
            for _ in self._blocks(start - self.position):
                pass
        is_empty = True
        for block in self._blocks(count):
            is_empty = False
            if not np.isfinite(block).all():
                raise MediaError(self.path, "holds NaN or infinite samples")
            if (loudest := np.abs(block).max()) > MAX_AMPLITUDE:
                raise MediaError(self.path, f"holds a sample of {loudest:.3g}, over the bound of {MAX_AMPLITUDE:.3g}")
            yield block
        if is_empty:
            raise MediaError(self.path, "holds no samples")

    def _blocks(self, count: int) -> Iterator[np.ndarray]:
        """The next `count` samples, or as many as there are."""
        most = max(NUMBERS_PER_BLOCK // self.channels, 1)
        while count > 0 and len(block := self.read(min(count, most), dtype="float32", always_2d=True)):
            count -= len(block)
            self.position += len(block)
            yield block


def _source(media: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(media) if isinstance(media, bytes) else media


# Of MPEG audio, layer III: bit rates in kbit/s of versions 1 and 2 (and 2.5), sampling rates in Hz of version 1.
_MP3_BIT_RATES = {
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES = (44100, 48000, 32000)
_MP3_HEADER = 0xFFFEFE  # the bits of a header's first three bytes that decide over its frame's length
_MP3_STREAM = 0xFFFE0C  # and those that do not change from frame to frame


def _mp3_frame_sizes() -> dict[int, int]:
    """Size of a frame in bytes, header included, by the first three bytes of the header."""
    sizes = {}
    for version_bits, version, slower in ((3, 1, 1), (2, 2, 2), (0, 2, 4)):
        for number, bit_rate in enumerate(_MP3_BIT_RATES[version], start=1):
            for rate_bits, rate in enumerate(_MP3_RATES):
                size = 144_000 // version * bit_rate * slower // rate
                for padding in (0, 1):
                    header = 0xFFE000 | version_bits << 11 | 1 << 9 | number << 4 | rate_bits << 2 | padding << 1
                    sizes[header] = size + padding
    return sizes


_MP3_FRAME_SIZES = _mp3_frame_sizes()


def mend_mp3_length(media: str | bytes, claimed: int) -> bytes | None:
    """An mp3 whose header tells its true length, by a walk over its frames; None if it does already, or is no mp3.

    libsndfile reads as many samples as the first frame's Xing tag claims, or, without one, as the first frame's bit
    rate lets it guess: too few of files that were joined or that vary in bit rate, or too many of those cut short.

    Args:
        media: path of the file, or its bytes.
        claimed: samples, as libsndfile has them.
    """
    with _source(media) if isinstance(media, bytes) else open(media, "rb") as file:
        start = file.read(3)
        if start != b"ID3" and int.from_bytes(start) & _MP3_HEADER not in _MP3_FRAME_SIZES:
            return None
        content = start + file.read()
    first, frames = _walk_mp3(content)
    if frames == 0:
        return None
    header = int.from_bytes(content[first : first + 3])
    tag = max(content.find(name, first, first + 64) for name in (b"Xing", b"Info"))
    if tag >= 0 and content[tag + 7] & 1:
        found = frames - 1  # the tag's frame holds no sound
        if abs(int.from_bytes(content[tag + 8 : tag + 12]) - found) <= 1:
            return None
        return content[: tag + 8] + found.to_bytes(4) + content[tag + 12 :]
    samples = 1152 if header >> 11 & 3 == 3 else 576  # of a frame, in versions 1 and 2
    if abs(frames * samples - claimed) <= 3 * 1152:  # as far as encoders pad
        return None
    # A frame of the same stream that holds nothing but a tag, put before the others.
    is_mono = content[first + 3] >> 6 == 3
    side_information = {1152: 17 if is_mono else 32, 576: 9 if is_mono else 17}[samples]
    header = header & _MP3_STREAM | 1 << 8 | 9 << 4  # without a checksum, and long enough for a tag
    empty = bytearray(_MP3_FRAME_SIZES[header & _MP3_HEADER])
    start = header.to_bytes(3) + content[first + 3 : first + 4] + bytes(side_information)
    start += b"Xing" + (1).to_bytes(4) + frames.to_bytes(4)
    empty[: len(start)] = start
    return content[:first] + bytes(empty) + content[first:]


def _walk_mp3(content: bytes) -> tuple[int, int]:
    """Where the first frame lies and how many there are, but for those cut off or of another stream."""
    first, frames, stream, place = 0, 0, None, 0
    if content[:3] == b"ID3":  # a tag that may hold pictures: seven bits a byte
        place = 10 + sum(byte << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0)))
    while (place := content.find(0xFF, place)) >= 0:
        header = int.from_bytes(content[place : place + 3])
        size = _MP3_FRAME_SIZES.get(header & _MP3_HEADER)
        if size is None or stream not in (None, header & _MP3_STREAM):
            place += 1
            continue
        if stream is None:  # the first one is confirmed by the next
            following = int.from_bytes(content[place + size : place + size + 3])
            if following & _MP3_HEADER not in _MP3_FRAME_SIZES or (following ^ header) & _MP3_STREAM:
                place += 1
                continue
            first, stream = place, header & _MP3_STREAM
        place += size
        frames += place <= len(content)
    return first, frames


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
