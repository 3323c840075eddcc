"""Recordings that the studies of the tests are about."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.tiny_run import RATE


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """24 recordings, tones and noise, in 4 groups."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    lines = ["file_name,label,group"]
    for number in range(24):
        tone = np.sin(2 * np.pi * rng.uniform(300, 3000) * np.arange(RATE // 4) / RATE)
        wave = tone if number % 2 else rng.normal(size=RATE // 4)
        soundfile.write(folder / f"{number}.wav", 0.3 * wave, RATE)
        lines.append(f"{number}.wav,{('noise', 'tone')[number % 2]},{number // 6}")
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder
