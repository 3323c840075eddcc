"""Tests of data/finding.py: what is found in folders and Hub sets, and what is refused."""

import csv
import os
from pathlib import Path

import datasets
import pytest
from helpers.sounds import write_tone, write_tones

from bridle_hf.common.errors import MediaError
from bridle_hf.data.batches import DrawDataset, GlobalBatches, make_loader
from bridle_hf.data.decoding import read_audio
from bridle_hf.data.finding import find_samples
from bridle_hf.data.loaders import AudioLoader
from bridle_hf.data.sample import HubRow, Sample
from bridle_hf.feature_extraction_bridle import BridleFeatureExtractor


MAX_FRAMES = 48


def write_metadata(folder, columns, *rows):
    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(folder)


def test_class_folders(tmp_path):
    samples = find_samples(write_tones(tmp_path), "audio")
    assert len(samples) == 20
    assert [sample.path for sample in samples] == sorted(sample.path for sample in samples)
    assert {(sample.label, sample.split, sample.labels) for sample in samples} == {
        ("class_0", None, None),
        ("class_1", None, None),
    }


def test_split_folders_under_their_usual_names(tmp_path):
    for folder in ("train/dog", "train/cat/deeper", "val/dog", "test/dog"):
        write_tone(tmp_path / folder / "A.WAV", format="WAV")
    (tmp_path / "README.txt").write_text("not audio")
    (tmp_path / "train" / "dog" / "._A.wav").write_text("a resource fork")
    samples = find_samples(str(tmp_path), "audio")
    found = sorted((sample.split, sample.label) for sample in samples)
    assert found == [("test", "dog"), ("train", "cat"), ("train", "dog"), ("validation", "dog")]
    assert len(find_samples(str(tmp_path), "audio", split="valid")) == 1
    with pytest.raises(ValueError, match=r"no samples of split 'balanced'.*'test', 'train', 'validation'"):
        find_samples(str(tmp_path), "audio", split="balanced")


def test_links_and_hidden_folders(tmp_path):
    data = tmp_path / "data"
    write_tone(data / "dog" / "a.wav")
    write_tone(data / ".ipynb_checkpoints" / "a.wav")
    write_tone(tmp_path / "elsewhere" / "b.wav")
    links = {"cat": "../elsewhere", "dog/up": "..", "dog/self": ".", "../elsewhere/back": "../data"}
    for link, target in links.items():
        (data / link).symlink_to(target)
    assert [Path(sample.path).relative_to(data).as_posix() for sample in find_samples(str(data), "audio")] == [
        "cat/b.wav",
        "dog/a.wav",
    ]


def test_names_that_are_not_utf8(tmp_path):
    write_tone(tmp_path / "a.wav")
    os.link(os.fsencode(tmp_path) + b"/a.wav", os.fsencode(tmp_path) + b"/\xe9t\xe9.wav")
    with pytest.raises(ValueError, match=r"the name of .*udce9.* is not UTF-8: rename it"):
        find_samples(str(tmp_path), "audio")
    (tmp_path / "metadata.csv").write_bytes("file_name,label\na.wav,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.csv: is no CSV in UTF-8"):
        find_samples(str(tmp_path), "audio")


def test_flat_folder_has_no_labels(tmp_path):
    write_tone(tmp_path / "b.wav")
    write_tone(tmp_path / "a.flac")
    assert find_samples(str(tmp_path), "audio") == [Sample(str(tmp_path / "a.flac")), Sample(str(tmp_path / "b.wav"))]


def test_split_folders_beside_others_are_refused(tmp_path):
    write_tone(tmp_path / "train" / "a.wav")
    write_tone(tmp_path / "dog" / "a.wav")
    with pytest.raises(ValueError, match=r"named like splits \(train\) stand beside others \(dog\)"):
        find_samples(str(tmp_path), "audio")


def test_folder_without_audio(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"no audio files found; .* metadata.csv, \*.tar, \*.parquet and .wav .flac"):
        find_samples(str(tmp_path), "audio")
    with pytest.raises(ValueError, match="modality 'smell'"):
        find_samples(str(tmp_path), "smell")


def test_metadata(tmp_path):
    columns = ("file_name", "label", "split", "fold", "group", "key")
    folder = write_metadata(
        tmp_path, columns, ("b.wav", "dog", "dev", "2", "x", "C"), ("a.wav", "", "train", "1", "y", "D")
    )
    first, second = find_samples(folder, "audio")
    assert first == Sample(str(tmp_path / "a.wav"), None, None, "train", "1", "y")
    assert second == Sample(str(tmp_path / "b.wav"), "dog", None, "validation", "2", "x")
    chosen = find_samples(folder, "audio", split="train", label_column="key", group_column="fold")
    assert [(sample.label, sample.group) for sample in chosen] == [("D", "1")]


def test_multi_label_metadata(tmp_path):
    folder = write_metadata(tmp_path, ("file_name", "labels"), ("a.wav", "Speech; Music"), ("b.wav", ""))
    assert [sample.labels for sample in find_samples(folder, "audio")] == [("Speech", "Music"), None]


@pytest.mark.parametrize(
    ("columns", "row", "options", "message"),
    [
        (("file", "label"), ("a.wav", "x"), {}, r"no column file_name; the columns are \['file', 'label'\]"),
        (("file_name",), ("",), {}, "line 2: file_name is empty|lists no files"),
        (("file_name", "label"), ("", "x"), {}, "line 2: file_name is empty"),
        (("file_name", "label", "labels"), ("a.wav", "x", "x"), {}, "both columns label and labels"),
        (("file_name",), ("a.wav",), {"label_column": "key"}, "no column 'key' for the labels"),
        (("file_name",), ("a.wav",), {"group_column": "voice"}, "no column 'voice' for the groups"),
    ],
)
def test_bad_metadata(tmp_path, columns, row, options, message):
    with pytest.raises(ValueError, match=message):
        find_samples(write_metadata(tmp_path, columns, row), "audio", **options)


def test_other_columns_need_metadata(tmp_path):
    with pytest.raises(ValueError, match=r"needs a metadata\.csv"):
        find_samples(write_tones(tmp_path), "audio", label_column="key")


@pytest.fixture
def parquet(tmp_path):
    """A Hub-like folder, its shards not directly inside: two splits, audio as bytes, a ClassLabel."""
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    for split, labels in (("train", [1, 0, 1]), ("test", [0])):
        paths = [write_tone(tmp_path / f"{split}_{i}.flac", frequency=300 + 100 * i) for i in range(len(labels))]
        audio = [{"path": path, "bytes": Path(path).read_bytes()} for path in paths]
        rows = datasets.Dataset.from_dict({"audio": audio, "label": labels})
        rows = rows.cast_column("audio", datasets.Audio())
        rows = rows.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_rows_of_a_hub_set(parquet):
    samples = find_samples(parquet, "audio")
    assert [(sample.split, sample.label) for sample in samples] == [
        ("train", "dog"),
        ("train", "cat"),
        ("train", "dog"),
        ("test", "cat"),
    ]
    assert samples[1].path == f"{parquet}/train/1"
    waveform, rate = read_audio(samples[0].media())
    assert waveform.shape == (1, 4800) and rate == 16000
    train = find_samples(parquet, "audio", split="train")
    dataset = DrawDataset(train, AudioLoader(BridleFeatureExtractor(), MAX_FRAMES), seed=0)
    batch = next(iter(make_loader(dataset, GlobalBatches(3), num_workers=1)))
    assert sorted(batch["index"].tolist()) == [0, 1, 2]
    assert not batch["skipped"]


def test_empty_cell_of_a_hub_set_is_a_bad_file():
    dataset = datasets.Dataset.from_dict(
        {"audio": [None, {"path": None, "bytes": None}, {"path": "a.wav", "bytes": None}]}
    )
    for index in (0, 1):
        with pytest.raises(MediaError, match=f"row {index}: column audio is empty"):
            HubRow(dataset, "audio", index).media()
        with pytest.raises(MediaError, match=f"set/{index}: column audio is empty"):
            Sample(f"set/{index}", source=HubRow(dataset, "audio", index)).media()
    assert HubRow(dataset, "audio", 2).media() == "a.wav"


def test_hub_errors(parquet, tmp_path):
    with pytest.raises(ValueError, match=r"is not a folder, and datasets\.load_dataset"):
        find_samples(str(tmp_path / "nowhere"), "audio")
    with pytest.raises(ValueError, match="split='balanced'"):
        find_samples(parquet, "audio", split="balanced")
    with pytest.raises(ValueError, match="no column 'key' for the labels"):
        find_samples(parquet, "audio", label_column="key")
