"""Kinetics, Something-Something v2 and UCF101."""

import re
from collections.abc import Iterator
from pathlib import Path

from bridle_hf.common.files import read_json
from bridle_hf.common.tables import read_table
from bridle_hf.data.folds import NEVER_HELD_OUT, canonical_split
from bridle_hf.data.layouts.files import Reading, by_tail, find, lines_of, ordered, require_files


# --- Kinetics ---

KINETICS_LISTS = ("*.csv", "annotations/*.csv", "annotations/*/*.csv", "kinetics*/*.csv", "csv/*.csv", "labels/*.csv")
_CLIP_COLUMNS = {"youtube_id", "time_start", "time_end"}


def is_kinetics_csv(path: Path) -> bool:
    """Whether a csv has the columns of Kinetics' lists."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return _CLIP_COLUMNS.issubset(name.strip() for name in file.readline().split(","))


def read_kinetics(folder: Path, files: list[str]) -> Reading:
    """Every csv with `youtube_id`, `time_start`, `time_end`, `split` and mostly `label`; clips named
    `ID_000001_000011.mp4` (or `ID.mp4`), in any folders. The set numbers no classes: they are in the order of the
    alphabet."""
    tables = [path for pattern in KINETICS_LISTS for path in sorted(folder.glob(pattern)) if is_kinetics_csv(path)]
    if not tables:
        require_files(folder, "kinetics", ("a csv with label, youtube_id, time_start, time_end, split",))
    reading, clips = Reading(gone=True), {}
    for table in tables:
        for line, row in read_table(table)[1]:
            where = f"{table}, line {line}"
            split = canonical_split(row.get("split") or table.stem)
            split = "validation" if split == "validate" else split
            try:
                times = [int(float(row[name])) for name in ("time_start", "time_end")]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: time_start and time_end are not seconds") from error
            name = f"{row['youtube_id']}_{times[0]:06d}_{times[1]:06d}"
            reading.add(name, where, label=row.get("label") or None, split=split)
            clips.setdefault(row["youtube_id"], []).append(name)
    only = {video: names[0] for video, names in clips.items() if len(set(names)) == 1}
    # What replaces broken clips comes beside them, in a folder of its own.
    kept = {Path(path).name: path for path in files if "replacement" in path}
    files = [path for path in files if Path(path).name not in kept] + list(kept.values())
    stems = {name.rpartition(".")[0]: path for name, path in by_tail(files).items()}
    reading.files = {stem if stem in reading.listed else only.get(stem, stem): path for stem, path in stems.items()}
    reading.classes = tuple(sorted({fields["label"] for fields in reading.listed.values()} - {None}))
    return reading


# --- Something-Something v2 ---

SSV2 = "something-something-v2-"
_SSV2_SPLITS = {"train": "train", "validation": "validation", "test": "test"}


def read_ssv2(folder: Path, files: list[str]) -> Reading:
    """`labels.json` (template to number), `train.json`, `validation.json` and perhaps `test.json` with
    `test-answers.csv`, also with the set's name before theirs, in the folder or its `labels/`; videos named by their
    id, in any folders."""
    found = {name: _ssv2_file(folder, f"{name}.json") for name in ("labels", *_SSV2_SPLITS)}
    wanted = ("labels", "train", "validation")
    require_files(folder, "ssv2", [f"labels/{name}.json" for name in wanted if not found[name]])
    numbers = read_json(found["labels"])
    if not isinstance(numbers, dict):
        raise ValueError(f"{found['labels']}: expected a mapping of templates to numbers")
    reading = Reading(classes=ordered(numbers.items(), found["labels"]))
    answers = dict(_ssv2_answers(_ssv2_file(folder, "test-answers.csv")))
    for part, split in _SSV2_SPLITS.items():
        rows = read_json(found[part]) if found[part] else []
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            if not isinstance(row, dict) or "id" not in row or (part != "test" and "template" not in row):
                raise ValueError(f"{found[part]}, entry {number}: expected an object with id and template")
            video = str(row["id"])
            template = row.get("template") or answers.get(video)
            label = None if template is None else re.sub(r"[\[\]]", "", template)
            reading.add(video, f"{found[part]}, entry {number}", label=label, split=split)
    reading.files = {name.rpartition(".")[0]: path for name, path in by_tail(files).items()}
    return reading


def _ssv2_file(folder: Path, name: str) -> Path | None:
    return find(folder, name) or find(folder, f"{SSV2}{name}")


def _ssv2_answers(path: Path | None) -> Iterator[tuple[str, str]]:
    for _, line in lines_of(path) if path else ():
        video, _, template = line.partition(";")
        yield video, template


# --- UCF101 ---

UCF_CLASSES = "classInd.txt"


def read_ucf101(folder: Path, files: list[str]) -> Reading:
    """`classInd.txt`, `trainlist01.txt` and `testlist01.txt` to 03, videos in `CLASS/`. Of several lists each is a
    fold: `1` is what `testlist01.txt` holds out, and what no list does is of a fold that is never held out; a single
    one gives splits. A group is what `g01` to `g25` name."""
    classes = find(folder, UCF_CLASSES)
    tests = {number: find(folder, f"testlist{number:02d}.txt") for number in (1, 2, 3)}
    trains = {number: find(folder, f"trainlist{number:02d}.txt") for number in (1, 2, 3)}
    numbers = [number for number in tests if tests[number] or trains[number]] or [1]
    lacking = [f"{kind}list{number:02d}.txt" for number in numbers for kind, lists in
               (("train", trains), ("test", tests)) if not lists[number]]  # fmt: skip
    if lacking or not classes:
        require_files(folder, "ucf101", [*([] if classes else [UCF_CLASSES]), *lacking])
    names = [line.split(maxsplit=1) for _, line in lines_of(classes)]
    reading = Reading(classes=ordered(((cells[-1], cells[0]) for cells in names), classes))
    held_out = {number: _ucf_list(tests[number]) for number in numbers}
    trained = {number: _ucf_list(trains[number]) for number in numbers}
    every = dict.fromkeys(path for lists in (trained, held_out) for paths in lists.values() for path in paths)
    if len(numbers) == 1:
        ((train, test),) = zip(trained.values(), held_out.values())
        fields = {path: {"split": "train"} for path in train} | {path: {"split": "test"} for path in test}
    else:
        fields = {path: {"fold": NEVER_HELD_OUT} for path in every}
        for number in numbers:
            _check_ucf_lists(every, trained[number], held_out[number], trains[number], tests[number])
            for path in held_out[number]:
                if fields[path]["fold"] != NEVER_HELD_OUT:
                    raise ValueError(f"{tests[number]}: {path} is in testlist{fields[path]['fold']:0>2}.txt, too")
                fields[path] = {"fold": str(number)}
    for path in every:
        group = re.search(r"_(g\d+)_", path)
        reading.add(path, classes, label=path.split("/")[0], group=group and group[1], **fields[path])
    reading.files = dict(by_tail(files, 2))
    return reading


def _ucf_list(path: Path) -> dict[str, None]:
    return dict.fromkeys(re.sub(r"\s+\d+$", "", line) for _, line in lines_of(path))


def _check_ucf_lists(every: dict, train: dict, test: dict, train_path: Path, test_path: Path) -> None:
    """A fold trains on all that it does not test: refuse lists that say otherwise."""
    if both := [path for path in test if path in train]:
        raise ValueError(f"{test_path}: {len(both)} videos are in {train_path.name}, too, as {both[0]}")
    if neither := [path for path in every if path not in train and path not in test]:
        raise ValueError(
            f"{train_path}: {len(neither)} videos of the other lists, as {neither[0]}, are in neither of this pair: "
            "leave the other pairs out"
        )
