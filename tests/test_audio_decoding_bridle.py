"""Tests of audio_decoding_bridle.py, against soundfile and PyAV that decode the whole."""

import numpy as np
import pytest
import soundfile
from helpers.sound_files import decode_with_av, write_m4a

from bridle_hf.audio_decoding_bridle import open_sound, read_blocks


RATE = 44100


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tones(seconds: float) -> np.ndarray:
    """(2, samples): tones that rise and fall, so that every moment is another."""
    time = np.arange(int(seconds * RATE)) / RATE
    phases = 200 * time + 40 * time**2, 900 * time - 30 * time**2
    return 0.3 * np.sin(2 * np.pi * np.array(phases))


def read_whole(media) -> tuple[int, np.ndarray]:
    rate, blocks = read_blocks(media)
    return rate, np.concatenate(list(blocks))


@pytest.mark.parametrize("form", ["path", "bytes"])
@pytest.mark.parametrize(
    ("name", "subtype", "channels"),
    [("a.wav", "PCM_16", 6), ("a.flac", "PCM_24", 2), ("a.ogg", "VORBIS", 1), ("a.mp3", "MPEG_LAYER_III", 2)],
)
def test_blocks_are_the_whole_file(name, subtype, channels, form, tmp_path, rng):
    path = tmp_path / name
    soundfile.write(path, 0.1 * rng.normal(size=(200_000, channels)), 44100, subtype=subtype)
    expected, rate = soundfile.read(path, dtype="float32", always_2d=True)
    found_rate, found = read_whole(str(path) if form == "path" else path.read_bytes())
    assert found_rate == rate
    np.testing.assert_array_equal(found, expected)


def test_what_libsndfile_cannot_read_is_read_by_pyav(tmp_path, rng):
    time = np.arange(48_000) / 48_000
    sound = 0.3 * np.sin(2 * np.pi * np.array([[300], [500]]) * time)
    path = write_m4a(tmp_path / "a.m4a", sound, 48_000)
    rate, found = read_whole(str(path))
    assert rate == 48_000 and found.shape[1] == 2 and found.dtype == np.float32
    for channel, expected in zip(found.T, sound):  # a lossy format, but at the right place
        assert np.corrcoef(channel[: len(expected)], expected)[0, 1] > 0.98
    np.testing.assert_array_equal(read_whole(path.read_bytes())[1], found)


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.wav").write_text("not a sound")
    with pytest.raises(ValueError, match=r"cannot be decoded .*libsndfile"):
        read_blocks(str(tmp_path / "a.wav"))
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_blocks(b"")
    with pytest.raises(ValueError, match="no such file"):
        read_blocks(str(tmp_path / "b.wav"))


# AAC makes noise of its own that depends on where it began; Matroska rounds times to milliseconds.
@pytest.mark.parametrize(
    ("name", "codec", "mean_error"),
    [("a.m4a", "aac", 1e-3), ("a.m4a", "alac", 0), ("a.aac", "aac", 1e-3), ("a.wv", "wavpack", 0), ("a.tta", "tta", 0),
     ("a.m4b", "aac", 1e-3), ("a.wma", "wmav2", None), ("a.weba", "libopus", None), ("a.mka", "flac", None),
     ("a.ac3", "ac3", None)],
)  # fmt: skip
def test_parts_of_what_pyav_reads(name, codec, mean_error, tmp_path):
    rate = 48_000 if codec == "libopus" else RATE  # of the few that Opus has
    path = write_m4a(tmp_path / name, tones(5.3), rate, codec)
    expected = decode_with_av(path)
    with open_sound(str(path)) as sound:
        assert (sound.rate, sound.channels) == (rate, 2)
        assert abs(sound.length - expected.shape[1]) <= 2048  # as far as encoders pad
        np.testing.assert_array_equal(np.concatenate(list(sound.blocks())).T, expected)
        for start, count in ((0, 5000), (RATE // 2, 3), (3 * RATE + 77, 30_000), (expected.shape[1] - 4000, 10**9)):
            found = np.concatenate(list(sound.blocks(start, count))).T
            wanted = expected[:, start : start + count]
            if mean_error is None:
                shifts = range(-RATE // 1000, RATE // 1000)
                pieces = (expected[:, max(start + shift, 0) :][:, : count - 100] for shift in shifts)
                errors = [np.abs(found[:, : piece.shape[1]] - piece[:, : found.shape[1]]).max() for piece in pieces]
                assert min(errors) < 0.02
            else:
                assert found.shape == wanted.shape
                assert np.abs(found - wanted).mean() <= mean_error
        with pytest.raises(ValueError, match="holds no samples"):
            list(sound.blocks(10**8, 10))


@pytest.mark.parametrize("claimed", [1, 30, 2**31])
def test_mp3_whose_header_lies_about_its_length(tmp_path, rng, claimed):
    soundfile.write(tmp_path / "a.mp3", 0.1 * rng.normal(size=3 * RATE), RATE)
    expected, _ = soundfile.read(tmp_path / "a.mp3", dtype="float32", always_2d=True)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    place = max(content.find(b"Xing"), content.find(b"Info")) + 8
    content[place : place + 4] = claimed.to_bytes(4)
    np.testing.assert_array_equal(read_whole(bytes(content))[1], expected)
    (tmp_path / "lying.mp3").write_bytes(content)
    np.testing.assert_array_equal(read_whole(str(tmp_path / "lying.mp3"))[1], expected)


def test_what_is_refused_while_it_is_read(tmp_path):
    for value, reason in ((np.nan, "NaN or infinite"), (1e30, "sample of 1e[+]30, over the bound")):
        soundfile.write(tmp_path / "a.wav", np.r_[np.zeros(1000), value], 16000, subtype="FLOAT")
        with pytest.raises(ValueError, match=reason):
            read_whole(str(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "a.wav", np.zeros((0, 2)), 16000)
    with pytest.raises(ValueError, match="holds no samples"):
        read_whole(str(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 50)
    with pytest.raises(ValueError, match="sampling rate of 50 Hz"):
        read_blocks(str(tmp_path / "a.wav"))
