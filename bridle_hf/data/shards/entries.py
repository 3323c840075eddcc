"""Shards: tar files in the WebDataset convention, parquet files with the bytes inside; local, or by any fsspec URL.

    find_shards ─► [shard] ─► read_entries (an index.jsonl, or a scan of each shard) ─► [Entry] ─► samples
                                                       Entry.source.media() ─► bytes, in any order

No shard is streamed: an entry knows where its bytes lie, and whoever computes a draw reads just them
(data/shards/sources.py).

Nothing is ever unpickled: members of a tar other than the media and .json, .cls, .txt are not looked at.
"""

import glob
import io
import json
import logging
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from bridle_hf.common.errors import one_line
from bridle_hf.common.tables import clean
from bridle_hf.data.order import WINDOW
from bridle_hf.data.sample import Source
from bridle_hf.data.shards.copies import file_system_of, is_remote, open_remote, opened
from bridle_hf.data.shards.sources import MAX_ROW_GROUP_BYTES, ParquetCell, TarMember, Unreadable, open_parquet


logger = logging.getLogger(__name__)

INDEX_NAME = "index.jsonl"
MAX_TEXT_BYTES = 1 << 20  # of a .json, .cls or .txt
MAX_EXPANDED = 10**6

_SHARD = re.compile(r"\.(tar|parquet)(\?.*)?$")
_COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)(\?.*)?$")
_BLOCK = tarfile.BLOCKSIZE


class Entry(NamedTuple):
    """One sample of a shard: its name there, what is known of it (label, split, ...) and where its bytes lie; see
    `Sample.class_order`."""

    shard: str
    name: str
    row: dict[str, Any]
    source: Source
    class_order: tuple[str, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Finding shards
# ---------------------------------------------------------------------------------------------------------------------


def names_shards(data: str) -> bool:
    """Whether `data` can be nothing but shards: a URL, an index, or a name or pattern that ends in .tar or .parquet.

    Raises:
        ValueError: compressed tars.
    """
    if _COMPRESSED.search(data) and not os.path.isdir(data):
        raise ValueError(f"{data}: a compressed tar cannot be read at random; decompress it")
    return is_remote(data) or (_is_file_name(data) and not os.path.isdir(data))


def holds_shards(folder: str) -> bool:
    """Whether a local folder has shards directly inside."""
    return bool(_find_local(folder))


def _is_file_name(data: str) -> bool:
    return bool(_SHARD.search(data)) or data.rpartition("/")[2] == INDEX_NAME


def find_shards(data: str) -> list[str]:
    """Paths or URLs of the shards of a set, in the order of their names, or as a list in braces gives them.

    Args:
        data: a folder with *.tar or *.parquet directly inside, one such file, a pattern (`*`, `?`, `[...]`, braces
            as in `train-{000000..000099}.tar` and `{a,b}.parquet`), each a path or an fsspec URL; in a URL only braces
            may stand before the file's name. What is there under the very name is no pattern.

    Raises:
        ValueError: nothing found, or a file system that cannot be reached.
    """
    shards: list[str] = []
    for pattern in [data] if os.path.exists(data) else _expand_braces(data):
        shards += _find_remote(pattern) if is_remote(pattern) else _find_local(pattern)
    shards = list(dict.fromkeys(shards))
    if not shards:
        raise ValueError(f"{data}: no *.tar or *.parquet there")
    return shards


def _require(shards: Sequence[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        for shard, there in zip(shards, pool.map(_exists, shards)):
            if not there:
                raise ValueError(f"{shard}: no such shard, or it cannot be reached")


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = map(int, numbers.groups())
        if not 0 <= last - first < MAX_EXPANDED:
            raise ValueError(f"{pattern}: {match[0]} is no range of 1 to {MAX_EXPANDED} shards")
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    return [expanded for choice in choices for expanded in _expand_braces(before + choice + after)]


def _find_local(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        names = sorted(name for name in os.listdir(pattern) if _SHARD.search(name) and not name.startswith("."))
        return [os.path.join(pattern, name) for name in names]
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not os.path.exists(pattern) else [pattern]


def _find_remote(pattern: str) -> list[str]:
    file_system, path = file_system_of(pattern)
    folder, _, name = pattern.rstrip("/").rpartition("/")
    if not _SHARD.search(pattern):
        folder, patterns = pattern.rstrip("/"), [f"{path.rstrip('/')}/*.{suffix}" for suffix in ("tar", "parquet")]
    elif glob.has_magic(name.partition("?")[0] if pattern.startswith("http") else name):  # there, ? begins the query
        patterns = [path]
    else:
        return [pattern]
    try:
        found = sorted(str(entry) for pattern in patterns for entry in file_system.glob(pattern))
    except Exception as error:  # each file system raises its own
        raise ValueError(f"{pattern}: cannot be listed: {one_line(error)}") from error
    return [f"{folder}/{os.path.basename(entry)}" for entry in found]


def _exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        file_system, name = file_system_of(path)
        file_system.info(name)  # over HTTP, `exists` would begin to fetch it
        return True
    except Exception:  # each file system raises its own
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Entries: from an index, or from the shards themselves
# ---------------------------------------------------------------------------------------------------------------------


def read_entries(data: str, modality: str, extensions: Sequence[str], wanted: Sequence[str]) -> list[Entry]:
    """What the shards of `data` hold, shard by shard.

    Shards that `index.jsonl` beside them lists (see training/shard.py) are not opened; others are scanned, a remote
    tar from end to end.

    Args:
        data: see `find_shards`; or the index itself, which then says what the shards are.
        modality: a key of `MODALITIES`; media of a parquet file are in a column of that feature type, or of that name,
            or in its only column of bytes.
        extensions: of the media in a tar, with their dot, in lower case.
        wanted: columns (parquet) and keys (.json in a tar) that an entry's row keeps; the first is of the labels.

    Raises:
        ValueError: what `find_shards` raises; a shard that is missing or cannot be scanned at all, or an index that
            does not fit.
    """
    data = data.removeprefix("file://")
    if data.rpartition("/")[2] == INDEX_NAME:
        index = _read_index(data)
        shards = list(index)
    else:
        shards = find_shards(data)
        folders = dict.fromkeys(shard.rpartition("/")[0] for shard in shards)
        indices = [f"{folder}/{INDEX_NAME}" if folder else INDEX_NAME for folder in folders]
        index = {shard: entries for path in indices if _exists(path) for shard, entries in _read_index(path).items()}
        if not _is_file_name(data) and (missing := sorted(index.keys() - set(shards))):
            raise ValueError(f"{missing[0]}: no such shard, but {INDEX_NAME} lists it: add it, or give a pattern")
    _require(shards)
    entries = []
    for shard in shards:
        if shard not in index:
            entries += scan(shard, modality, extensions, wanted)
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
    folder, entries = path.rpartition("/")[0], {}
    shared: dict[str, Any] = {}  # millions of entries have few shards, and few labels between them
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
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
        entries.setdefault(shard, []).append(Entry(shard, name, row, source))
    return entries


def index_line(entry: Entry) -> str:
    """One line of `index.jsonl`."""
    source = {name: getattr(entry.source, name) for name in entry.source.__slots__ if name != "shard"}
    row = {"shard": os.path.basename(entry.shard), "name": entry.name, **source, **entry.row}
    return json.dumps(row, ensure_ascii=False) + "\n"


def scan(shard: str, modality: str, extensions: Sequence[str], wanted: Sequence[str]) -> list[Entry]:
    """All samples of one shard, what is broken of it as `Unreadable`; arguments as of `read_entries`.

    Raises:
        ValueError: nothing of it can be made out.
    """
    try:
        if _SHARD.search(shard)[1] == "tar":
            with opened(shard, lambda path: open(path, "rb")) as file:
                entries = list(_scan_tar(shard, file, extensions, wanted))
        else:
            entries = _scan_parquet(shard, modality, wanted)
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read: {one_line(error)}") from error
    # What cannot be read counts where its neighbour does: split, fold and label are most likely the same.
    row = next((entry.row for entry in entries if entry.row), {})
    for number, entry in enumerate(entries):
        if isinstance(entry.source, Unreadable) and not entry.row:
            entries[number] = entry._replace(row=row)
        row = entry.row or row
    return entries


# --- tar ---


def _scan_tar(shard: str, file: BinaryIO, extensions: Sequence[str], wanted: Sequence[str]) -> Iterator[Entry]:
    """A sample is a run of members with one key, the name up to the first dot of its last part."""
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
        row = _row_of_sample(file, by_extension, wanted)
        reason = ""
    except ValueError as error:
        row, reason = {}, str(error)
    for member in media:
        name = member.name if member.name not in names else f"{member.name}@{member.offset}"
        names.add(name)
        if not member.isreg() or member.issparse():
            reason = "is a link or sparse: the tar does not hold its bytes"
        source = Unreadable(shard, reason) if reason else TarMember(shard, member.offset_data, member.size)
        yield Entry(shard, name, row, source)


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


# --- parquet ---


def _scan_parquet(shard: str, modality: str, wanted: Sequence[str]) -> list[Entry]:
    import pyarrow

    try:
        if is_remote(shard):
            # The footer and a few columns: a range request or two.
            with suppress(ValueError, NotImplementedError), open_remote(shard) as file:
                return _parquet_entries(open_parquet(file), shard, modality, wanted)
            # The server does not know ranges, or the file is broken, which the copy shows.
        return _parquet_entries(opened(shard, open_parquet), shard, modality, wanted)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shard}: not a whole parquet file: {one_line(error)}") from error


def _parquet_entries(file: Any, shard: str, modality: str, wanted: Sequence[str]) -> list[Entry]:
    import datasets
    import pyarrow

    try:
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
    except ValueError as error:
        raise ValueError(f"{shard}: has a column that `datasets` cannot read: {one_line(error)}") from error
    column = media_column(features, shard, modality)
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


def media_column(features: Any, where: str, modality: str) -> str:
    """The column of `datasets.Features` that holds the media: that of the modality's feature type, or of bytes; of
    several the one of that name.

    Raises:
        ValueError: none, or several.
    """
    typed = [name for name, feature in features.items() if type(feature).__name__ == modality.capitalize()]
    found = typed or [name for name, feature in features.items() if _holds_bytes(feature)]
    found = [name for name in found if name == modality] or found
    if len(found) != 1:
        raise ValueError(f"{where}: expected one {modality} column, found {found} with bytes among {list(features)}")
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
