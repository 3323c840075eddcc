"""Strong labels in fine-tuning: what sounds in each step of a crop; recordings in windows, and F1 of their events."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from bridle_hf import BridleConfig
from bridle_hf.audio_windows_bridle import find_events, frame_shift, seconds_per_step, stitch_steps
from bridle_hf.common.errors import reason_of
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.decoding import read_audio, read_crops
from bridle_hf.data.loaders import AudioLoader
from bridle_hf.data.sample import SKIPPED, Sample
from bridle_hf.feature_extraction_bridle import num_frames, num_samples
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.augmentation import AudioTrainingLoader
from bridle_hf.probing.event_metrics import Event, event_metrics


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a recording that is evaluated as a whole: its first frame, and how many it has at most."""

    sample: Sample
    start: int
    frames: int

    @property
    def path(self) -> str:
        """The name of the recording."""
        return self.sample.path


class EventLoader(AudioTrainingLoader):
    """Read a crop of a recording, at random, or a [`Window`] of it; `labels` (steps, classes) say what sounds when.

    A class sounds in a step if an event of it covers more than half of the step; and in one step at the least, that
    which its onset is nearest to the beginning of.
    """

    def __init__(self, load: AudioLoader, config: BridleConfig, names: Sequence[str], args: FinetuneArguments):
        super().__init__(load, (), {}, len(names), args)
        self.numbers = {name: number for number, name in enumerate(names)}
        self.rate = load.feature_extractor.sampling_rate
        self.steps, self.seconds = config.patch_grid[0], seconds_per_step(config, self.rate)

    def __call__(self, sample: Sample | Window, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        if isinstance(sample, Window):
            waveform, rate, start = self._read_window(sample)
            events = sample.sample.events
        else:
            waveform, rate, start = self.load.read_at(sample, rng)
            events = sample.events
        loaded = self.load.fit(self.load.features(waveform, rate))
        loaded = loaded if rng is None else self._masked(loaded, rng)
        return {**loaded, "labels": self._labels(events, start)}

    def _read_window(self, window: Window) -> tuple[np.ndarray, int, float]:
        start = window.start * frame_shift(self.rate) / self.rate

        def crop(samples: int, rate: int) -> tuple[int, int]:
            first, count = round(start * rate), int(num_samples(window.frames, self.rate) * rate / self.rate)
            return first, min(count, samples - first)

        waveform, rate = read_audio(window.sample.media(), window.path, crop)
        return waveform, rate, start

    def _labels(self, events: Sequence[tuple[float, float, str]], start: float) -> torch.Tensor:
        labels = torch.zeros(self.steps, self.num_classes)
        for onset, offset, name in events:
            first, end = (round((time - start) / self.seconds) for time in (onset, offset))
            end = max(end, first + 1)
            labels[max(first, 0) : max(end, 0), self.numbers[name]] = 1.0
        return labels


def cut_into_windows(samples: Sequence[Sample], load: EventLoader, ledger: SkippedFiles) -> list[Window]:
    """The windows of recordings to evaluate on, side by side; the last ends with the recording, and overlaps.

    Each process looks how long its share of them are; what cannot be opened goes to `ledger`.
    """
    windows = []
    with PartialState().split_between_processes(list(samples)) as own:
        for sample in own:
            try:
                windows += _windows(sample, load)
            except SKIPPED as error:
                ledger.add(sample.path, reason_of(error))
    return gather_object(windows)


def _windows(sample: Sample, load: EventLoader) -> list[Window]:
    lengths: list[tuple[int, int]] = []
    for _ in read_crops(sample.media(), sample.path, lambda samples, rate: lengths.append((samples, rate)) or ()):
        pass
    ((samples, rate),) = lengths
    most, frames = load.load.max_frames, num_frames(int(samples * load.rate / rate), load.rate)
    patch, spare = most // load.steps, max(frames - most, 0)
    starts = [*range(0, spare, most), math.ceil(spare / patch) * patch]
    return [Window(sample, start, min(frames - start, most)) for start in starts]


class EvaluationWindows(Dataset):
    """Every window once, as `load` reads it."""

    def __init__(self, windows: Sequence[Window], load: EventLoader, config: BridleConfig):
        self.samples, self.load, self.config = windows, load, config

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.load(self.samples[index]), "index": index, "skipped": []}

    def measure(self, logits: np.ndarray) -> dict[str, float]:
        """[`event_metrics`] of what the classifier makes of each window, (windows, steps, classes)."""
        scores, names = torch.from_numpy(logits).float().sigmoid().numpy(), list(self.load.numbers)
        references, found = [], []
        for _, numbers in itertools.groupby(range(len(self.samples)), lambda number: self.samples[number].path):
            windows = {number: self.samples[number] for number in numbers}
            patch = self.config.patch_shape[1]
            steps = [scores[number][: math.ceil(window.frames / patch)] for number, window in windows.items()]
            whole = stitch_steps([window.start for window in windows.values()], steps, self.config)
            references.append([Event(*event) for event in next(iter(windows.values())).sample.events])
            events = find_events(whole, self.load.seconds)
            found.append([Event(onset, offset, names[number]) for onset, offset, number, _ in events])
        return event_metrics(references, found, names)
