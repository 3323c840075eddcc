"""Sample: one recording, image or clip before it is read, and where its bytes are."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bridle_hf.common.errors import MediaError


# What a loader raises on a sample that cannot be used, to be skipped, counted and listed: MediaError is a ValueError,
# OverflowError an ArithmeticError; what asks for too much memory is one sample's fault, not the run's.
SKIPPED = (ValueError, ArithmeticError, MemoryError)


@dataclass(frozen=True, slots=True)
class HubRow:
    """One cell of a `datasets.Dataset` whose media column is kept undecoded: {"bytes": ..., "path": ...}."""

    dataset: Any
    column: str
    index: int

    @property
    def place(self) -> None:
        return None

    def media(self) -> str | bytes:
        """The bytes, or the path where the set holds none. MediaError if it holds neither."""
        cell = self.dataset[self.index][self.column] or {}
        media = cell.get("bytes") or cell.get("path")
        if media is None:
            raise MediaError(f"row {self.index}", f"column {self.column} is empty")
        return media


class Source(Protocol):
    """Where the bytes of a sample are, when it is not a file of its own: a row of a Hub set, a part of a shard."""

    @property
    def place(self) -> tuple[str, int] | None:
        """The shard and the part of it that are read together; None where any sample is as near as any other."""

    def media(self) -> str | bytes:
        """The bytes, or the path of a file. MediaError if there are none."""


# Nothing writes to one; but `frozen` would make it in six times the time, and there may be millions.
@dataclass(slots=True, unsafe_hash=True)
class Sample:
    """One recording, image or clip, before it is read.

    `path` names it: a file, `<id>/<split>/<row>` for a row of a Hub set, or `<shard>/<name>` within a shard. A set has
    either `label` or `labels` (multi-label). `split` is `train`, `validation` or `test` wherever the data says so
    under one of their usual names. `class_order` names all classes by number where the data numbers them (a
    `datasets.ClassLabel`). `events` are the strong labels of a recording, what sounds when: (onset, offset, label) in
    seconds each; `labels` are then the labels of these.
    """

    path: str
    label: str | None = None
    labels: tuple[str, ...] | None = None
    split: str | None = None
    fold: str | None = None
    group: str | None = None
    source: Source | None = field(default=None, repr=False, compare=False)
    class_order: tuple[str, ...] | None = field(default=None, repr=False, compare=False)
    events: tuple[tuple[float, float, str], ...] | None = None

    @property
    def place(self) -> tuple[str, int] | None:
        """See `Source`; None for a file."""
        return None if self.source is None else self.source.place

    def media(self) -> str | bytes:
        """What a reader opens: the path of the file, or the bytes of a row or of a part of a shard.

        Raises:
            MediaError: there are none.
        """
        if self.source is None:
            return self.path
        try:
            return self.source.media()
        except MediaError as error:
            raise MediaError(self.path, error.reason) from error


@contextmanager
def garbage_left() -> Iterator[None]:
    """While many samples are made: looking for garbage, Python would visit all of them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def name_within(path: str, data: str) -> str:
    """A sample's path as it is called in the folder `data`, however that is spelled, as "./notes/"."""
    return path.removeprefix(data.rstrip("/") + "/").removeprefix(f"{Path(data)}/")


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most `most` samples, spread evenly over all."""
    return [samples[index] for index in np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)]
