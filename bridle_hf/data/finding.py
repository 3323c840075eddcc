"""From a folder, a set of shards or a Hub id to the list of its samples, in an order that depends on names alone."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bridle_hf.data.modalities import MODALITIES
from bridle_hf.data.sample import HubRow, Sample, Source
from bridle_hf.data.shards.entries import class_names, holds_shards, media_column, names_shards, read_entries


SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}


_NOT_UTF8 = re.compile("[\\udc80-\\udcff]")  # how Python spells bytes of a file name that are not


def find_samples(
    data: str,
    modality: str,
    split: str | None = None,
    label_column: str = "label",
    group_column: str = "group",
) -> list[Sample]:
    """List the samples of a folder, of shards or of a Hub id, in an order that depends on their names alone.

    `data` is the first of these that fits:

    * shards by name: a `.tar` or `.parquet` file, a pattern of these (`shards/train-*.tar`,
      `s3://bucket/train-{000000..000099}.tar`), any other fsspec URL, or an `index.jsonl`; see data/shards/entries.py;
    * a folder with `metadata.csv`: column `file_name` (relative to the folder) and optionally `label` or `labels`
      (";"-separated: multi-label), `split`, `fold`, `group`; an empty cell means that it is not known;
    * a folder of media files: `DIR/<split>/<class>/<file>`, `DIR/<class>/<file>` or `DIR/<file>`. The first level is
      read as splits where every folder on it is called train, validation (valid, val, dev) or test (eval); deeper
      folders under the class change nothing;
    * a folder with shards, `.tar` or `.parquet` files, directly inside;
    * a folder of parquet files further down, or a Hub id: whatever `datasets.load_dataset` takes, with a column of the
      modality's feature type, or named like it, and optionally columns as above.

    Shards hold what `metadata.csv` does as columns (parquet), or in a `.json` of each sample (tar; else `.cls` or
    `.txt` is the label); a shard named like a split, as `train-000.tar`, is of it.

    Files are not opened, but for shards without an index: a file that is listed and missing, or broken, shows when it
    is read. What a broken shard should hold is a sample that cannot be read.

    Args:
        data: folder, shards or Hub id.
        modality: a key of `MODALITIES`.
        split: only the samples of this split; for a Hub id, what `load_dataset(split=...)` takes.
        label_column: column, or key, that holds the label, where there are any; "labels", or lists in it, mean
            multi-label.
        group_column: column that holds the group, where there are columns.

    Raises:
        ValueError: unknown modality, nothing of that modality in `data`, a column or split that is not there, split
            folders mixed with others, a shard that is missing or of which nothing can be made out, or a Hub id that
            `datasets` cannot load.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r}: expected one of {sorted(MODALITIES)}")
    if names_shards(data):
        samples = _shard_samples(data, modality, label_column, group_column)
        return samples if split is None else _of_split(samples, split, data)
    folder = Path(data)
    if not folder.is_dir():
        return _hub_samples(data, modality, split, label_column, group_column)
    if (folder / "metadata.csv").is_file():
        samples = _csv_samples(folder / "metadata.csv", label_column, group_column)
    elif not (samples := _folder_samples(folder, modality)):
        if holds_shards(data):
            samples = _shard_samples(data, modality, label_column, group_column)
        elif any(folder.rglob("*.parquet")):
            return _hub_samples(data, modality, split, label_column, group_column)
        else:
            wanted = " ".join(("metadata.csv, *.tar, *.parquet and", *MODALITIES[modality].extensions))
            raise ValueError(f"{data}: no {modality} files found; looked for {wanted}")
    elif (label_column, group_column) != ("label", "group"):
        raise ValueError(f"{data}: columns {label_column!r} and {group_column!r} were asked for: needs a metadata.csv")
    return samples if split is None else _of_split(samples, split, data)


def _folder_samples(folder: Path, modality: str) -> list[Sample]:
    extensions = MODALITIES[modality].extensions
    files = sorted((path.relative_to(folder) for path in _walk(folder)), key=lambda path: path.parts)
    files = [path for path in files if path.suffix.lower() in extensions and not path.name.startswith(".")]
    for path in files:
        if _NOT_UTF8.search(str(path)):
            raise ValueError(f"{folder}: the name of {str(path)!a} is not UTF-8: rename it")
    first_level = {path.parts[0] for path in files if len(path.parts) > 1}
    splits = first_level & SPLIT_NAMES.keys()
    if splits and splits != first_level:
        others = sorted(first_level - splits)
        raise ValueError(
            f"{folder}: folders named like splits ({', '.join(sorted(splits))}) stand beside others "
            f"({', '.join(others[:3])}): keep one kind on the first level, or write a metadata.csv"
        )
    samples = []
    for path in files:
        folders = path.parts[:-1]
        split = SPLIT_NAMES[folders[0]] if splits and folders else None
        classes = folders[1:] if splits else folders
        samples.append(Sample(str(folder / path), label=classes[0] if classes else None, split=split))
    return samples


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below, through links too, but not round in a circle, nor into hidden folders."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not _closes_a_circle(Path(root, name))]
        yield from (Path(root, name) for name in names)


def _closes_a_circle(path: Path) -> bool:
    """Whether it is a link to a folder that is on the way to it."""
    return path.is_symlink() and any(parent.resolve().is_relative_to(path.resolve()) for parent in path.parents)


def _csv_samples(path: Path, label_column: str, group_column: str) -> list[Sample]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if "file_name" not in columns:
                raise ValueError(f"{path}: no column file_name; the columns are {columns}")
            label_column = _choose_label_column(columns, label_column, path)
            if group_column != "group" and group_column not in columns:
                raise ValueError(f"{path}: no column {group_column!r} for the groups; the columns are {columns}")
            samples = []
            for row in reader:
                if not row["file_name"]:
                    raise ValueError(f"{path}, line {reader.line_num}: file_name is empty")
                samples.append(_sample_of_row(str(path.parent / row["file_name"]), row, label_column, group_column))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no CSV in UTF-8: {error}") from error
    if not samples:
        raise ValueError(f"{path}: lists no files")
    return sorted(samples, key=lambda sample: sample.path)


def _choose_label_column(columns: Sequence[str], wanted: str, where: str | Path) -> str:
    if wanted == "label" and "labels" in columns:
        if "label" in columns:
            raise ValueError(f"{where}: has both columns label and labels (multi-label): keep one of them")
        return "labels"
    if wanted != "label" and wanted not in columns:
        raise ValueError(f"{where}: no column {wanted!r} for the labels; the columns are {list(columns)}")
    return wanted


def _sample_of_row(
    path: str, row: dict[str, Any], label_column: str, group_column: str, source: Source | None = None
) -> Sample:
    def cell(column: str) -> str | None:
        value = row.get(column)
        return None if value is None or value == "" else str(value)

    label, labels = cell(label_column), None
    if label_column == "labels" or isinstance(row.get(label_column), list | tuple):
        names = row.get(label_column) or ()
        names = names.split(";") if isinstance(names, str) else names if isinstance(names, list | tuple) else [names]
        label, labels = None, tuple(name for name in (str(name).strip() for name in names) if name) or None
    split = cell("split")
    split = SPLIT_NAMES.get(split, split)
    return Sample(path, label, labels, split, cell("fold"), cell(group_column), source)


def _of_split(samples: list[Sample], split: str, data: str) -> list[Sample]:
    name = SPLIT_NAMES.get(split, split)
    chosen = [sample for sample in samples if sample.split == name]
    if not chosen:
        found = sorted({sample.split for sample in samples if sample.split is not None})
        raise ValueError(f"{data}: no samples of split {split!r}; the splits are {found or 'not given'}")
    return chosen


# --- Shards ---


def _shard_samples(data: str, modality: str, label_column: str, group_column: str) -> list[Sample]:
    wanted = dict.fromkeys((label_column, "label", "labels", "split", "fold", group_column))
    entries = read_entries(data, modality, MODALITIES[modality].extensions, tuple(wanted))
    if not entries:
        raise ValueError(f"{data}: holds no {modality}")
    columns = list(dict.fromkeys(column for entry in entries for column in entry.row))
    label_column = _choose_label_column(columns, label_column, data)
    if group_column != "group" and group_column not in columns:
        raise ValueError(f"{data}: no column {group_column!r} for the groups; the columns are {columns}")
    samples = []
    for shard, name, row, source in entries:
        row = row if row.get("split") else row | {"split": _split_of_name(shard)}
        samples.append(_sample_of_row(f"{shard}/{name}", row, label_column, group_column, source))
    return samples


def _split_of_name(shard: str) -> str | None:
    first = re.split(r"[-_.]", shard.rpartition("/")[2])[0]
    return first if first in SPLIT_NAMES else None


# --- Rows of a Hub set ---


def _hub_samples(data: str, modality: str, split: str | None, label_column: str, group_column: str) -> list[Sample]:
    import datasets

    try:
        loaded = datasets.load_dataset(data, split=split)
    except Exception as error:  # whatever its network, its builders and its file systems raise
        raise ValueError(
            f"{data!r} is not a folder, and datasets.load_dataset(..., split={split!r}) failed: {error}"
        ) from error
    by_split = loaded if isinstance(loaded, dict) else {split: loaded}
    samples = []
    for name, dataset in by_split.items():
        samples += _dataset_samples(dataset, f"{data}/{name}", name, modality, label_column, group_column)
    if not samples:
        raise ValueError(f"{data}: holds no rows")
    return samples


def _dataset_samples(
    dataset: Any, name: str, split: str, modality: str, label_column: str, group_column: str
) -> list[Sample]:
    import datasets

    media = media_column(dataset.features, name, modality)
    feature = getattr(datasets, modality.capitalize())
    media_only = dataset.select_columns([media]).cast_column(media, feature(decode=False))
    label_column = _choose_label_column(dataset.column_names, label_column, name)
    if group_column != "group" and group_column not in dataset.column_names:
        raise ValueError(f"{name}: no column {group_column!r} for the groups; the columns are {dataset.column_names}")
    wanted = {label_column, group_column, "split", "fold"} & set(dataset.column_names) - {media}
    columns = {column: class_names(dataset.features[column], list(dataset[column])) for column in sorted(wanted)}
    samples = []
    for index in range(len(dataset)):
        row = {"split": split} | {column: values[index] for column, values in columns.items()}
        source = HubRow(media_only, media, index)
        samples.append(_sample_of_row(f"{name}/{index}", row, label_column, group_column, source))
    return samples
