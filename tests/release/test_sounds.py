"""Sounds of the release: clips are functions of seed and number, of the lengths and levels that are promised."""

import csv

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.data.finding import find_samples
from bridle_hf.release import sounds


SEEDS = st.integers(0, 2**32)


def tone(rng: np.random.Generator) -> np.ndarray:
    return np.sin(rng.uniform(0.1, 1.0) * np.arange(rng.integers(1_000, 50_000)))


def write(folder, count, seed=0, source=tone):
    folder.mkdir()
    sounds.write_sounds(folder, dict.fromkeys(sounds.KINDS, source), count, seed)
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows, [soundfile.read(folder / row["file_name"])[0] for row in rows]


def test_a_clip_is_a_function_of_seed_and_number(tmp_path):
    rows, few = write(tmp_path / "few", 5)
    more_rows, more = write(tmp_path / "more", 9)
    assert more_rows[:5] == rows and all(np.array_equal(a, b) for a, b in zip(few, more))
    _, others = write(tmp_path / "others", 5, seed=1)
    assert not any(np.array_equal(a, b) for a, b in zip(few, others))
    assert len({wave.tobytes() for wave in more}) == 9


def test_clips_have_their_lengths_and_levels(tmp_path):
    rows, waves = write(tmp_path / "clips", 200)
    lengths = np.array([len(wave) for wave in waves])
    assert lengths.max() == sounds.SAMPLES and lengths.min() >= sounds.LEAST_SAMPLES
    assert abs(np.mean(lengths < sounds.SAMPLES) - sounds.SHORT) < 0.1
    levels = np.array([10 * np.log10(np.mean(wave**2)) for wave in waves])
    assert levels.min() > sounds.LEVELS_DB[0] - 1 and levels.max() < sounds.LEVELS_DB[1] + 1
    assert np.ptp(levels) > 20, "loud and soft ones"
    assert {row["label"] for row in rows} == set(sounds.KINDS)
    assert len(find_samples(str(tmp_path / "clips"), "audio")) == 200


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 600), st.integers(1, 300), st.floats(0, 0.999), SEEDS)
def test_a_cut_is_a_piece_of_the_wave_or_all_of_it_in_silence(length, samples, place, seed):
    wave = np.arange(1.0, length + 1)
    loudest = int(place * length)
    wave[loudest] = 1e6
    found = sounds.cut(wave, np.random.default_rng(seed), samples)
    assert found.shape == (samples,) and found.max() == 1e6
    heard = np.where(found == 1e6, loudest + 1, found)[found > 0]
    assert len(heard) == min(length, samples) and (np.diff(heard) == 1).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(-60, 20), SEEDS)
def test_a_level_is_so_many_decibels_over_another(reference, decibels, seed):
    wave = sounds.at_power(sounds.noise(np.random.default_rng(seed), 4_000), reference, decibels)
    assert 10 * np.log10(np.mean(wave**2) / reference) == pytest.approx(decibels, abs=1e-6)
    assert not sounds.at_power(np.zeros(8), reference, decibels).any()


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_what_is_played_lies_in_the_clip_and_on_the_keyboard(seed):
    for compose in (sounds.note, sounds.chord, sounds.phrase, sounds.hits):
        for start, channel, key, velocity, samples in compose(np.random.default_rng(seed)):
            assert 0 <= start < sounds.SAMPLES and samples > 0
            assert channel in (0, 1) and 0 <= key <= 127 and 1 <= velocity <= 127


@pytest.mark.slow
def test_the_first_sounds_of_the_release(tmp_path):
    """Fetches soundfonts, recordings and voices; twice the same."""
    folders = [sounds.make_sounds(tmp_path / "a", count=60), sounds.make_sounds(tmp_path / "a", count=30)]
    long, short = ([soundfile.read(s.path)[0] for s in find_samples(folder, "audio")] for folder in folders)
    assert all(np.array_equal(a, b) for a, b in zip(short, long))
    assert {sample.label for sample in find_samples(folders[0], "audio")} == set(sounds.KINDS)
