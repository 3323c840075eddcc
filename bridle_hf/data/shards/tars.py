"""Tars as shards: their samples by the WebDataset convention, read from headers.

Nothing is ever unpickled: members other than the media and .json, .cls, .txt are not looked at.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, BinaryIO

from bridle_hf.common.errors import one_line
from bridle_hf.data.shards.sources import Entry, TarMember, Unreadable


MAX_TEXT_BYTES = 1 << 20  # of a .json, .cls or .txt
# In the global extended header, which readers of tars pass over: names of the classes by number, as JSON.
CLASS_ORDER = "BRIDLE.class_order"

_BLOCK = tarfile.BLOCKSIZE


def scan_tar(shard: str, file: BinaryIO, extensions: Sequence[str], wanted: Sequence[str]) -> Iterator[Entry]:
    """Entries of a local tar: a sample is a run of members with one key, their name up to the first dot of its end.

    Raises:
        ValueError: it is no tar.
    """
    key, members = None, []
    found, breaks, names = False, 0, set()
    for member in _tar_members(file):
        if isinstance(member, str):
            # The rest of the sample may be behind the break, and its label with it.
            breaks += 1
            yield Entry(shard, f"break {breaks}", {}, Unreadable(shard, member))
            key, members = None, []
            continue
        found = True
        match = re.match(r"(.*/)?[^./]+(?=\.[^/]*\Z)", member.name, re.DOTALL)
        if member.isdir() or not match:  # such as the ._NAME that macOS puts between the files of a sample
            continue
        if match[0] != key:
            yield from _tar_sample(shard, file, key, members, extensions, wanted, names)
            key, members = match[0], []
        members.append(member)
    yield from _tar_sample(shard, file, key, members, extensions, wanted, names)
    if breaks and not found:
        raise ValueError(f"{shard}: not a tar; a compressed one must be decompressed")


def _tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo | str]:
    """Members in order; a str says why some of them cannot be read. Goes on behind a broken header."""
    end = file.seek(0, io.SEEK_END)
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * _BLOCK)), encoding="utf-8", errors="replace")
    tar.fileobj = file
    position, in_zeros, in_break = 0, False, False
    while position < end:
        file.seek(position)
        block = file.read(_BLOCK)
        if block.count(0) == _BLOCK:
            position, in_zeros = position + _BLOCK, True
            continue
        reason = ""
        try:
            # `fromtarfile` reads long names whole: their size is to be believed first.
            size = tarfile.TarInfo.frombuf(block, "utf-8", "replace").size
            if size <= end - position:
                file.seek(position)
                member = tarfile.TarInfo.fromtarfile(tar)
                size = member.offset_data + member.size - position
            if size > end - position:
                reason = f"is truncated: the member at byte {position} goes beyond its end"
            elif tar.offset <= position or member.size < 0:
                raise ValueError("a size below 0")
        except RecursionError:
            yield f"has too many extended headers in a row at byte {position}"
            return
        except (tarfile.TarError, ValueError, OverflowError, IndexError, MemoryError) as error:
            reason = f"has no tar header at byte {position}: {one_line(error)}"
        if reason:
            if not in_break:
                yield reason
            position, in_zeros, in_break = position + _BLOCK, False, True
            continue
        yield member
        position, in_zeros, in_break = tar.offset, False, False
    if not (in_zeros or in_break):
        yield "is truncated: it has no mark at its end"


def _tar_sample(
    shard: str,
    file: BinaryIO,
    key: str | None,
    members: list[tarfile.TarInfo],
    extensions: Sequence[str],
    wanted: Sequence[str],
    names: set[str],
) -> Iterator[Entry]:
    """Each medium of a sample; `names` are those of the shard so far."""
    by_extension = {member.name[len(key) :].lower(): member for member in members}
    media = [member for member in members if member.name[len(key) :].lower() in extensions]
    # Plain tars hold names with dots, as `take.2.wav`.
    media = media or [member for member in members if member.name.lower().endswith(tuple(extensions))]
    if not media:
        return
    try:
        row, order = _row_of_sample(file, by_extension, wanted), _class_order(media[0].pax_headers.get(CLASS_ORDER))
        reason = ""
    except ValueError as error:
        row, order, reason = {}, None, str(error)
    for member in media:
        name = member.name if member.name not in names else f"{member.name}@{member.offset}"
        names.add(name)
        if not member.isreg() or member.issparse():
            reason = "is a link or sparse: the tar does not hold its bytes"
        source = Unreadable(shard, reason) if reason else TarMember(shard, member.offset_data, member.size)
        yield Entry(shard, name, row, source, order)


def _row_of_sample(file: BinaryIO, by_extension: dict[str, tarfile.TarInfo], wanted: Sequence[str]) -> dict[str, Any]:
    """Label and the like: what the .json says, else .cls, else .txt."""
    texts = {}
    for extension in (".json", ".cls", ".txt"):
        member = by_extension.get(extension)
        if member is None:
            continue
        if not member.isreg() or member.size > MAX_TEXT_BYTES:
            raise ValueError(f"its {extension} is no file, or larger than {MAX_TEXT_BYTES} bytes")
        file.seek(member.offset_data)
        try:
            texts[extension] = file.read(member.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"its {extension} is not UTF-8") from error
    row = {}
    if ".json" in texts:
        try:
            row = json.loads(texts[".json"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .json is not JSON: {error}") from error
        row = {name: row[name] for name in wanted if name in row} if isinstance(row, dict) else {}
    if not {"label", "labels"} & row.keys() and (label := texts.get(".cls", texts.get(".txt", "")).strip()):
        row["label"] = label
    return row


@lru_cache(maxsize=8)
def _class_order(text: str | None) -> tuple[str, ...] | None:
    names = None if text is None else json.loads(text)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"its {CLASS_ORDER} is no list of names")
    return names and tuple(names)
