"""Audio decoding: sound files in blocks, by libsndfile (wav, flac, ogg, mp3, ...) or PyAV (m4a, aac, wma, ...).

    open_sound ─► rate, channels, length; blocks (samples, channels) of any part
    read_blocks ─► rate; blocks (samples, channels) from the beginning to the end

However long a recording is, no more of it is held than a block. Every error of a file is a `ValueError` that says what
is wrong with it, without its name.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from .feature_extraction_bridle import MAX_AMPLITUDE


MIN_RATE = 100  # Hz; a lower one is a broken header's, and has no samples for a frame of 25 ms
# Numbers in a second, of all channels together: eight at 500 kHz, eighty at 48. It bounds what a crop takes.
MAX_NUMBERS_PER_SECOND = 4_000_000
NUMBERS_PER_BLOCK = 2**20  # of what is decoded at a time: 4 MB
# What libsndfile says where the header does not know how many samples follow, as of FLAC that went through a pipe.
UNKNOWN_LENGTH = 2**63 - 1
# From a seek to the first sample that is wanted: codecs make sound of a packet and of those before it.
PREROLL_SECONDS = 1


def read_blocks(
    media: str | bytes, crop: Callable[[int, int], tuple[int, int]] | None = None
) -> tuple[int, Iterator[np.ndarray]]:
    """A recording from the beginning to the end, see `open_sound`.

    Args:
        crop: given (samples, sampling rate), chooses (start, count) of the samples to read; all if absent.

    Returns:
        The sampling rate in Hz, and the blocks (samples, channels) float32, read as they are asked for.
    """
    stack = ExitStack()
    sound = stack.enter_context(open_sound(media))

    def blocks() -> Iterator[np.ndarray]:
        with stack:
            yield from sound.blocks(*(crop(sound.length, sound.rate) if crop else ()))

    return sound.rate, blocks()


@contextmanager
def open_sound(media: str | bytes) -> Iterator["_Sound"]:
    """Open a recording, and close it at the end.

    Args:
        media: path of the file, or its bytes.

    Raises:
        ValueError: missing or undecodable; a sampling rate that is too low, or too high for its channels. While blocks
            are read: undecodable or empty; samples that are NaN, infinite or over `MAX_AMPLITUDE`.
        ImportError: neither soundfile nor av is installed.
    """
    sound = _open(media)
    try:
        if sound.rate < MIN_RATE or sound.rate * sound.channels > MAX_NUMBERS_PER_SECOND:
            channels = f" in {sound.channels} channels" if sound.channels > 1 else ""
            raise ValueError(f"has a sampling rate of {sound.rate} Hz{channels}")
        yield sound
    # Memory: a broken header promises terabytes.
    except (*sound.errors, OSError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"cannot be decoded: {_reason(error)}") from error
    finally:
        sound.close()


def _open(media: str | bytes) -> "_Sound":
    if isinstance(media, str) and not os.path.isfile(media):
        raise ValueError("no such file")
    # Not outside of a `try`: remote code whose imports are not there does not load.
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without its library
        soundfile, why = None, "soundfile is not installed"
    if soundfile is not None:
        try:
            return _SndfileSound(media, soundfile)
        # Beside its own errors soundfile raises ValueError and others.
        except (RuntimeError, OSError, ValueError, ArithmeticError, MemoryError) as error:
            why = f"libsndfile: {_reason(error)}"
    try:
        import av
    except ImportError as error:
        if soundfile is None:
            raise ImportError("reading sound files needs soundfile or av: pip install soundfile av") from error
        raise ValueError(f"cannot be decoded ({why}; more formats: pip install av)") from error
    try:
        return _AvSound(media, av)
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"cannot be decoded ({why}; libav: {_reason(error)})") from error


def _reason(error: Exception) -> str:
    """In a library's words, without the name of a file."""
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)


class _Sound:
    """An open recording: `channels` at `rate` Hz, and its `length` in samples."""

    rate: int
    channels: int
    length: int
    errors: tuple[type[Exception], ...]  # of the library that reads it

    def blocks(self, start: int = 0, count: int = UNKNOWN_LENGTH) -> Iterator[np.ndarray]:
        """`count` samples from `start` on, or as many as there are, in pieces (samples, channels) float32.

        Parts are asked for in order: some codecs go on, and never back.
        """
        is_empty = True
        for block in self._decode(start, count):
            is_empty = False
            if not np.isfinite(block).all():
                raise ValueError("holds NaN or infinite samples")
            if (loudest := np.abs(block).max()) > MAX_AMPLITUDE:
                raise ValueError(f"holds a sample of {loudest:.3g}, over the bound of {MAX_AMPLITUDE:.3g}")
            yield block
        if is_empty:
            raise ValueError("holds no samples")

    def _decode(self, start: int, count: int) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


# --- libsndfile ---


class _SndfileSound(_Sound):
    """With its true length, be the header silent about it or wrong."""

    def __init__(self, media: str | bytes, soundfile: Any):
        class SoundFile(soundfile.SoundFile):
            def seekable(self) -> bool:
                # Read to the end, wherever the header says that it is: soundfile would stop there, and seek each time.
                return False

        self.errors = (soundfile.SoundFileError, RuntimeError)
        self._open = lambda content: SoundFile(_source(content))
        self._media, self._position = media, 0
        try:
            self._file = self._open(media)
        except soundfile.LibsndfileError:
            # Of an mp3 that claims to be shorter than its encoder's padding, libsndfile says that it cannot be opened.
            if (mended := mend_mp3_length(media, 0)) is None:
                raise
            self._file = self._open(mended)
        if self._file.format == "MP3" and (mended := mend_mp3_length(media, self._file.frames)) is not None:
            self._file.close()
            self._file = self._open(mended)
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self._seekable = self._file.frames != UNKNOWN_LENGTH and soundfile.SoundFile.seekable(self._file)

    @cached_property
    def length(self) -> int:
        if self._file.frames != UNKNOWN_LENGTH:
            return self._file.frames
        length = sum(map(len, self._decode(0, UNKNOWN_LENGTH)))
        self.close()  # there libsndfile fails to seek once it is at the end
        self._file, self._position = self._open(self._media), 0
        return length

    def _decode(self, start: int, count: int) -> Iterator[np.ndarray]:
        if start != self._position and self._seekable:
            self._position = self._file.seek(start)
        elif start != self._position:  # GSM 6.10 and others
            for _ in self._next(start - self._position):
                pass
        yield from self._next(count)

    def _next(self, count: int) -> Iterator[np.ndarray]:
        most = max(NUMBERS_PER_BLOCK // self.channels, 1)
        while count > 0 and len(block := self._file.read(min(count, most), dtype="float32", always_2d=True)):
            count -= len(block)
            self._position += len(block)
            yield block

    def close(self) -> None:
        self._file.close()


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
        file.seek(0)
        content = file.read()
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


# --- PyAV ---


class _AvSound(_Sound):
    """The first sound of a file that libav reads; what lies where, its packets tell, in some containers to 1 ms."""

    def __init__(self, media: str | bytes, av: Any):
        self.errors = (av.error.FFmpegError,)
        self._av, self._media = av, media
        self._begin()
        try:
            # The header may be wrong about what is in the packets.
            first = next(self._container.decode(self._stream), None)
            if first is None:
                raise ValueError("no sound")
        except Exception:
            self.close()
            raise
        self.rate, self.channels = first.sample_rate, first.layout.nb_channels
        self._start = first.time or 0.0
        # The samples' type is what changes, rate and channels stay.
        self._resampler = lambda: av.AudioResampler(format="fltp", layout=first.layout.name, rate=self.rate)

    def _begin(self) -> None:
        # Tags in an unknown encoding are no reason to refuse a recording.
        self._container = self._av.open(_source(self._media), metadata_errors="replace")
        streams = self._container.streams.audio
        if not streams or streams[0].codec_context is None:
            self.close()
            raise ValueError("no sound that can be decoded")
        self._stream = streams[0]

    @cached_property
    def length(self) -> int:
        self.close()
        self._begin()
        packets = [packet for packet in self._container.demux(self._stream) if packet.pts is not None]
        end = max(packet.pts + (packet.duration or 0) for packet in packets) * self._stream.time_base
        return round((float(end) - self._start) * self.rate)

    def _decode(self, start: int, count: int) -> Iterator[np.ndarray]:
        seconds = start / self.rate - PREROLL_SECONDS
        if seconds > 0:
            self._container.seek(round((self._start + seconds) * 1e6))
        else:  # anew: back at the beginning, codecs make other sound of their first packets
            self.close()
            self._begin()
        resampler, position = self._resampler(), None
        for frame in self._container.decode(self._stream):
            if position is None:
                position = round(((frame.time or 0.0) - self._start) * self.rate)
            for part in resampler.resample(frame):
                block = part.to_ndarray().T[max(start - position, 0) : max(start + count - position, 0)]
                position += part.samples
                if len(block):
                    yield block
            if position >= start + count:
                return

    def close(self) -> None:
        self._container.close()


__all__ = ["MIN_RATE", "open_sound", "read_blocks"]
