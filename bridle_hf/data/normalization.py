"""Normalisation of the log-mel: mean and deviation of a data set."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bridle_hf.common.errors import MediaError
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.decoding import read_audio
from bridle_hf.data.sample import Sample
from bridle_hf.feature_extraction_bridle import num_samples


def measure_normalization(
    samples: Sequence[Sample], feature_extractor: Any, ledger: SkippedFiles, max_samples: int = 2000
) -> tuple[float, float]:
    """(mean, std) of the log-mel over at most `max_samples` of `samples`, spread evenly; bad ones go to `ledger`."""

    def waveforms() -> Iterator[tuple[np.ndarray, int]]:
        for sample in samples[:: math.ceil(len(samples) / max_samples)]:
            try:
                waveform, rate = read_audio(sample.media(), sample.path)
            except MediaError as error:
                ledger.add(sample.path, error.reason)
                continue
            if waveform.shape[-1] < num_samples(1, rate):
                ledger.add(sample.path, "is shorter than one frame of 25 ms")
                continue
            yield waveform, rate

    # On short recordings threads cost more than they give.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return feature_extractor.measure_normalization(waveforms())
    finally:
        torch.set_num_threads(threads)
