"""Checkpoint manifest: sha256 of every file of a folder, written last, so that a folder that is not whole shows."""

import hashlib
import json
import os
from pathlib import Path

from bridle_hf.common.errors import RunError


MANIFEST = "manifest.json"


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read: names the file."""


def write_manifest(folder: Path) -> None:
    """Write `folder/manifest.json` with the sha256 of every file beside it, and sync all of them to the disk.

    Raises:
        OSError: the file system refused.
    """
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        sync(path)


def check_manifest(folder: Path) -> None:
    """See that every file of the manifest is what was written.

    Raises:
        CheckpointError: a file, the manifest perhaps, is missing, cannot be read or has changed: names it.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not hashes:
            raise ValueError("the manifest is empty")
        for name, expected in hashes.items():
            if sha256(folder / name) != expected:
                raise CheckpointError(f"checkpoint file {folder / name} is not what was written (sha256 differs)")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise unreadable(folder, error) from error


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """The error that says in one line why a checkpoint cannot be read."""
    return CheckpointError(" ".join(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}".split()))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
