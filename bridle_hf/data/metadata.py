"""Metadata of samples: metadata.csv and metadata.jsonl, and the columns that shards and Hub sets have as well."""

import difflib
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from bridle_hf.common.tables import Row, Rows, clean, iterate_table, read_table
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
    get, labels, events = row.get, None, None
    label_column, group_column, _ = columns
    found = get(label_column)
    if "events" in row and (events := _events_of(path, row["events"])) is not None:
        label, labels = None, tuple(sorted({name for _, _, name in events}))
    elif label_column == "labels" or isinstance(found, list | tuple):
        label, labels = None, _labels_of_cell(found)
    else:
        label = None if found is None else _cell(str(found))
    split, fold, group = get("split"), get("fold"), get(group_column)
    return Sample(
        path, label, labels,
        None if split is None else _split_of_cell(str(split)),
        None if fold is None else _cell(str(fold)),
        None if group is None else _cell(str(group)),
        source, class_order, events,
    )  # fmt: skip


def _labels_of_cell(value: Any) -> tuple[str, ...] | None:
    names = (value or "").split(";") if isinstance(value, str | None) else value
    names = names if isinstance(names, list | tuple) else [names]
    return tuple(name for name in map(clean, names) if name) or None


# Most cells say one of few things, which are cleaned, and kept, once.
@lru_cache(maxsize=1 << 16)
def _cell(value: str) -> str | None:
    return clean(value) or None


@lru_cache(maxsize=256)
def _split_of_cell(value: str) -> str | None:
    return canonical_split(name) if (name := clean(value)) else None


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
        own = columns.among(found, folder / table)
        if {"onset", "offset"} <= set(found):
            logger.info("%s: strong labels, by its columns onset and offset", folder / table)
            rows = _with_events(folder / table, rows, own)
        of_table = _samples_of_table(folder / table, os.path.dirname(table), found, rows, own, order)
        paths = {_normal(sample.path) for sample in of_table}
        if len(paths) < len(of_table) or not paths.isdisjoint(listed):
            _refuse_twice([folder / name for name, _, _ in used])
        listed |= paths
        samples += [_by_names(sample, spelled) for sample in of_table] if spelled else of_table
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


def _samples_of_table(
    table: Path, in_folder: str, found: Collection[str], rows: Iterable[Row], columns: Columns, order: Any
) -> list[Sample]:
    """The samples of the rows of a table, which lies in the folder `in_folder` of the data ("": in it itself)."""
    samples, names, folder, prefixes = [], [], table.parent, {}
    for line, row in rows:
        name = row.get("file_name")
        if not name or not isinstance(name, str):
            raise _without_name(table, line)
        path = _path_of_name(folder, name, prefixes)
        samples.append(sample_of_row(path, row, columns, None, order))
        if "split" not in found:
            names.append(name)
    if "split" not in found:
        for sample, split in zip(samples, _splits_by_folder(in_folder, names)):
            sample.split = split
    return samples


def _refuse_twice(tables: Sequence[Path]) -> None:
    """Raise a `ValueError` that says which file is listed more than once, and where."""
    places: dict[str, tuple[Path, int, str]] = {}
    for table in tables:
        columns, rows = read_table(table)
        of_events = {"onset", "offset"} <= set(columns)  # there, several rows name a file
        for line, row in rows:
            name = row["file_name"]
            normal = _normal(_path_of_name(table.parent, name, {}))
            before, at, other = places.setdefault(normal, (table, line, name))
            if (before, at) != (table, line) and not (of_events and (before, other) == (table, name)):
                raise ValueError(
                    f"{table}, line {line}: {name!r} is listed before, at {before}, line {at}: one row for each file; "
                    'several labels of a file go into a column `labels`, as "dog;rain"'
                )


def _with_events(table: Path, rows: Iterable[Row], columns: Columns) -> Rows:
    """Of a table with a row for each event (onset, offset, label), a row for each file, with its `events`.

    Raises:
        ValueError: times or labels that are none; rows of a file that differ in its other columns.
    """
    files: dict[str, tuple[int, dict[str, Any]]] = {}
    events: dict[str, list[tuple[float, float, str]]] = {}
    of_event = ("onset", "offset", columns.label)
    for line, row in rows:
        own = {name: value for name, value in row.items() if name not in of_event}
        name = row.get("file_name")
        if not name or not isinstance(name, str):
            raise _without_name(table, line)
        first, kept = files.setdefault(name, (line, own))
        if own != kept:
            raise ValueError(f"{table}, line {line}: split, fold or group is not that of line {first}, the same file")
        cells = [row.get(name) for name in of_event]
        found = events.setdefault(name, [])
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


def _without_name(table: Path, line: int) -> ValueError:
    return ValueError(f"{table}, line {line}: file_name is empty")


def _path_of_name(folder: Path, name: str, prefixes: dict[str, str]) -> str:
    """`folder / name`, as a string; what folders make of it is made out once for each, and kept in `prefixes`."""
    cut = name.rfind("/") + 1
    place, last = name[:cut], name[cut:]
    if "\\" in name or last in ("", "."):
        path = folder / name
        if "\\" in name and not path.exists():  # written on Windows
            path = folder / name.replace("\\", "/")
        return str(path)
    prefix = prefixes.get(place)
    if prefix is None:
        prefix = prefixes[place] = str(folder / place / "_")[:-1]
    return prefix + last


def _normal(path: str) -> str:
    """`os.path.normpath` of what `Path` has spelled."""
    return os.path.normpath(path) if ".." in path else path


def _splits_by_folder(in_folder: str, names: Sequence[str]) -> list[str]:
    """Of each file the split of the folder that its table is in, else of its own first folder; [] if none is one."""
    if in_folder:
        part = _split_part(in_folder)
        return [split_of(part)] * len(names) if part else []
    places = [name.replace("\\", "/").rpartition("/")[0] for name in names]
    splits = {place: split_of(os.path.normpath(place).split("/")[0]) if place else None for place in set(places)}
    return [splits[place] for place in places] if all(splits.values()) else []


def _split_part(place: str) -> str | None:
    return next((part for part in place.split(os.sep) if split_of(part)), None)


def _read_tables(folder: Path, tables: Sequence[str]) -> Iterator[tuple[str, list[str], Iterable[Row]]]:
    """Name, columns and rows of each table of samples; ValueError for two in a folder.

    The rows of a single table are read as they are asked for; several would be open all at once.
    """
    places = [os.path.dirname(table) for table in tables]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{folder / place}: has both {' and '.join(METADATA_NAMES)}: keep one of them")
    for table in tables:
        names, rows = iterate_table(folder / table)
        first = next(rows, None)
        if "file_name" in names and first is not None:
            rows = chain([first], rows)
            yield table, list(dict.fromkeys(names)), rows if len(tables) == 1 else list(rows)
        elif os.path.dirname(table):
            logger.warning("%s: lists no file_name: not used; the columns are %s", folder / table, names)
        elif "file_name" in names:
            raise ValueError(f"{folder / table}: lists no files")
        else:
            raise ValueError(f"{folder / table}: no column file_name; the columns are {names}")
