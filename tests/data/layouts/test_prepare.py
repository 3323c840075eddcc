"""`bridle prepare`: the metadata.csv that it writes is read as the set's own files are."""

import csv
import json
from pathlib import Path

import pytest
from helpers import miniatures

from bridle_hf.commands import main
from bridle_hf.data.finding import find_samples
from bridle_hf.data.labels import Labels
from bridle_hf.data.layouts.table import LAYOUTS


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "audioset_balanced"])
@pytest.mark.parametrize("layout", ["named", "auto"])
def test_metadata_is_read_as_the_set_is(tmp_path, capsys, name, layout):
    folder, modality = getattr(miniatures, f"write_{name}")(tmp_path), LAYOUTS[name].modality
    before = find_samples(str(folder), modality)
    main("prepare", [name if layout == "named" else "auto", str(folder)])
    assert (
        f"{folder}/metadata.csv: {len(before)} rows, {len(before[0].class_order)} classes" in capsys.readouterr().out
    )
    after = find_samples(str(folder), modality)
    assert after == before and {sample.class_order for sample in after} == {before[0].class_order}
    labelled = find_samples(str(folder), modality, need_labels=True)
    assert Labels(labelled).names == list(before[0].class_order)


def test_metadata_elsewhere_names_whole_paths(tmp_path):
    folder = miniatures.write_esc50(tmp_path / "read_only")
    before = find_samples(str(folder), "audio")
    main("prepare", ["esc50", str(folder), "--output_dir", str(tmp_path / "mine")])
    assert not (folder / "metadata.csv").exists()
    assert find_samples(str(tmp_path / "mine"), "audio") == before


def test_metadata_of_lists(tmp_path, capsys):
    miniatures.write_sound(tmp_path / "a.wav")
    for split, number in (("train", 3), ("val", 1)):
        miniatures.write_sound(tmp_path / f"{split}_clip.wav")
        miniatures.write_text(tmp_path / f"{split}.csv", f"{split}_clip.wav {number}\n")
    with pytest.raises(SystemExit):
        main("prepare", ["lists", str(tmp_path)])
    assert "give --modality" in capsys.readouterr().err
    before = find_samples(str(tmp_path), "audio")
    main("prepare", ["lists", str(tmp_path), "--modality", "audio"])
    with open(tmp_path / "metadata.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"file_name": "train_clip.wav", "label": "3", "split": "train"},
            {"file_name": "val_clip.wav", "label": "1", "split": "validation"},
        ]
    after = find_samples(str(tmp_path), "audio")
    assert after == before and after[0].class_order == before[0].class_order == ("0", "1", "2", "3")


def test_what_is_there_is_kept(tmp_path, capsys):
    folder = miniatures.write_esc50(tmp_path)
    (folder / "metadata.csv").write_text("mine")
    with pytest.raises(SystemExit):
        main("prepare", ["esc50", str(folder)])
    assert "metadata.csv is there: give --overwrite" in capsys.readouterr().err
    assert (folder / "metadata.csv").read_text() == "mine"
    main("prepare", ["esc50", str(folder), "--overwrite"])
    assert len(find_samples(str(folder), "audio")) == 15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["esc50", "DIR"], "it lacks meta/esc50.csv"),
        (["auto", "DIR"], "is not laid out as any of esc50, urbansound8k"),
        (["folder", "DIR"], "there is nothing to prepare"),
        (["auto", "nowhere"], "nowhere: neither a folder nor a list file"),
        (["esc5", "DIR"], "invalid choice: 'esc5'"),
    ],
)
def test_what_cannot_be_prepared_is_named(tmp_path, capsys, words, message):
    miniatures.write_sound(tmp_path / "dog" / "a.wav")
    with pytest.raises(SystemExit):
        main("prepare", [str(tmp_path) if word == "DIR" else word for word in words])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.glob("*.csv"))


def test_a_label_with_a_semicolon_among_several_is_refused(tmp_path, capsys):
    miniatures.write_sound(tmp_path / "a.wav")
    miniatures.write_text(tmp_path / "l.json", json.dumps({"data": [{"wav": "a.wav", "labels": "x;y,z"}]}))
    with pytest.raises(SystemExit):
        main("prepare", ["lists", str(tmp_path / "l.json"), "--modality", "audio"])
    assert "has a ; in it" in capsys.readouterr().err


def test_from_python(tmp_path):
    from bridle_hf.data.layouts.prepare import prepare

    made = prepare(layout="ucf101", data=str(miniatures.write_ucf101(tmp_path)))
    assert made == {
        "path": Path(tmp_path, "UCF101", "metadata.csv"),
        "samples": 50,
        "classes": 2,
        "splits": 0,
        "folds": 4,
    }
