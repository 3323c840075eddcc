"""Sources of samples within shards: where their bytes lie, in the shard itself or in the copy of a remote one."""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from bridle_hf.common.errors import MediaError, one_line
from bridle_hf.data.order import WINDOW
from bridle_hf.data.sample import Source
from bridle_hf.data.shards.copies import opened


MAX_OPEN = 2 * WINDOW
MAX_ROW_GROUP_BYTES = 512 << 20  # of the row groups that a process holds

MAX_MEMBER_BYTES = 8 << 30  # what a plain tar header can say; more is no sample, but a header or an index that lies

_BLOCK = tarfile.BLOCKSIZE
_MAX_READ = 1 << 30  # Linux reads no more than 2 GiB at once


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file within a tar: `size` bytes from `offset` on, its header just before."""

    shard: str
    offset: int
    size: int

    @property
    def place(self) -> tuple[str, int]:
        return self.shard, 0

    def media(self) -> bytes:
        """The bytes. MediaError if the shard is missing, shorter, or holds something else or too much there."""
        if self.size > MAX_MEMBER_BYTES:
            raise MediaError(self.shard, f"has a member of {self.size} bytes at {self.offset}: too large for a sample")
        try:
            file = _open_tars.get(self.shard, lambda: opened(self.shard, _open_unbuffered))
            is_there = os.fstat(file.fileno()).st_size >= self.offset + self.size
            header = os.pread(file.fileno(), _BLOCK, self.offset - _BLOCK)
            media = b"".join(
                os.pread(file.fileno(), min(self.size - start, _MAX_READ), self.offset + start)
                for start in range(0, self.size if is_there else 0, _MAX_READ)
            )
        except ConnectionError:
            raise
        except (OSError, OverflowError, MemoryError) as error:
            raise MediaError(self.shard, f"cannot be read: {error}") from error
        if len(media) < self.size:
            raise MediaError(self.shard, f"is truncated: it ends before byte {self.offset + self.size}")
        try:
            size = tarfile.TarInfo.frombuf(header, "utf-8", "replace").size
        except (tarfile.TarError, ValueError) as error:
            raise MediaError(self.shard, f"has no tar header at byte {self.offset - _BLOCK}: {error}") from error
        if size != self.size:
            raise MediaError(
                self.shard, f"has {size} bytes at {self.offset}, its index says {self.size}: write the index anew"
            )
        return media


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A cell of a parquet file: bytes, or a structure with `bytes` as `datasets` writes it."""

    shard: str
    column: str
    row_group: int
    row: int

    @property
    def place(self) -> tuple[str, int]:
        return self.shard, self.row_group

    def media(self) -> bytes:
        """The bytes. MediaError if the shard or its row group cannot be read, or the cell is empty."""
        import pyarrow

        key = (self.shard, self.column, self.row_group)
        try:
            cell = _row_groups.get(key, lambda: self._read_group())[self.row].as_py()
        except ConnectionError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
            raise MediaError(self.shard, f"row group {self.row_group} cannot be read: {one_line(error)}") from error
        media = cell.get("bytes") if isinstance(cell, dict) else cell
        if not media or not isinstance(media, bytes):  # a number or a text would be opened as a file
            raise MediaError(self.shard, f"column {self.column} holds no bytes")
        return media

    def _read_group(self) -> Any:
        file = _open_parquets.get(self.shard, lambda: opened(self.shard, open_parquet))
        return file.read_row_group(self.row_group, columns=[self.column], use_threads=False)[self.column]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for what a broken shard should hold, so that it is counted among the bad files."""

    shard: str
    reason: str

    @property
    def place(self) -> tuple[str, int]:
        return self.shard, 0

    def media(self) -> bytes:
        """Raises MediaError."""
        raise MediaError(self.shard, self.reason)


class Entry(NamedTuple):
    """One sample of a shard: its name there, what is known of it (label, split, ...) and where its bytes lie; see
    `Sample.class_order`."""

    shard: str
    name: str
    row: dict[str, Any]
    source: Source
    class_order: tuple[str, ...] | None = None


# --- Opening shards ---


class _Recent:
    """What was asked for last, up to a total weight: the oldest goes first."""

    def __init__(self, most: int, weigh: Callable[[Any], int] = lambda value: 1):
        self.most, self.weigh, self.total = most, weigh, 0
        self.values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.values:
            self.values[key] = make()
            self.total += self.weigh(self.values[key])
        self.values.move_to_end(key)
        while self.total > self.most and len(self.values) > 1:
            self._drop_oldest()
        return self.values[key]

    def _drop_oldest(self) -> None:
        _, value = self.values.popitem(last=False)
        self.total -= self.weigh(value)
        if hasattr(value, "close"):
            value.close()


# Of each process. A fork inherits them, and may: both kinds of file are read by position alone.
_open_tars, _open_parquets = _Recent(MAX_OPEN), _Recent(MAX_OPEN)
_row_groups = _Recent(MAX_ROW_GROUP_BYTES, lambda column: column.nbytes)


def _open_unbuffered(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


def open_parquet(file: Any) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(file, page_checksum_verification=True)
