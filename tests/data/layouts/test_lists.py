"""List files as other projects write and read them: AST's and AudioMAE's json, VideoMAE's lines, csv and txt."""

import csv
import io
import json
import shutil

import pytest
from helpers.miniatures import write_clip, write_sound, write_text

from bridle_hf.data.finding import find_samples
from bridle_hf.data.labels import Labels


@pytest.fixture
def sounds(tmp_path):
    for name in ("a", "b", "c", "d"):
        write_sound(tmp_path / "audio" / f"{name}.wav")
    return tmp_path


def seen(samples) -> dict:
    return {sample.path.rpartition("/")[2]: (sample.label or sample.labels, sample.split) for sample in samples}


VOCABULARY = 'index,mid,display_name\n0,/m/07rwj00,"dog"\n1,/m/07rwj01,"rooster"\n2,/m/07rwj02,"pig"\n'


def write_ast(folder, **lists):
    """As AST's prep scripts do: absolute paths, labels as mids with commas between them."""
    for name, rows in lists.items():
        data = [{"video_id": "dummy", "wav": str(folder / "audio" / f"{clip}.wav"), "image": "empty", "labels": labels}
                for clip, labels in rows.items()]  # fmt: skip
        write_text(folder / "data" / "datafiles" / f"{name}.json", json.dumps({"data": data}, indent=1))


def test_json_of_ast_with_one_label_each(sounds):
    write_ast(
        sounds,
        esc_train_data_1={"a": "/m/07rwj02", "b": "/m/07rwj00", "c": "/m/07rwj01"},
        esc_eval_data_1={"d": "/m/07rwj02"},
    )
    data = str(sounds / "data" / "datafiles" / "esc_{train,eval}_data_1.json")
    samples = find_samples(data, "audio", need_labels=True)
    assert seen(samples)["a.wav"] == ("/m/07rwj02", "train") and seen(samples)["d.wav"] == ("/m/07rwj02", "test")
    write_text(sounds / "data" / "esc_class_labels_indices.csv", VOCABULARY)
    named = find_samples(data, "audio", need_labels=True)
    assert seen(named)["a.wav"] == ("pig", "train")
    labels = Labels(named)
    assert labels.names == ["dog", "rooster", "pig"] and not labels.multi_label
    assert labels.encode(named).equal(
        Labels(samples, sounds / "data" / "esc_class_labels_indices.csv").encode(samples)
    )


def test_json_of_ast_with_several_labels(sounds):
    write_ast(sounds, train={"a": "/m/07rwj02,/m/07rwj00", "b": "/m/07rwj01"}, eval={"c": "/m/07rwj00"})
    write_text(sounds / "data" / "class_labels_indices.csv", VOCABULARY)
    samples = find_samples(str(sounds / "data" / "datafiles"), "audio", need_labels=True)  # a folder of both lists
    assert seen(samples) == {
        "a.wav": (("pig", "dog"), "train"), "b.wav": (("rooster",), "train"), "c.wav": (("dog",), "test"),
    }  # fmt: skip
    assert Labels(samples).encode(samples).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("absolute", [True, False])
def test_lines_of_videomae(tmp_path, absolute):
    """A csv without header: `path label`, read by pandas with a blank as delimiter."""
    root = tmp_path / "videos"
    for name in ("one", "two", "three"):
        write_clip(root / f"{name}.mp4")
    prefix = f"{root}/" if absolute else "videos/"
    write_text(tmp_path / "train.csv", f"{prefix}one.mp4 4\n{prefix}two.mp4 0\n")
    write_text(tmp_path / "val.csv", f"{prefix}three.mp4 2\n")
    samples = find_samples(str(tmp_path), "video", need_labels=True)
    assert seen(samples) == {
        "one.mp4": ("4", "train"), "two.mp4": ("0", "train"), "three.mp4": ("2", "validation"),
    }  # fmt: skip
    labels = Labels([sample for sample in samples if sample.split == "train"])
    numbers = dict(zip((sample.label for sample in samples), labels.encode(samples).tolist()))
    assert numbers == {"4": 4, "0": 0, "2": 2}  # the numbers of the lists, also of classes without samples


def test_lines_of_videomaes_pretraining(tmp_path):
    write_clip(tmp_path / "clips" / "a b.mp4")
    write_text(tmp_path / "train.csv", f"{tmp_path}/clips/a b.mp4 0 -1\n")
    (sample,) = find_samples(str(tmp_path / "train.csv"), "video")
    assert sample.path.endswith("a b.mp4") and (sample.label, sample.split) == (None, "train")


@pytest.mark.parametrize(
    "line", ["{path},dog", "{path}, dog", '"{path}","dog"', "{path}\tdog", "{path} dog", "{path};dog"]
)
def test_lines_of_other_kinds(sounds, line):
    paths = [f"audio/{name}.wav" for name in "ab"]
    write_text(sounds / "list.txt", "\n".join(line.format(path=path) for path in paths) + "\n\n")
    assert seen(find_samples(str(sounds / "list.txt"), "audio")) == {"a.wav": ("dog", None), "b.wav": ("dog", None)}


@pytest.mark.parametrize("column", ["file_name", "path", "filepath", "wav"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "jsonl", "json"])
def test_tables(sounds, column, ending):
    rows = [
        {column: f"audio/{name}.wav", "label": "Dog, bark", "fold": str(number)} for number, name in enumerate("ab")
    ]
    if ending.startswith("json"):
        text = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ending == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    write_text(sounds / "lists" / f"mine.{ending}", text)  # paths are below the folder above the list's
    samples = find_samples(str(sounds / "lists" / f"mine.{ending}"), "audio")
    assert [(sample.label, sample.fold) for sample in samples] == [("Dog, bark", "0"), ("Dog, bark", "1")]


def test_other_columns_of_labels(sounds):
    write_text(sounds / "list.csv", "filename,fold,category\naudio/a.wav,1,dog\naudio/b.wav,2,cat\n")
    with pytest.raises(ValueError, match=r"no column 'label'.*give --label_column 'category'"):
        find_samples(str(sounds / "list.csv"), "audio", need_labels=True)
    samples = find_samples(str(sounds / "list.csv"), "audio", label_column="category")
    assert [sample.label for sample in samples] == ["dog", "cat"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("audio/a.wav 1\nsomething else\n", r"line 2: expected `path label` of audio, got 'something else'"),
        ("audio/a.wav 10 3\n", r"line 1: expected `path label`"),
        ("audio/a.wav 1\naudio/a.wav 2\n", r"line 2: audio/a.wav is listed before, at .*line 1"),
        ("audio/a.wav 1\n" + "".join(f"x/{n:02d}.wav 1\n" for n in range(12)),
         r"12 of 13 files that it lists are not there: .*x/00.wav.*x/09.wav and 2 more"),
        ("path,label\n", "lists no files"),
        ("", "lists no files"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_named(sounds, text, message):
    write_text(sounds / "list.txt", text)
    with pytest.raises(ValueError, match=message):
        find_samples(str(sounds / "list.txt"), "audio")


def test_few_files_that_are_not_there_are_named_and_left_out(sounds, caplog):
    for number in range(20):
        shutil.copy(sounds / "audio" / "a.wav", sounds / "audio" / f"{number:02d}.wav")
    write_text(sounds / "list.txt", "".join(f"audio/{number:02d}.wav {number % 2}\n" for number in range(21)))
    assert len(find_samples(str(sounds / "list.txt"), "audio")) == 20
    assert "1 of 21 files that it lists are not there" in caplog.text and "audio/20.wav; left out" in caplog.text


def test_lists_whose_splits_do_not_show_are_refused(sounds):
    for name in ("one", "two"):
        write_text(sounds / f"{name}.txt", "audio/a.wav 1\n")
    with pytest.raises(ValueError, match=r"one.txt, two.txt: their names do not tell a split for each"):
        find_samples(str(sounds / "{one,two}.txt"), "audio")
    with pytest.raises(ValueError, match=r"nowhere\.json: no such list file"):
        find_samples(str(sounds / "nowhere.json"), "audio")
    with pytest.raises(ValueError, match="holds no list of audio files that are there"):
        find_samples(str(sounds), "audio", layout="lists")
    write_text(sounds / "odd.json", '{"images": []}')
    with pytest.raises(ValueError, match=r"expected a list of objects, or \{\"data\""):
        find_samples(str(sounds / "odd.json"), "audio")


def test_numbers_in_json_are_class_numbers(sounds):
    rows = [{"path": "audio/a.wav", "label": 0}, {"path": "audio/b.wav", "label": 2}]
    write_text(sounds / "list.json", json.dumps(rows))
    samples = find_samples(str(sounds / "list.json"), "audio", need_labels=True)
    assert Labels(samples).names == ["0", "1", "2"] and Labels(samples).encode(samples).tolist() == [0, 2]
    rows = [{"path": "audio/a.wav", "label": 20230101}, {"path": "audio/b.wav", "label": 2}]
    write_text(sounds / "list.json", json.dumps(rows))
    assert Labels(find_samples(str(sounds / "list.json"), "audio")).names == ["2", "20230101"]  # names, not numbers


def test_tables_beside_class_folders_that_list_other_files_change_nothing(sounds):
    write_text(sounds / "train.csv", "image,label\n0001.wav,1\n")  # where these are, nothing tells
    write_text(sounds / "test.txt", "audio/a.mp4 1\n")  # of another modality
    write_text(sounds / "val.json", "[]")
    assert len(find_samples(str(sounds), "audio")) == 4
