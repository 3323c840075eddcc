"""Tests of fine-tuning on strong labels: columns onset and offset to events found in whole recordings."""

import json
import logging

import numpy as np
import pytest
import soundfile
import torch
from helpers.tiny_run import RATE, RECIPE

import bridle_hf
from bridle_hf import BridleConfig, BridleFeatureExtractor, BridleForAudioFrameClassification, BridleModel
from bridle_hf.common.errors import ArgumentError
from bridle_hf.data.finding import find_samples
from bridle_hf.data.loaders import AudioLoader
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.events import EvaluationWindows, EventLoader, Window, _windows


NAMES = {"low": 600, "high": 3000}
CONFIG = {name: value for name, value in RECIPE["encoder"].items() if "decoder" not in name and "code" not in name}
STEP = 0.08  # seconds of a patch of 8 frames


def write_events(folder, count, seconds=(0.8, 2.5), seed=0):
    """Recordings with bursts of two tones, some of them with none, and `metadata.csv`."""
    rng, lines = np.random.default_rng(seed), ["file_name,onset,offset,label,split"]
    folder.mkdir()
    for number in range(count):
        length = rng.uniform(*seconds)
        waveform, split = 0.01 * rng.normal(size=int(length * RATE)), "test" if number % 3 == 0 else "train"
        found = []
        for name, pitch in NAMES.items():
            if rng.random() < 0.8:
                onset = rng.uniform(0, length - 0.4)
                offset = onset + rng.uniform(0.25, 0.4)
                first, end = int(onset * RATE), int(offset * RATE)
                waveform[first:end] += 0.3 * np.sin(2 * np.pi * pitch * np.arange(end - first) / RATE)
                found.append(f"{number}.wav,{onset:.3f},{offset:.3f},{name},{split}")
        lines += found or [f"{number}.wav,,,,{split}"]
        soundfile.write(folder / f"{number}.wav", waveform, RATE)
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_events(tmp_path_factory.mktemp("events") / "data", 36)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BridleModel(BridleConfig(**CONFIG)).save_pretrained(folder)
    BridleFeatureExtractor(num_mel_bins=32, max_length=48, mean=-8.0, std=4.0).save_pretrained(folder)
    return str(folder)


def finetune(encoder, data, out, **options):
    given = {"draws_per_epoch": 2400, "num_train_epochs": 1, "learning_rate": 5e-3, "report_to": ["none"]}
    return bridle_hf.finetune(
        model=encoder, data=data, output_dir=str(out), per_device_train_batch_size=16, **{**given, **options}
    )


def test_events_are_found_in_whole_recordings(encoder, data, tmp_path, caplog):
    """Of tones that anyone hears: in recordings up to five times as long as the model's input."""
    with caplog.at_level(logging.INFO):
        results = finetune(encoder, data, tmp_path / "out").results
    assert "strong labels, by its columns onset and offset" in caplog.text
    assert results["metric"] == "event_f1" and results["samples"] == {"train": 24, "evaluation": 12, "test": 0}
    assert set(results["evaluation"]) == {"event_f1", "segment_f1", "event_f1_micro", "segment_f1_micro", "loss"}
    assert results["evaluation"]["event_f1"] > 0.8 and results["evaluation"]["segment_f1"] > 0.9
    model = BridleForAudioFrameClassification.from_pretrained(tmp_path / "out")
    assert model.config.architectures == ["BridleForAudioFrameClassification"]
    assert model.config.id2label == {0: "high", 1: "low"}
    assert "sound event detection" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["results"]["sound event detection"]


def test_labels_of_a_crop_are_those_of_its_time(data):
    """Whatever the crop: a tone sounds in a step if the labels say so."""
    config, extractor = BridleConfig(**CONFIG), BridleFeatureExtractor(num_mel_bins=32, max_length=48)
    load = EventLoader(AudioLoader(extractor, 48), config, ["high", "low"], FinetuneArguments("", ""))
    samples = [sample for sample in find_samples(data, "audio") if sample.events]
    assert {sample.labels for sample in samples} == {("high",), ("low",), ("high", "low")}
    rng = np.random.default_rng(0)
    bins = [22, 9]  # of 3 kHz and of 600 Hz
    for sample in samples:
        loaded = load(sample, rng)
        assert loaded["labels"].shape == (6, 2)
        steps = int(-(-loaded["attention_mask"].sum() // 8))
        energy = loaded["input_values"].unflatten(0, (6, 8)).mean(dim=1)
        for number, bin_ in enumerate(bins):
            loud = energy[:steps, bin_ - 1 : bin_ + 2].amax(dim=1) > 0.8
            assert (loud != loaded["labels"][:steps, number].bool()).sum() <= 2  # at the two ends of an event
    assert load._labels([(1.0, 1.01, "low"), (0.0, 9.0, "high")], 0.92).tolist() == [
        [1, 0], [1, 1], [1, 0], [1, 0], [1, 0], [1, 0]
    ]  # fmt: skip


def test_a_perfect_classifier_scores_1_in_recordings_of_any_length(tmp_path):
    """Logits that are the labels, window by window: what is cut is stitched again."""
    data = write_events(tmp_path / "data", 9, seconds=(0.5, 4.0), seed=3)
    config, extractor = BridleConfig(**CONFIG), BridleFeatureExtractor(num_mel_bins=32, max_length=48)
    load = EventLoader(AudioLoader(extractor, 48), config, ["high", "low"], FinetuneArguments("", ""))
    samples = find_samples(data, "audio")
    windows = [window for sample in samples for window in _windows(sample, load)]
    assert all(window.start % 8 == 0 for window in windows) and len(windows) > 2 * len(samples)
    for sample in samples:
        frames = 1 + (soundfile.info(sample.path).frames - 400) // 160
        ends = [window.start + window.frames for window in windows if window.sample is sample]
        assert ends[-1] == frames
    logits = np.stack([20 * load(window)["labels"].numpy() - 10 for window in windows])
    found = EvaluationWindows(windows, load, config).measure(logits)
    assert found["event_f1"] == 1.0 and found["segment_f1"] > 0.9
    assert isinstance(windows[0], Window)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["0.wav,0.5,0.2,low,train"], "line 2: the event lasts from 0.5 to 0.2 s: expected 0 <= onset < offset"),
        (["0.wav,x,0.2,low,train"], "line 2: onset 'x' and offset 0.2 must be numbers, in seconds"),
        (["0.wav,0.1,0.2,,train"], "line 2: the event has no label"),
        (["0.wav,0.1,0.2,low,train", "0.wav,0.1,0.2,low,test"], "line 3: split, fold or group is not that of line 2"),
        (["0.wav,,,,train", "1.wav,,,,test"], "no training sample has an event"),
        (["0.wav,0.1,0.2,low,train", "1.wav,0.1,0.2,high,test"], "label 'high' is not among the 1 classes"),
    ],
)
def test_strong_labels_that_are_none_are_refused(lines, reason, encoder, tmp_path):
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,onset,offset,label,split", *lines]) + "\n")
    with pytest.raises(ArgumentError) as caught:
        finetune(encoder, str(tmp_path), tmp_path.with_name("out"))
    assert reason.replace("0.2 must", "'0.2' must") in str(caught.value) or reason in str(caught.value)


@pytest.mark.parametrize("option", [{"augment": True}, {"mixup_probability": 0.5}, {"patch_dropout": [0.1, 0.0]},
                                    {"balanced_sampling": True}])  # fmt: skip
def test_options_of_whole_recordings_are_refused(option, encoder, data, tmp_path):
    with pytest.raises(ArgumentError, match=f"--{next(iter(option))} is for labels of whole recordings"):
        finetune(encoder, data, tmp_path / "out", **option)


def test_broken_recordings_are_skipped_and_listed(encoder, tmp_path):
    data = write_events(tmp_path / "data", 24, seed=2)
    (tmp_path / "data" / "3.wav").write_bytes(b"no sound")
    (tmp_path / "data" / "4.wav").write_bytes(b"no sound")
    results = finetune(encoder, data, tmp_path / "out", draws_per_epoch=48).results
    assert results["skipped_files"] == 2 and results["samples"]["evaluation"] == 7
