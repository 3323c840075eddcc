"""Tests of training/shard.py: the same bytes whoever writes them, nothing lost, nothing taken over that is broken."""

import csv
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from helpers.shard_sets import digest, digests, make_shards
from helpers.sounds import write_tone, write_tones
from helpers.tiny_run import ROOT
from helpers.waiting import DEADLINE

from bridle_hf.common.errors import ArgumentError
from bridle_hf.data.finding import find_samples
from bridle_hf.data.labels import Labels
from bridle_hf.data.order import Places
from bridle_hf.data.sample import Sample
from bridle_hf.data.shards import writer as shard
from bridle_hf.data.shards.listing import INDEX_NAME
from bridle_hf.data.shards.writer import _class_order


def hashes(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def data(tmp_path):
    """20 recordings with all that metadata.csv can say, two of them broken."""
    folder = tmp_path / "data"
    rows = [("file_name", "labels", "split", "fold", "group")]
    for number in range(20):
        write_tone(folder / f"été {number}.flac", frequency=200 + 50 * number)
        rows.append((f"été {number}.flac", f"a;b {number % 3}", ("train", "dev")[number % 4 == 0], number % 5, "g"))
    (folder / "été 3.flac").write_bytes((folder / "été 3.flac").read_bytes()[:2000])
    (folder / "été 8.flac").unlink()
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_same_bytes_from_any_number_of_workers(data, tmp_path, kind):
    options = ("--format", kind, "--samples_per_shard", "4")
    one = hashes(make_shards(data, tmp_path / "one", *options))
    data.rename(tmp_path / "moved")
    two = hashes(make_shards(tmp_path / "moved", tmp_path / "two", *options, "--num_workers", "2"))
    assert one.pop("skipped.jsonl") != two.pop("skipped.jsonl")  # it names files where they are
    assert one == two
    shards = [name for name in one if name.endswith(kind)]
    assert shards == [f"train-00000{n}.{kind}" for n in range(4)] + [f"validation-00000{n}.{kind}" for n in range(2)]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_nothing_is_lost_but_what_is_broken(data, tmp_path, kind):
    out = make_shards(data, tmp_path / "out", "--format", kind, "--samples_per_shard", "4")
    files = {digest(sample.path): sample for sample in find_samples(str(data), "audio") if Path(sample.path).exists()}
    for index in (True, False):
        samples = find_samples(out, "audio")
        assert len(samples) == 18
        for sample in samples:
            file = files[digest(sample.media())]
            for name in ("label", "labels", "split", "fold", "group"):
                assert getattr(sample, name) == getattr(file, name)
        if index:
            (Path(out) / INDEX_NAME).unlink()
    skipped = [json.loads(line) for line in (Path(out) / "skipped.jsonl").read_text().splitlines()]
    assert {entry["path"]: entry["reason"].split(":")[0] for entry in skipped} == {
        str(data / "été 3.flac"): "cannot be decoded",
        str(data / "été 8.flac"): "No such file or directory",
    }


def test_however_the_folder_is_spelled(tmp_path, monkeypatch):
    tones = Path(write_tones(tmp_path / "tones", 4))
    monkeypatch.chdir(tmp_path)
    expected = hashes(make_shards(tones, tmp_path / "whole"))
    for number, data in enumerate(("tones", "./tones", "tones/", "../" + tmp_path.name + "//tones")):
        assert hashes(make_shards(data, tmp_path / f"out_{number}")) == expected


def test_a_full_disk(tmp_path):
    tones = write_tones(tmp_path / "tones", 4)
    out = tmp_path / "out"
    expected = hashes(make_shards(tones, out, "--samples_per_shard", "2"))
    (out / "data-000001.tar").unlink()
    (out / ".data-000001.tar.part").symlink_to("/dev/full")
    with pytest.raises(ArgumentError, match=r"No space left on device; mend this \(output_dir is .*out\), and"):
        make_shards(tones, out, "--samples_per_shard", "2", "--resume")
    (out / ".data-000001.tar.part").unlink()
    assert hashes(make_shards(tones, out, "--samples_per_shard", "2", "--resume")) == expected


def test_resuming_makes_what_is_missing_or_broken(data, tmp_path):
    options = ("--samples_per_shard", "4")
    out = Path(make_shards(data, tmp_path / "out", *options))
    expected, untouched = hashes(out), (out / "train-000000.tar").stat().st_mtime_ns
    (out / "train-000001.tar").unlink()
    (out / INDEX_NAME).unlink()
    broken = out / "train-000002.tar"
    broken.write_bytes(broken.read_bytes()[:3000])
    (out / ".train-000003.tar.part").write_bytes(b"half of it")
    (out / "train-000003.tar").unlink()
    make_shards(data, out, *options, "--resume")
    assert hashes(out) == expected
    assert (out / "train-000000.tar").stat().st_mtime_ns == untouched


def test_killed_and_resumed(tmp_path):
    tones = write_tones(tmp_path / "tones", 60)
    options = ["--samples_per_shard", "2", "--num_workers", "2"]
    expected = hashes(make_shards(tones, tmp_path / "whole", *options))
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "training" / "shard.py"),
        "--data",
        tones,
        "--output_dir",
        str(out),
        *options,
    ]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("*.tar"))) < 5:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=DEADLINE)  # ends when nobody holds the pipe: its workers have gone, too
    assert len(list(out.glob("*.tar"))) >= 5
    make_shards(tones, out, *options, "--resume")
    assert hashes(out) == expected


def test_sizes(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for number in range(30):
        write_tone(folder / f"{number}.wav", seconds=rng.uniform(1, 20))
    out = Path(make_shards(folder, tmp_path / "out", "--shard_size_mb", "1"))
    by_shard: dict[str, int] = {}
    for sample in find_samples(str(out), "audio"):
        by_shard[sample.place[0]] = by_shard.get(sample.place[0], 0) + len(sample.media())
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert max(by_shard.values()) <= 1 << 20 and len(by_shard) <= 2 * total / (1 << 20)
    assert digests(find_samples(str(out), "audio")) == digests(find_samples(str(folder), "audio"))


def test_of_shards_and_of_hub_sets(tmp_path):
    """Bytes without a name, and shards of shards, from few of them at a time."""
    tones = write_tones(tmp_path / "tones", 40)
    first = make_shards(tones, tmp_path / "first", "--samples_per_shard", "1")
    order = shard.mixed_order(find_samples(first, "audio"))
    assert Places.of(find_samples(first, "audio")) is not None and sorted(order) == list(range(40))
    second = make_shards(first, tmp_path / "second", "--format", "parquet")
    rows = datasets.Dataset.from_dict(
        {"audio": [{"bytes": path.read_bytes(), "path": None} for path in Path(tones).rglob("*.wav")]}
    )
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "hub" / "data" / "train-0.parquet")
    third = make_shards(tmp_path / "hub", tmp_path / "third")
    for made in (second, third):
        samples = find_samples(made, "audio")
        assert digests(samples) == digests(find_samples(tones, "audio"))
    assert all(sample.path.endswith(".wav") for sample in samples) and {sample.split for sample in samples} == {
        "train"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples_per_shard", "0"), "--samples_per_shard is 0: expected 1 to 1e9"),
        (("--num_workers", "-1"), "--num_workers is -1"),
        (("--format", "zip"), "format"),
        (("--shard_size", "3"), "unknown argument '--shard_size'; did you mean 'shard_size_mb'"),
        (("--split", "test"), "no samples of split 'test'"),
        (("--modality", "image"), "no image files found"),
        (("--resume",), "does not hold a run of shards"),
        ((), "is not empty: give --resume"),
    ],
)
def test_errors_are_one_line(tmp_path, options, message):
    tones = write_tones(tmp_path / "tones", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").write_text("")
    with pytest.raises(ArgumentError, match=message) as caught:
        make_shards(tones, tmp_path / "out", *options)
    assert "\n" not in str(caught.value)


def test_too_many_bad_files(tmp_path):
    tones = Path(write_tones(tmp_path / "tones", 20))
    for path in sorted(tones.rglob("*.wav"))[:3]:
        path.write_bytes(b"")
    with pytest.raises(ArgumentError, match="3 of 20 files cannot be read"):
        make_shards(tones, tmp_path / "out", "--samples_per_shard", "5")
    assert not (tmp_path / "out" / INDEX_NAME).exists()


def test_data_that_changed_meanwhile(tmp_path):
    tones = Path(write_tones(tmp_path / "tones", 20))
    bad = sorted(tones.rglob("*.wav"))[0]
    content = bad.read_bytes()
    bad.write_bytes(b"")
    out = make_shards(tones, tmp_path / "out", "--samples_per_shard", "20")
    bad.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"data-000000\.tar holds 19 samples, not what the data has for it now"):
        make_shards(tones, Path(out), "--samples_per_shard", "20", "--resume")


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("column", ["label", "labels"])
def test_the_order_of_a_class_label_survives(tmp_path, kind, indexed, column):
    """As a Hub set has it: not that of the alphabet, with a class that no sample has, and a sample without any."""
    names = ["zebra", "Ähre", "unseen", "ant"]
    paths = [Path(write_tone(tmp_path / f"{number}.wav", frequency=300 + 100 * number)) for number in range(4)]
    media = [path.read_bytes() for path in paths]
    numbers = [3, 0, 1, None] if column == "label" else [[3, 0], [1], [0, 1], None]
    label = datasets.ClassLabel(names=names)
    rows = datasets.Dataset.from_dict({"audio": [{"bytes": each, "path": None} for each in media], column: numbers})
    rows = rows.cast_column("audio", datasets.Audio())
    rows = rows.cast_column(column, label if column == "label" else datasets.List(label))
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "set" / "data" / "train-0.parquet")
    out = Path(make_shards(tmp_path / "set", tmp_path / "out", "--format", kind, "--samples_per_shard", "2"))
    if not indexed:
        (out / "index.jsonl").unlink()
    samples = find_samples(str(out), "audio")
    assert {sample.class_order for sample in samples} == {tuple(names)}
    assert Labels([sample for sample in samples if sample.label or sample.labels]).names == names
    if column == "label":
        expected = [(each if each is None else names[each], None) for each in numbers]
    else:
        expected = [(None, each and tuple(names[number] for number in each)) for each in numbers]
    assert {sample.media(): (sample.label, sample.labels) for sample in samples} == dict(zip(media, expected))
    shards = sorted(str(path) for path in out.glob(f"*.{kind}"))
    if kind == "parquet":
        again = datasets.load_dataset("parquet", data_files=shards, cache_dir=str(tmp_path / "cache"))
        assert again["train"].features[column] == rows.features[column]
    else:
        read = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        assert sorted(sample["wav"] for sample in read) == sorted(media), "others see samples alone"


def test_shards_of_several_orders_keep_the_names_alone(caplog):
    samples = [Sample("a", label="x", class_order=("x", "y")), Sample("b", label="x", class_order=("y", "x"))]
    assert _class_order(samples) is None and "in different ways" in caplog.text
    assert _class_order(samples[:1]) == ("x", "y") and _class_order([Sample("c")]) is None


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_strong_labels_survive(tmp_path, kind):
    """Onsets and offsets, and recordings in which nothing sounds; with an index and by a scan."""
    data = tmp_path / "data"
    for number in range(4):
        write_tone(data / f"{number}.wav", frequency=200 + 50 * number)
    rows = ["0.wav,0.5,0.8,cat", "0.wav,0.1,0.3,dog", "1.wav,,,", "2.wav,0.2,0.4,dog", "3.wav,0,0.25,cat"]
    (data / "metadata.csv").write_text("\n".join(["file_name,onset,offset,label", *rows]) + "\n")
    wanted = {digest(sample.path): (sample.labels, sample.events) for sample in find_samples(str(data), "audio")}
    assert sorted(len(events) for _, events in wanted.values()) == [0, 1, 1, 2]
    out = make_shards(data, tmp_path / "out", "--format", kind)
    for index in (True, False):
        found = find_samples(out, "audio")
        assert {digest(sample.media()): (sample.labels, sample.events) for sample in found} == wanted
        if index:
            (Path(out) / INDEX_NAME).unlink()
