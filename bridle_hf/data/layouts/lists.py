"""List files of paths and labels: json as of AST and AudioMAE, lines of `path label` as of VideoMAE, csv."""

import csv
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bridle_hf.common.files import read_json
from bridle_hf.common.skipped import MAX_BAD_FRACTION
from bridle_hf.common.tables import clean, read_table
from bridle_hf.data.folds import SPLIT_NAMES, split_of
from bridle_hf.data.labels import read_label_order
from bridle_hf.data.layouts.files import lines_of, logger, named
from bridle_hf.data.metadata import Columns, sample_of_row
from bridle_hf.data.modalities import MODALITIES
from bridle_hf.data.sample import Sample
from bridle_hf.data.shards.listing import expand_braces


SUFFIXES = (".csv", ".json", ".jsonl", ".tsv", ".txt")
PATH_COLUMNS = ("file_name", "path", "filepath", "file_path", "file", "filename", "wav", "audio", "image", "video")
MOST_NUMBERED = 10**5  # a larger number is a name
_VOCABULARY = "*class_labels_indices*.csv"
Row = dict[str, Any]


def names_lists(data: str) -> bool:
    """Whether `data` names a list file, or a pattern of them."""
    return data.lower().endswith(SUFFIXES) and not Path(data).is_dir()


def split_lists(folder: Path, names: Iterable[str], modality: str) -> list[Path]:
    """The files directly in a folder that are named as splits are, and list files of the modality."""
    paths = [folder / name for name in sorted(names) if name.lower().endswith(SUFFIXES)]
    return [path for path in paths if split_of(path.stem) and path.is_file() and _holds_paths(path, modality)]


def read_lists(data: str, modality: str, columns: Columns) -> list[Sample]:
    """The samples of list files.

    Args:
        data: a file; a pattern of files (`*`, `?`, `{train,val}`) or a folder, each file's split in its name. Paths
            that are not absolute lie below the list's folder, the one above it, or the current one: the first of them
            that has any of the files.

    Raises:
        ValueError: no such file, or one that is no list; a line without path or label; most files are not there.
    """
    paths = _paths(data, modality)
    splits = [_split_of_name(path) for path in paths]
    if len(paths) > 1 and (None in splits or len(set(splits)) < len(paths)):
        raise ValueError(f"{data}: {named([path.name for path in paths])}: their names do not tell a split for each")
    rows = [list(_rows(path, modality)) for path in paths]
    every = [row for found in rows for _, row in found]
    if empty := [path for path, found in zip(paths, rows) if not found]:
        raise ValueError(f"{empty[0]}: lists no files")
    order = _name_classes(every, paths, columns.label)
    columns = columns.among(dict.fromkeys(name for row in every for name in row if name != "path"), data)
    samples, seen, missing = [], {}, []
    for path, split, found in zip(paths, splits, rows):
        base = _base(path, [row["path"] for _, row in found])
        for line, row in found:
            where, file = f"{path}, line {line}", str(base / row["path"])
            if seen.setdefault(file, where) != where:
                raise ValueError(f"{where}: {row['path']} is listed before, at {seen[file]}")
            if Path(file).exists():
                samples.append(sample_of_row(file, {"split": split} | row, columns, None, order))
            else:
                missing.append(file)
    if missing:
        message = f"{data}: {len(missing)} of {len(every)} files that it lists are not there: {named(missing)}"
        if len(missing) > MAX_BAD_FRACTION * len(every):
            raise ValueError(message)
        logger.warning("%s; left out", message)
    return sorted(samples, key=lambda sample: sample.path)


def _paths(data: str, modality: str) -> list[Path]:
    if Path(data).is_dir():
        found = split_lists(Path(data), [path.name for path in Path(data).iterdir()], modality)
    else:
        found = [Path(path) for pattern in expand_braces(data) for path in sorted(glob.glob(pattern)) or [pattern]]
    if not found:
        raise ValueError(
            f"{data}: holds no list of {modality} files that are there: looked for train, val and test with "
            f"{' '.join(SUFFIXES)}; a list of another name is given itself"
        )
    for path in found:
        if not path.is_file():
            raise ValueError(f"{path}: no such list file")
    return found


def _split_of_name(path: Path) -> str | None:
    words = {SPLIT_NAMES[word] for word in re.findall("[a-z]+", path.stem.lower()) if word in SPLIT_NAMES}
    return words.pop() if len(words) == 1 else None


def _base(path: Path, names: Sequence[str]) -> Path:
    bases = (path.parent, path.parent.parent, Path())
    return next((base for base in bases if any((base / name).exists() for name in names)), path.parent)


# --- What a list says ---


def _rows(path: Path, modality: str) -> Iterator[tuple[int, Row]]:
    """(line or entry, row) with `path` and the row's other columns.

    Raises:
        ValueError: it is no list of paths.
    """
    if path.suffix.lower() == ".json":
        found: Iterable[tuple[int, Any]] = enumerate(_json_rows(path), 1)
    elif path.suffix.lower() == ".jsonl" or _has_header(path):
        found = _table(path)
    else:
        yield from _lines(path, modality)
        return
    for line, row in found:
        column = next((name for name in PATH_COLUMNS if isinstance(row, dict) and row.get(name)), None)
        if column is None:
            raise ValueError(
                f"{path}, line {line}: no path: expected a column {', '.join(PATH_COLUMNS[:4])}, wav, ..."
            )
        yield line, row | {"path": str(row[column])}


def _json_rows(path: Path) -> list[Any]:
    value = read_json(path)
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected a list of objects, or {{"data": [{{"wav": ..., "labels": ...}}]}}')
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("labels"), str):
            row["labels"] = [label.strip() for label in row["labels"].split(",") if label.strip()]
    return rows


def _table(path: Path) -> Iterable[tuple[int, Row]]:
    if path.suffix.lower() in (".csv", ".jsonl"):
        return read_table(path)[1]
    delimiter = "\t" if "\t" in lines_of(path)[0][1] else ","
    (_, header), *lines = lines_of(path)
    names = [name.strip() for name in header.split(delimiter)]
    cells = [(number, next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))) for number, line in lines]
    return [(number, dict(zip(names, map(clean, row)))) for number, row in cells]


def _has_header(path: Path) -> bool:
    lines = lines_of(path)
    return bool(lines) and bool(set(re.split(r"\s*[,\t]\s*", lines[0][1].lower())) & set(PATH_COLUMNS))


def _lines(path: Path, modality: str) -> Iterator[tuple[int, Row]]:
    """Lines of `path label`: a path may hold blanks and ends as the modality's files do; what follows is the label.
    `0 -1` (VideoMAE's pretraining: from the start to the end) is none."""
    endings = "|".join(map(re.escape, MODALITIES[modality].extensions))
    pattern = re.compile(rf'"?(?P<path>.+?(?:{endings}))"?(?:\s*[\s,;]\s*"?(?P<label>.+?)"?)?', re.IGNORECASE)
    for number, line in lines_of(path):
        match = pattern.fullmatch(line)
        label = match and match["label"]
        if match is None or (label and re.fullmatch(r"-?\d+([\s,;]+-?\d+)+", label) and label != "0 -1"):
            raise ValueError(f"{path}, line {number}: expected `path label` of {modality}, got {line!r}")
        yield number, {"path": match["path"]} | ({} if label in (None, "-1", "0 -1") else {"label": label})


def _holds_paths(path: Path, modality: str) -> bool:
    """Whether a file lists files of the modality, one of the first of which is there."""
    try:
        first = [row["path"] for _, row in islice(_rows(path, modality), 10)]
    except (ValueError, OSError):
        return False
    endings = MODALITIES[modality].extensions
    found = [name for name in first if name.lower().endswith(endings)]
    return any((_base(path, found) / name).exists() for name in found)


# --- Labels ---


def _name_classes(rows: Sequence[Row], paths: Sequence[Path], column: str) -> tuple[str, ...] | None:
    """The order of the classes, where it is known; gives rows the names that they have in it.

    `labels` of which no row has several are one `label`. `*class_labels_indices*.csv` beside a list, or in the folder
    above, names and numbers the classes. Else numbers stand for themselves: 2 is class 2, whether or not there is a 1.
    """
    for row in rows:
        if "labels" in row and not isinstance(row["labels"], list):
            row["labels"] = [label for label in map(clean, str(row["labels"] or "").split(";")) if label]
    if all(len(row.get("labels") or ()) <= 1 for row in rows):
        for row in rows:
            if "labels" in row:
                row["label"] = next(iter(row.pop("labels") or ()), None)
    places = dict.fromkeys(place for path in paths for place in (path.parent, path.parent.parent))
    found = [table for place in places for table in sorted(place.glob(_VOCABULARY))]
    labels = {label for row in rows for name in (column, "labels") for label in _several(row.get(name))}
    if len(found) == 1 and labels:
        names, numbers = read_label_order(found[0])
        if labels <= numbers.keys():
            logger.info("%s numbers the classes of %s", found[0], named([path.name for path in paths]))
            for row in rows:
                for name in {column, "labels"} & row.keys():
                    known = [names[numbers[label]] for label in _several(row[name])]
                    row[name] = known if isinstance(row[name], list) else next(iter(known), None)
            return tuple(names)
    if (
        labels
        and all(label.isdecimal() and str(int(label)) == label for label in labels)
        and (max(map(int, labels)) < MOST_NUMBERED)
    ):
        return tuple(map(str, range(max(map(int, labels)) + 1)))
    return None


def _several(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value in (None, "") else [value]
    return [clean(label) for label in values]
