"""Tests of data/batches.py: how samples are read, and in which order they are drawn."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers.sound_files import write_m4a
from helpers.sounds import write_tone, write_tones
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.common.errors import MediaError, TooManyBadFiles
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import (
    DrawDataset,
    GlobalBatches,
    iterate_eval,
    loader_errors_as_os_errors,
    make_loader,
    train_batches,
)
from bridle_hf.data.decoding import read_audio, read_crops
from bridle_hf.data.finding import find_samples
from bridle_hf.data.folds import assign_folds, group_folds, split_by_groups
from bridle_hf.data.labels import Labels, label_names
from bridle_hf.data.loaders import AudioLoader, roll_and_gain
from bridle_hf.data.normalization import measure_normalization
from bridle_hf.data.sample import Sample
from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor, num_frames, num_samples


MAX_FRAMES = 48


@pytest.fixture
def feature_extractor():
    return BridleFeatureExtractor(mean=-5.0, std=4.0)


@pytest.fixture
def tones(tmp_path):
    """20 recordings of two classes."""
    return write_tones(tmp_path / "tones")


@pytest.fixture
def ledger(tmp_path):
    return SkippedFiles(tmp_path / "skipped.jsonl", total=20)


# --- reading audio ---


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_rates_and_channels(tmp_path, feature_extractor, extension, rate, channels):
    path = write_tone(tmp_path / f"a.{extension}", 0.3, rate, channels)
    waveform, found_rate = read_audio(path)
    assert (waveform.dtype, found_rate) == (np.float32, rate)
    assert waveform.shape[0] == channels
    assert waveform.shape[1] == pytest.approx(0.3 * rate, abs=0.03 * rate)  # lossy coders pad
    from_bytes, _ = read_audio(Path(path).read_bytes(), "a")
    np.testing.assert_array_equal(from_bytes, waveform)

    sample = AudioLoader(feature_extractor, MAX_FRAMES)(Sample(path))
    assert sample["input_values"].shape == (MAX_FRAMES, 128) and sample["input_values"].dtype == torch.float32
    assert sample["attention_mask"].shape == (MAX_FRAMES,)
    frames = int(sample["attention_mask"].sum())
    assert frames == pytest.approx(28, abs=3)
    reference = AudioLoader(feature_extractor, MAX_FRAMES)(Sample(write_tone(tmp_path / "reference.wav")))[
        "input_values"
    ]
    loudest = reference[5:20].mean(0).argmax()
    assert sample["input_values"][5:20].mean(0).argmax() == loudest


def test_odd_rate(tmp_path, feature_extractor):
    path = write_tone(tmp_path / "a.wav", 0.3, rate=11127)
    assert AudioLoader(feature_extractor, MAX_FRAMES)(Sample(path))["attention_mask"].sum() == 28


def test_flac_that_went_through_a_pipe(tmp_path):
    path = write_tone(tmp_path / "a.flac", seconds=5.0)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    expected, rate = read_audio(path)
    content[21] &= 0xF0  # the header's count of samples, 36 bits: 0 is "unknown"
    content[22:26] = bytes(4)
    for crop in (None, lambda samples, rate: (samples - 1000, 900)):
        waveform = read_audio(bytes(content), crop=crop)[0]
        start, count = crop(expected.shape[1], rate) if crop else (0, expected.shape[1])
        np.testing.assert_array_equal(waveform, expected[:, start : start + count])
    content[21] |= 0x0F  # and one that promises terabytes
    content[22:26] = b"\xff" * 4
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_audio(bytes(content))


def test_what_libsndfile_cannot_read_is_listed_and_read_by_pyav(tmp_path, feature_extractor):
    """Apple's lossless codec, against the same samples in a wav."""
    wave = 0.3 * np.sin(np.arange(6 * 44100) / 30) * np.linspace(0.1, 1, 6 * 44100)
    soundfile.write(tmp_path / "a.wav", wave, 44100)
    samples, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    names = ["b.m4a", "c.WV", "d.tta"]
    for name, codec in zip(names, ("alac", "wavpack", "tta")):
        write_m4a(tmp_path / name.lower(), samples[None], rate, codec).rename(tmp_path / name)
    listed = find_samples(str(tmp_path), "audio")
    assert [Path(sample.path).name for sample in listed] == ["a.wav", *names]
    load = AudioLoader(feature_extractor, MAX_FRAMES)
    for rng in (lambda: None, lambda: np.random.default_rng(1)):
        wanted = load(listed[0], rng())["input_values"]
        for sample in listed[1:]:
            torch.testing.assert_close(load(sample, rng())["input_values"], wanted, rtol=0, atol=1e-3)
    ledger = SkippedFiles(tmp_path / "skipped.jsonl", total=4)
    numbers = [measure_normalization([sample], feature_extractor, ledger) for sample in listed]
    np.testing.assert_allclose(numbers, [numbers[0]] * 4, atol=1e-3)
    assert not (tmp_path / "skipped.jsonl").exists()


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16", "IMA_ADPCM", "MS_ADPCM"])
def test_codecs_of_telephones(tmp_path, feature_extractor, subtype):
    path = write_tone(tmp_path / "a.wav", seconds=30, rate=8000, subtype=subtype)
    with soundfile.SoundFile(path) as file:
        expected = file.read(file.frames, dtype="float32")
    waveform, _ = read_audio(path)
    np.testing.assert_array_equal(waveform, expected[None])
    # Some of them cannot be sought in.
    np.testing.assert_array_equal(read_audio(path, crop=lambda *_: (7000, 900))[0], waveform[:, 7000:7900])
    assert AudioLoader(feature_extractor, MAX_FRAMES)(Sample(path))["attention_mask"].all()


def mp3(bit_rates: str, seconds: float = 4.0) -> bytes:
    """Noise that fades, so that bit rates that vary fall."""
    samples = int(seconds * 22050)
    noise = np.random.default_rng(0).normal(size=samples) * np.geomspace(0.3, 1e-4, samples)
    content = io.BytesIO()
    soundfile.write(content, noise, 22050, format="MP3", bitrate_mode=bit_rates, compression_level=0.3)
    return content.getvalue()


def with_tag(content: bytes, **numbers: bytes) -> bytes:
    """An mp3 whose first frame, a tag, has other numbers."""
    tag = max(content.find(b"Xing"), content.find(b"Info"))
    place = tag + {"name": 0, "frames": 8}[(name := next(iter(numbers)))]
    return content[:place] + numbers[name] + content[place + 4 :]


@pytest.mark.parametrize("bit_rates", ["VARIABLE", "CONSTANT"])
def test_mp3_whose_header_lies_about_its_length(feature_extractor, tmp_path, bit_rates):
    content = mp3(bit_rates)
    expected, rate = read_audio(content)
    assert abs(expected.shape[1] - 4 * rate) < 3000
    for frames in (0, 1, 20, 1000, 2**32 - 1):
        lying = with_tag(content, frames=frames.to_bytes(4, "big"))
        np.testing.assert_array_equal(read_audio(lying)[0], expected)
        (tmp_path / "lying.mp3").write_bytes(lying)
        for rng in (None, np.random.default_rng(frames)):
            assert AudioLoader(feature_extractor, MAX_FRAMES)(Sample(str(tmp_path / "lying.mp3")), rng)
    # Two that were joined, pictures in front, and no tag at all: a frame or two more, of the encoder's padding.
    padding = 4 * 576
    pictures = b"ID3\x03\0\0" + bytes([0, 0, 7, 104]) + b"\xff\xf3\x90\0" * 250
    for longer, times in ((content * 2, 2), (pictures + content, 1), (with_tag(content, name=bytes(4)), 1)):
        assert 0 <= read_audio(longer)[0].shape[1] - times * expected.shape[1] <= times * padding
    # Cut short: what is there is read.
    half = read_audio(content[: len(content) // 2])[0]
    np.testing.assert_allclose(half[:, :5000], expected[:, :5000], atol=1e-6)


def test_a_rate_that_cannot_be(tmp_path):
    with pytest.raises(MediaError, match=r"sampling rate of 10 Hz"):
        read_audio(write_tone(tmp_path / "a.wav", seconds=100, rate=10))
    with pytest.raises(MediaError, match=r"sampling rate of 655350 Hz in 8 channels"):
        read_audio(write_tone(tmp_path / "a.flac", seconds=0.1, rate=655350, channels=8))


def test_bad_files(tmp_path):
    good = Path(write_tone(tmp_path / "good.flac")).read_bytes()
    (tmp_path / "truncated.flac").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.wav").write_text("not a recording")
    (tmp_path / "zero.wav").write_bytes(b"")
    write_tone(tmp_path / "empty.wav", seconds=0)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.5], np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "absurd.wav", np.array([0.0, -1e19, 0.5], np.float32), 16000, subtype="FLOAT")
    reasons = {
        "truncated.flac": "cannot be decoded",
        "text.wav": "cannot be decoded",
        "zero.wav": "cannot be decoded",
        "empty.wav": "holds no samples",
        "nan.wav": "NaN or infinite",
        "absurd.wav": r"holds a sample of 1e\+19, over the bound of 2.15e\+09",
        "absent.wav": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(MediaError, match=rf"{name}: .*{reason}"):
            read_audio(str(tmp_path / name))


def test_long_recordings_are_cropped(tmp_path, feature_extractor):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.linspace(-0.9, 0.9, 160_000), 16000)
    loader = AudioLoader(feature_extractor, MAX_FRAMES, cache_bytes=1 << 20)
    starts = [loader.read(Sample(str(path)), np.random.default_rng(seed))[0][0, 0] for seed in range(200)]
    assert min(starts) < -0.8 and max(starts) > 0.7
    middle, _ = loader.read(Sample(str(path)))
    assert abs(middle.mean()) < 1e-3
    assert loader(Sample(str(path)))["attention_mask"].all()
    different = [loader(Sample(str(path)), np.random.default_rng(seed))["input_values"] for seed in (0, 1)]
    assert not torch.equal(*different)


def test_roll_and_gain():
    waveform = np.arange(1, 101, dtype=np.float32)[None]
    rng = np.random.default_rng(0)
    offsets, gains = [], []
    for _ in range(4000):
        augmented = roll_and_gain(waveform, rng)
        assert augmented.dtype == np.float32
        gains.append(augmented.sum() / waveform.sum())
        offsets.append(int(augmented.argmin()))
        np.testing.assert_allclose(np.roll(augmented, -offsets[-1]) / gains[-1], waveform, rtol=1e-5)
    # Beta(10, 10) has mean 1/2 and variance 1/84; a uniform offset in 0..99 has mean 49.5 and variance 833.25.
    assert np.mean(gains) == pytest.approx(1.0, abs=0.01)
    assert np.var(gains) == pytest.approx(1 / 84, rel=0.1)
    assert np.mean(offsets) == pytest.approx(49.5, abs=2)
    assert np.var(offsets) == pytest.approx(833.25, rel=0.1)
    assert set(offsets) == set(range(100))


def test_roll_keeps_channels_together():
    stereo = np.stack([np.arange(100), np.arange(100)]).astype(np.float32)
    left, right = roll_and_gain(stereo, np.random.default_rng(0))
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("augment", [False, True])
def test_cache_changes_nothing_and_keeps_to_its_budget(tones, feature_extractor, augment, monkeypatch):
    samples = find_samples(tones, "audio")
    frames = num_frames(4800, 16000)
    sizes = {False: frames * 128 * 4, True: 4800 * 4}
    loaders = [AudioLoader(feature_extractor, MAX_FRAMES, augment, bytes) for bytes in (0, 10 * sizes[augment])]
    for _ in range(2):
        for number, sample in enumerate(samples):
            plain, cached = (loader(sample, np.random.default_rng(number)) for loader in loaders)
            assert torch.equal(plain["input_values"], cached["input_values"])
    reads = []
    monkeypatch.setattr("bridle_hf.data.loaders.read_audio", lambda *args: reads.append(args) or read_audio(*args))
    for sample in samples:
        loaders[1](sample, np.random.default_rng(0))
    assert len(reads) == 10
    assert torch.equal(loaders[1](samples[0])["input_values"], loaders[0](samples[0])["input_values"])  # evaluation


def test_measure_normalization(tones, feature_extractor, ledger):
    samples = [*find_samples(tones, "audio"), Sample("absent.wav")]
    mean, std = measure_normalization(samples, feature_extractor, ledger)
    values = torch.cat([AudioLoader(feature_extractor, 28)(sample)["input_values"] for sample in samples[:-1]]) * 8 - 5
    assert (mean, std) == (pytest.approx(values.mean().item(), abs=1e-3), pytest.approx(values.std().item(), abs=1e-3))
    assert list(ledger.reasons) == ["absent.wav"]


def test_one_absurd_recording_leaves_the_normalization_as_it_was(tones, feature_extractor, ledger):
    samples = find_samples(tones, "audio")
    expected = measure_normalization(samples, feature_extractor, ledger)
    for value in (np.nan, np.inf, 1e19, 1e38, 1e10):
        path = str(Path(tones) / f"{value}.wav")
        soundfile.write(path, np.array([0.1, value] * 2000, np.float32), 16000, subtype="FLOAT")
        found = measure_normalization([*samples, Sample(path)], feature_extractor, SkippedFiles(path + "l", total=20))
        assert found == expected
    one = measure_normalization(samples[:1], feature_extractor, ledger)
    assert np.isfinite(one).all() and one[1] > 0
    with pytest.raises(TooManyBadFiles, match=r"1 of 1 files .*nan\.wav: holds NaN"):
        measure_normalization(
            [Sample(str(Path(tones) / "nan.wav"))], feature_extractor, SkippedFiles(ledger.output_path, total=1)
        )


def test_long_recordings_are_measured_in_crops(tmp_path, feature_extractor, ledger, monkeypatch):
    rng = np.random.default_rng(0)
    path = tmp_path / "long.flac"
    # Its loudness drifts: any one part of it is no measure of the whole.
    soundfile.write(path, rng.normal(size=16000 * 300) * np.geomspace(1e-3, 0.3, 16000 * 300), 16000)
    waveform, rate = read_audio(str(path))
    expected = feature_extractor.measure_normalization([(waveform, rate)])
    read = []
    monkeypatch.setattr(
        "bridle_hf.data.normalization.read_crops",
        lambda *args: (read.append(crop[0].shape) or crop for crop in read_crops(*args)),
    )
    found = measure_normalization([Sample(str(path))], feature_extractor, ledger)
    assert found == pytest.approx(expected, abs=0.01)
    few = measure_normalization([Sample(str(path))], feature_extractor, ledger, max_samples=10)
    assert few == pytest.approx(expected, abs=0.3)
    assert len(read) == 29 + 10 and max(read) == (1, num_samples(1024, 16000))


# --- drawing ---


def load_number(sample, rng):
    """Stands in for a loader: the sample's number and one random number; samples called bad_* are bad."""
    if sample.path.startswith("bad"):
        raise MediaError(sample.path, "broken")
    return {"number": torch.tensor([float(sample.path.split("_")[-1]), -1.0 if rng is None else rng.random()])}


def numbered(count, bad=()):
    return [Sample(f"bad_{index}" if index in bad else f"sample_{index}") for index in range(count)]


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), ValueError("odd"), ZeroDivisionError()])
def test_a_sample_that_asks_too_much_is_skipped(tmp_path, error):
    def load(sample, rng):
        if sample.path == "sample_3":
            raise error
        return load_number(sample, rng)

    dataset = DrawDataset(numbered(20), load, seed=0)
    skipped = [entry for draw in range(20) for entry in dataset[draw]["skipped"]]
    assert skipped[0] == ("sample_3", str(error) or type(error).__name__)
    ledger = SkippedFiles(tmp_path / "skipped.jsonl", total=20)
    assert sum(len(kept) for kept, _ in iterate_eval(numbered(20), load, 8, ledger)) == 19
    assert list(ledger.reasons) == ["sample_3"]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_every_sample_once_per_epoch(count, seed, epoch):
    dataset = DrawDataset(numbered(count), load_number, seed)
    drawn = [dataset[draw]["index"] for draw in range(epoch * count, (epoch + 1) * count)]
    assert sorted(drawn) == list(range(count))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), draws=st.lists(st.integers(0, 2000), max_size=20))
def test_a_sample_is_a_function_of_seed_and_draw(seed, draws):
    samples = numbered(30, bad=(3, 4))
    one, other = DrawDataset(samples, load_number, seed), DrawDataset(samples, load_number, seed)
    in_order = {draw: one[draw] for draw in sorted(draws)}
    for draw in draws:  # in any order, and again
        sample = other[draw]
        assert torch.equal(sample["number"], in_order[draw]["number"])
        assert (sample["index"], sample["skipped"]) == (in_order[draw]["index"], in_order[draw]["skipped"])


def test_epochs_seeds_and_samples_differ():
    orders = {
        tuple(DrawDataset(numbered(30), load_number, seed).index_of(d) for d in range(e, e + 30))
        for seed in (0, 1)
        for e in (0, 30, 60)
    }
    assert len(orders) == 6
    dataset = DrawDataset(numbered(30), load_number, 0)
    assert len({dataset[draw]["number"][1].item() for draw in range(300)}) == 300


def run_of_batches(samples, steps, world_size, num_workers, start_batch=0, global_batch=8):
    """The global batches of a run, put together from all its processes."""
    ranks = []
    for rank in range(world_size):
        batches = GlobalBatches(global_batch, rank, world_size, start_batch)
        loader = make_loader(DrawDataset(samples, load_number, seed=7), batches, num_workers=num_workers)
        stream = iter(loader)
        ranks.append([next(stream) for _ in range(steps)])
    skipped = [[entry for batch in parts for entry in batch["skipped"]] for parts in zip(*ranks, strict=True)]
    return [torch.cat([batch["number"] for batch in parts]) for parts in zip(*ranks, strict=True)], skipped


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (4, 0), (2, 2)])
def test_order_does_not_depend_on_processes_or_workers(world_size, num_workers):
    samples = numbered(30, bad=(5, 6))
    expected, expected_skipped = run_of_batches(samples, 9, 1, 0)
    found, found_skipped = run_of_batches(samples, 9, world_size, num_workers)
    assert all(map(torch.equal, found, expected))
    assert found_skipped == expected_skipped and any(found_skipped)


def test_restart_in_the_middle():
    expected, _ = run_of_batches(numbered(30), 9, 1, 0)
    found, _ = run_of_batches(numbered(30), 4, 2, 0, start_batch=5)
    assert all(map(torch.equal, found, expected[5:]))


def test_loader_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run_of_batches(numbered(30), 1, 1, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_must_divide():
    with pytest.raises(ValueError, match="global batch of 10 cannot be shared equally by 4 processes"):
        GlobalBatches(10, 0, 4)
    with pytest.raises(ValueError, match="rank 4 of 4"):
        GlobalBatches(8, 4, 4)
    with pytest.raises(ValueError, match="`samples` is empty"):
        DrawDataset([], load_number, 0)


# --- bad files ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_replaced_and_listed(tmp_path, caplog, num_workers):
    samples = numbered(30, bad=(5, 6))
    ledger = SkippedFiles(tmp_path / "skipped.jsonl", len(samples))
    loader = make_loader(DrawDataset(samples, load_number, 0), GlobalBatches(10), num_workers=num_workers)
    batches = train_batches(loader, ledger)
    for _ in range(9):
        batch = next(batches)
        assert batch["number"].shape == (10, 2) and "skipped" not in batch
        assert not {5, 6} & set(batch["index"].tolist())
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["bad_5", "bad_6"]
    assert {line["reason"] for line in lines} == {"broken"}
    assert len([record for record in caplog.records if "skipped bad_" in record.message]) == 2


def test_more_than_a_tenth_is_an_error(tmp_path):
    for total, allowed in ((20, 2), (5, 0), (29, 2)):
        ledger = SkippedFiles(tmp_path / "skipped.jsonl", total)
        for number in range(allowed):
            ledger.add(f"bad_{number}", "broken")
            ledger.add(f"bad_{number}", "broken")
        with pytest.raises(
            TooManyBadFiles, match=rf"{allowed + 1} of {total} files cannot be read.*The last is one_more"
        ):
            ledger.add("one_more", "broken")


def test_nothing_readable(tmp_path):
    ledger = SkippedFiles(tmp_path / "skipped.jsonl", 10**6)
    loader = make_loader(DrawDataset(numbered(3, bad=range(3)), load_number, 0), GlobalBatches(4))
    with pytest.raises(TooManyBadFiles, match="32 files in a row cannot be read; the last is bad_"):
        next(train_batches(loader, ledger))
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3


def test_errors_that_are_no_bad_files_are_not_hidden():
    def broken_load(sample, rng):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        DrawDataset(numbered(3), broken_load, 0)[0]


def test_ledger_goes_back_with_a_checkpoint(tmp_path):
    ledger = SkippedFiles(tmp_path / "skipped.jsonl", 100)
    ledger.add("a", "broken")
    state = json.loads(json.dumps(ledger.state_dict()))
    ledger.add("b", "broken later")
    resumed = SkippedFiles(tmp_path / "skipped.jsonl", 100)
    resumed.load_state_dict(state)
    resumed.add("a", "broken")
    resumed.add("b", "broken later")
    assert [json.loads(line)["path"] for line in ledger.output_path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_takes_each_once_in_order(tmp_path, num_workers):
    samples = numbered(25, bad=(3, 24))
    ledger = SkippedFiles(tmp_path / "skipped.jsonl", len(samples))
    kept = []
    for indices, batch in iterate_eval(samples, load_number, 8, ledger, num_workers):
        assert batch["number"][:, 0].tolist() == indices and set(batch) == {"number"}
        assert (batch["number"][:, 1] == -1).all()  # no random generator
        kept += indices
    assert kept == [index for index in range(25) if index not in (3, 24)]
    assert list(ledger.reasons) == ["bad_3", "bad_24"]


def test_too_short_clip_is_a_bad_file(tmp_path, feature_extractor):
    for number in range(11):
        write_tone(tmp_path / f"{number}.wav", seconds=0.01 if number == 0 else 0.3)
    samples = find_samples(str(tmp_path), "audio")
    ledger = SkippedFiles(tmp_path / "skipped.jsonl", len(samples))
    batches = list(iterate_eval(samples, AudioLoader(feature_extractor, MAX_FRAMES), 11, ledger))
    assert len(batches[0][0]) == 10
    assert "one frame" in ledger.reasons[samples[0].path]


# --- labels and folds ---


def test_single_labels():
    samples = [Sample("a", "dog"), Sample("b", "cat"), Sample("c", "dog")]
    labels = Labels(samples)
    assert labels.names == label_names(samples) == ["cat", "dog"]
    assert not labels.multi_label
    encoded = labels.encode(samples)
    assert encoded.tolist() == [1, 0, 1] and encoded.dtype == torch.int64
    with pytest.raises(ValueError, match=r"v \(split validation\): label 'cow' is not among the 2 classes"):
        labels.encode([Sample("v", "cow", split="validation")])
    with pytest.raises(ValueError, match=r"v \(split test\) has no `label`"):
        labels.encode([Sample("v", split="test")])
    with pytest.raises(ValueError, match="has no `label`"):
        Labels([Sample("a"), Sample("b")])


def test_labels_that_are_numbers_are_sorted_as_such():
    samples = [Sample(str(number), str(number)) for number in (10, 2, 1, 11)]
    assert Labels(samples).names == ["1", "2", "10", "11"]
    assert label_names([*samples, Sample("x", "cat")]) == ["1", "10", "11", "2", "cat"]


def test_classes_are_logged_with_their_counts(caplog):
    caplog.set_level("INFO")
    samples = [Sample("a", "dog"), Sample("b", "cat"), Sample("c", "dog"), Sample("d", "Dog")]
    Labels(samples).log({"training": samples, "evaluation": samples[:1]})
    assert "training: 4 samples, 3 classes: Dog 1, cat 1, dog 2" in caplog.text
    assert "evaluation: 1 samples, 3 classes: Dog 0, cat 0, dog 1" in caplog.text
    assert "['Dog', 'dog'] are classes of their own" in caplog.text
    many = [Sample(str(number), f"class {number % 527}") for number in range(1000)]
    caplog.clear()
    Labels(many).log({"training": many})
    assert "... and 507 more, of 1 to 2 samples each" in caplog.text and len(caplog.text) < 700


def test_multi_labels_in_the_order_of_audioset(tmp_path):
    order = tmp_path / "class_labels_indices.csv"
    order.write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/m/04rlf,"Music"\n'
    )
    samples = [Sample("a", labels=("/m/04rlf", "/m/09x0r")), Sample("b", labels=("Male speech, man speaking",))]
    labels = Labels(samples, order)
    assert labels.names == ["Speech", "Male speech, man speaking", "Music"] and labels.multi_label
    assert labels.encode(samples).tolist() == [[1, 0, 1], [0, 1, 0]]
    with pytest.raises(ValueError, match="'/m/0xyz' is not among the 3 classes"):
        Labels([Sample("a", labels=("/m/0xyz",))], order)
    with pytest.raises(ValueError, match="has no `labels`"):
        Labels([*samples, Sample("c", label="Music")], order)
    order.write_text("index,mid,display_name\n0,a,A\n2,b,B\n")
    with pytest.raises(ValueError, match="without gaps"):
        Labels(samples, order)
    order.write_text("index,name\n0,a\n")
    with pytest.raises(ValueError, match="no column display_name, mid"):
        Labels(samples, order)


def test_held_out_groups():
    samples = [Sample(str(index), group=str(index % 4)) for index in range(8)]
    rest, held_out = split_by_groups(samples, ["3"])
    assert {sample.group for sample in rest} == {"0", "1", "2"} and {sample.group for sample in held_out} == {"3"}
    with pytest.raises(ValueError, match="no samples of group 9; the groups are 0, 1, 2, 3"):
        split_by_groups(samples, ["9"])


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(st.integers(0, 12), min_size=20, max_size=80), num_folds=st.integers(2, 4))
def test_group_folds(groups, num_folds):
    groups = [*groups, 0, 1, 2, 3]
    samples = [Sample(str(number), group=str(group)) for number, group in enumerate(groups)]
    folds = group_folds(samples, num_folds)
    assert set(folds) == set(range(num_folds))
    assert all(len(set(folds[np.array(groups) == group])) == 1 for group in set(groups))
    np.testing.assert_array_equal(folds, assign_folds(samples, num_folds))


def test_folds_by_column_and_by_label():
    samples = [Sample(str(number), "dog", fold=str(number % 11)) for number in range(22)]
    assert assign_folds(samples).tolist() == [number % 11 for number in range(22)]
    samples = [Sample(str(number), "cat" if number % 4 else "dog") for number in range(40)]
    folds = assign_folds(samples, 5)
    dogs = np.array([sample.label == "dog" for sample in samples])
    assert np.bincount(folds[dogs]).tolist() == [2] * 5 and np.bincount(folds[~dogs]).tolist() == [6] * 5


def test_fold_errors():
    with pytest.raises(ValueError, match="b has no fold, others have"):
        assign_folds([Sample("a", fold="1"), Sample("b")])
    with pytest.raises(ValueError, match="all samples are of fold 1"):
        assign_folds([Sample("a", fold="1")])
    with pytest.raises(ValueError, match="b has no group, others have"):
        group_folds([Sample("a", group="1"), Sample("b")], 2)
    with pytest.raises(ValueError, match="3 folds of 2 groups"):
        group_folds([Sample("a", group="1"), Sample("b", group="2")], 3)


# --- what a DataLoader says of its workers ---


class _Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((8,), index)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_is_called_dead(monkeypatch, error):
    def fail(*args):
        raise error

    batches = iter(make_loader(_Numbers(), [[0, 1], [2, 3]], num_workers=1))
    # In this process alone, the workers have been started. What the parent calls to take a tensor from a worker.
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", fail)
    with pytest.raises(ChildProcessError, match="a loader worker has died"), loader_errors_as_os_errors(0):
        next(batches)
    with pytest.raises(type(error)), loader_errors_as_os_errors(0):
        fail()  # of something else, such as a tracker
