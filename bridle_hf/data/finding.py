"""Finding samples: from a folder, shards or a Hub id to the list of them, in an order that depends on names alone."""

import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from bridle_hf.common.errors import one_line
from bridle_hf.common.tables import clean
from bridle_hf.data.folds import are_splits, canonical_split, check_class_folders, split_of
from bridle_hf.data.labels import labels_of
from bridle_hf.data.layouts.files import refuse_other_encodings, walk_folders
from bridle_hf.data.layouts.lists import names_lists, read_lists
from bridle_hf.data.layouts.table import LAYOUTS, find_layout, half_there, read_layout
from bridle_hf.data.metadata import METADATA_NAMES, Columns, metadata_samples, sample_of_row
from bridle_hf.data.modalities import MODALITIES
from bridle_hf.data.sample import HubRow, Sample, garbage_left
from bridle_hf.data.shards.entries import read_entries
from bridle_hf.data.shards.listing import holds_shards, is_file_name, names_shards
from bridle_hf.data.shards.parquets import class_names, class_order, column_names, media_column


logger = logging.getLogger(__name__)

# Arguments of commands, to those of `find_samples`.
_OPTIONS = {
    "split": "split", "label_column": "label_column", "group_column": "group_column", "data_config": "config",
    "data_revision": "revision", "data_streaming": "streaming", "media_column": "media_column", "layout": "layout",
}  # fmt: skip


def find_samples(
    data: str,
    modality: str,
    split: str | None = None,
    label_column: str = "label",
    group_column: str = "group",
    *,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    media_column: str | None = None,
    layout: str = "auto",
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
    * a folder that is laid out as one of the sets of data/layouts/table.py is downloaded, or that holds one: its own
      lists give labels, the order of the classes, splits, folds and groups;
    * list files (`.csv`, `.json`, `.txt` of paths and labels): one, a pattern of them, or a folder with one for each
      split, see data/layouts/lists.py;
    * a folder with a metadata file in each of its split folders;
    * a folder of media files: `DIR/<split>/<class>/<file>`, `DIR/<class>/<file>` or `DIR/<file>`. The first level is
      read as splits where every folder on it is called train (training), validation (valid, val, dev, development)
      or test (testing, eval, evaluation), in any case; deeper folders under the class change nothing;
    * a folder with shards, `.tar` or `.parquet` files, directly inside;
    * a folder of parquet files further down, or a Hub id: whatever `datasets.load_dataset` takes, with a column of the
      modality's feature type, or of bytes and named like it, and optionally columns as above. A `ClassLabel` numbers
      the classes.

    Shards hold what `metadata.csv` does as columns (parquet), or in a `.json` of each sample (tar; else `.cls` or
    `.txt` is the label); a shard named like a split, as `train-000.tar`, is of it. Strong labels of a recording are
    `events` there, a list of {onset, offset, label}.

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
        streaming: read the files of a Hub set as remote shards, part by part, in place of downloading it first.
        media_column: column that holds the media, where there are several that could.
        layout: `auto`, as above; `folder`, without the sets and lists; or a key of `LAYOUTS`, or `lists`.
        need_labels: leave out splits without any label; refuse what has columns but none of labels, and class folders
            that surely are none, of which there is but a warning otherwise.

    Raises:
        ValueError: unknown modality, nothing of that modality in `data`, a column or split that is not there, split
            folders mixed with others, a file that is listed twice, a shard that is missing or of which nothing can be
            made out, or a Hub id that `datasets` cannot load.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r}: expected one of {sorted(MODALITIES)}")
    columns, folder = Columns(label_column, group_column, need_labels), Path(data)
    hub = _HubSet(data, config, revision, streaming, media_column)
    is_hub = not names_shards(data) and (bool(config) or not folder.is_dir())
    if (config or revision or streaming) and (not is_hub or layout != "auto" or (revision and folder.is_dir())):
        raise ValueError(f"{data}: a configuration, revision or streaming is for Hub ids; leave it out")
    if layout == "folder" and not folder.is_dir():
        raise ValueError(f"{data}: is no folder, as --layout folder says")
    if layout in LAYOUTS:
        samples = _layout_samples(layout, folder, modality, columns)
    elif layout == "lists" or (not names_shards(data) and names_lists(data)):
        samples = read_lists(data, modality, columns)
    elif names_shards(data):
        samples = _shard_samples(data, data, modality, columns, media_column)
    elif is_hub:
        samples, split = _hub_samples(hub, modality, split, columns), None
    elif found := [name for name in METADATA_NAMES if (folder / name).is_file()]:
        samples = metadata_samples(folder, found, columns)
    elif layout == "auto" and (own := find_layout(folder, modality)):
        samples = _layout_samples(*own, modality, columns)
    elif not (samples := _folder_samples(folder, modality, columns)):
        if holds_shards(data):
            samples = _shard_samples(data, data, modality, columns, media_column)
        elif any(folder.rglob("*.parquet")):
            samples, split = _hub_samples(hub, modality, split, columns), None
        else:
            wanted = " ".join(("metadata.jsonl, metadata.csv, *.tar, *.parquet and", *MODALITIES[modality].extensions))
            raise ValueError(f"{data}: no {modality} files found; looked for {wanted}")
    if media_column and samples[0].source is None:
        raise ValueError(f"{data}: --media_column is for Hub sets and parquet; leave it out")
    samples = _without_unlabelled_splits(samples, data) if need_labels else samples
    return samples if split is None else _of_split(samples, split, data)


def find_asked(args: Any, modality: str, need_labels: bool = False) -> list[Sample]:
    """[`find_samples`] with the options that the arguments of commands share, as far as these have them."""
    options = {name: getattr(args, option) for option, name in _OPTIONS.items() if hasattr(args, option)}
    return find_samples(args.data, modality, need_labels=need_labels, **options)


def _layout_samples(layout: str, folder: Path, modality: str, columns: Columns) -> list[Sample]:
    if layout == "lists":
        return read_lists(str(folder), modality, columns)
    if (columns.label, columns.group) != ("label", "group"):
        raise ValueError(
            f"{folder}: labels and groups of {layout} are its own: leave --label_column, --group_column out, or give "
            "--layout folder"
        )
    return read_layout(layout, folder, modality)


def _without_unlabelled_splits(samples: list[Sample], data: str) -> list[Sample]:
    """Without the splits of which no sample is labelled: of many sets, the test's labels are kept back."""
    labelled = {sample.split for sample in samples if labels_of(sample)}
    unlabelled = {sample.split for sample in samples} - labelled - {None}
    if not labelled or not unlabelled:
        return samples
    kept = [sample for sample in samples if sample.split not in unlabelled]
    logger.info("%s: no sample of split %s has a label: %d are left out", data, ", ".join(sorted(unlabelled)),
                len(samples) - len(kept))  # fmt: skip
    return kept


def _of_split(samples: list[Sample], split: str, data: str) -> list[Sample]:
    name = canonical_split(split)
    chosen = [sample for sample in samples if sample.split == name]
    if not chosen:
        found = sorted({sample.split for sample in samples if sample.split is not None})
        raise ValueError(f"{data}: no samples of split {split!r}; the splits are {found or 'not given'}")
    return chosen


# --- Folders of media files ---


@garbage_left()
def _folder_samples(folder: Path, modality: str, columns: Columns) -> list[Sample]:
    extensions = MODALITIES[modality].extensions
    # A list for each folder: what it says of its files is made out once, and there may be millions of them.
    runs, tables = [], []
    for place, names in walk_folders(folder):
        tables += [place + name for name in METADATA_NAMES if name in names]
        if files := [place + name for name in names if name.endswith(extensions) or name.lower().endswith(extensions)]:
            refuse_other_encodings(folder, files)
            runs.append((place, files))
    if tables and (samples := metadata_samples(folder, tables, columns, list(chain(*(files for _, files in runs))))):
        return samples
    if runs and (columns.label, columns.group) != ("label", "group"):
        raise ValueError(
            f"{folder}: columns {columns.label!r} and {columns.group!r} were asked for: needs a metadata.csv"
        )
    folders = {place: place.split(os.sep)[:-1] for place, _ in runs}
    by_split = are_splits({parts[0] for parts in folders.values() if parts}, folder)
    splits = {place: split_of(parts[0]) if by_split and parts else None for place, parts in folders.items()}
    if by_split:
        folders = {place: parts[1:] for place, parts in folders.items()}
    classes, hint = {parts[0] for parts in folders.values() if parts}, half_there(folder, modality)
    check_class_folders(classes, str(folder), columns.needed, hint)
    _warn_of_splits_within({parts[1] for parts in folders.values() if len(parts) > 1}, folder)
    samples, prefix = [], _prefix(folder)
    for place, files in runs:
        label = clean(folders[place][0]) if folders[place] else None
        split = splits[place]
        samples += [Sample(prefix + name, label, None, split) for name in files]
    return samples


def _warn_of_splits_within(names: Collection[str], folder: Path) -> None:
    if names and all(map(split_of, names)):
        logger.warning(
            "%s: the folders within the class folders are named like splits (%s) but not read as such: splits come "
            "first, as DIR/train/CLASS, or in a metadata.csv", folder, ", ".join(sorted(names)[:3]),
        )  # fmt: skip


def _prefix(folder: Path) -> str:
    return str(folder / "_")[:-1]  # "" for "."


# --- Shards ---


@garbage_left()
def _shard_samples(
    shards: str | Sequence[str],
    data: str,
    modality: str,
    columns: Columns,
    media: str | None = None,
    split: str | None = None,
) -> list[Sample]:
    wanted = dict.fromkeys((columns.label, "label", "labels", "split", "fold", columns.group, "events"))
    entries = read_entries(shards, modality, MODALITIES[modality].extensions, tuple(wanted), media)
    if not entries:
        raise ValueError(f"{data}: holds no {modality}")
    found = dict.fromkeys(column for entry in entries for column in entry.row)
    if not {columns.label, "labels"} & found.keys():
        found |= dict.fromkeys(column_names(entries[0].shard))  # what rows do not keep, for the message
    columns = columns.among(found, data)
    samples = []
    for entry in entries:
        row = entry.row if entry.row.get("split") else entry.row | {"split": split or _split_of_name(entry.shard)}
        path = f"{entry.shard}/{entry.name}"
        samples.append(sample_of_row(path, row, columns, entry.source, entry.class_order))
    return samples


def _split_of_name(shard: str) -> str | None:
    return split_of(re.split(r"[-_.]", shard.rpartition("/")[2])[0])


# --- Rows of a Hub set ---


class _HubSet(NamedTuple):
    """A set for `datasets`: a Hub id, or a folder, and what is asked for of it."""

    data: str
    config: str | None
    revision: str | None
    streaming: bool
    media_column: str | None

    def load(self, load: Callable[..., Any], **options: Any) -> Any:
        """What a function of `datasets` makes of it. ValueError if it cannot."""
        try:
            return load(self.data, self.config, revision=self.revision, **options)
        except Exception as error:  # whatever its network, its builders and its file systems raise
            asked = {"name": self.config, "revision": self.revision, **options}
            given = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
            is_folder = os.path.isdir(self.data)
            what = f"{self.data}:" if is_folder else f"{self.data!r} is not a folder, and"
            hint = "" if self.config or "config name" not in str(error).lower() else "; give --data_config"
            called = f"datasets.{load.__name__}(..., {given})"
            raise ValueError(f"{what} {called} failed: {one_line(error)}{hint}") from error


def _hub_samples(hub: _HubSet, modality: str, split: str | None, columns: Columns) -> list[Sample]:
    import datasets

    if hub.streaming:
        return _streamed_samples(hub, modality, split, columns)
    loaded = hub.load(datasets.load_dataset, split=split)
    by_split = loaded if isinstance(loaded, dict) else {split: loaded}
    samples = []
    for name, dataset in by_split.items():
        samples += _dataset_samples(dataset, f"{hub.data}/{name}", name, modality, columns, hub.media_column)
    if not samples:
        raise ValueError(f"{hub.data}: holds no rows")
    return samples


def _streamed_samples(hub: _HubSet, modality: str, split: str | None, columns: Columns) -> list[Sample]:
    """The rows of the set's own files, read where they lie."""
    import datasets

    files = hub.load(datasets.load_dataset_builder).config.data_files or {}
    files = {name: list(map(str, paths)) for name, paths in files.items()}
    if others := [path for paths in files.values() for path in paths if not is_file_name(path)]:
        raise ValueError(f"{hub.data}: streaming reads parquet and tar, not {others[0]}: leave --streaming out")
    if split is not None and split not in files:
        raise ValueError(f"{hub.data}: no samples of split {split!r}; the splits are {sorted(files)}")
    samples = []
    for name in files if split is None else [split]:
        samples += _shard_samples(files[name], hub.data, modality, columns, hub.media_column, name)
    if not samples:
        raise ValueError(f"{hub.data}: holds no files")
    return samples


@garbage_left()
def _dataset_samples(
    dataset: Any, name: str, split: str, modality: str, columns: Columns, media: str | None
) -> list[Sample]:
    import datasets

    media = media_column(dataset.features, name, modality, media)
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
