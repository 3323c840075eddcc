"""Tables that people write: the rows of a .csv or .jsonl file, without the blanks around names and cells."""

import csv
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from bridle_hf.common.errors import one_line


Rows = list[tuple[int, dict[str, Any]]]


def clean(name: Any) -> str:
    """A cell, or the name of a class folder, as text: however a file system or an editor spells it."""
    name = str(name).strip()
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def read_table(path: str | os.PathLike) -> tuple[list[str], Rows]:
    """The columns of a table, and (line number, row) of each row; cells of a csv that are not there are None.

    Raises:
        ValueError: it is not a table in UTF-8; a row with more cells than columns; a column twice.
    """
    is_csv = os.fspath(path).endswith(".csv")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return _csv_table(file) if is_csv else _jsonl_table(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no {'CSV' if is_csv else 'JSON'} in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def _csv_table(file: Iterable[str]) -> tuple[list[str], Rows]:
    reader = csv.reader(file, skipinitialspace=True)
    columns = [name.strip() for name in next(reader, [])]
    if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
        raise ValueError(f"line 1: the column {twice[0]} is there twice")
    rows, width = [], len(columns)
    for cells in reader:
        cells = list(map(str.strip, cells))
        if len(cells) == width and cells[0]:  # as most are
            rows.append((reader.line_num, dict(zip(columns, cells))))
            continue
        if any(cells[width:]):
            raise ValueError(
                f"line {reader.line_num}: {len(cells)} cells for {width} columns; a cell with a comma in it "
                "needs quotes"
            )
        if any(cells):
            empty = [None] * (width - len(cells))
            rows.append((reader.line_num, dict(zip(columns, cells + empty))))
    return columns, rows


def _jsonl_table(file: Iterable[str]) -> tuple[list[str], Rows]:
    rows = list(_jsonl_rows(file))
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _jsonl_rows(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
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
