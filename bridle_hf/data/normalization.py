"""Normalisation of the log-mel: mean and deviation of a data set."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bridle_hf.common.errors import reason_of
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.decoding import read_crops
from bridle_hf.data.sample import SKIPPED, Sample
from bridle_hf.feature_extraction_bridle import num_samples


MOST_CROPS = 60  # of one recording: ten minutes at the usual length


def measure_normalization(
    samples: Sequence[Sample], feature_extractor: Any, ledger: SkippedFiles, max_samples: int = 2000
) -> tuple[float, float]:
    """(mean, std) of the log-mel over at most `max_samples` crops of `samples`; bad files go to `ledger`.

    A crop is as long as the model's input, so that a recording of any length takes little memory. Recordings that are
    no longer are measured whole. Longer ones are measured in crops spread evenly over them, as many as
    `max_samples` leaves to each and 60 at most: the numbers are then estimates, as they are where there are more than
    `max_samples` recordings, of which those spread evenly are taken.

    Raises:
        ValueError: no sample can be measured, or all are silence.
        TooManyBadFiles: see `SkippedFiles`.
    """
    most = min(max(max_samples // len(samples), 1), MOST_CROPS)

    def waveforms() -> Iterator[tuple[torch.Tensor, int]]:
        for sample in samples[:: math.ceil(len(samples) / max_samples)]:
            try:
                for waveform, rate in _crops(sample, feature_extractor.max_length, most):
                    # What the extractor would refuse is found here, where it has a name.
                    prepared = feature_extractor._prepare_waveform(waveform, rate, None, where="the waveform")
                    yield prepared, feature_extractor.sampling_rate
            except SKIPPED as error:
                ledger.add(sample.path, reason_of(error))

    # On short recordings threads cost more than they give.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return feature_extractor.measure_normalization(waveforms())
    finally:
        torch.set_num_threads(threads)


def _crops(sample: Sample, max_frames: int, most: int) -> Iterator[tuple[np.ndarray, int]]:
    """Waveforms of `max_frames` each, at most `most`, spread evenly over a recording, or all of it; with its rate."""

    def crops(samples: int, rate: int) -> list[tuple[int, int]]:
        wanted = min(num_samples(max_frames, rate), samples)
        count = min(samples // max(wanted, 1), most)
        starts = np.linspace(0, samples - wanted, count) if count > 1 else [(samples - wanted) / 2]
        return [(int(start), wanted) for start in starts]

    return read_crops(sample.media(), sample.path, crops)
