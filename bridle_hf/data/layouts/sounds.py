"""ESC-50, UrbanSound8K and Speech Commands: one label per recording, in folds or official splits."""

import re
from pathlib import Path

from bridle_hf.data.layouts.files import Reading, lines_of, ordered, require_files, rows_with


BACKGROUND_NOISE = "_background_noise_"
SPEECH_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def read_esc50(folder: Path, files: list[str]) -> Reading:
    """`meta/esc50.csv` and `audio/`: 5 folds; a group is the recording clips are cut from; classes by `target`."""
    table = folder / "meta" / "esc50.csv"
    require_files(folder, "esc50", ("meta/esc50.csv", "audio"))
    rows = rows_with(table, "filename", "fold", "target", "category")
    reading = Reading(classes=ordered(((row["category"], row["target"]) for _, row in rows), table))
    for line, row in rows:
        fields = {"label": row["category"], "fold": row["fold"], "group": row.get("src_file")}
        reading.add(f"audio/{row['filename']}", f"{table}, line {line}", **fields)
    reading.files = {path: path for path in _slashed(files) if path.startswith("audio/")}
    return reading


def read_urbansound8k(folder: Path, files: list[str]) -> Reading:
    """`metadata/UrbanSound8K.csv` and `audio/fold1` to `fold10`; a group is the recording (`fsID`); classes by
    `classID`."""
    table = folder / "metadata" / "UrbanSound8K.csv"
    require_files(folder, "urbansound8k", ("metadata/UrbanSound8K.csv", "audio"))
    rows = rows_with(table, "slice_file_name", "fsID", "fold", "classID", "class")
    reading = Reading(classes=ordered(((row["class"], row["classID"]) for _, row in rows), table))
    for line, row in rows:
        name = f"audio/fold{row['fold']}/{row['slice_file_name']}"
        reading.add(name, f"{table}, line {line}", label=row["class"], fold=row["fold"], group=row["fsID"])
    reading.files = {path: path for path in _slashed(files) if path.startswith("audio/")}
    return reading


def read_speech_commands(folder: Path, files: list[str]) -> Reading:
    """`WORD/SPEAKER_nohash_N.wav`; `validation_list.txt` and `testing_list.txt` name those splits, the rest trains. A
    group is the speaker. The set numbers no classes: they are in the order of the alphabet. `_background_noise_` is no
    word, and left out."""
    require_files(folder, "speech_commands", SPEECH_LISTS.values())
    reading = Reading()
    for split, name in SPEECH_LISTS.items():
        for number, path in lines_of(folder / name):
            reading.add(path, f"{folder / name}, line {number}", **_word(path), split=split)
    reading.files = {
        path: path for path in _slashed(files) if "/" in path and not path.startswith(f"{BACKGROUND_NOISE}/")
    }
    for path in reading.files:
        reading.listed.setdefault(path, {**_word(path), "split": "train"})
    reading.classes = tuple(sorted({fields["label"] for fields in reading.listed.values()}))
    return reading


def _word(path: str) -> dict[str, str]:
    word, _, name = path.rpartition("/")
    return {"label": word, "group": re.split(r"_nohash_|\.", name)[0]}


def _slashed(files: list[str]) -> list[str]:
    return [path.replace("\\", "/") for path in files]
