"""Shards: tar files in the WebDataset convention, parquet files with the bytes inside; local, or by any fsspec URL.

    find_shards ─► [shard] ─► read_entries (an index.jsonl, or a scan of each shard) ─► [Entry] ─► samples
                                                       Entry.source.media() ─► bytes, in any order

No shard is streamed: an entry knows where its bytes lie, and whoever computes a draw reads just them
(data/shards/sources.py).
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bridle_hf.common.errors import one_line
from bridle_hf.data.shards.copies import is_remote, open_remote, opened
from bridle_hf.data.shards.listing import INDEX_NAME, exists, find_shards, format_of, is_file_name, require
from bridle_hf.data.shards.parquets import scan_parquet
from bridle_hf.data.shards.sources import Entry, ParquetCell, TarMember, Unreadable
from bridle_hf.data.shards.tars import scan_tar


def read_entries(
    data: str | Sequence[str],
    modality: str,
    extensions: Sequence[str],
    wanted: Sequence[str],
    media: str | None = None,
) -> list[Entry]:
    """What the shards of `data` hold, shard by shard.

    Shards that `index.jsonl` beside them lists (see training/shard.py) are not opened; others are scanned, a remote
    tar from end to end.

    Args:
        data: see `find_shards`; or the index itself, which then says what the shards are; or the shards.
        modality: a key of `MODALITIES`; media of a parquet file are in a column of that feature type, or of that name,
            or in its only column of bytes.
        extensions: of the media in a tar, with their dot, in lower case.
        wanted: columns (parquet) and keys (.json in a tar) that an entry's row keeps; the first is of the labels.
        media: the column of a parquet file that holds the media.

    Raises:
        ValueError: what `find_shards` raises; a shard that is missing or cannot be scanned at all, or an index that
            does not fit.
    """
    whole = isinstance(data, str)
    data = data.removeprefix("file://") if whole else data
    if whole and data.rpartition("/")[2] == INDEX_NAME:
        index = _read_index(data)
        shards = list(index)
    else:
        shards = find_shards(data) if whole else list(data)
        folders = dict.fromkeys(shard.rpartition("/")[0] for shard in shards)
        indices = [f"{folder}/{INDEX_NAME}" if folder else INDEX_NAME for folder in folders]
        index = {shard: entries for path in indices if exists(path) for shard, entries in _read_index(path).items()}
        if whole and not is_file_name(data) and (missing := sorted(index.keys() - set(shards))):
            raise ValueError(f"{missing[0]}: no such shard, but {INDEX_NAME} lists it: add it, or give a pattern")
    require(shards)
    entries = []
    for shard in shards:
        if shard not in index:
            entries += scan(shard, modality, extensions, wanted, media)
        else:
            entries += (entry for entry in index[shard] if _is_of_modality(entry, extensions))
    return entries


def _is_of_modality(entry: Entry, extensions: Sequence[str]) -> bool:
    return not isinstance(entry.source, TarMember) or entry.name.lower().endswith(tuple(extensions))


def _read_index(path: str) -> dict[str, list[Entry]]:
    """Entries by shard; names of shards are relative to the index."""
    try:
        with open_remote(path) if is_remote(path) else open(path, "rb") as file:
            lines = file.read().decode().removesuffix("\n").split("\n")
    except Exception as error:  # each file system raises its own
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    folder, entries, order = path.rpartition("/")[0], {}, None
    shared: dict[str, Any] = {}  # millions of entries have few shards, and few labels between them
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row.keys() == {"class_order"}:
                order = row["class_order"] and tuple(map(str, row["class_order"]))
                continue
            shard, name = str(row.pop("shard")), str(row.pop("name"))
            shard = shared.setdefault(shard, f"{folder}/{shard}" if folder else shard)
            if "offset" in row:
                source = TarMember(shard, int(row.pop("offset")), int(row.pop("size")))
            else:
                column = sys.intern(row.pop("column"))
                source = ParquetCell(shard, column, int(row.pop("row_group")), int(row.pop("row")))
            row = shared.setdefault(repr(row), row)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a line of an index: {one_line(error)}") from error
        entries.setdefault(shard, []).append(Entry(shard, name, row, source, order))
    return entries


def index_lines(entries: Iterable[Entry]) -> Iterator[str]:
    """The lines of `index.jsonl`; the order of the classes has one of its own, before the entries that it is of."""
    order = None
    for entry in entries:
        if entry.class_order != order:
            order = entry.class_order
            yield json.dumps({"class_order": order}, ensure_ascii=False) + "\n"
        source = {name: getattr(entry.source, name) for name in entry.source.__slots__ if name != "shard"}
        row = {"shard": os.path.basename(entry.shard), "name": entry.name, **source, **entry.row}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def scan(
    shard: str, modality: str, extensions: Sequence[str], wanted: Sequence[str], media: str | None = None
) -> list[Entry]:
    """All samples of one shard, what is broken of it as `Unreadable`; arguments as of `read_entries`.

    Raises:
        ValueError: nothing of it can be made out.
    """
    try:
        if format_of(shard) == "tar":
            with opened(shard, lambda path: open(path, "rb")) as file:
                entries = list(scan_tar(shard, file, extensions, wanted))
        else:
            entries = scan_parquet(shard, modality, wanted, media)
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read: {one_line(error)}") from error
    # What cannot be read counts where its neighbour does: split, fold and label are most likely the same.
    row = next((entry.row for entry in entries if entry.row), {})
    for number, entry in enumerate(entries):
        if isinstance(entry.source, Unreadable) and not entry.row:
            entries[number] = entry._replace(row=row)
        row = entry.row or row
    return entries
