"""Copies of remote shards: fetched whole into a local folder when first needed, once for all processes of a machine.

One large request in place of thousands of small ones, and servers that know no byte ranges do, too. A request may take
as long as it will, but ends where nothing comes for a while; the next one goes on where it broke off, if the server
knows ranges. The environment says where the copies lie, and how much of them:

    BRIDLE_SHARD_CACHE     folder of the copies; ~/.cache/bridle_hf/shards if not set
    BRIDLE_SHARD_CACHE_GB  its size, 50 if not set; the copies not used for longest make room
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bridle_hf.common.errors import one_line


logger = logging.getLogger(__name__)

RETRY_SECONDS = (1, 2, 4, 8, 16)  # between attempts to reach a remote shard that bring nothing new
SILENCE_SECONDS = 60.0  # that a server may take to connect or to send something more
_CHUNK_BYTES = 1 << 20
# The fields of fsspec's `info` that say which version of a file it is, by any of its file systems.
_TELLS_STATE = re.compile("^size$|(?i:modified|mtime|updated|created|etag|md5|crc32|digest|generation|blob_id)")

T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Whether it is a URL."""
    return "://" in path


def file_system_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, asked for anew each time: what fsspec keeps of it is of one process alone.

    Raises:
        ValueError: fsspec cannot make it: a package is missing, or its connection fails.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url, **{name: _http_options() for name in ("http", "https") if f"{name}://" in url})
    except Exception as error:  # a package that is missing, or what its connection raises
        raise ValueError(f"{url}: {one_line(error)}") from error


def _http_options() -> dict[str, Any]:
    """A time limit for silence alone. By itself aiohttp ends every request after 300 s in all; fsspec's other file
    systems know no such end."""
    from aiohttp import ClientTimeout

    return {"timeout": ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)}


def open_remote(url: str) -> BinaryIO:
    """A remote file, read where it lies."""
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
            part.write_bytes(b"")
            _with_patience(url, lambda: _fetch(file_system, name, part, about), lambda: part.stat().st_size)
            os.replace(part, path)
            _make_room(folder, path)
    return str(path)


def _fetch(file_system: Any, name: str, part: Path, about: dict[str, Any]) -> None:
    """Write the file to `part`; over HTTP, what is there of it already is not asked for again."""
    size = about.get("size")
    if "http" not in file_system.protocol:
        file_system.get_file(name, str(part))
    elif size is None or part.stat().st_size < size:
        from fsspec.asyn import sync

        with open(part, "ab") as file:
            sync(file_system.loop, _fetch_rest, file_system, name, file, about.get("ETag", ""))
    if size is not None and (came := part.stat().st_size) != size:
        if came > size:
            part.write_bytes(b"")
        raise OSError(f"{came} of {size} bytes came")


async def _fetch_rest(file_system: Any, url: str, file: BinaryIO, tag: str) -> None:
    """Append what is missing; a server that sends the whole nevertheless begins the file anew."""
    session, start = await file_system.set_session(), file.tell()
    # Compressed on its way, a byte's place would not be that in the file.
    headers = {**file_system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag.startswith('"'):  # of a file that has changed meanwhile, the whole
            headers["If-Range"] = tag
    async with session.get(file_system.encode_url(url), **{**file_system.kwargs, "headers": headers}) as response:
        file_system._raise_not_found_for_status(response, url)
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            file.truncate(0)
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            file.write(chunk)


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


def _with_patience(url: str, action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """`action`, tried again while it fails: the network's moods must not decide what a run sees.

    Args:
        progress: grows while attempts that fail bring something; patience is for those that do not.

    Raises:
        FileNotFoundError, PermissionError: as `action` raises them.
        ConnectionError: it fails again and again.
    """
    waits, most = list(RETRY_SECONDS), progress()
    while True:
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each file system raises its own
            if progress() > most:
                waits, most = list(RETRY_SECONDS), progress()
            if not waits:
                raise ConnectionError(f"{url}: cannot be copied: {one_line(error)}") from error
            logger.warning("%s: %s; trying again", url, one_line(error))
            time.sleep(waits.pop(0))
