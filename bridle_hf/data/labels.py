"""Labels of samples, their classes and the numbers of these."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from bridle_hf.common.tables import read_table
from bridle_hf.data.sample import Sample


logger = logging.getLogger(__name__)

LABEL_ORDER = "label_order.csv"  # beside a metadata.csv: numbers its classes, as `--label_order` does
MAX_NAMED = 20  # classes that a line names one by one


def label_names(samples: Sequence[Sample]) -> list[str]:
    """The labels that occur in `samples`, single or multi, sorted: by value if all are numbers."""
    names = {name for sample in samples for name in labels_of(sample)}
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?", name) for name in names):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


class Labels:
    """The classes of a task and their numbers.

    Args:
        samples: the training samples; each must be labelled.
        order_file: a csv with the columns `index`, `mid`, `display_name`, as AudioSet's `class_labels_indices.csv`:
            fixes the classes and their numbers; samples may use either name. If absent: the order of the data (see
            `Sample.class_order`), else that of `label_names`.

    Attributes:
        names: the class names by number (the display names of `order_file`).
        multi_label: whether samples carry several labels each.

    Raises:
        ValueError: a sample without label, samples of both kinds, a label that `order_file` lacks, a malformed file,
            or samples whose classes are numbered in different ways.
    """

    def __init__(self, samples: Sequence[Sample], order_file: str | os.PathLike | None = None):
        self.multi_label = any(sample.labels is not None for sample in samples)
        if order_file is None:
            self.names = list(_class_order(samples) or label_names(samples))
            self._numbers = {name: number for number, name in enumerate(self.names)}
        else:
            self.names, self._numbers = read_label_order(order_file)
        self._numbers_seen = {number for numbers in self._encode(samples) for number in numbers}

    def check_several(self, samples: str) -> None:
        """Raise a `ValueError` that speaks of `samples`, in words, if they are all of one class."""
        if len(self._numbers_seen) < 2:
            raise ValueError(
                f"{samples} have one class only ({self.names[min(self._numbers_seen)]}): nothing to tell apart; if "
                "that is the folder around the class folders, give it as --data"
            )

    def log(self, parts: Mapping[str, Sequence[Sample]]) -> None:
        """Log the classes with their number of samples in each part, as {"train": samples}; what looks odd, too."""
        for part, samples in parts.items():
            counts = Counter(number for numbers in self._encode(samples) for number in numbers)
            named = [f"{name} {counts[number]}" for number, name in enumerate(self.names)]
            if rest := [counts[number] for number in range(MAX_NAMED, len(self.names))]:
                named[MAX_NAMED:] = [f"... and {len(rest)} more, of {min(rest)} to {max(rest)} samples each"]
            logger.info("%s: %d samples, %d classes: %s", part, len(samples), len(self.names), ", ".join(named))
        alike: dict[str, list[str]] = {}
        for name in self.names:
            alike.setdefault(" ".join(re.split(r"[\s_-]+", name.casefold())), []).append(name)
        for names in alike.values():
            if len(names) > 1:
                logger.warning("%s are classes of their own: are they one, spelled in several ways?", names)

    def encode(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Class numbers (samples,) int64, or for multi-label sets 0/1 rows (samples, classes) float32.

        Raises:
            ValueError: a sample without label, or with one that is not among the classes (such as a label seen only in
                validation).
        """
        numbers = self._encode(samples)
        if not self.multi_label:
            return torch.tensor([found[0] for found in numbers], dtype=torch.int64)
        rows = torch.zeros(len(samples), len(self.names))
        for row, found in zip(rows, numbers, strict=True):
            row[found] = 1.0
        return rows

    def _encode(self, samples: Sequence[Sample]) -> list[list[int]]:
        numbers = [[self._number(name, sample) for name in labels_of(sample)] for sample in samples]
        for sample, found in zip(samples, numbers, strict=True):
            if not found or (sample.labels is not None) != self.multi_label:
                kind = "`labels` (multi-label)" if self.multi_label else "`label`"
                raise ValueError(
                    f"{sample.path} (split {sample.split}) has no {kind}: every sample needs one here. Label it by "
                    "class folders or by metadata.csv, or leave it out"
                )
        return numbers

    def _number(self, name: str, sample: Sample) -> int:
        if name not in self._numbers:
            raise ValueError(
                f"{sample.path} (split {sample.split}): label {name!r} is not among the {len(self.names)} classes of "
                "the training samples or the label file; add training samples of it, or leave this one out"
            )
        return self._numbers[name]


def labels_of(sample: Sample) -> tuple[str, ...]:
    """The labels of a sample, single or multi; () if it has none."""
    if sample.labels is not None:
        return sample.labels
    return () if sample.label is None else (sample.label,)


def class_orders(samples: Iterable[Sample]) -> set[tuple[str, ...] | None]:
    """The different orders of classes that samples have, see `Sample.class_order`."""
    return set({id(sample.class_order): sample.class_order for sample in samples}.values())  # few, but long


def _class_order(samples: Iterable[Sample]) -> tuple[str, ...] | None:
    orders = class_orders(samples)
    if len(orders) > 1:
        raise ValueError("the samples' label columns number the classes in different ways: give a --label_order")
    return next(iter(orders), None)


def read_label_order(path: str | os.PathLike) -> tuple[list[str], dict[str, int]]:
    """Names by number of a csv with `index`, `mid`, `display_name`; the number of each mid and of each name.

    Raises:
        ValueError: it lacks a column, or its index does not count from 0.
    """
    columns, table = read_table(path)
    missing = {"index", "mid", "display_name"} - set(columns)
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; the columns are {columns}")
    by_index = {row["index"]: row for _, row in table}
    rows = [by_index.get(str(number)) for number in range(len(table))]
    if None in rows:
        raise ValueError(f"{path}: the column index must count 0, 1, 2, ... without gaps")
    numbers = {row[column]: number for column in ("mid", "display_name") for number, row in enumerate(rows)}
    return [row["display_name"] for row in rows], numbers
