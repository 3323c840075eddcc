"""Resampling of sound files: the same samples with librosa, without it, and by the feature extractor."""

import sys

import numpy as np
import pytest
import soundfile
import soxr
import torch
from torch.utils.data import DataLoader, Dataset

from bridle_hf.data.decoding import resample
from bridle_hf.data.loaders import AudioLoader
from bridle_hf.data.sample import Sample
from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor


RATES = [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000, 192000]


def noise(rate, channels=2):
    return (0.1 * np.random.default_rng(rate).standard_normal((channels, rate // 2 + 7))).astype(np.float32)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2])
def test_same_samples_with_and_without_librosa(rate, channels, monkeypatch):
    librosa = pytest.importorskip("librosa")
    waveform = noise(rate, channels)
    calls, original = [], librosa.resample
    monkeypatch.setattr(librosa, "resample", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    by_librosa = resample(waveform, rate, 16000)
    assert calls, "librosa is used where it is installed"
    monkeypatch.setitem(sys.modules, "librosa", None)
    by_soxr = resample(waveform, rate, 16000)
    assert by_librosa.shape == by_soxr.shape and by_librosa.dtype == by_soxr.dtype == np.float32
    np.testing.assert_array_equal(by_librosa, by_soxr)  # to the bit: a loader worker never asks librosa
    for resampled, channel in zip(by_soxr, waveform):
        np.testing.assert_allclose(resampled, soxr.resample(channel, rate, 16000), rtol=0, atol=1e-6)


class Resampled(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("librosa.resample", lambda *args, **kwargs: calls.append(1))
            return torch.from_numpy(resample(noise(44100), 44100, 16000)), len(calls)


def test_a_loader_worker_does_not_wait_for_librosa():
    """Its first import takes seconds, in each worker anew."""
    pytest.importorskip("librosa")
    ((samples, calls),) = DataLoader(Resampled(), batch_size=None, num_workers=1)
    assert calls == 0 and torch.equal(samples, torch.from_numpy(resample(noise(44100), 44100, 16000)))


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_file_is_loaded_as_the_feature_extractor_would(rate, tmp_path):
    path = tmp_path / "noise.wav"
    soundfile.write(path, noise(rate).T, rate, subtype="FLOAT")
    extractor = BridleFeatureExtractor()
    loaded = AudioLoader(extractor, max_frames=60)(Sample(str(path)))["input_values"]
    waveform, _ = soundfile.read(path, dtype="float32", always_2d=True)
    expected = extractor([waveform.T], sampling_rate=rate, max_length=60, return_tensors="pt")["input_values"][0]
    frames = min(60, 50)
    np.testing.assert_allclose(loaded[: frames - 3], expected[: frames - 3], rtol=0, atol=1e-6)
