"""Finding samples: from a folder, shards or a Hub id to the list of them, in an order that depends on names alone."""

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bridle_hf.common.errors import one_line
from bridle_hf.common.tables import clean
from bridle_hf.data.folds import are_splits, canonical_split, check_class_folders, split_of
from bridle_hf.data.metadata import METADATA_NAMES, Columns, metadata_samples, sample_of_row
from bridle_hf.data.modalities import MODALITIES
from bridle_hf.data.sample import HubRow, Sample
from bridle_hf.data.shards.entries import read_entries
from bridle_hf.data.shards.listing import holds_shards, names_shards
from bridle_hf.data.shards.parquets import class_names, class_order, column_names, media_column


logger = logging.getLogger(__name__)

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python spells bytes of a file name that are not


def find_samples(
    data: str,
    modality: str,
    split: str | None = None,
    label_column: str = "label",
    group_column: str = "group",
    *,
    config: str | None = None,
    revision: str | None = None,
    need_labels: bool = False,
) -> list[Sample]:
    """List the samples of a folder, of shards or of a Hub id, in an order that depends on their names alone.

    `data` is the first of these that fits:

    * shards by name: a `.tar` or `.parquet` file, a pattern of these (`shards/train-*.tar`,
      `s3://bucket/train-{000000..000099}.tar`), any other fsspec URL, or an `index.jsonl`; see data/shards/entries.py;
    * a folder with `metadata.csv` or `metadata.jsonl`: column `file_name` (relative to the folder) and optionally
      `label` or `labels` (";"-separated, or a list: multi-label), `split`, `fold`, `group`; an empty cell means that
      it is not known. With columns `onset` and `offset` (seconds), a row is an event (strong labels), and a recording
      in which nothing sounds has a row without. Without a column `split`, files in folders that are all named like
      splits are of these;
    * a folder with such a file in each of its split folders;
    * a folder of media files: `DIR/<split>/<class>/<file>`, `DIR/<class>/<file>` or `DIR/<file>`. The first level is
      read as splits where every folder on it is called train (training), validation (valid, val, dev, development)
      or test (testing, eval, evaluation), in any case; deeper folders under the class change nothing;
    * a folder with shards, `.tar` or `.parquet` files, directly inside;
    * a folder of parquet files further down, or a Hub id: whatever `datasets.load_dataset` takes, with a column of the
      modality's feature type, or of bytes and named like it, and optionally columns as above. A `ClassLabel` numbers
      the classes.

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
        config: configuration of a Hub set.
        revision: branch, tag or commit of a Hub set.
        need_labels: refuse what has columns but none of labels, and class folders that surely are none, of which
            there is but a warning otherwise.

    Raises:
        ValueError: unknown modality, nothing of that modality in `data`, a column or split that is not there, split
            folders mixed with others, a file that is listed twice, a shard that is missing or of which nothing can be
            made out, or a Hub id that `datasets` cannot load.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r}: expected one of {sorted(MODALITIES)}")
    columns, folder = Columns(label_column, group_column, need_labels), Path(data)
    if (config or revision) and (names_shards(data) or (revision and folder.is_dir())):
        raise ValueError(f"{data}: a configuration or revision is for Hub ids; leave it out")
    if names_shards(data):
        samples = _shard_samples(data, modality, columns)
    elif config or not folder.is_dir():
        return _hub_samples(data, modality, split, columns, config, revision)
    elif found := [name for name in METADATA_NAMES if (folder / name).is_file()]:
        samples = metadata_samples(folder, found, columns)
    elif not (samples := _folder_samples(folder, modality, columns)):
        if holds_shards(data):
            samples = _shard_samples(data, modality, columns)
        elif any(folder.rglob("*.parquet")):
            return _hub_samples(data, modality, split, columns)
        else:
            wanted = " ".join(("metadata.jsonl, metadata.csv, *.tar, *.parquet and", *MODALITIES[modality].extensions))
            raise ValueError(f"{data}: no {modality} files found; looked for {wanted}")
    return samples if split is None else _of_split(samples, split, data)


def _of_split(samples: list[Sample], split: str, data: str) -> list[Sample]:
    name = canonical_split(split)
    chosen = [sample for sample in samples if sample.split == name]
    if not chosen:
        found = sorted({sample.split for sample in samples if sample.split is not None})
        raise ValueError(f"{data}: no samples of split {split!r}; the splits are {found or 'not given'}")
    return chosen


# --- Folders of media files ---


def _folder_samples(folder: Path, modality: str, columns: Columns) -> list[Sample]:
    extensions = MODALITIES[modality].extensions
    names = [name for name in _walk(folder) if name.lower().endswith((*extensions, *METADATA_NAMES))]
    tables = [name for name in names if name.endswith(METADATA_NAMES) and os.path.basename(name) in METADATA_NAMES]
    files = [name for name in names if name not in tables] if tables else names
    if _NOT_UTF8.search("".join(files)):
        name = next(filter(_NOT_UTF8.search, files))
        raise ValueError(f"{folder}: the name of {name!a} is not UTF-8: rename it")
    if samples := metadata_samples(folder, tables, columns, files):
        return samples
    if files and (columns.label, columns.group) != ("label", "group"):
        raise ValueError(
            f"{folder}: columns {columns.label!r} and {columns.group!r} were asked for: needs a metadata.csv"
        )
    # What a file's folders say is made out once for each folder: there may be millions of files.
    places = [name.rpartition(os.sep)[0] for name in files]
    folders = {place: place.split(os.sep) if place else [] for place in dict.fromkeys(places)}
    by_split = are_splits({parts[0] for parts in folders.values() if parts}, folder)
    splits = {place: split_of(parts[0]) if by_split and parts else None for place, parts in folders.items()}
    if by_split:
        folders = {place: parts[1:] for place, parts in folders.items()}
    check_class_folders({parts[0] for parts in folders.values() if parts}, str(folder), columns.needed)
    _warn_of_splits_within({parts[1] for parts in folders.values() if len(parts) > 1}, folder)
    labels = {place: clean(parts[0]) if parts else None for place, parts in folders.items()}
    prefix = _prefix(folder)
    return [Sample(prefix + name, label=labels[place], split=splits[place]) for name, place in zip(files, places)]


def _warn_of_splits_within(names: Collection[str], folder: Path) -> None:
    if names and all(map(split_of, names)):
        logger.warning(
            "%s: the folders within the class folders are named like splits (%s) but not read as such: splits come "
            "first, as DIR/train/CLASS, or in a metadata.csv", folder, ", ".join(sorted(names)[:3]),
        )  # fmt: skip


def _prefix(folder: Path) -> str:
    return str(folder / "_")[:-1]  # "" for "."


def _walk(folder: Path) -> list[str]:
    """Every file below, relative and in order, through links too, but not round in a circle, nor what is hidden."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    found = []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not _closes_a_circle(Path(root, name))]
        place = os.path.relpath(root, folder) + os.sep if root != str(folder) else ""
        found += [place + name for name in names if not name.startswith(".")]
    # Folder by folder, as their names would be sorted one by one.
    return sorted(found, key=lambda name: name.replace(os.sep, "\0"))


def _closes_a_circle(path: Path) -> bool:
    """Whether it is a link to a folder that is on the way to it."""
    return path.is_symlink() and any(parent.resolve().is_relative_to(path.resolve()) for parent in path.parents)


# --- Shards ---


def _shard_samples(data: str, modality: str, columns: Columns) -> list[Sample]:
    wanted = dict.fromkeys((columns.label, "label", "labels", "split", "fold", columns.group))
    entries = read_entries(data, modality, MODALITIES[modality].extensions, tuple(wanted))
    if not entries:
        raise ValueError(f"{data}: holds no {modality}")
    found = dict.fromkeys(column for entry in entries for column in entry.row)
    if not {columns.label, "labels"} & found.keys():
        found |= dict.fromkeys(column_names(entries[0].shard))  # what rows do not keep, for the message
    columns = columns.among(found, data)
    samples = []
    for entry in entries:
        row = entry.row if entry.row.get("split") else entry.row | {"split": _split_of_name(entry.shard)}
        path = f"{entry.shard}/{entry.name}"
        samples.append(sample_of_row(path, row, columns, entry.source, entry.class_order))
    return samples


def _split_of_name(shard: str) -> str | None:
    return split_of(re.split(r"[-_.]", shard.rpartition("/")[2])[0])


# --- Rows of a Hub set ---


def _hub_samples(
    data: str,
    modality: str,
    split: str | None,
    columns: Columns,
    config: str | None = None,
    revision: str | None = None,
) -> list[Sample]:
    import datasets

    try:
        loaded = datasets.load_dataset(data, config, revision=revision, split=split)
    except Exception as error:  # whatever its network, its builders and its file systems raise
        asked = {"name": config, "revision": revision, "split": split}
        given = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
        what = f"{data}:" if os.path.isdir(data) else f"{data!r} is not a folder, and"
        hint = "" if config or "config name" not in str(error).lower() else "; give --data_config"
        raise ValueError(f"{what} datasets.load_dataset(..., {given}) failed: {one_line(error)}{hint}") from error
    by_split = loaded if isinstance(loaded, dict) else {split: loaded}
    samples = []
    for name, dataset in by_split.items():
        samples += _dataset_samples(dataset, f"{data}/{name}", name, modality, columns)
    if not samples:
        raise ValueError(f"{data}: holds no rows")
    return samples


def _dataset_samples(dataset: Any, name: str, split: str, modality: str, columns: Columns) -> list[Sample]:
    import datasets

    media = media_column(dataset.features, name, modality)
    feature = getattr(datasets, modality.capitalize())
    media_only = dataset.select_columns([media]).cast_column(media, feature(decode=False))
    columns = columns.among(dataset.column_names, name)
    wanted = {columns.label, columns.group, "split", "fold"} & set(dataset.column_names) - {media}
    cells = {column: class_names(dataset.features[column], list(dataset[column])) for column in sorted(wanted)}
    order = class_order(dataset.features.get(columns.label))
    samples = []
    for index in range(len(dataset)):
        row = {"split": split} | {column: values[index] for column, values in cells.items()}
        samples.append(sample_of_row(f"{name}/{index}", row, columns, HubRow(media_only, media, index), order))
    return samples
