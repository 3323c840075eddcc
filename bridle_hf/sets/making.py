"""Folders of data sets, made once in a cache; their names hold a hash of what decides their content."""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def default_cache_dir() -> Path:
    """The folder of this project in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridle_hf"


def made_once(cache_dir: str | os.PathLike | None, name: str, write: Callable[[Path], None]) -> str:
    """The folder `CACHE_DIR/name`, filled by `write` where it is missing; one rename makes it whole or not at all."""
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = root / name
    if folder.is_dir():
        return str(folder)
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".tmp", dir=root))
    try:
        write(unfinished)
        unfinished.chmod(0o755)  # mkdtemp leaves it to the owner alone
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is there, another process was faster with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def content_hash(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def write_table(folder: Path, columns: Sequence[str], rows: list[tuple]) -> None:
    """`metadata.csv`. ValueError for two rows of one file, the first column: one has been written over the other."""
    if len({row[0] for row in rows}) < len(rows):
        raise ValueError(f"{folder}: two rows are of one file")
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
