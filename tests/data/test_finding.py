"""Tests of data/finding.py: what is found in folders and Hub sets, and what is refused."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from helpers.sounds import write_tone, write_tones
from PIL import Image

from bridle_hf.common.errors import MediaError
from bridle_hf.data.batches import DrawDataset, GlobalBatches, make_loader
from bridle_hf.data.decoding import read_audio
from bridle_hf.data.finding import find_samples
from bridle_hf.data.labels import Labels
from bridle_hf.data.loaders import AudioLoader
from bridle_hf.data.sample import HubRow, Sample
from bridle_hf.data.shards.sources import ParquetCell
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


def test_files_come_in_the_order_of_their_folders_and_names(tmp_path):
    """Files and folders mixed, names that begin alike; a link to itself is a file that cannot be read."""
    names = ["b/x.wav", "ab/z.wav", "ab!.wav", "a.wav", "b.wav", "ab c/q.wav", "ab/c/q.wav", "ab/c.wav"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    found = [Path(sample.path).relative_to(tmp_path) for sample in find_samples(str(tmp_path), "audio")]
    assert found == sorted(map(Path, [*names, "loop.wav"]), key=lambda path: path.parts)


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
        (("file_name", "", ""), ("", "x", ""), {}, "line 2: file_name is empty"),
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


# --- what people have ---


def empty_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize("again", ["x.wav", "./x.wav", "sub/../x.wav", " x.wav "])
def test_a_file_listed_twice_is_refused(tmp_path, again):
    folder = write_metadata(tmp_path, ("file_name", "label"), ("x.wav", "dog"), ("y.wav", "cat"), (again, "rain"))
    with pytest.raises(ValueError, match=r"line 4: .*x\.wav' is listed before, at .*line 2.*`labels`"):
        find_samples(folder, "audio")


def test_a_file_of_two_splits_is_refused(tmp_path):
    for split in ("train", "test"):
        write_metadata(tmp_path / split, ("file_name",), ("../x.wav",))
    with pytest.raises(
        ValueError, match=r"test.metadata\.csv, line 2: .* is listed before|is listed before, at .*test"
    ):
        find_samples(str(tmp_path), "audio")


@pytest.mark.parametrize(
    ("folder", "split"),
    [(name, "train") for name in ("Train", "TRAIN", "training", "train_set")]
    + [(name, "test") for name in ("Testing", "evaluation", "EVAL", "test-data")]
    + [(name, "validation") for name in ("Valid", "VAL", "Dev", "development", "Validation")],
)
def test_splits_by_any_of_their_names(tmp_path, folder, split):
    data = empty_files(tmp_path, f"{folder}/cat/x.wav")
    assert [(sample.split, sample.label) for sample in find_samples(data, "audio")] == [(split, "cat")]
    csv_folder = write_metadata(tmp_path / "csv", ("file_name", "split"), ("x.wav", folder))
    assert find_samples(csv_folder, "audio", split=folder)[0].split == split


@pytest.mark.parametrize(
    ("names", "surely"),
    [
        ([f"fold{number}" for number in range(1, 11)], True),
        (["_background_noise_", "yes", "no"], True),
        (["FSD50K.dev_audio", "FSD50K.eval_audio"], True),
        (["train-clean-100", "dev-clean"], True),
        (["train/fold1", "train/fold2", "test/fold3"], True),
        (["train_horn", "dog"], False),
        (["audio", "dog"], False),
        (["_extra_", "dog"], False),
        (["dog", "cat", "1", "2", "background_noise", "trainer"], None),
    ],
)
def test_folders_that_are_no_classes(tmp_path, caplog, names, surely):
    data = empty_files(tmp_path, *(f"{name}/x.wav" for name in names))
    assert len(find_samples(data, "audio")) == len(names)  # to pretrain on
    assert ("look like something else" in caplog.text) == (surely is not None)
    if surely:
        with pytest.raises(ValueError, match="folders that are read as classes look like something else"):
            find_samples(data, "audio", need_labels=True)
    else:
        assert len(find_samples(data, "audio", need_labels=True)) == len(names)


def test_splits_within_classes_are_warned_of(tmp_path, caplog):
    find_samples(empty_files(tmp_path, "cat/train/x.wav", "cat/test/y.wav"), "audio")
    assert "not read as such" in caplog.text


def test_blanks_and_backslashes_in_csv(tmp_path):
    text = 'file_name, label ,split\na.wav, dog,train\nsub\\b.wav ,dog , Test \n \nc.wav, "cat, big",train\n'
    (tmp_path / "metadata.csv").write_text(text)
    empty_files(tmp_path, "a.wav", "sub/b.wav", "c.wav")
    samples = find_samples(str(tmp_path), "audio")
    assert [(sample.label, sample.split) for sample in samples] == [
        ("dog", "train"), ("cat, big", "train"), ("dog", "test"),
    ]  # fmt: skip
    assert all(Path(sample.path).is_file() for sample in samples)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\na,b.wav,dog\n", "line 2: 3 cells for 2 columns"),
        ("metadata.csv", "file_name,label,label\na.wav,b,c\n", "the column label is there twice"),
        ("metadata.jsonl", "[" * 100_000 + "\n", "line 1: is not JSON"),
        ("metadata.jsonl", '{"file_name": "a.wav"}\n[1]\n', "line 2: expected an object"),
        ("metadata.jsonl", '{"label": "a.wav"}\n', r"no column file_name; the columns are \['label'\]"),
        ("metadata.jsonl", '{"file_name": 3}\n', "line 1: file_name is empty"),
    ],
)
def test_tables_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        find_samples(str(tmp_path), "audio")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["Label", "lable", "class", "sound_label", "Category"])
def test_a_column_that_is_nearly_label(tmp_path, caplog, name):
    folder = write_metadata(tmp_path, ("file_name", name), ("a.wav", "dog"))
    assert find_samples(folder, "audio")[0].label is None
    assert f"no column 'label' for the labels; the columns are ['file_name', '{name}']" in caplog.text
    with pytest.raises(ValueError, match=f"give --label_column '{name}'"):
        find_samples(folder, "audio", need_labels=True)
    assert find_samples(folder, "audio", label_column=name, need_labels=True)[0].label == "dog"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_of_each_split_is_what_datasets_reads(tmp_path, suffix):
    """As the documentation of `datasets` has it; the oracle is `load_dataset` itself."""
    for split, label in (("train", "dog"), ("test", "cat")):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / f"{label}.png")
        rows = {"csv": f"file_name,label\n{label}.png,{label}\n"}
        rows["jsonl"] = f'{{"file_name": "{label}.png", "label": "{label}"}}\n'
        (folder / f"metadata.{suffix}").write_text(rows[suffix])
    samples = find_samples(str(tmp_path / "set"), "image")
    theirs = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert {sample.split: sample.label for sample in samples} == {name: theirs[name]["label"][0] for name in theirs}
    assert all(Path(sample.path).is_file() for sample in samples)
    empty_files(tmp_path / "set", "validation/new.png")
    with pytest.raises(ValueError, match=r"1 others, such as validation.new.png, are in no table"):
        find_samples(str(tmp_path / "set"), "image")


def test_metadata_above_split_folders(tmp_path):
    folder = write_metadata(tmp_path, ("file_name", "label"), ("Train/a.wav", "x"), ("test\\b.wav", "y"))
    assert [(sample.split, sample.label) for sample in find_samples(folder, "audio")] == [
        ("train", "x"),
        ("test", "y"),
    ]
    folder = write_metadata(tmp_path, ("file_name", "label"), ("train/a.wav", "x"), ("car/b.wav", "y"))
    assert {sample.split for sample in find_samples(folder, "audio")} == {None}


def test_multi_label_jsonl(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "labels": ["x ", "y"]}\n{"file_name": "b.wav"}\n')
    assert [sample.labels for sample in find_samples(str(tmp_path), "audio")] == [("x", "y"), None]
    (tmp_path / "metadata.csv").write_text("file_name\n")
    with pytest.raises(ValueError, match=r"both metadata.csv and metadata.jsonl"):
        find_samples(str(tmp_path), "audio")


# --- Hub sets ---


@pytest.fixture
def numbered(tmp_path):
    """A set with two configurations, whose ClassLabel is not in the order of the alphabet and has an unused class."""
    folder = tmp_path / "numbered"
    names = ["zebra", "ant", "unseen"]
    for config in ("small", "large"):
        rows = datasets.Dataset.from_dict({"audio": [{"bytes": b"x", "path": None}] * 2, "label": [0, 1]})
        rows = rows.cast_column("audio", datasets.Audio()).cast_column("label", datasets.ClassLabel(names=names))
        (folder / config).mkdir(parents=True)
        rows.to_parquet(folder / config / "train-0.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(folder)


def test_numbers_of_a_class_label_are_kept(numbered):
    for samples in (find_samples(numbered, "audio", config="small"), find_samples(f"{numbered}/small", "audio")):
        labels = Labels(samples)
        assert labels.names == ["zebra", "ant", "unseen"] and labels.encode(samples).tolist() == [0, 1]
        with pytest.raises(ValueError, match=r"one class only \(ant\)"):
            Labels(samples[1:]).check_several("these")
    other = replace(samples[0], class_order=("ant", "zebra"))
    with pytest.raises(ValueError, match="number the classes in different ways"):
        Labels([*samples, other])


def test_configuration_and_revision(numbered):
    assert len(find_samples(numbered, "audio", config="large")) == 2
    with pytest.raises(ValueError, match=r"numbered: datasets\.load_dataset.*small.*give --data_config") as raised:
        find_samples(numbered, "audio")
    assert "is not a folder" not in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="is for Hub ids"):
        find_samples(numbered, "audio", revision="main")
    with pytest.raises(ValueError, match="is for Hub ids"):
        find_samples(f"{numbered}/small/train-0.parquet", "audio", config="small")
    with pytest.raises(ValueError, match=r"nowhere' is not a folder, and datasets.*revision='v1'"):
        find_samples("nowhere", "audio", revision="v1")


def test_a_hub_set_is_streamed_as_shards(numbered):
    """What is read where it lies has the names, labels and class numbers of what is downloaded first."""
    downloaded = find_samples(numbered, "audio", config="small")
    streamed = find_samples(numbered, "audio", config="small", streaming=True)
    assert [(s.label, s.split, s.class_order) for s in streamed] == [
        (s.label, s.split, s.class_order) for s in downloaded
    ]
    assert [sample.media() for sample in streamed] == [sample.media() for sample in downloaded] == [b"x", b"x"]
    assert all(isinstance(sample.source, ParquetCell) and sample.place is not None for sample in streamed)
    assert len(find_samples(numbered, "audio", "train", config="small", streaming=True)) == 2
    with pytest.raises(ValueError, match=r"no samples of split 'test'; the splits are \['train'\]"):
        find_samples(numbered, "audio", "test", config="small", streaming=True)
    with pytest.raises(ValueError, match="streaming is for Hub ids"):
        find_samples(f"{numbered}/small", "audio", streaming=True)
    with pytest.raises(
        ValueError, match=r"numbered: datasets\.load_dataset_builder.*give --data_config|is for Hub ids"
    ):
        find_samples(numbered, "audio", streaming=True)


def test_streaming_refuses_files_that_are_no_shards(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("a,b\n1,2\n")
    (tmp_path / "set" / "README.md").write_text("---\nconfigs:\n- config_name: own\n  data_files: train.csv\n---\n")
    with pytest.raises(ValueError, match=r"streaming reads parquet and tar, not .*train\.csv"):
        find_samples(str(tmp_path / "set"), "audio", config="own", streaming=True)


@pytest.mark.parametrize("place", ["set", "set/deep"])
def test_one_of_several_columns_of_media(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    rows = datasets.Dataset.from_dict({name: [{"bytes": name.encode(), "path": None}] for name in ("clean", "noisy")})
    rows = rows.cast_column("clean", datasets.Audio()).cast_column("noisy", datasets.Audio())
    rows.to_parquet(tmp_path / place / "train.parquet")
    with pytest.raises(
        ValueError, match=r"expected one audio column, found \['clean', 'noisy'\].*--media_column 'clean'"
    ):
        find_samples(str(tmp_path / "set"), "audio")
    (sample,) = find_samples(str(tmp_path / "set"), "audio", media_column="noisy")
    assert sample.media() == b"noisy"
    with pytest.raises(ValueError, match="no column 'loud' for the audio; the columns are"):
        find_samples(str(tmp_path / "set"), "audio", media_column="loud")
    write_tone(tmp_path / "folder" / "dog" / "a.wav")
    with pytest.raises(ValueError, match="--media_column is for Hub sets and parquet"):
        find_samples(str(tmp_path / "folder"), "audio", media_column="noisy")


def test_a_split_without_any_label_is_left_out_where_labels_are_needed(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [(f"{split}_{number}.wav", "" if split == "test" else "dog", split) for split in ("train", "test")
            for number in range(2)]  # fmt: skip
    folder = write_metadata(tmp_path, ("file_name", "label", "split"), *rows)
    assert len(find_samples(folder, "audio")) == 4
    assert [sample.split for sample in find_samples(folder, "audio", need_labels=True)] == ["train", "train"]
    assert "no sample of split test has a label: 2 are left out" in caplog.text
    folder = write_metadata(tmp_path, ("file_name", "label", "split"), *rows, ("one.wav", "dog", "test"))
    assert (
        len(find_samples(folder, "audio", need_labels=True)) == 5
    )  # one label is missing: that is told of, not hidden


def test_columns_are_named_where_there_are_no_labels(tmp_path):
    for name in ("flat", "deep/data"):
        (tmp_path / name).mkdir(parents=True)
        rows = datasets.Dataset.from_dict({"audio": [{"bytes": b"x", "path": None}], "genre_label": [1]})
        rows.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / name / "train.parquet")
        with pytest.raises(ValueError, match=r"no column 'label'.*'genre_label'.*give --label_column 'genre_label'"):
            find_samples(str(tmp_path / name.split("/")[0]), "audio", need_labels=True)


def test_files_beside_folders_come_in_the_order_of_their_paths_parts(tmp_path):
    names = [
        "b.wav",
        "a.wav",
        "a/z.wav",
        "a b.wav",
        "a/b/c.wav",
        "a/b.wav",
        "a-b/x.wav",
        "c/.hidden/x.wav",
        ".d/y.wav",
    ]
    for name in [*names, "a/old_metadata.csv", "METADATA.CSV"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    seen = [path for path in map(Path, names) if not any(part.startswith(".") for part in path.parts)]
    expected = [str(tmp_path / path) for path in sorted(seen, key=lambda path: path.parts)]
    assert [sample.path for sample in find_samples(str(tmp_path), "audio")] == expected


def test_a_label_order_beside_the_data_takes_mids(tmp_path):
    (tmp_path / "label_order.csv").write_text('index,mid,display_name\n0,/m/x,"Cat, wild"\n1,/m/y,Dog\n')
    for header, cells in (("label", ["/m/y", "Dog", '"Cat, wild"']), ("labels", ["/m/y;/m/x", "Dog", "/m/x"])):
        rows = "".join(f"{number}.wav,{cell}\n" for number, cell in enumerate(cells))
        (tmp_path / "metadata.csv").write_text(f"file_name,{header}\n{rows}")
        found = [sample.labels or (sample.label,) for sample in find_samples(str(tmp_path), "audio")]
        several = header == "labels"
        assert found == [("Dog", "Cat, wild") if several else ("Dog",), ("Dog",), ("Cat, wild",)]
