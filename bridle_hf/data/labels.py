"""What the items of a data set are called: classes and their numbers, and the folds and groups that hold items out."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bridle_hf.data.decoding import Item


def label_names(items: Sequence[Item]) -> list[str]:
    """The labels that occur in `items`, single or multi, sorted."""
    return sorted({name for item in items for name in _labels_of(item)})


class Labels:
    """The classes of a task and their numbers.

    Args:
        items: the training items; each must be labelled.
        order_file: a csv with the columns `index`, `mid`, `display_name`, as AudioSet's `class_labels_indices.csv`:
            fixes the classes and their numbers; items may use either name. If absent: the names in `items`, sorted.

    Attributes:
        names: the class names by number (the display names of `order_file`).
        multi_label: whether items carry several labels each.

    Raises:
        ValueError: an item without label, items of both kinds, a label that `order_file` lacks, or a malformed file.
    """

    def __init__(self, items: Sequence[Item], order_file: str | os.PathLike | None = None):
        self.multi_label = any(item.labels is not None for item in items)
        if order_file is None:
            self.names = label_names(items)
            self._numbers = {name: number for number, name in enumerate(self.names)}
        else:
            self.names, self._numbers = _read_label_order(order_file)
        self.encode(items)

    def check_several(self, items: str) -> None:
        """Raise a `ValueError` that speaks of `items`, in words, if they are all of one class."""
        if len(self.names) < 2:
            raise ValueError(f"{items} have one class only ({self.names[0]}): nothing to tell apart")

    def encode(self, items: Sequence[Item]) -> torch.Tensor:
        """Class numbers (items,) int64, or for multi-label sets 0/1 rows (items, classes) float32.

        Raises:
            ValueError: an item without label, or with one that is not among the classes (such as a label seen only in
                validation).
        """
        numbers = [[self._number(name, item) for name in _labels_of(item)] for item in items]
        for item, found in zip(items, numbers, strict=True):
            if not found or (item.labels is not None) != self.multi_label:
                kind = "`labels` (multi-label)" if self.multi_label else "`label`"
                raise ValueError(
                    f"{item.path} (split {item.split}) has no {kind}: every item needs one here. Label it by class "
                    "folders or by metadata.csv, or leave it out"
                )
        if not self.multi_label:
            return torch.tensor([found[0] for found in numbers], dtype=torch.int64)
        rows = torch.zeros(len(items), len(self.names))
        for row, found in zip(rows, numbers, strict=True):
            row[found] = 1.0
        return rows

    def _number(self, name: str, item: Item) -> int:
        if name not in self._numbers:
            raise ValueError(
                f"{item.path} (split {item.split}): label {name!r} is not among the {len(self.names)} classes of the "
                "training items or the label file; add training items of it, or leave this one out"
            )
        return self._numbers[name]


def _labels_of(item: Item) -> tuple[str, ...]:
    if item.labels is not None:
        return item.labels
    return () if item.label is None else (item.label,)


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


def split_by_groups(items: Sequence[Item], held_out: Iterable[str]) -> tuple[list[Item], list[Item]]:
    """(items of other groups, items of the `held_out` groups). ValueError for a group that no item has."""
    held_out = set(held_out)
    found = {item.group for item in items}
    if not held_out <= found:
        unknown, known = sorted(held_out - found), sorted(map(str, found))
        raise ValueError(f"no items of group {', '.join(unknown)}; the groups are {', '.join(known[:20])}")
    rest = [item for item in items if item.group not in held_out]
    return rest, [item for item in items if item.group in held_out]


def assign_folds(items: Sequence[Item], num_folds: int | None = None) -> np.ndarray:
    """Fold number of each item, (items,) int64 from 0, the same on every call.

    By the column `fold` where the items have it (`num_folds` does not apply: there are as many as it names), else
    group-disjoint where they have `group`, else with each label spread evenly. If `num_folds` is not given: 5, or as
    many as there are groups.

    Raises:
        ValueError: only some items have a fold or group, or there are fewer than 2 folds or groups to be had.
    """
    groups = {item.group for item in items} - {None}
    num_folds = num_folds or min(5, len(groups) or 5)
    if any(item.fold is not None for item in items):
        names = sorted({_required(item, "fold") for item in items}, key=lambda name: (len(name), name))
        if len(names) < 2:
            raise ValueError(f"all items are of fold {names[0]}: needs at least 2 folds")
        return np.array([names.index(item.fold) for item in items])
    if groups:
        return group_folds(items, num_folds)
    by_label = sorted(range(len(items)), key=lambda index: (_labels_of(items[index]), index))
    folds = np.empty(len(items), dtype=np.int64)
    rng = np.random.default_rng(0)
    for start in range(0, len(items), num_folds):  # a run of `num_folds` alike goes to as many folds, in random order
        run = by_label[start : start + num_folds]
        folds[run] = rng.permutation(num_folds)[: len(run)]
    return folds


def group_folds(items: Sequence[Item], num_folds: int) -> np.ndarray:
    """Fold number of each item, (items,) int64 from 0, no group in two folds: the largest group left goes to the
    smallest fold.

    Raises:
        ValueError: an item without group, or fewer groups than folds.
    """
    sizes = Counter(_required(item, "group") for item in items)
    if not 2 <= num_folds <= len(sizes):
        raise ValueError(f"{num_folds} folds of {len(sizes)} groups: needs at least 2 folds, and a group for each")
    filled = [0] * num_folds
    fold_of = {}
    for group, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += size
    return np.array([fold_of[item.group] for item in items])


def _required(item: Item, attribute: str) -> str:
    value = getattr(item, attribute)
    if value is None:
        raise ValueError(f"{item.path} has no {attribute}, others have: fill the column for every item, or for none")
    return value
