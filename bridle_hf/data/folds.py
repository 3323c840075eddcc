"""Splits, folds and groups: which samples are held out together."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from bridle_hf.data.labels import labels_of
from bridle_hf.data.sample import Sample


logger = logging.getLogger(__name__)

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_NAMES = {name: split for split, names in _SPLITS.items() for name in names}

# The fold of samples that every fold trains on: no official list tests them.
NEVER_HELD_OUT = "never held out"

# Folders that downloads put around or beside classes.
_FOLD = re.compile(r"(cv)?folds?[-_ ]*\d+")
_PART = re.compile(r"(part|shard|chunk|batch|disc|cd|subset|set)[-_ ]*\d+")
_AROUND = {
    "audio", "audios", "wav", "wavs", "sounds", "recordings", "image", "images", "img", "imgs", "jpegimages", "photos",
    "pictures", "video", "videos", "clips", "frames", "data", "dataset", "media", "files", "samples", "raw", "extra",
    "other", "misc", "unlabeled", "unlabelled",
}  # fmt: skip


def split_of(name: str) -> str | None:
    """`train`, `validation` or `test` for one of their usual names in any case, also as `test_set`; else None."""
    return SPLIT_NAMES.get(re.sub(r"[-_ ]?(set|data|split)$", "", name.strip().casefold()))


def canonical_split(name: str) -> str:
    """See `split_of`; any other name as it is."""
    return split_of(name) or name.strip()


def are_splits(first_level: Collection[str], where: str | Path) -> bool:
    """Whether the folders of the first level are splits. ValueError if only some of them are."""
    splits = sorted(name for name in first_level if split_of(name))
    others = sorted(set(first_level) - set(splits))
    if splits and others:
        raise ValueError(
            f"{where}: folders named like splits ({', '.join(splits)}) stand beside others ({', '.join(others[:3])}): "
            "keep one kind on the first level, or write a metadata.csv"
        )
    return bool(splits)


def check_class_folders(names: Collection[str], where: str, refuse: bool, hint: str = "") -> None:
    """Say so where folders that are read as classes look like splits, folds or helpers: in a warning, and the `hint`.

    Raises:
        ValueError: `refuse`, and some of them are surely no classes.
    """
    kinds = {name: _kind_of_folder(name) for name in sorted(names)}
    splits = [name for name, kind in kinds.items() if kind == "a split"]
    sure = [name for name, kind in kinds.items() if kind in ("a fold", "background noise")]
    sure += splits if len(splits) == len(kinds) else []
    odd = sure or [name for name, kind in kinds.items() if kind]
    if not odd:
        return
    looks = ", ".join(f"{name} ({kinds[name]})" for name in odd[:3])
    message = (
        f"{where}: {len(odd)} of {len(kinds)} folders that are read as classes look like something else: {looks}; "
        "move what is no class elsewhere, give the folder with the class folders, or write a metadata.csv with "
        "file_name, label, split, fold" + (f" ({hint})" if hint else "")
    )
    if refuse and sure:
        raise ValueError(message)
    logger.warning(message)


def _kind_of_folder(name: str) -> str | None:
    name = name.casefold()
    words = re.findall(r"[^\W\d_]+", name)
    if _FOLD.fullmatch(name):
        return "a fold"
    if name.startswith("_") and words[:2] == ["background", "noise"]:
        return "background noise"
    if split_of(name) or any(word in SPLIT_NAMES for word in words):
        return "a split"
    if _PART.fullmatch(name):
        return "a part"
    return "a helper" if name.startswith("_") or name in _AROUND else None


def split_by_groups(samples: Sequence[Sample], held_out: Iterable[str]) -> tuple[list[Sample], list[Sample]]:
    """(samples of other groups, samples of the `held_out` groups). ValueError for a group that no sample has."""
    held_out = set(held_out)
    found = {sample.group for sample in samples}
    if not held_out <= found:
        unknown, known = sorted(held_out - found), sorted(map(str, found))
        raise ValueError(f"no samples of group {', '.join(unknown)}; the groups are {', '.join(known[:20])}")
    rest = [sample for sample in samples if sample.group not in held_out]
    return rest, [sample for sample in samples if sample.group in held_out]


def assign_folds(samples: Sequence[Sample], num_folds: int | None = None) -> np.ndarray:
    """Fold number of each sample, (samples,) int64 from 0, the same on every call.

    By the column `fold` where the samples have it (`num_folds` does not apply: there are as many as it names; -1 is
    `NEVER_HELD_OUT`), else group-disjoint where they have `group`, else with each label spread evenly. If `num_folds`
    is not given: 5, or as many as there are groups.

    Raises:
        ValueError: only some samples have a fold or group, or there are fewer than 2 folds or groups to be had.
    """
    groups = {sample.group for sample in samples} - {None}
    num_folds = num_folds or min(5, len(groups) or 5)
    if any(sample.fold is not None for sample in samples):
        numbers = {name: number for number, name in enumerate(fold_names(samples))}
        return np.array([numbers.get(sample.fold, -1) for sample in samples])
    if groups:
        return group_folds(samples, num_folds)
    by_label = sorted(range(len(samples)), key=lambda index: (labels_of(samples[index]), index))
    folds = np.empty(len(samples), dtype=np.int64)
    rng = np.random.default_rng(0)
    for start in range(
        0, len(samples), num_folds
    ):  # a run of `num_folds` alike goes to as many folds, in random order
        run = by_label[start : start + num_folds]
        folds[run] = rng.permutation(num_folds)[: len(run)]
    return folds


def fold_names(samples: Sequence[Sample]) -> list[str]:
    """The folds that the samples have, but for `NEVER_HELD_OUT`, in order.

    Raises:
        ValueError: only some samples have a fold, or there are fewer than 2.
    """
    found = {required(sample, "fold") for sample in samples} - {NEVER_HELD_OUT}
    if len(found) < 2:
        raise ValueError(f"all samples are of fold {', '.join(found)}: needs at least 2 folds")
    return sorted(found, key=lambda name: (len(name), name))


def group_folds(samples: Sequence[Sample], num_folds: int) -> np.ndarray:
    """Fold number of each sample, (samples,) int64 from 0, no group in two folds: the largest group left goes to the
    smallest fold.

    Raises:
        ValueError: a sample without group, or fewer groups than folds.
    """
    sizes = Counter(required(sample, "group") for sample in samples)
    if not 2 <= num_folds <= len(sizes):
        raise ValueError(f"{num_folds} folds of {len(sizes)} groups: needs at least 2 folds, and a group for each")
    filled = [0] * num_folds
    fold_of = {}
    for group, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += size
    return np.array([fold_of[sample.group] for sample in samples])


def required(sample: Sample, attribute: str) -> str:
    """Its fold or group; ValueError where it has none, though others have."""
    value = getattr(sample, attribute)
    if value is None:
        raise ValueError(
            f"{sample.path} has no {attribute}, others have: fill the column for every sample, or for none"
        )
    return value
