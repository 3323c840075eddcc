"""Parquet files as shards: the bytes inside, read from footers and a few columns; class names of `datasets`."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from bridle_hf.common.errors import one_line
from bridle_hf.common.tables import clean
from bridle_hf.data.order import WINDOW
from bridle_hf.data.shards.copies import is_remote, open_remote, opened
from bridle_hf.data.shards.sources import MAX_ROW_GROUP_BYTES, Entry, ParquetCell, Unreadable, open_parquet


logger = logging.getLogger(__name__)


def scan_parquet(shard: str, modality: str, wanted: Sequence[str], media: str | None = None) -> list[Entry]:
    """Entries of a parquet file, local or remote; see `read_entries`.

    Raises:
        ValueError: it is no whole parquet file, or has not one column of media.
    """
    import pyarrow

    try:
        if is_remote(shard):
            # The footer and a few columns: a range request or two.
            with suppress(ValueError, NotImplementedError), open_remote(shard) as file:
                return _parquet_entries(open_parquet(file), shard, modality, wanted, media)
            # The server does not know ranges, or the file is broken, which the copy shows.
        return _parquet_entries(opened(shard, open_parquet), shard, modality, wanted, media)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shard}: not a whole parquet file: {one_line(error)}") from error


def _parquet_entries(file: Any, shard: str, modality: str, wanted: Sequence[str], media: str | None) -> list[Entry]:
    import datasets
    import pyarrow

    try:
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
    except ValueError as error:
        raise ValueError(f"{shard}: has a column that `datasets` cannot read: {one_line(error)}") from error
    column = media_column(features, shard, modality, media)
    columns = [name for name in wanted if name in features and name != column]
    order = class_order(next((features[name] for name in (*wanted[:1], "labels") if name in columns), None))
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != file.metadata.num_rows:
        raise ValueError(f"{shard}: its row groups hold {sum(counts)} rows, it should {file.metadata.num_rows}")
    _warn_of_large_groups(file, shard)
    entries = []
    for group, count in enumerate(counts):
        try:
            table = file.read_row_group(group, columns=columns, use_threads=False) if columns else None
            values = {name: class_names(features[name], table[name].to_pylist()) for name in columns}
            sources = [ParquetCell(shard, column, group, row) for row in range(count)]
        except (pyarrow.ArrowException, OSError) as error:
            values = {}
            sources = [Unreadable(shard, f"row group {group} cannot be read: {one_line(error)}")] * count
        for row, source in enumerate(sources):
            cells = {name: column[row] for name, column in values.items()}
            entries.append(Entry(shard, str(len(entries)), cells, source, order))
    return entries


def _warn_of_large_groups(file: Any, shard: str) -> None:
    groups = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    if max(groups, default=0) * WINDOW > MAX_ROW_GROUP_BYTES:
        logger.warning(
            "%s: a row group of %d MiB must be read for each of its rows; training/shard.py writes smaller ones",
            shard, max(groups) >> 20,
        )  # fmt: skip


def column_names(shard: str) -> list[str]:
    """All columns of a local parquet file; [] of any other shard, and of one that is broken."""
    import pyarrow

    if is_remote(shard) or not shard.endswith(".parquet"):
        return []
    with suppress(pyarrow.ArrowException, OSError):
        return open_parquet(shard).schema_arrow.names
    return []


def media_column(features: Any, where: str, modality: str, name: str | None = None) -> str:
    """The column of `datasets.Features` that holds the media: that of the modality's feature type, or of bytes; of
    several the one of that name. Or the one called `name`.

    Raises:
        ValueError: none, or several; it is not there.
    """
    if name is not None:
        if name not in features:
            raise ValueError(f"{where}: no column {name!r} for the {modality}; the columns are {list(features)}")
        return name
    typed = [column for column, feature in features.items() if type(feature).__name__ == modality.capitalize()]
    found = typed or [column for column, feature in features.items() if _holds_bytes(feature)]
    found = [column for column in found if column == modality] or found
    if len(found) != 1:
        hint = f": give --media_column {found[0]!r}, or another" if found else ""
        raise ValueError(
            f"{where}: expected one {modality} column, found {found} with bytes among {list(features)}{hint}"
        )
    return found[0]


def _holds_bytes(feature: Any) -> bool:
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def class_names(feature: Any, values: list) -> list:
    """Class numbers of a `ClassLabel`, or of a list of them, as names, None for -1 (not known); others as they are."""
    inner = getattr(feature, "feature", feature)
    if not hasattr(inner, "int2str"):
        return values
    return [inner.int2str(value) if value not in (None, -1) else None for value in values]


def class_order(feature: Any) -> tuple[str, ...] | None:
    """Names by number of a `ClassLabel`, or of a list of them; None of any other feature."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else tuple(map(clean, names))
