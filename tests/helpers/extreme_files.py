"""Extreme pictures, videos and recordings of under 1 MB: vast or thin shapes, headers that lie, absurd values.

`write_extremes` writes them; `read_all`, in a process of its own, reads each in a fork of itself, by the loader and by
a pipeline, and tells the memory and the time that it took.
"""

import io
import os
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from helpers.sound_files import write_m4a
from helpers.videos import picture, write_video
from PIL import Image


MOST_BYTES = 1_000_000
WAYS = {
    "image": ("training", "evaluation", "pipeline"),
    "video": ("training", "evaluation", "views", "cached", "pipeline"),
    "audio": ("training", "evaluation", "normalization", "pipeline"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

SIDE = 5000  # 25 million pixels, as many as are read


def png(width: int, height: int, bits: int = 8, colour: int = 2, extra: bytes = b"", rows: int | None = None) -> bytes:
    """A PNG of nothing but zeros, made row by row; perhaps of fewer `rows` than it says."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    packer, row = zlib.compressobj(9), bytes(1 + (width * channels * bits + 7) // 8)
    lines = b"".join([*(packer.compress(row) for _ in range(height if rows is None else rows)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def flat(mode: str, kind: str, side: int = SIDE, **options) -> Callable[[], bytes]:
    return lambda: encoded(Image.new(mode, (side, side)), kind, **options)


def tiff_with(**tags: int) -> bytes:
    """A small TIFF with some of its numbers, by tag, replaced."""
    content = bytearray(encoded(Image.new("RGB", (64, 64)), "TIFF"))
    (entries,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, entries)
    for entry in range(entries + 2, entries + 2 + 12 * count, 12):
        tag = f"t{struct.unpack_from('<H', content, entry)[0]}"
        if tag in tags:
            struct.pack_into("<HII", content, entry + 2, 4, 1, tags[tag])
    return bytes(content)


def float_tiff(value: float) -> bytes:
    return encoded(Image.fromarray(np.full((64, 64), value, np.float32)), "TIFF")


PICTURES: dict[str, Callable[[], bytes]] = {
    "high.png": lambda: png(1, 20000),
    "wide.png": lambda: png(20000, 1),
    "higher.png": lambda: png(1, 2_000_000, 1, 0),
    "wider.jpg": lambda: encoded(Image.new("RGB", (65000, 1)), "JPEG"),
    "as_thin_as_may_be.png": lambda: png(1, 32),
    "as_thin_and_as_large_as_may_be.png": lambda: png(883, 28256),
    "thinner.png": lambda: png(1, 33),
    "vast.png": lambda: png(13000, 13000),
    "vaster_bits.png": lambda: png(30000, 30000, 1, 0),
    "lying.png": lambda: png(2**31 - 1, 2**31 - 1, rows=0),
    "lying_less.png": lambda: png(5000, 5000, rows=3),
    "rgb.png": lambda: png(SIDE, SIDE),
    "rgba.png": lambda: png(SIDE, SIDE, colour=6),
    "la.png": lambda: png(SIDE, SIDE, colour=4),
    "bits.png": lambda: png(SIDE, SIDE, 1, 0),
    "deep_rgb.png": lambda: png(SIDE, SIDE, 16),
    "deep_grey.png": lambda: png(SIDE, SIDE, 16, 0),
    "turned.png": lambda: encoded(Image.new("RGB", (SIDE, SIDE)), "PNG", exif=_turned()),
    "key.png": lambda: encoded(_with_key(Image.new("RGB", (SIDE, SIDE))), "PNG"),
    "palette.gif": flat("P", "GIF"),
    "frames.gif": lambda: encoded(_blinking()[0], "GIF", save_all=True, append_images=_blinking() * 100, duration=9),
    "grey.jpg": flat("L", "JPEG"),
    "cmyk.jpg": flat("CMYK", "JPEG", 4500),
    "progressive.jpg": flat("RGB", "JPEG", progressive=True),
    "rgb.webp": flat("RGB", "WEBP", lossless=True),
    "rgba.webp": flat("RGBA", "WEBP", lossless=True),
    "rgb.avif": flat("RGB", "AVIF"),
    "rgba.jp2": flat("RGBA", "JPEG2000"),
    "rgba_half.jp2": flat("RGBA", "JPEG2000", 3500),
    "cmyk.tif": flat("CMYK", "TIFF", compression="tiff_deflate"),
    "lab.tif": flat("LAB", "TIFF", compression="tiff_deflate"),
    "float_large.tif": flat("F", "TIFF", compression="tiff_deflate"),
    "float_absurd.tif": lambda: float_tiff(1e19),
    "float_nan.tif": lambda: float_tiff(np.nan),
    "lying_width.tif": lambda: tiff_with(t256=2**30),
    "lying_size.tif": lambda: tiff_with(t256=4999, t257=4999),
    "lying_strips.tif": lambda: tiff_with(t278=2**32 - 1, t279=2**32 - 1),
    "lying_offset.tif": lambda: tiff_with(t273=2**32 - 1),
    "lying_samples.tif": lambda: tiff_with(t277=2**31),
    "lying.bmp": lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 2**30, 2**30, 1, 24, 0, *[0] * 5),
    "lying.ppm": lambda: b"P6 100000 100000 255\n" + bytes(999),
    "lying_less.ppm": lambda: b"P6 5000 5000 255\n" + bytes(999),
    "lying.pgm": lambda: b"P5 4999 5000 65535\n" + bytes(999),
    "lying.tga": lambda: struct.pack("<BBBHHBHHHHBB", 0, 0, 10, *[0] * 5, 65535, 65535, 24, 0) + b"\xff\0\0\0" * 99,
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _with_key(image: Image.Image) -> Image.Image:
    image.info["transparency"] = (0, 0, 0)
    return image


def _blinking() -> list[Image.Image]:
    return [Image.new("L", (800, 800), shade) for shade in (0, 255)]


# ---------------------------------------------------------------------------------------------------------------------
# Videos
# ---------------------------------------------------------------------------------------------------------------------


def video(**options) -> Callable[[Path], object]:
    return lambda path: write_video(path, **options)


def packets(
    contents: Iterator[bytes], size: tuple[int, int], codec: str = "mjpeg", pts: Callable[[int], int] = lambda n: n
) -> Callable[[Path], None]:
    """A video of ready-made packets, of frames whose size need not be the one that its header tells."""

    def write(path: Path) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            (stream.width, stream.height) = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number, content in enumerate(contents):
                packet = av.Packet(content)
                packet.stream, packet.time_base = stream, Fraction(1, 10)
                packet.pts = packet.dts = pts(number)
                packet.is_keyframe = codec == "mjpeg" or number == 0
                container.mux(packet)

    return write


def jpegs(size: tuple[int, int], count: int = 20, lie: tuple[int, int] | None = None) -> list[bytes]:
    content = encoded(Image.new("RGB", size), "JPEG")
    if lie:  # a header that promises more than there is
        place = content.index(b"\xff\xc0") + 5
        content = content[:place] + struct.pack(">HH", *lie[::-1]) + content[place + 4 :]
    return [content] * count


def still_packets(size: tuple[int, int], count: int) -> list[bytes]:
    """Packets of MPEG-4: a key frame, and then the same frame of no change, over and over."""
    encoder = av.CodecContext.create("mpeg4", "w")
    (encoder.width, encoder.height), encoder.pix_fmt, encoder.time_base = size, "yuv420p", Fraction(1, 10)
    encoder.options = {"g": "600"}
    frame = av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8), format="rgb24")
    first, *_, last = [bytes(packet) for _ in range(4) for packet in encoder.encode(frame)]
    return [first] + [last] * count


def patched(write: Callable[[Path], object], old: bytes, new: bytes, after: int = 0) -> Callable[[Path], None]:
    """The file with `new` written where `old` ends, `after` bytes on."""

    def patch(path: Path) -> None:
        write(path)
        content = bytearray(path.read_bytes())
        place = content.index(old) + len(old) + after
        content[place : place + len(new)] = new
        path.write_bytes(content)

    return patch


VIDEOS: dict[str, Callable[[Path], object]] = {
    "plain.mp4": video(),
    "large.mp4": video(num_frames=20, size=(4096, 2304), options={"preset": "ultrafast", "bf": "2"}),
    "many_references.mp4": video(
        num_frames=20, size=(4096, 2304), options={"preset": "ultrafast", "refs": "16", "g": "99"}
    ),
    "too_large.mp4": video(num_frames=2, size=(8192, 4320), options={"preset": "ultrafast"}),
    "vast.mp4": patched(video(), b"stsd", struct.pack(">HH", 65500, 65500), 40),
    "lying_pictures.mkv": packets(jpegs((64, 48), lie=(65500, 65500)), (64, 48)),
    "vast_behind_a_small_header.mkv": packets(jpegs((7500, 7500), 1), (64, 48)),
    "vast_later.mkv": packets(jpegs((64, 48), 4) + jpegs((7500, 7500), 1), (64, 48)),
    "high.mkv": packets(jpegs((16, 8192)), (16, 8192)),
    "wide.mkv": packets(jpegs((8192, 16)), (8192, 16)),
    "high_behind_a_small_header.mkv": packets(jpegs((16, 8192)), (64, 48)),
    "small.mkv": packets(jpegs((1, 1)), (1, 1)),
    "one_key_frame.mp4": packets(still_packets((1920, 1080), 900), (1920, 1080), "mpeg4"),
    "one_large_key_frame.mp4": packets(still_packets((4096, 2304), 190), (4096, 2304), "mpeg4"),
    "far_timestamps.mkv": packets(jpegs((64, 48)), (64, 48), pts=lambda number: number**4 * 10**6),
    "endless_tag.mkv": patched(video(), b"DURATIOND\x87", b"99999999:59:59".ljust(18), 1),
    "infinite_tag.mkv": patched(video(), b"DURATIOND\x87", b"00:00:inf".ljust(18), 1),
    "nan_tag.mkv": patched(video(), b"DURATIOND\x87", b"00:00:nan".ljust(18), 1),
    "endless.mp4": patched(video(), b"mdhd", struct.pack(">II", 1, 2**32 - 1), 12),
    "fast.avi": patched(video(codec="mpeg4"), b"vids", struct.pack("<IIII", 1, 2**31 - 1, 0, 2**32 - 1), 16),
    "slow.avi": patched(video(codec="mpeg4"), b"vids", struct.pack("<IIII", 2**31 - 1, 1, 0, 2**32 - 1), 16),
}


# ---------------------------------------------------------------------------------------------------------------------
# Recordings
# ---------------------------------------------------------------------------------------------------------------------


def silence(seconds: float, rate: int, channels: int = 1, **options) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with soundfile.SoundFile(path, "w", rate, channels, **options) as file:
            block = np.zeros((1 << 20, channels), np.int16)
            left = int(seconds * rate)
            while left > 0:
                file.write(block[:left])
                left -= len(block)

    return write


def with_value(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        wave = np.random.default_rng(0).normal(size=16000).astype(np.float64) * 0.1
        wave[8000] = value
        soundfile.write(path, wave, 16000, subtype="DOUBLE" if abs(value) > 3e38 else "FLOAT")

    return write


def of_unknown_length(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """FLAC whose header does not count its samples (36 bits)."""
    return patched(write, b"fLaC", bytes(4), 18)


SOUNDS: dict[str, Callable[[Path], object]] = {
    "hour.flac": silence(3600, 44100, 2),
    "hour_of_unknown_length.flac": of_unknown_length(silence(3600, 44100)),
    "many_channels.flac": silence(21, 500_000, 8),
    "too_fast.flac": silence(5, 655_350, 8),
    "promising.flac": patched(silence(5, 16000), b"fLaC", b"\xff" * 4, 18),
    "too_slow.wav": silence(10**5, 2),
    "lying_rate.wav": patched(silence(1, 16000), b"fmt ", struct.pack("<I", 2**31 - 1), 8),
    "no_rate.wav": patched(silence(1, 16000), b"fmt ", struct.pack("<I", 0), 8),
    "lying_channels.wav": patched(silence(1, 16000), b"fmt ", struct.pack("<H", 1024), 6),
    "no_channels.wav": patched(silence(1, 16000), b"fmt ", struct.pack("<H", 0), 6),
    "lying_size.wav": patched(silence(1, 16000), b"data", struct.pack("<I", 2**32 - 2), 0),
    "lying_rate.aiff": patched(silence(1, 16000), b"COMM", b"\x7f\xfe" + b"\xff" * 8, 12),
    "telephone.wav": silence(600, 8000, subtype="GSM610"),
    "telephone_g721.wav": silence(200, 8000, subtype="G721_32"),
    "long.mp3": silence(600, 8000),
    "overstated.mp3": patched(silence(60, 16000), b"Xing", struct.pack(">I", 2**32 - 1), 4),
    "understated.mp3": patched(silence(60, 16000), b"Xing", struct.pack(">I", 1), 4),
    "far_end.ogg": patched(silence(60, 16000, format="OGG"), b"OggS\0\4", struct.pack("<q", 2**62), 0),
    "long.ogg": silence(600, 16000),
    "long.m4a": lambda path: write_m4a(path, np.zeros((1, 1200 * 16000), np.float32), 16000),
    "channels.ogg": silence(3, 48000, 100, format="OGG"),
    **{f"value_{value:g}.wav": with_value(value) for value in (1e5, 1e10, 1e19, 1e38, 1e300, np.inf, np.nan)},
}


def write_extremes(folder: Path, modality: str) -> list[str]:
    """Paths of all those of a modality."""
    folder.mkdir(parents=True)
    extremes = {"image": PICTURES, "video": VIDEOS, "audio": SOUNDS}[modality]
    for name, make in extremes.items():
        path = folder / name
        if modality == "image":
            path.write_bytes(make())
        else:
            make(path)
        assert path.stat().st_size < MOST_BYTES, (name, path.stat().st_size)
    return [str(folder / name) for name in extremes]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def readers(modality: str, folder: Path) -> dict[str, Callable[[str], object]]:
    """How a file of that modality is read, by the names of `WAYS`; models are tiny, inputs of the usual size."""
    from transformers import pipeline

    import bridle_hf
    from bridle_hf.common.skipped import SkippedFiles
    from bridle_hf.data.modalities import make_processor, make_sample_loader
    from bridle_hf.data.normalization import measure_normalization
    from bridle_hf.data.sample import Sample

    config = bridle_hf.BridleConfig(
        modality=modality, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    process = make_processor(config)
    train = make_sample_loader(config, process, augment=True)
    found = {
        "training": lambda path: train(Sample(path), np.random.default_rng(0)),
        "evaluation": lambda path: make_sample_loader(config, process)(Sample(path), None),
    }
    if modality == "audio":
        ledger = SkippedFiles(folder / "skipped.jsonl", total=100)
        found["normalization"] = lambda path: measure_normalization([Sample(path)], process, ledger)
    if modality == "video":
        found["views"] = lambda path: train.views(Sample(path))
        found["cached"] = lambda path: make_sample_loader(config, process, cache_bytes=100 << 20)(Sample(path), None)
    model = getattr(bridle_hf, f"BridleFor{modality.title()}Classification")(config).eval()
    name = "feature_extractor" if modality == "audio" else "image_processor"
    found["pipeline"] = pipeline(f"{modality}-classification", model=model, **{name: process})
    return found


def read_all(modality: str, paths: list[str], folder: Path) -> Iterator[dict]:
    """Read each file in each way: {"file", "way", "outcome", "memory" in MB above that of the process, "seconds", and
    "cpu", the seconds of them in which it computed}.

    The outcome is "read", or the error's class and message.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    ways = readers(modality, folder)
    plain = folder / f"plain.{ {'image': 'png', 'video': 'mp4', 'audio': 'wav'}[modality] }"
    write_plain(modality, plain)
    for way in WAYS[modality]:
        ways[way](str(plain))  # what is loaded at the first call is not the file's doing
        for path in paths:
            yield {"file": Path(path).name, "way": way, **_in_a_fork(ways[way], path)}


def write_plain(modality: str, path: Path) -> None:
    if modality == "image":
        Image.fromarray(picture(0, (300, 300))).save(path)
    elif modality == "video":
        write_video(path, 100, (300, 300))
    else:
        soundfile.write(path, np.random.default_rng(0).normal(size=48000) * 0.1, 44100)


def _in_a_fork(read: Callable[[str], object], path: str) -> dict:
    inlet, outlet = os.pipe()
    start = time.perf_counter()
    if (child := os.fork()) == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                read(path)
                outcome = "read"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"
            used = resource.getrusage(resource.RUSAGE_SELF)
            memory, cpu = (used.ru_maxrss - before) / 1000, used.ru_utime + used.ru_stime
            os.write(outlet, f"{memory:.0f} {cpu:.2f} {outcome}".encode()[:4000])
        finally:
            os._exit(0)
    os.close(outlet)
    with open(inlet, "rb") as answer:
        memory, cpu, outcome = (answer.read().decode(errors="replace") or "-1 -1 died").split(" ", maxsplit=2)
    os.waitpid(child, 0)
    seconds = round(time.perf_counter() - start, 2)
    return {"outcome": outcome, "memory": int(memory), "seconds": seconds, "cpu": float(cpu)}
