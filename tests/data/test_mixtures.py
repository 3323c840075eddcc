"""Mixtures of two recordings: what is laid over what, how loud, how often; a function of the generator alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.common.errors import MediaError
from bridle_hf.data.loaders import AudioLoader, MixtureLoader
from bridle_hf.data.sample import Sample


WAVES = {
    "a": np.array([1, -1, 1, -1, 0, 0, 0, 0], np.float32),
    "b": np.array([0, 0, 0, 0, 2, 2, -2, -2], np.float32),
    "short": np.array([3, -3], np.float32),
}


class LoaderOfArrays(AudioLoader):
    """Recordings in memory; one that is not of `WAVES` is broken; a frame holds a whole waveform."""

    def _decode(self, sample, rng):
        if sample.path not in WAVES:
            raise MediaError(sample.path, "cannot be decoded")
        return WAVES[sample.path][None], 16000, 0, True

    def features(self, waveform, sampling_rate):
        return torch.tensor(waveform)


def loader(share: float, *others: str) -> MixtureLoader:
    return MixtureLoader(LoaderOfArrays(None, 1), [Sample(name) for name in others], share)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["b", "short"]))
def test_a_mixture_is_the_sum_of_two_recordings(seed, other):
    """The sample as it is, the other one within 6 dB, as long as the sample; the same for the same generator."""
    load = loader(1.0, other)
    mixed, again = (load(Sample("a"), np.random.default_rng(seed))["input_values"][0] for _ in range(2))
    assert torch.equal(mixed, again)
    added = mixed.numpy() - WAVES["a"]
    fitted = np.zeros(8)
    fitted[: len(WAVES[other])] = WAVES[other]
    gain = added @ fitted / (fitted @ fitted)
    np.testing.assert_allclose(added, gain * fitted, atol=1e-5)
    assert 10 ** (-6 / 20) - 1e-5 <= gain <= 10 ** (6 / 20) + 1e-5


def test_a_share_of_the_samples_is_mixed():
    load, plain = loader(0.3, "a", "b"), LoaderOfArrays(None, 1)
    unmixed = plain(Sample("b"), np.random.default_rng(0))["input_values"]
    mixed, gains = 0, []
    for seed in range(1000):
        values = load(Sample("b"), np.random.default_rng(seed))["input_values"]
        mixed += not torch.equal(values, unmixed)
        gains += [float(values[0, 0])] if values[0, 0] else []
    assert mixed == pytest.approx(300, abs=60)
    assert len(gains) == pytest.approx(mixed / 2, rel=0.25), "any recording may be laid over, the sample's own as well"
    assert np.median(20 * np.log10(gains)) == pytest.approx(0, abs=1.5)


def test_broken_recordings():
    """One that would be laid over is left out; the sample's own is reported."""
    load = loader(1.0, "broken")
    assert load(Sample("a"), np.random.default_rng(0))["input_values"][0].tolist() == WAVES["a"].tolist()
    with pytest.raises(MediaError, match="gone"):
        load(Sample("gone"), np.random.default_rng(0))
