"""AudioSet and FSD50K: several labels per recording, of a vocabulary."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bridle_hf.data.layouts.files import Reading, by_tail, find, lines_of, ordered, require_files, rows_with


SEGMENTS = {
    "balanced_train_segments.csv": "train",
    "unbalanced_train_segments.csv": "train",
    "eval_segments.csv": "test",
}
BALANCED = ("balanced_train_segments.csv", "eval_segments.csv")
VOCABULARY = "class_labels_indices.csv"
# A clip's name: the video's id, perhaps with a Y before it, or its times in s or ms behind it.
_CLIP = re.compile(r"(?P<id>.{11})((_[\d.]+){1,2})?")


def read_audioset(folder: Path, files: list[str], lists: Sequence[str] = tuple(SEGMENTS)) -> Reading:
    """`class_labels_indices.csv`, `*_segments.csv` and clips named by their video's id, in any folders; both lists to
    train on are split `train`, `eval_segments.csv` is `test`. Classes by `index`."""
    found = {name: path for name in lists if (path := find(folder, name))}
    table = find(folder, VOCABULARY)
    if missing := [*([] if table else [VOCABULARY]), *([] if found else [" or ".join(lists)])]:
        require_files(folder, "audioset", missing)
    rows = rows_with(table, "index", "mid", "display_name")
    reading = Reading(classes=ordered(((row["display_name"], row["index"]) for _, row in rows), table), gone=True)
    names = {row["mid"]: row["display_name"] for _, row in rows}
    for name, path in found.items():
        for where, video, mids in _segments(path):
            labels = tuple(names.get(mid, mid) for mid in mids)
            reading.add(video, where, labels=labels, split=SEGMENTS[name])
    others = [path for name in SEGMENTS if name not in lists and (path := find(folder, name))]
    elsewhere = {video for path in others for _, video, _ in _segments(path)}
    reading.files = _by_video(files, reading.listed.keys() | elsewhere)
    for video in elsewhere - reading.listed.keys():
        reading.files.pop(video, None)
    return reading


def _segments(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(where, id of the video, mids) of each row; what begins with # are the set's own headers."""
    lines = [(number, line) for number, line in lines_of(path) if not line.startswith(("#", "YTID"))]
    rows = csv.reader((line for _, line in lines), skipinitialspace=True)
    for (number, _), cells in zip(lines, rows, strict=True):
        if len(cells) != 4:
            raise ValueError(f"{path}, line {number}: {len(cells)} cells, expected YTID, start, end and labels")
        yield f"{path}, line {number}", cells[0].strip(), [mid.strip() for mid in cells[3].split(",") if mid.strip()]


def _by_video(files: list[str], known: set[str]) -> dict[str, str]:
    """Files by the id of their video; by their name where no row is of it."""
    found = {}
    for name, path in by_tail(files).items():
        stem = name.rpartition(".")[0]
        matches = [_CLIP.fullmatch(stem), _CLIP.fullmatch(stem[1:]) if stem.startswith("Y") else None]
        ids = [match["id"] for match in matches if match and match["id"] in known]
        video = ids[0] if ids else name
        if found.setdefault(video, path) != path:
            raise ValueError(f"{found[video]} and {path} are both of video {video}: keep one of them")
    return found


def read_fsd50k(folder: Path, files: list[str]) -> Reading:
    """`FSD50K.ground_truth/` with `dev.csv` (splits train and val), `eval.csv` (test) and `vocabulary.csv`, which
    numbers the classes; `FSD50K.dev_audio/` and `FSD50K.eval_audio/`."""
    truth = folder / "FSD50K.ground_truth"
    lists = {"dev": ("fname", "labels", "split"), "eval": ("fname", "labels")}
    require_files(folder, "fsd50k", [f"FSD50K.ground_truth/{name}.csv" for name in ("vocabulary", *lists)])
    vocabulary = [next(csv.reader([line])) for _, line in lines_of(truth / "vocabulary.csv")]
    numbers = [(cells[1], cells[0]) for cells in vocabulary if len(cells) > 1 and cells[0] != "index"]
    reading = Reading(classes=ordered(numbers, truth / "vocabulary.csv"))
    for part, columns in lists.items():
        table = truth / f"{part}.csv"
        for line, row in rows_with(table, *columns):
            split = "test" if part == "eval" else {"val": "validation"}.get(row["split"], row["split"])
            labels = tuple(row["labels"].split(","))
            reading.add(f"FSD50K.{part}_audio/{row['fname']}.wav", f"{table}, line {line}", labels=labels, split=split)
    own = tuple(f"FSD50K.{part}_audio" for part in lists)
    reading.files = {tail: path for tail, path in by_tail(files, 2).items() if tail.startswith(own)}
    return reading
