"""Data sets: packages are fetched whole and checked, and what is written of them holds what they hold."""

import csv
import gzip
import hashlib
import json
import shutil
import sys
import zipfile
from dataclasses import dataclass

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bridle_hf.common.arguments import make_arguments
from bridle_hf.data.finding import find_samples
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.sets import creatures, pictures, speech
from bridle_hf.sets.fetching import Package, fetched
from bridle_hf.study.run import answers
from bridle_hf.study.sets import SETS


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Fetching


@dataclass(frozen=True)
class Local(Package):
    """A package that a copy brings."""

    source: str = ""

    @property
    def words(self):
        return [sys.executable, "-c", f"import shutil; shutil.copy({self.source!r}, '.')"]


@pytest.fixture
def archives(tmp_path) -> dict:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "data.txt").write_text("content", encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as wheel:
        wheel.write(tmp_path / "package" / "data.txt", "package/data.txt")
    tar = shutil.make_archive(str(tmp_path / "two"), "gztar", tmp_path, "package")
    found = {"pip": str(tmp_path / "one.whl"), "npm": tar}
    return {
        client: Local(client, "name", "1", hashlib.sha256(open(path, "rb").read()).hexdigest(), path)
        for client, path in found.items()
    }


@pytest.mark.parametrize("client", ["pip", "npm"])
def test_a_package_is_fetched_once_and_unpacked(archives, tmp_path, client):
    folder = fetched(archives[client], tmp_path / "cache")
    assert (folder / "package" / "data.txt").read_text(encoding="utf-8") == "content"
    assert [path.name for path in folder.iterdir()] == ["package"], "the archive itself is not kept"
    gone = Local(client, "name", "1", archives[client].sha256, "/nowhere")
    assert fetched(gone, tmp_path / "cache") == folder


def test_what_is_wrong_with_a_package_is_one_line_and_leaves_nothing(archives, tmp_path):
    given = archives["pip"]
    for package, expected in [
        (Local("pip", "name", "1", "0" * 64, given.source), "expected a file with sha256 000"),
        (Local("pip", "name", "1", given.sha256, "/nowhere"), "pip package name 1: .* failed: .*nowhere"),
    ]:
        with pytest.raises(RuntimeError, match=expected) as caught:
            fetched(package, tmp_path / "cache")
        assert "\n" not in str(caught.value) and not list((tmp_path / "cache").iterdir())


def test_the_commands_are_those_of_the_ordinary_clients():
    words = [Package(client, "name", "1.0", "").words for client in ("pip", "npm", "apt")]
    assert words[0][1:] == ["-m", "pip", "download", "--quiet", "--no-deps", "name==1.0"]
    assert words[1:] == [["npm", "pack", "--silent", "name@1.0"], ["apt-get", "download", "name=1.0"]]


# Speech


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3 * speech.SAMPLES))
def test_a_word_stands_in_the_middle_of_a_second(length):
    """As much silence before as behind it, or as much cut off, up to a sample."""
    places = np.flatnonzero(speech.centred(np.ones(length)))
    assert len(places) == min(length, speech.SAMPLES)
    assert abs(places[0] - (speech.SAMPLES - 1 - places[-1])) <= 1
    wave = np.arange(1.0, length + 1)
    found = speech.centred(wave)
    assert found.shape == (speech.SAMPLES,) and np.mean(found**2) == pytest.approx(1)
    if length > speech.SAMPLES:
        first = found[0] / (found[1] - found[0]) - 1  # how many were cut off
        assert abs(first - (length - speech.SAMPLES) / 2) < 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20_000), st.floats(0, 0.999))
def test_the_loudest_moment_is_in_the_crop(length, place):
    wave = 0.01 * np.random.default_rng(0).normal(size=length)
    wave[int(place * length)] = 5.0
    found = speech.loudest(wave)
    assert found.shape == (speech.CROP,) and found.max() == 5.0


def test_spoken_descriptions_by_language(tmp_path):
    package, folder = tmp_path / "stamps" / "animals", tmp_path / "out"
    package.mkdir(parents=True), folder.mkdir()
    rng = np.random.default_rng(0)
    for stamp in ("frog-1", "cat_2"):
        for language in ("fr", "ru", "en"):
            soundfile.write(package / f"{stamp}_desc_{language}.ogg", 0.1 * rng.normal(size=30_000), 44_100)
    # One name in two folders of one name: two files, which no fold sets apart.
    (tmp_path / "stamps" / "toys" / "animals").mkdir(parents=True)
    shutil.copy(package / "cat_2_desc_fr.ogg", tmp_path / "stamps" / "toys" / "animals")
    speech._write_spoken(folder, tmp_path / "stamps", speech.LANGUAGES)
    found = {(row["label"], row["group"]) for row in rows(folder)}
    assert found == {(language, f"animals/{stamp}") for language in ("fr", "ru") for stamp in ("frog-1", "cat_2")}
    for row in rows(folder):
        wave, rate = soundfile.read(folder / row["file_name"])
        assert (len(wave), rate) == (speech.CROP, 16_000)
        assert np.mean(wave**2) == pytest.approx(2 * 0.1**2, rel=0.1)  # speech and noise of one power
    assert len(find_samples(str(folder), "audio")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_set_of_the_study_can_be_listed_for_its_tasks(name):
    """Fetches what is not in the user's cache."""
    study_set = SETS[name]
    data = study_set.make(None)
    (args,) = make_arguments(PretrainArguments, recipe=study_set.recipe, values={"data": data, "output_dir": "-"})
    paths = [sample.path for sample in find_samples(data, args.modality)]
    assert len(paths) > 1000
    for task in study_set.tasks.values():
        labels, folds, clusters = answers(data, args.modality, task, paths)
        assert len(labels) == len(folds) == len(clusters) == len(paths)
        assert len(set(labels.tolist())) > 1 and len(set(folds.tolist())) > 1


@pytest.mark.slow
def test_keywords_are_said(tmp_path):
    """Fetches the synthesizer. The same word by the same voice is the same to the bit, up to its noise."""
    folder = speech.make_keywords(tmp_path, words=("yes", "no"), most_voices=3)
    assert speech.make_keywords(tmp_path, words=("yes", "no"), most_voices=3) == folder
    samples = find_samples(folder, "audio")
    assert sorted({sample.label for sample in samples}) == ["no", "yes"] and len(samples) == 6
    assert len({sample.group for sample in samples}) == 3


# Pictures


def test_emoji_on_white_by_category(tmp_path):
    package, folder = tmp_path / "package", tmp_path / "out"
    (package / "img" / "google" / "64").mkdir(parents=True), folder.mkdir()
    entries = []
    for number, category in enumerate(["Flags", "Objects", "Component", "Flags"]):
        picture = Image.new("RGBA", (64, 64))
        picture.paste((200, 0, 0, 255), (0, 0, 32, 64))
        picture.save(package / "img" / "google" / "64" / f"{number}.png")
        entries.append({"category": category, "image": f"{number}.png", "has_img_google": number != 3})
    (package / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    pictures._write_emoji(folder, package)
    assert [(row["file_name"], row["label"]) for row in rows(folder)] == [
        ("images/0.png", "Flags"),
        ("images/1.png", "Objects"),
    ]
    pixels = np.asarray(Image.open(folder / "images" / "0.png"))
    assert pixels.shape == (64, 64, 3) and pixels[5, 5].tolist() == [200, 0, 0] and pixels[5, 60].tolist() == [255] * 3


def test_idx_files(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array(values.shape, dtype=">u4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + values.tobytes()))
    np.testing.assert_array_equal(pictures.read_idx(tmp_path / "x.gz"), values)
    (tmp_path / "y.gz").write_bytes(gzip.compress(b"\0\0\x0d\1" + bytes(8)))
    with pytest.raises(ValueError, match="is no IDX file"):
        pictures.read_idx(tmp_path / "y.gz")


# Creatures


def test_creatures_by_action_and_direction(tmp_path):
    mod, folder = tmp_path / "mods" / "game", tmp_path / "out"
    (mod / "animations" / "enemies").mkdir(parents=True), (mod / "images").mkdir(), folder.mkdir()
    sheet = Image.new("RGBA", (200, 100))
    for number in range(4):  # of four colours, 20 x 40
        sheet.paste((250, 60 * number, 0, 255), (30 * number, 0, 30 * number + 20, 40))
    sheet.save(mod / "images" / "ant.png")
    lines = ["image=images/ant.png", "[stance]", "frames=2"]
    lines += [
        f"frame={index},{direction},{30 * (index + 2 * direction)},0,20,40,10,40"
        for index in (0, 1)
        for direction in (0, 1)
    ]
    lines += ["[critdie]", "frame=0,0,60,0,20,40,0,20", "[block]", "frame=0,0,0,0,20,40,0,0"]
    lines += ["[die]", "frame=0,0,60,0,20,40,0,20"]  # as critdie: there once
    (mod / "animations" / "enemies" / "ant.txt").write_text("\n".join(lines), encoding="utf-8")
    (mod / "animations" / "enemies" / "queen.txt").write_text("INCLUDE animations/enemies/ant.txt", encoding="utf-8")
    creatures._write_creatures(folder, tmp_path / "mods")
    found = [(row["label"], row["group"], row["direction"]) for row in rows(folder)]
    assert found == [("stance", "ant", "0"), ("stance", "ant", "1"), ("die", "ant", "0")]
    with av.open(str(folder / "clips" / "00000.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (8, 48, 48, 3)
    assert np.abs(frames[:, 0, 0].astype(int) - 128).max() < 12, "the ground is grey"
    middle = np.abs(frames.astype(int) - 128).max(axis=-1) > 60
    assert middle.any(axis=(1, 2)).all(), "the creature is there in every frame"
