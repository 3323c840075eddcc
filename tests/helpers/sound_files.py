"""Sound files of formats that libsndfile does not write."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_m4a(path: Path, waveform: np.ndarray, rate: int) -> Path:
    """(channels, samples) as AAC."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout={1: "mono", 2: "stereo", 6: "5.1"}[len(waveform)])
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(waveform, np.float32), format="fltp", layout=stream.layout.name
        )
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)  # else players keep the encoder's delay
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
