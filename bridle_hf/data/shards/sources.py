"""Sources of samples within shards: where their bytes lie, and how shards are opened, in place or as a copy.

A remote shard is copied whole to a local folder when it is first needed, once for all processes of a machine: one
large request in place of thousands of small ones, and servers that know no byte ranges do, too. The environment says
where, how much:

    BRIDLE_SHARD_CACHE     folder of the copies; ~/.cache/bridle_hf/shards if not set
    BRIDLE_SHARD_CACHE_GB  its size, 50 if not set; the copies not used for longest make room
"""

import hashlib
import logging
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bridle_hf.common.errors import MediaError, one_line
from bridle_hf.data.order import WINDOW


logger = logging.getLogger(__name__)

MAX_OPEN = 2 * WINDOW
MAX_ROW_GROUP_BYTES = 512 << 20  # of the row groups that a process holds
RETRY_SECONDS = (1, 2, 4, 8, 16)  # between attempts to reach a remote shard

_BLOCK = tarfile.BLOCKSIZE
_MAX_READ = 1 << 30  # Linux reads no more than 2 GiB at once
# The fields of fsspec's `info` that say which version of a file it is, by any of its file systems.
_TELLS_STATE = re.compile("^size$|(?i:modified|mtime|updated|created|etag|md5|crc32|digest|generation|blob_id)")

T = TypeVar("T")


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
        """The bytes. MediaError if the shard is missing, shorter, or holds something else there."""
        try:
            file = _open_tars.get(self.shard, lambda: opened(self.shard, _open_unbuffered))
            header = os.pread(file.fileno(), _BLOCK, self.offset - _BLOCK)
            media = b"".join(
                os.pread(file.fileno(), min(self.size - start, _MAX_READ), self.offset + start)
                for start in range(0, self.size, _MAX_READ)
            )
        except ConnectionError:
            raise
        except OSError as error:
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


# ---------------------------------------------------------------------------------------------------------------------
# Opening shards
# ---------------------------------------------------------------------------------------------------------------------


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


def is_remote(path: str) -> bool:
    """Whether it is a URL."""
    return "://" in path


def file_system_of(url: str) -> tuple[Any, str]:
    # Asked for anew each time: what fsspec keeps of it is of one process alone.
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except Exception as error:  # a package that is missing, or what its connection raises
        raise ValueError(f"{url}: {one_line(error)}") from error


def _open_unbuffered(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


def open_parquet(file: Any) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(file, page_checksum_verification=True)


def open_remote(url: str) -> BinaryIO:
    file_system, path = file_system_of(url)
    return file_system.open(path, "rb")


def opened(shard: str, opener: Callable[[str], T]) -> T:
    """`opener` of a local shard, or of the copy of a remote one."""
    while is_remote(shard):
        path = _local_copy(shard)
        with suppress(FileNotFoundError):  # another process made room just now
            return opener(path)
    return opener(shard)


def _local_copy(url: str) -> str:
    """Path of a copy of the shard, made by whichever process comes first.

    Raises:
        FileNotFoundError, PermissionError: of the remote file.
        ConnectionError: it cannot be had, after some attempts.
    """
    from filelock import FileLock

    folder = Path(os.environ.get("BRIDLE_SHARD_CACHE") or Path.home() / ".cache" / "bridle_hf" / "shards")
    folder.mkdir(parents=True, exist_ok=True)
    file_system, name = _with_patience(url, lambda: file_system_of(url))
    about = _with_patience(url, lambda: file_system.info(name))
    # A shard that changes is another one: size, time and tag are in the name. Nothing else is: where a server
    # redirects to may be new each time, and a listing tells more than a question about one file.
    state = sorted((name, str(value)) for name, value in about.items() if _TELLS_STATE.search(name))
    path = folder / f"{hashlib.sha256(f'{url} {state}'.encode()).hexdigest()[:32]}.shard"
    with FileLock(f"{path}.lock"):
        if path.exists() and about.get("size") in (None, path.stat().st_size):  # a machine that went down cuts files
            os.utime(path)
        else:
            part = path.with_suffix(".part")
            _with_patience(url, lambda: _fetch(file_system, name, part, about.get("size")))
            os.replace(part, path)
            _make_room(folder, path)
    return str(path)


def _fetch(file_system: Any, name: str, part: Path, size: int | None) -> None:
    file_system.get_file(name, str(part))
    if size is not None and part.stat().st_size != size:
        raise OSError(f"{part.stat().st_size} of {size} bytes came")


def _make_room(folder: Path, newest: Path) -> None:
    given = os.environ.get("BRIDLE_SHARD_CACHE_GB") or "50"
    try:
        limit = float(given) * 1e9
    except ValueError as error:
        raise ValueError(f"BRIDLE_SHARD_CACHE_GB is {given!r}: expected a number of gigabytes") from error
    copies = {}
    for path in folder.glob("*.shard"):
        with suppress(FileNotFoundError):
            copies[path] = path.stat()
    total = sum(about.st_size for about in copies.values())
    for path, about in sorted(copies.items(), key=lambda entry: entry[1].st_mtime_ns):
        if total <= limit:
            break
        if path != newest:
            path.unlink(missing_ok=True)
            total -= about.st_size


def _with_patience(url: str, action: Callable[[], T]) -> T:
    """`action`, tried again while it fails: the network's moods must not decide what a run sees."""
    for seconds in (*RETRY_SECONDS, None):
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each file system raises its own
            if seconds is None:
                raise ConnectionError(f"{url}: cannot be copied: {one_line(error)}") from error
            logger.warning("%s: %s; trying again", url, one_line(error))
            time.sleep(seconds)
