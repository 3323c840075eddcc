"""Tests of audio_windows_bridle.py, against resampling and slices of the whole."""

import numpy as np
import pytest
import soxr
from helpers.sounds import RATE, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.audio_windows_bridle import array_blocks, cut_windows, mono_blocks, patch_times
from bridle_hf.feature_extraction_bridle import num_frames


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 22050, 44100, 48000, 96000, 192000, 22255.5]), samples=st.integers(3, 200_000)
)
def test_resampled_in_blocks_as_in_one_piece(rate, samples):
    waveform = np.random.default_rng(samples).normal(size=(3, samples)).astype(np.float32)
    found = np.concatenate(list(mono_blocks(array_blocks(waveform), rate, RATE)))
    np.testing.assert_array_equal(found, soxr.resample(waveform.T.mean(axis=1), rate, RATE))


def test_samples_that_are_none_are_refused(rng):
    stereo = rng.normal(size=(2, 100)).astype(np.float32)
    for waveform, rate, options, reason in [
        (stereo, RATE, {"downmix": False}, "2 channels"),
        (stereo * np.nan, RATE, {}, "NaN or infinite"),
        (stereo[:, :0], RATE, {}, "is empty"),
        (stereo.T, RATE, {}, "has 100 channels of 2 samples: transpose"),
        (stereo[None], RATE, {}, "a clip is"),
        (stereo, 0, {}, "0 Hz"),
        (stereo, float("nan"), {}, "nan Hz"),
    ]:
        with pytest.raises(ValueError, match=reason):
            list(mono_blocks(array_blocks(waveform), rate, RATE, **options))


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(400, 80_000), overlap=st.floats(0, 0.95), block=st.integers(1, 30_000),
    patch=st.sampled_from([4, 16]), rate=st.sampled_from([RATE, 22050]),
)  # fmt: skip
def test_windows_cover_a_recording(samples, overlap, block, patch, rate):
    config = tiny_config(patch_size=[patch, 16])
    waveform = np.arange(max(samples, rate // 40), dtype=np.float32)
    shift, length = rate // 100, 47 * (rate // 100) + rate // 40
    blocks = (waveform[start : start + block] for start in range(0, len(waveform), block))
    windows = list(cut_windows(blocks, config, rate, overlap))
    end = 0
    for first, window in windows:
        assert first % patch == 0 and len(window) <= length
        np.testing.assert_array_equal(window, waveform[first * shift :][: len(window)])
        assert first <= end, "nothing is left out"
        end = first + num_frames(len(window), rate)
    assert end == num_frames(len(waveform), rate)
    assert len(windows) == 1 or all(num_frames(len(window), rate) > 48 - patch for _, window in windows)
    if overlap < 0.5 and len(windows) > 2:
        starts = [first for first, _ in windows[:-1]]
        assert set(np.diff(starts)) <= {patch * max(round(48 // patch * (1 - overlap)), 1)}


def test_less_than_a_frame_is_refused():
    with pytest.raises(ValueError, match="399 samples at 16000 Hz"):
        list(cut_windows([np.zeros(399, np.float32)], tiny_config(), RATE))


def test_times_are_the_middle_of_what_a_patch_is_made_of():
    # A patch has 16 frames 10 ms apart, the last of which is 25 ms long: 175 ms, from 0, from 160 ms, ...
    np.testing.assert_allclose(patch_times(tiny_config()), [0.0875, 0.2475, 0.4075])
    np.testing.assert_allclose(patch_times(tiny_config(), 1000)[-1], 0.0875 + 999 * 0.16)
    assert tiny_config().seconds_per_frame == pytest.approx(0.16)
    with pytest.raises(ValueError, match="image"):
        patch_times(tiny_config(modality="image", image_size=32))
