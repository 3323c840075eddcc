"""Tables that people write: the rows of a .csv or .jsonl file, without the blanks around names and cells."""

import csv
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

from bridle_hf.common.errors import one_line


Row = tuple[int, dict[str, Any]]  # its line, and its cells by column
Rows = list[Row]


def clean(name: Any) -> str:
    """A cell, or the name of a class folder, as text: however a file system or an editor spells it."""
    name = str(name).strip()
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def read_table(path: str | os.PathLike) -> tuple[list[str], Rows]:
    """The columns of a table, and (line number, row) of each row; cells of a csv that are not there are None.

    Raises:
        ValueError: it is not a table in UTF-8; a row with more cells than columns; a column twice.
    """
    columns, rows = iterate_table(path)
    return columns, list(rows)


def iterate_table(path: str | os.PathLike) -> tuple[list[str], Iterator[Row]]:
    """[`read_table`], whose rows are read as they are asked for: there may be millions of them."""
    parts = _parts(path)
    return next(parts), parts


def _parts(path: str | os.PathLike) -> Iterator[Any]:
    """The columns of a table, then its rows."""
    is_csv = os.fspath(path).endswith(".csv")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from _csv_parts(file) if is_csv else _jsonl_parts(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no {'CSV' if is_csv else 'JSON'} in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def _csv_parts(file: Iterable[str]) -> Iterator[Any]:
    reader = csv.reader(file, skipinitialspace=True)
    columns = [name.strip() for name in next(reader, [])]
    if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
        raise ValueError(f"line 1: the column {twice[0]} is there twice")
    yield columns
    width, strip = len(columns), str.strip
    for cells in reader:
        if len(cells) == width:  # as most have
            row = dict(zip(columns, map(strip, cells)))
            if any(row.values()) or any(map(strip, cells)):  # of columns without a name, a row keeps one
                yield reader.line_num, row
            continue
        cells = list(map(strip, cells))
        if any(cells[width:]):
            raise ValueError(
                f"line {reader.line_num}: {len(cells)} cells for {width} columns; a cell with a comma in it "
                "needs quotes"
            )
        if any(cells):
            yield reader.line_num, dict(zip(columns, chain(cells, repeat(None))))


def _jsonl_parts(file: Iterable[str]) -> Iterator[Any]:
    rows = list(_jsonl_rows(file))
    yield list(dict.fromkeys(name for _, row in rows for name in row))
    yield from rows


def _jsonl_rows(file: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: is not JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number}: expected an object, as {{"file_name": ...}}')
        yield number, {name.strip(): v.strip() if isinstance(v, str) else v for name, v in row.items()}
