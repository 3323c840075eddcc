"""Listing of shards: which there are, of a folder, a pattern or a URL."""

import glob
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bridle_hf.common.errors import one_line
from bridle_hf.data.shards.copies import file_system_of, is_remote


INDEX_NAME = "index.jsonl"
MAX_EXPANDED = 10**6

_SHARD = re.compile(r"\.(tar|parquet)(\?.*)?$")
_COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)(\?.*)?$")


def names_shards(data: str) -> bool:
    """Whether `data` can be nothing but shards: a URL, an index, or a name or pattern that ends in .tar or .parquet.

    Raises:
        ValueError: compressed tars.
    """
    if _COMPRESSED.search(data) and not os.path.isdir(data):
        raise ValueError(f"{data}: a compressed tar cannot be read at random; decompress it")
    return is_remote(data) or (is_file_name(data) and not os.path.isdir(data))


def holds_shards(folder: str) -> bool:
    """Whether a local folder has shards directly inside."""
    return bool(_find_local(folder))


def is_file_name(data: str) -> bool:
    """Whether it names one shard or an index, or a pattern of them, and not a folder."""
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
    for pattern in [data] if os.path.exists(data) else expand_braces(data):
        shards += _find_remote(pattern) if is_remote(pattern) else _find_local(pattern)
    shards = list(dict.fromkeys(shards))
    if not shards:
        raise ValueError(f"{data}: no *.tar or *.parquet there")
    return shards


def require(shards: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first shard that is not there."""
    with ThreadPoolExecutor(16) as pool:
        for shard, there in zip(shards, pool.map(exists, shards)):
            if not there:
                raise ValueError(f"{shard}: no such shard, or it cannot be reached")


def expand_braces(pattern: str) -> list[str]:
    """The names that `{a,b}` and `{000..099}` in a pattern stand for. ValueError for a range that is none."""
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
    return [expanded for choice in choices for expanded in expand_braces(before + choice + after)]


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


def exists(path: str) -> bool:
    """Whether there is such a file, here or at that URL."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        file_system, name = file_system_of(path)
        file_system.info(name)  # over HTTP, `exists` would begin to fetch it
        return True
    except Exception:  # each file system raises its own
        return False


def format_of(shard: str) -> str:
    """ "tar" or "parquet"."""
    return _SHARD.search(shard)[1]
