"""Files of a set: all that lie below its folder, and how they go together with the rows of the set's own lists."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridle_hf.common.skipped import MAX_BAD_FRACTION
from bridle_hf.common.tables import Rows, read_table
from bridle_hf.data.sample import Sample


logger = logging.getLogger(__name__)

# Folders beside a set's media that its own lists may lie in.
PLACES = (
    "", "annotations", "labels", "metadata", "meta", "csv", "ucfTrainTestlist",
    "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist",
)  # fmt: skip
MAX_LISTED = 10  # names in a message
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python spells bytes of a file name that are not


def walk(folder: Path) -> list[str]:
    """Every file of [`walk_folders`], relative to `folder`."""
    return [place + name for place, names in walk_folders(folder) for name in names]


def walk_folders(folder: Path, place: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every file below, in order, through links too, but not round in a circle, nor what is hidden: the place, "" or
    ending with a slash, and the names of files that follow each other in it.

    Raises:
        ValueError: a folder cannot be listed.
    """
    names, folders = [], set()
    try:
        with os.scandir(folder / place) as entries:
            for entry in entries:
                name = entry.name
                if name[0] != ".":
                    names.append(name)
                    try:
                        if entry.is_dir():
                            folders.add(name)
                    except OSError:
                        pass  # a link to itself: a file that cannot be read
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be listed: {error.strerror}") from error
    names.sort()
    # A folder's files come where its name does, as paths would be sorted part by part.
    first = 0
    for index, name in enumerate(names) if folders else ():
        if name in folders:
            if first < index:
                yield place, names[first:index]
            first = index + 1
            if not _closes_a_circle(folder / place / name):
                yield from walk_folders(folder, f"{place}{name}{os.sep}")
    if first < len(names):
        yield place, names[first:]


def _closes_a_circle(path: Path) -> bool:
    """Whether it is a link to a folder that is on the way to it."""
    return path.is_symlink() and any(parent.resolve().is_relative_to(path.resolve()) for parent in path.parents)


def refuse_other_encodings(folder: Path, files: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first file whose name is not UTF-8."""
    together = "".join(files)
    if not together.isascii() and _NOT_UTF8.search(together):
        name = next(filter(_NOT_UTF8.search, files))
        raise ValueError(f"{folder}: the name of {name!a} is not UTF-8: rename it")


def named(names: Sequence[str]) -> str:
    """Up to ten names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


@dataclass
class Reading:
    """What a set's own files say.

    Args:
        listed: a row's name in the set's lists, to fields of its `Sample`.
        files: the same name, to the file below the folder.
        classes: in the order of their numbers.
        gone: files of this set vanish from where they are fetched: most may be missing.
    """

    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    gone: bool = False

    def add(self, name: str, where: str | Path, **fields: Any) -> None:
        """Take in a row of a list.

        Raises:
            ValueError: another row says something else of the same file.
        """
        if self.listed.setdefault(name, fields) != fields:
            raise ValueError(f"{where}: {name} is listed twice: as {self.listed[name]}, and as {fields}")


def samples_of(reading: Reading, folder: Path, layout: str) -> list[Sample]:
    """The samples of the rows that have a file; what does not go together is named in a warning and left out.

    Raises:
        ValueError: more than 10% of rows have no file, of the splits that have any, or more than 10% of files no row;
            a class that the set's own list of classes lacks.
    """
    where, known = f"{folder}: read as {layout}", set(reading.classes)
    for name, fields in reading.listed.items():
        for label in fields.get("labels") or ([fields["label"]] if fields.get("label") is not None else []):
            if label not in known:
                raise ValueError(f"{where}: {name} is of class {label!r}, which the set's list of classes lacks")
    present = {name: fields for name, fields in reading.listed.items() if name in reading.files}
    missing = [name for name in reading.listed if name not in reading.files]
    if not present:
        _refuse(
            f"{where}: no row of its lists has its file, as {named(missing)}; {len(reading.files)} files are there"
        )
    there = {fields.get("split") for fields in present.values()}
    absent = sorted({str(reading.listed[name].get("split")) for name in missing} - set(map(str, there)))
    for split in absent:
        count = sum(str(fields.get("split")) == split for fields in reading.listed.values())
        logger.warning("%s: none of the %d files of split %s are there: it is left out", where, count, split)
    missing = [name for name in missing if reading.listed[name].get("split") in there]
    unlisted = [path for name, path in reading.files.items() if name not in reading.listed]
    _report(where, missing, len(present) + len(missing), "rows of its lists have no file", reading.gone)
    _report(where, unlisted, len(reading.files), "files are in none of its lists", False)
    order, prefix = reading.classes or None, str(folder / "_")[:-1]  # "" for "."
    found = [Sample(prefix + reading.files[name], class_order=order, **fields) for name, fields in present.items()]
    return sorted(found, key=lambda sample: sample.path)


def _report(where: str, names: Sequence[str], total: int, what: str, gone: bool) -> None:
    if not names:
        return
    message = f"{where}: {len(names)} of {total} {what}: {named(names)}"
    if len(names) > MAX_BAD_FRACTION * total and not gone:
        _refuse(f"{message}; complete the set, or leave these out of it")
    logger.warning("%s; left out", message)


def _refuse(message: str) -> None:
    raise ValueError(f"{message}; `--layout folder` reads it by class folders and metadata.csv alone")


def require_files(folder: Path, layout: str, names: Iterable[str]) -> None:
    """Refuse a folder that lacks files of the set.

    Raises:
        ValueError: names them.
    """
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ValueError(
            f"{folder}: read as {layout}, it lacks {', '.join(missing)}: add them, or give the folder that has them"
        )


def find(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, or in one of `PLACES` below it; None if there is none.

    Raises:
        ValueError: there are several.
    """
    found = [path for place in PLACES if (path := folder / place / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]}: which of them counts? Keep one")
    return found[0] if found else None


def rows_with(path: Path, *columns: str) -> Rows:
    """Rows of a table that has these columns.

    Raises:
        ValueError: it lacks one, or a cell of them is empty.
    """
    found, rows = read_table(path)
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; the columns are {found}")
    for line, row in rows:
        if empty := [name for name in columns if not row[name]]:
            raise ValueError(f"{path}, line {line}: {empty[0]} is empty")
    return rows


def lines_of(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not in UTF-8: {error}") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def ordered(numbers: Iterable[tuple[str, int | str]], where: str | Path) -> tuple[str, ...]:
    """Names of classes in the order of the numbers that a set gives them.

    Raises:
        ValueError: a name has two numbers, or a number two names, or is none.
    """
    names: dict[int, str] = {}
    for name, number in dict.fromkeys(numbers):
        if not str(number).isdecimal():
            raise ValueError(f"{where}: class {name!r} has {number!r} as its number")
        if names.setdefault(int(number), name) != name:
            raise ValueError(f"{where}: classes {names[int(number)]!r} and {name!r} both have number {number}")
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ValueError(f"{where}: class {twice[0]!r} has two numbers")
    return tuple(names[number] for number in sorted(names))


def by_tail(files: Iterable[str], parts: int = 1) -> Mapping[str, str]:
    """The last `parts` of each path, with / between them, to the path; ValueError where two end alike."""
    found: dict[str, str] = {}
    for path in files:
        tail = "/".join(path.split(os.sep)[-parts:])
        if found.setdefault(tail, path) != path:
            raise ValueError(f"{found[tail]} and {path} are two files of one name: keep one of them")
    return found
