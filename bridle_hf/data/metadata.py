"""Metadata of samples: metadata.csv and metadata.jsonl, and the columns that shards and Hub sets have as well."""

import difflib
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridle_hf.common.tables import Rows, clean, read_table
from bridle_hf.data.folds import are_splits, canonical_split, split_of
from bridle_hf.data.labels import LABEL_ORDER, read_label_order
from bridle_hf.data.sample import Sample, Source


logger = logging.getLogger(__name__)

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_LIKE_LABEL = {
    "class", "classes", "classname", "class_name", "category", "categories", "target", "targets", "tag", "tags",
}  # fmt: skip


class Columns(NamedTuple):
    """The columns asked for; `needed`: whether there must be one of labels."""

    label: str
    group: str
    needed: bool

    def among(self, found: Collection[str], where: str | Path) -> "Columns":
        """As they are called in a set that has the columns `found`. ValueError for one that is not there."""
        if self.label == "label" and "labels" in found:
            if "label" in found:
                raise ValueError(f"{where}: has both columns label and labels (multi-label): keep one of them")
            return self._replace(label="labels").among(found, where)
        if self.label not in found:
            near = [name for name in found if _is_like_label(name)]
            hint = f"; for {near[0]!r}, give --label_column {near[0]!r}" if near else ""
            message = f"{where}: no column {self.label!r} for the labels; the columns are {list(found)}{hint}"
            if self.needed or self.label != "label":
                raise ValueError(message)
            if near:
                logger.warning("%s", message)
        if self.group != "group" and self.group not in found:
            raise ValueError(f"{where}: no column {self.group!r} for the groups; the columns are {list(found)}")
        return self


def _is_like_label(name: str) -> bool:
    name = name.strip().casefold()
    return (
        name in _LIKE_LABEL or "label" in name or bool(difflib.get_close_matches(name, ["label", "labels"], 1, 0.75))
    )


def sample_of_row(
    path: str,
    row: dict[str, Any],
    columns: Columns,
    source: Source | None = None,
    class_order: tuple[str, ...] | None = None,
) -> Sample:
    def cell(column: str) -> str | None:
        value = row.get(column)
        return None if value is None else clean(value) or None

    label, labels, found = cell(columns.label), None, row.get(columns.label)
    if columns.label == "labels" or isinstance(found, list | tuple):
        names = (found or "").split(";") if isinstance(found, str | None) else found
        names = names if isinstance(names, list | tuple) else [names]
        label, labels = None, tuple(name for name in map(clean, names) if name) or None
    split = cell("split")
    split = None if split is None else canonical_split(split)
    return Sample(path, label, labels, split, cell("fold"), cell(columns.group), source, class_order)


# --- metadata.csv, metadata.jsonl ---


def metadata_samples(folder: Path, tables: Sequence[str], columns: Columns, files: Sequence[str] = ()) -> list[Sample]:
    """The samples that these tables below `folder` list; `files` are all that there are. A `label_order.csv` in
    `folder` (see `read_label_order`) numbers the classes.

    Raises:
        ValueError: a table without `file_name` in `folder` itself, or what `Columns.among` refuses; a file that is
            listed twice, or not at all beside tables in folders.
    """
    samples, listed = [], {}
    order = tuple(read_label_order(folder / LABEL_ORDER)[0]) if tables and (folder / LABEL_ORDER).exists() else None
    used = list(_read_tables(folder, tables))
    places = {os.path.dirname(table) for table, _ in used} - {""}
    are_splits({_split_part(place) or place for place in places}, folder)
    for table, rows in used:
        place, found = os.path.dirname(table), list(dict.fromkeys(name for _, row in rows for name in row))
        own = columns.among(found, folder / table)
        splits = {} if "split" in found else _splits_by_folder(place, rows)
        for line, row in rows:
            where, name = f"{folder / table}, line {line}", row["file_name"]
            path = _path_of_name(folder / place, name)
            first = listed.setdefault(os.path.normpath(path), where)
            if first != where:
                raise ValueError(
                    f"{where}: {name!r} is listed before, at {first}: one row for each file; several labels of a "
                    'file go into a column `labels`, as "dog;rain"'
                )
            samples.append(sample_of_row(path, row | {"split": splits[line]} if splits else row, own, None, order))
    covered = tuple(f"{place}{os.sep}" for place in places)
    missing = [name for name in files if places and not name.startswith(covered)]
    missing = [name for name in missing if os.path.normpath(folder / name) not in listed]
    if missing:
        raise ValueError(
            f"{folder}: {used[0][0]} lists files, but {len(missing)} others, such as {missing[0]}, are in no table"
        )
    return sorted(samples, key=lambda sample: sample.path)


def _path_of_name(folder: Path, name: str) -> str:
    path = folder / name
    if "\\" in name and not path.exists():  # written on Windows
        path = folder / name.replace("\\", "/")
    return str(path)


def _splits_by_folder(place: str, rows: Rows) -> dict[int, str]:
    """By line: the split of the folder that the table is in, else of the first folder of each file; {} if none is."""
    if place:
        part = _split_part(place)
        return {line: split_of(part) for line, _ in rows} if part else {}
    firsts = {line: os.path.normpath(row["file_name"].replace("\\", "/")).split("/") for line, row in rows}
    splits = {line: split_of(parts[0]) if len(parts) > 1 else None for line, parts in firsts.items()}
    return splits if all(splits.values()) else {}


def _split_part(place: str) -> str | None:
    return next((part for part in place.split(os.sep) if split_of(part)), None)


def _read_tables(folder: Path, tables: Sequence[str]) -> Iterator[tuple[str, Rows]]:
    """Name and rows of each table of samples; ValueError for two in a folder."""
    places = [os.path.dirname(table) for table in tables]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{folder / place}: has both {' and '.join(METADATA_NAMES)}: keep one of them")
    for table in tables:
        names, rows = read_table(folder / table)
        if "file_name" in names and rows:
            for line, row in rows:
                if not isinstance(row.get("file_name"), str) or not row["file_name"]:
                    raise ValueError(f"{folder / table}, line {line}: file_name is empty")
            yield table, rows
        elif os.path.dirname(table):
            logger.warning("%s: lists no file_name: not used; the columns are %s", folder / table, names)
        elif "file_name" in names:
            raise ValueError(f"{folder / table}: lists no files")
        else:
            raise ValueError(f"{folder / table}: no column file_name; the columns are {names}")
