"""Sound files of formats that libsndfile does not write."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_m4a(path: Path, waveform: np.ndarray, rate: int, codec: str = "aac") -> Path:
    """(channels, samples) as AAC or by another codec, in the container that the name says."""
    with av.open(str(path), "w", format="webm" if path.suffix == ".weba" else None) as container:
        stream = container.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo", 6: "5.1"}[len(waveform)])
        stream.bit_rate = stream.bit_rate or 128_000  # of which wmav2 has none of its own
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(waveform, np.float32), format="fltp", layout=stream.layout.name
        )
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)  # else players keep the encoder's delay
        finest = max(stream.codec_context.codec.audio_formats, key=lambda kind: kind.bits).name
        stream.codec_context.format, resampler = finest, av.AudioResampler(format=finest)
        for part in resampler.resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def decode_with_av(path: Path | str) -> np.ndarray:
    """All of a file, (channels, samples) float32."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp")
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
