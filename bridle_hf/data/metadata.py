"""Metadata of samples: metadata.csv and metadata.jsonl, and the columns that shards and Hub sets have as well."""

import difflib
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from bridle_hf.common.tables import Rows, clean, read_table
from bridle_hf.data.folds import are_splits, canonical_split, split_of
from bridle_hf.data.labels import LABEL_ORDER, read_label_order
from bridle_hf.data.sample import Sample, Source, garbage_left


logger = logging.getLogger(__name__)

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
EVENT_FIELDS = ("onset", "offset", "label")  # of an event in a row's `events`, where a row is a file
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
    label, labels, found = None, None, row.get(columns.label)
    events = _events_of(path, row.get("events"))
    if events is not None:
        labels = tuple(sorted({name for _, _, name in events}))
    elif columns.label == "labels" or isinstance(found, list | tuple):
        names = (found or "").split(";") if isinstance(found, str | None) else found
        names = names if isinstance(names, list | tuple) else [names]
        labels = tuple(name for name in map(clean, names) if name) or None
    elif found is not None:
        label = _cell(found)
    split, fold, group = row.get("split"), row.get("fold"), row.get(columns.group)
    return Sample(
        path, label, labels,
        None if split is None else _split_of_cell(split),
        None if fold is None else _cell(fold),
        None if group is None else _cell(group),
        source, class_order, events,
    )  # fmt: skip


def _cell(value: Any) -> str | None:
    return _cleaned(value) if isinstance(value, str) else clean(value) or None


# Most cells say one of few things, which are cleaned, and kept, once.
@lru_cache(maxsize=4096)
def _cleaned(value: str) -> str | None:
    return clean(value) or None


def _split_of_cell(value: Any) -> str | None:
    name = _cell(value)
    return None if name is None else _canonical(name)


_canonical = lru_cache(maxsize=256)(canonical_split)


# --- metadata.csv, metadata.jsonl ---


@garbage_left()
def metadata_samples(folder: Path, tables: Sequence[str], columns: Columns, files: Sequence[str] = ()) -> list[Sample]:
    """The samples that these tables below `folder` list; `files` are all that there are. A `label_order.csv` in
    `folder` (see `read_label_order`) numbers the classes.

    Raises:
        ValueError: a table without `file_name` in `folder` itself, or what `Columns.among` refuses; a file that is
            listed twice, or not at all beside tables in folders.
    """
    samples, listed = [], set()
    order, spelled = None, {}
    if tables and (folder / LABEL_ORDER).exists():
        names, numbers = read_label_order(folder / LABEL_ORDER)
        order, spelled = tuple(names), {label: names[number] for label, number in numbers.items()}
    used = list(_read_tables(folder, tables))
    places = {os.path.dirname(table) for table, _, _ in used} - {""}
    are_splits({_split_part(place) or place for place in places}, folder)
    for table, found, rows in used:
        place = os.path.dirname(table)
        own = columns.among(found, folder / table)
        splits = {} if "split" in found else _splits_by_folder(place, rows)
        if {"onset", "offset"} <= set(found):
            logger.info("%s: strong labels, by its columns onset and offset", folder / table)
            rows = _with_events(folder / table, rows, own)
        paths = _paths_of_names(folder / place, [row["file_name"] for _, row in rows])
        for (line, row), path in zip(rows, paths):
            normal = _normal(path)
            if normal in listed:
                first = _first_place(folder, used, normal)
                raise ValueError(
                    f"{folder / table}, line {line}: {row['file_name']!r} is listed before, at {first}: one row for "
                    'each file; several labels of a file go into a column `labels`, as "dog;rain"'
                )
            listed.add(normal)
            sample = sample_of_row(path, row | {"split": splits[line]} if splits else row, own, None, order)
            samples.append(_by_names(sample, spelled) if spelled else sample)
    covered = tuple(f"{place}{os.sep}" for place in places)
    missing = [name for name in files if places and not name.startswith(covered)]
    missing = [name for name in missing if _normal(str(folder / name)) not in listed]
    if missing:
        raise ValueError(
            f"{folder}: {used[0][0]} lists files, but {len(missing)} others, such as {missing[0]}, are in no table"
        )
    return sorted(samples, key=attrgetter("path"))


def _by_names(sample: Sample, spelled: Mapping[str, str]) -> Sample:
    """Its labels as the classes are called, in the place of their mids."""
    labels, events = sample.labels, sample.events
    return replace(
        sample,
        label=spelled.get(sample.label, sample.label),
        labels=labels and tuple(spelled.get(label, label) for label in labels),
        events=events and tuple((onset, offset, spelled.get(label, label)) for onset, offset, label in events),
    )


def _first_place(folder: Path, used: Sequence[tuple[str, list[str], Rows]], normal: str) -> str:
    """Table and line of the first row with the file of this path."""
    for table, _, rows in used:
        paths = _paths_of_names((folder / table).parent, [row["file_name"] for _, row in rows])
        for (line, _), path in zip(rows, paths):
            if _normal(path) == normal:
                return f"{folder / table}, line {line}"
    raise KeyError(normal)


def _with_events(table: Path, rows: Rows, columns: Columns) -> Rows:
    """Of a table with a row for each event (onset, offset, label), a row for each file, with its `events`.

    Raises:
        ValueError: times or labels that are none; rows of a file that differ in its other columns.
    """
    files: dict[str, tuple[int, dict[str, Any]]] = {}
    events: dict[str, list[tuple[float, float, str]]] = {}
    of_event = ("onset", "offset", columns.label)
    for line, row in rows:
        own = {name: value for name, value in row.items() if name not in of_event}
        first, kept = files.setdefault(row["file_name"], (line, own))
        if own != kept:
            raise ValueError(f"{table}, line {line}: split, fold or group is not that of line {first}, the same file")
        cells = [row.get(name) for name in of_event]
        found = events.setdefault(row["file_name"], [])
        if any(cell not in (None, "") for cell in cells):  # else nothing sounds in the recording
            found.append(_event(f"{table}, line {line}", *cells))
    return [(line, row | {"events": tuple(sorted(events[name]))}) for name, (line, row) in files.items()]


def _events_of(where: str, found: Any) -> tuple[tuple[float, float, str], ...] | None:
    """The events of a file, in order, also where [`_with_events`] has them ready; None where a row's `events` are
    something else.

    Raises:
        ValueError: times or labels that are none.
    """
    if isinstance(found, tuple):
        return found
    are_events = isinstance(found, list) and all(
        isinstance(event, dict) and event.keys() == set(EVENT_FIELDS) for event in found
    )
    return tuple(sorted(_event(where, *map(event.get, EVENT_FIELDS)) for event in found)) if are_events else None


def _event(where: str, onset: Any, offset: Any, label: Any) -> tuple[float, float, str]:
    try:
        onset, offset = float(onset), float(offset)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: onset {onset!r} and offset {offset!r} must be numbers, in seconds") from None
    if not 0 <= onset < offset < math.inf:
        raise ValueError(f"{where}: the event lasts from {onset} to {offset} s: expected 0 <= onset < offset")
    if label is None or not clean(label):
        raise ValueError(f"{where}: the event has no label")
    return onset, offset, clean(label)


def _paths_of_names(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """`folder / name` of each, as a string; what folders make of it is made out once for each."""
    prefixes: dict[str, str] = {}
    for name in names:
        last = name.rpartition("/")[2]
        if "\\" in name or last in ("", "."):
            yield _path_of_name(folder, name)
            continue
        place = name[: len(name) - len(last)]
        if place not in prefixes:
            prefixes[place] = str(folder / place / "_")[:-1]
        yield prefixes[place] + last


def _path_of_name(folder: Path, name: str) -> str:
    path = folder / name
    if "\\" in name and not path.exists():  # written on Windows
        path = folder / name.replace("\\", "/")
    return str(path)


def _normal(path: str) -> str:
    """`os.path.normpath` of what `Path` has spelled."""
    return os.path.normpath(path) if ".." in path else path


def _splits_by_folder(place: str, rows: Rows) -> dict[int, str]:
    """By line: the split of the folder that the table is in, else of the first folder of each file; {} if none is."""
    if place:
        part = _split_part(place)
        return {line: split_of(part) for line, _ in rows} if part else {}
    places = [row["file_name"].replace("\\", "/").rpartition("/")[0] for _, row in rows]
    splits = {place: split_of(os.path.normpath(place).split("/")[0]) if place else None for place in set(places)}
    return {line: splits[place] for (line, _), place in zip(rows, places)} if all(splits.values()) else {}


def _split_part(place: str) -> str | None:
    return next((part for part in place.split(os.sep) if split_of(part)), None)


def _read_tables(folder: Path, tables: Sequence[str]) -> Iterator[tuple[str, list[str], Rows]]:
    """Name, columns and rows of each table of samples; ValueError for two in a folder."""
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
            yield table, list(dict.fromkeys(names)), rows
        elif os.path.dirname(table):
            logger.warning("%s: lists no file_name: not used; the columns are %s", folder / table, names)
        elif "file_name" in names:
            raise ValueError(f"{folder / table}: lists no files")
        else:
            raise ValueError(f"{folder / table}: no column file_name; the columns are {names}")
