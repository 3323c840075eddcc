"""A labelled set of short recordings that a tiny model can tell apart in a few steps, and such a model on disk."""

import csv
from pathlib import Path

import numpy as np
import soundfile

from bridle_hf import BridleConfig, BridleFeatureExtractor, BridleForPreTraining


RATE = 16000
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_mel_bins": 32,
    "max_length": 48,
    "decoder_type": "plain",
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}


def tiny_config(**fields) -> BridleConfig:
    return BridleConfig(**{"modality": "audio", **TINY, **fields})


def write_tone(path: Path, seconds=0.3, rate=RATE, channels=1, frequency=440.0, **options) -> str:
    """A file with a tone; `options` are those of `soundfile.write`."""
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * frequency * time)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate, **options)
    return str(path)


def write_tones(folder: Path, count: int = 20) -> str:
    """`folder` with tones of two classes, all of them different."""
    for number in range(count):
        write_tone(folder / f"class_{number % 2}" / f"{number:02d}.wav", frequency=200 + 50 * number)
    return str(folder)


def sound(name: str, rng: np.random.Generator, seconds: float = 0.4) -> np.ndarray:
    """A "tone", "noise" or "click" (samples,), or several at once, joined by "+"."""
    time = np.arange(int(seconds * RATE)) / RATE
    kinds = {
        "tone": 0.3 * np.sin(2 * np.pi * rng.uniform(400, 900) * time),
        "noise": 0.1 * rng.normal(size=time.size),
        "click": (np.arange(time.size) % 1600 < 8) * 0.8,
    }
    return sum(kinds[part] for part in name.split("+")).astype(np.float32)


def write_sounds(folder: Path, names=("noise", "tone"), per_class: int = 12, multi_label: bool = False) -> str:
    """`folder` with recordings of each name; column `label` or `labels`, and `group`, 0 or 1."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = [("file_name", "labels" if multi_label else "label", "group")]
    for name in names:
        for index in range(per_class):
            path = f"{name}_{index}.wav"
            soundfile.write(folder / path, sound(name, rng), RATE)
            rows.append((path, name.replace("+", ";"), index % 2))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(folder)


def save_encoder(folder: Path, **fields) -> str:
    """A pretraining model with its processor, as pretraining leaves it."""
    BridleForPreTraining(tiny_config(**fields)).save_pretrained(folder)
    BridleFeatureExtractor(num_mel_bins=32, max_length=48).save_pretrained(folder)
    return str(folder)
