"""Tables of embeddings, written from parts in constant memory and read again: .parquet, .npz, .npy with a .csv.

A row has the id of its file, its labels where the data have any, its time and place where it is one of several, and
the embedding. How the table was made stands in it, too (not in .npy).
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


FORMATS = (".parquet", ".npz", ".npy")
_METADATA = "bridle_hf"


@dataclass(frozen=True)
class Part:
    """Some rows of a table: values (rows, ..., dim) float32, and columns of as many entries each, by name."""

    values: np.ndarray
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class Table:
    """A table that was read: values (rows, ..., dim), columns by name, and how it was made."""

    values: np.ndarray
    columns: dict[str, np.ndarray]
    made: dict[str, Any]


def files_of(path: Path) -> list[Path]:
    """What [`write_table`] writes: beside an .npy, its columns as .csv."""
    return [path, path.with_suffix(".csv")] if path.suffix == ".npy" else [path]


def write_table(path: Path, parts: Iterable[Part], shape: tuple[int, ...], made: dict) -> None:
    """Write a table, whole or not at all.

    Args:
        path: one of `FORMATS`.
        parts: its rows, some at a time; each part has the same columns.
        shape: (rows, ..., dim) of all embeddings.
        made: how it was made, as JSON.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    write = {".parquet": _write_parquet, ".npz": _write_npz, ".npy": _write_npy}[path.suffix]
    write(temporary, path, parts, shape, made)
    os.replace(temporary, path)


def _write_parquet(file: Path, path: Path, parts: Iterable[Part], shape: tuple[int, ...], made: dict) -> None:
    import pyarrow
    from pyarrow import parquet

    size = int(np.prod(shape[1:]))
    kinds = {"U": pyarrow.string(), "O": pyarrow.string(), "i": pyarrow.int64(), "f": pyarrow.float64()}
    writer = None
    for part in parts:
        if writer is None:
            fields = [(name, kinds[column.dtype.kind]) for name, column in part.columns.items()]
            schema = pyarrow.schema([*fields, ("embedding", pyarrow.list_(pyarrow.float32(), size))])
            schema = schema.with_metadata({_METADATA: json.dumps({**made, "shape": shape[1:]})})
            writer = parquet.ParquetWriter(file, schema)
        columns = [pyarrow.array(column.tolist(), kinds[column.dtype.kind]) for column in part.columns.values()]
        flat = pyarrow.array(np.ascontiguousarray(part.values).reshape(-1))
        columns.append(pyarrow.FixedSizeListArray.from_arrays(flat, size))
        writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    writer.close()


def _write_npz(file: Path, path: Path, parts: Iterable[Part], shape: tuple[int, ...], made: dict) -> None:
    columns: dict[str, list[np.ndarray]] = {}
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as entry:
            _write_array(entry, parts, shape, columns)
        for name, pieces in columns.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.concatenate(pieces), allow_pickle=False)
        with archive.open("made.npy", "w") as entry:
            np.lib.format.write_array(entry, np.array(json.dumps(made)), allow_pickle=False)


def _write_npy(file: Path, path: Path, parts: Iterable[Part], shape: tuple[int, ...], made: dict) -> None:
    columns: dict[str, list[np.ndarray]] = {}
    with open(file, "wb") as entry:
        _write_array(entry, parts, shape, columns)
    _, names = files_of(path)
    with open(temporary := names.with_name(f".{names.name}.tmp"), "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(columns)
        writer.writerows(zip(*(np.concatenate(pieces).tolist() for pieces in columns.values())))
    os.replace(temporary, names)


def _write_array(file: Any, parts: Iterable[Part], shape: tuple[int, ...], columns: dict[str, list]) -> None:
    """An .npy file of all parts' values, one after the other; their columns are gathered."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part.values, "<f4").tobytes())
        for name, column in part.columns.items():
            columns.setdefault(name, []).append(column.astype(str) if column.dtype.kind == "O" else column)


def read_table(path: Path) -> Table:
    """Read what [`write_table`] wrote, of .parquet and .npz.

    Raises:
        ValueError: it is not such a table.
        OSError: it cannot be read.
    """
    if path.suffix not in (".parquet", ".npz"):
        raise ValueError(f"{path}: a table is .parquet or .npz")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return _read_parquet(path) if path.suffix == ".parquet" else _read_npz(path)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a table of `bridle embed`: {error}") from error


def _read_parquet(path: Path) -> Table:
    from pyarrow import parquet

    table = parquet.read_table(path)
    made = json.loads((table.schema.metadata or {})[_METADATA.encode()])
    flat = table.column("embedding").combine_chunks()
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in getattr(flat, "chunks", [flat])])
    columns = {name: np.array(table.column(name).to_pylist()) for name in table.column_names if name != "embedding"}
    return Table(values.reshape(-1, *made.pop("shape")), columns, made)


def _read_npz(path: Path) -> Table:
    with np.load(path, allow_pickle=False) as archive:
        columns = {name: archive[name] for name in archive.files if name not in ("embeddings", "made")}
        return Table(archive["embeddings"], columns, json.loads(str(archive["made"])))


def part_bytes(part: Part, skipped: Sequence[tuple[str, str]]) -> bytes:
    """A part as a file, with the (path, reason) of what is not in it."""
    buffer = io.BytesIO()
    columns = {f"column_{name}": column for name, column in part.columns.items()}
    np.savez(buffer, values=part.values, skipped=np.array(json.dumps(list(skipped))), **columns)
    return buffer.getvalue()


def load_values(path: str | os.PathLike) -> np.ndarray:
    """The embeddings of a part, which are most of its file."""
    with np.load(path, allow_pickle=False) as archive:
        return archive["values"]


def load_columns(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """The columns of a part, and the (path, reason) of what is not in it."""
    with np.load(path, allow_pickle=False) as archive:
        names = [name for name in archive.files if name.startswith("column_")]
        columns = {name.removeprefix("column_"): archive[name] for name in names}
        return columns, [(name, reason) for name, reason in json.loads(str(archive["skipped"]))]
