"""Labels of samples, their classes and the numbers of these."""

import csv
import os
from collections.abc import Sequence

import torch

from bridle_hf.data.sample import Sample


def label_names(samples: Sequence[Sample]) -> list[str]:
    """The labels that occur in `samples`, single or multi, sorted."""
    return sorted({name for sample in samples for name in _labels_of(sample)})


class Labels:
    """The classes of a task and their numbers.

    Args:
        samples: the training samples; each must be labelled.
        order_file: a csv with the columns `index`, `mid`, `display_name`, as AudioSet's `class_labels_indices.csv`:
            fixes the classes and their numbers; samples may use either name. If absent: the names in `samples`,
            sorted.

    Attributes:
        names: the class names by number (the display names of `order_file`).
        multi_label: whether samples carry several labels each.

    Raises:
        ValueError: a sample without label, samples of both kinds, a label that `order_file` lacks, or a malformed
            file.
    """

    def __init__(self, samples: Sequence[Sample], order_file: str | os.PathLike | None = None):
        self.multi_label = any(sample.labels is not None for sample in samples)
        if order_file is None:
            self.names = label_names(samples)
            self._numbers = {name: number for number, name in enumerate(self.names)}
        else:
            self.names, self._numbers = _read_label_order(order_file)
        self.encode(samples)

    def check_several(self, samples: str) -> None:
        """Raise a `ValueError` that speaks of `samples`, in words, if they are all of one class."""
        if len(self.names) < 2:
            raise ValueError(f"{samples} have one class only ({self.names[0]}): nothing to tell apart")

    def encode(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Class numbers (samples,) int64, or for multi-label sets 0/1 rows (samples, classes) float32.

        Raises:
            ValueError: a sample without label, or with one that is not among the classes (such as a label seen only in
                validation).
        """
        numbers = [[self._number(name, sample) for name in _labels_of(sample)] for sample in samples]
        for sample, found in zip(samples, numbers, strict=True):
            if not found or (sample.labels is not None) != self.multi_label:
                kind = "`labels` (multi-label)" if self.multi_label else "`label`"
                raise ValueError(
                    f"{sample.path} (split {sample.split}) has no {kind}: every sample needs one here. Label it by "
                    "class folders or by metadata.csv, or leave it out"
                )
        if not self.multi_label:
            return torch.tensor([found[0] for found in numbers], dtype=torch.int64)
        rows = torch.zeros(len(samples), len(self.names))
        for row, found in zip(rows, numbers, strict=True):
            row[found] = 1.0
        return rows

    def _number(self, name: str, sample: Sample) -> int:
        if name not in self._numbers:
            raise ValueError(
                f"{sample.path} (split {sample.split}): label {name!r} is not among the {len(self.names)} classes of "
                "the training samples or the label file; add training samples of it, or leave this one out"
            )
        return self._numbers[name]


def _labels_of(sample: Sample) -> tuple[str, ...]:
    if sample.labels is not None:
        return sample.labels
    return () if sample.label is None else (sample.label,)


def _read_label_order(path: str | os.PathLike) -> tuple[list[str], dict[str, int]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"index", "mid", "display_name"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; the columns are {reader.fieldnames}")
        rows = sorted(reader, key=lambda row: int(row["index"]))
    if [int(row["index"]) for row in rows] != list(range(len(rows))):
        raise ValueError(f"{path}: the column index must count 0, 1, 2, ... without gaps")
    numbers = {row[column]: int(row["index"]) for column in ("mid", "display_name") for row in rows}
    return [row["display_name"] for row in rows], numbers


# ---------------------------------------------------------------------------------------------------------------------
# Splits, folds, groups
# ---------------------------------------------------------------------------------------------------------------------
