"""From a folder or a Hub id to batches: find the items, read them, draw them in an order that nothing can disturb.

The order of the data and every random choice about a sample are pure functions of (seed, draw), where a *draw* is the
position of a sample in the whole run: 0, 1, 2, ... without end. Workers, processes and restarts only decide who
computes a draw, and so cannot change it. On the way:

    find_items -> [Item] -> DrawDataset (item of a draw, read by a loader) -> GlobalBatches -> make_loader
                                                                           -> train_batches (bad files to the ledger)

What differs between modalities stands in one table, `MODALITIES` of training/media.py.
"""

import contextlib
import csv
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bridle_hf import BridleConfig
from bridle_hf.feature_extraction_bridle import num_samples
from bridle_hf.masking_bridle import make_mask
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask, patchify
from training.media import MODALITIES, Load
from training.monitoring import write_text
from training.reading import HubRow, Item, MediaError, read_audio


logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}
MAX_BAD_FRACTION = 0.1
MAX_ATTEMPTS = 32  # with 10% bad files, 32 bad ones in a row are a matter of 1e-32

# Random streams beside that of the sample itself, kept apart by the spawn key.
_PERMUTATION_STREAM, _REPLACEMENT_STREAM = 1, 2


class TooManyBadFiles(RuntimeError):  # noqa: N818 (the name says the error)
    """More than 10% of the items cannot be read, or none can."""


# ---------------------------------------------------------------------------------------------------------------------
# Finding items
# ---------------------------------------------------------------------------------------------------------------------


def find_items(
    data: str,
    modality: str,
    split: str | None = None,
    label_column: str = "label",
    group_column: str = "group",
) -> list[Item]:
    """List the items of a folder or a Hub id, in an order that depends on their names alone.

    `data` is the first of these that fits:

    * a folder with `metadata.csv`: column `file_name` (relative to the folder) and optionally `label` or `labels`
      (";"-separated: multi-label), `split`, `fold`, `group`; an empty cell means that it is not known;
    * a folder of media files: `DIR/<split>/<class>/<file>`, `DIR/<class>/<file>` or `DIR/<file>`. The first level is
      read as splits where every folder on it is called train, validation (valid, val, dev) or test (eval); deeper
      folders under the class change nothing;
    * a folder of parquet files, or a Hub id: whatever `datasets.load_dataset` takes, with a column of the modality's
      feature type, or named like it, and optionally columns as above.

    Files are not opened: one that is listed and missing, or broken, shows when it is read.

    Args:
        data: folder or Hub id.
        modality: a key of `MODALITIES`.
        split: only the items of this split; for a Hub id, what `load_dataset(split=...)` takes.
        label_column: column that holds the label, where there are columns; "labels" means multi-label.
        group_column: column that holds the group, where there are columns.

    Raises:
        ValueError: unknown modality, nothing of that modality in `data`, a column or split that is not there, split
            folders mixed with others, or a Hub id that `datasets` cannot load.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r}: expected one of {sorted(MODALITIES)}")
    folder = Path(data)
    if not folder.is_dir():
        return _hub_items(data, modality, split, label_column, group_column)
    if (folder / "metadata.csv").is_file():
        items = _csv_items(folder / "metadata.csv", label_column, group_column)
    elif not (items := _folder_items(folder, modality)):
        if any(folder.rglob("*.parquet")):
            return _hub_items(data, modality, split, label_column, group_column)
        extensions = " ".join(MODALITIES[modality].extensions)
        raise ValueError(f"{data}: no {modality} files found; looked for metadata.csv, *.parquet and {extensions}")
    elif (label_column, group_column) != ("label", "group"):
        raise ValueError(f"{data}: columns {label_column!r} and {group_column!r} were asked for: needs a metadata.csv")
    return items if split is None else _of_split(items, split, data)


def _folder_items(folder: Path, modality: str) -> list[Item]:
    extensions = MODALITIES[modality].extensions
    files = sorted(
        (
            Path(root, name).relative_to(folder)
            for root, _, names in os.walk(folder, followlinks=True)
            for name in names
        ),
        key=lambda path: path.parts,
    )
    files = [path for path in files if path.suffix.lower() in extensions and not path.name.startswith(".")]
    first_level = {path.parts[0] for path in files if len(path.parts) > 1}
    splits = first_level & SPLIT_NAMES.keys()
    if splits and splits != first_level:
        others = sorted(first_level - splits)
        raise ValueError(
            f"{folder}: folders named like splits ({', '.join(sorted(splits))}) stand beside others "
            f"({', '.join(others[:3])}): keep one kind on the first level, or write a metadata.csv"
        )
    items = []
    for path in files:
        folders = path.parts[:-1]
        split = SPLIT_NAMES[folders[0]] if splits and folders else None
        classes = folders[1:] if splits else folders
        items.append(Item(str(folder / path), label=classes[0] if classes else None, split=split))
    return items


def _csv_items(path: Path, label_column: str, group_column: str) -> list[Item]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "file_name" not in columns:
            raise ValueError(f"{path}: no column file_name; the columns are {columns}")
        label_column = _choose_label_column(columns, label_column, path)
        if group_column != "group" and group_column not in columns:
            raise ValueError(f"{path}: no column {group_column!r} for the groups; the columns are {columns}")
        items = []
        for row in reader:
            if not row["file_name"]:
                raise ValueError(f"{path}, line {reader.line_num}: file_name is empty")
            items.append(_item_of_row(str(path.parent / row["file_name"]), row, label_column, group_column))
    if not items:
        raise ValueError(f"{path}: lists no files")
    return sorted(items, key=lambda item: item.path)


def _choose_label_column(columns: Sequence[str], wanted: str, where: str | Path) -> str:
    if wanted == "label" and "labels" in columns:
        if "label" in columns:
            raise ValueError(f"{where}: has both columns label and labels (multi-label): keep one of them")
        return "labels"
    if wanted != "label" and wanted not in columns:
        raise ValueError(f"{where}: no column {wanted!r} for the labels; the columns are {list(columns)}")
    return wanted


def _item_of_row(
    path: str, row: dict[str, Any], label_column: str, group_column: str, hub: HubRow | None = None
) -> Item:
    def cell(column: str) -> str | None:
        value = row.get(column)
        return None if value is None or value == "" else str(value)

    label, labels = cell(label_column), None
    if label_column == "labels":
        names = row["labels"].split(";") if isinstance(row["labels"], str) else row["labels"] or ()
        label, labels = None, tuple(name.strip() for name in names if name.strip()) or None
    split = cell("split")
    split = SPLIT_NAMES.get(split, split)
    return Item(path, label, labels, split, cell("fold"), cell(group_column), row=hub)


def _of_split(items: list[Item], split: str, data: str) -> list[Item]:
    name = SPLIT_NAMES.get(split, split)
    chosen = [item for item in items if item.split == name]
    if not chosen:
        found = sorted({item.split for item in items if item.split is not None})
        raise ValueError(f"{data}: no items of split {split!r}; the splits are {found or 'not given'}")
    return chosen


# --- Rows of a Hub set. Streaming is to come: it needs another source of draws, not another Item. ---


def _hub_items(data: str, modality: str, split: str | None, label_column: str, group_column: str) -> list[Item]:
    import datasets

    try:
        loaded = datasets.load_dataset(data, split=split)
    except Exception as error:  # whatever its network, its builders and its file systems raise
        raise ValueError(
            f"{data!r} is not a folder, and datasets.load_dataset(..., split={split!r}) failed: {error}"
        ) from error
    by_split = loaded if isinstance(loaded, dict) else {split: loaded}
    items = []
    for name, dataset in by_split.items():
        items += _dataset_items(dataset, f"{data}/{name}", name, modality, label_column, group_column)
    if not items:
        raise ValueError(f"{data}: holds no rows")
    return items


def _dataset_items(
    dataset: Any, name: str, split: str, modality: str, label_column: str, group_column: str
) -> list[Item]:
    import datasets

    media = _media_column(dataset, name, modality)
    feature = getattr(datasets, modality.capitalize())
    media_only = dataset.select_columns([media]).cast_column(media, feature(decode=False))
    label_column = _choose_label_column(dataset.column_names, label_column, name)
    if group_column != "group" and group_column not in dataset.column_names:
        raise ValueError(f"{name}: no column {group_column!r} for the groups; the columns are {dataset.column_names}")
    wanted = {label_column, group_column, "split", "fold"} & set(dataset.column_names) - {media}
    columns = {column: _names(dataset.features[column], list(dataset[column])) for column in sorted(wanted)}
    items = []
    for index in range(len(dataset)):
        row = {"split": split} | {column: values[index] for column, values in columns.items()}
        hub = HubRow(media_only, media, index)
        items.append(_item_of_row(f"{name}/{index}", row, label_column, group_column, hub))
    return items


def _media_column(dataset: Any, name: str, modality: str) -> str:
    typed = [column for column, kind in dataset.features.items() if type(kind).__name__ == modality.capitalize()]
    found = typed or [column for column in dataset.column_names if column == modality]
    if len(found) != 1:
        raise ValueError(f"{name}: expected one {modality} column, found {found} among {dataset.column_names}")
    return found[0]


def _names(feature: Any, values: list) -> list:
    """Class numbers of a `ClassLabel`, or of a list of them, as names; anything else as it is."""
    inner = getattr(feature, "feature", feature)
    if not hasattr(inner, "int2str"):
        return values
    return [inner.int2str(value) if value is not None else None for value in values]


class MaskedLoader:
    """A loader whose samples carry `bool_masked_pos` (patches,), drawn for each sample from a mix of masks.

    Only real patches are hidden, so that a padded clip has its share of visible ones.

    Args:
        load: loader of a modality.
        config: `BridleConfig` of the encoder; gives patches and `mask_ratio`.
        masks: weight by kind of mask, such as {"random": 1, "mel_band": 3}; empty: the config's `mask_type` alone.

    Raises:
        ValueError: a kind of mask that is unknown or does not fit the grid, or weights that are not.
    """

    def __init__(self, load: Load, config: BridleConfig, masks: dict[str, float]):
        self.load, self.config = load, config
        masks = masks or {config.mask_type: 1.0}
        for kind, weight in masks.items():
            make_mask(kind, config.patch_grid, config.mask_ratio)
            if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"masks: the weight of '{kind}' is {weight!r}, expected a number of 0 or more")
        total = sum(masks.values())
        if total <= 0:
            raise ValueError("masks: all weights are 0")
        self.kinds, self.shares = list(masks), [weight / total for weight in masks.values()]

    def __call__(self, item: Item, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        sample = self.load(item, rng)
        values = sample[INPUT_NAMES[self.config.modality]][None]
        grid = patchify(values, self.config)[1]
        steps = grid[0]
        if "attention_mask" in sample:
            real = patch_attention_mask(sample["attention_mask"][None], self.config)
            steps = int(real.sum()) // math.prod(grid[1:])
        kind = self.kinds[rng.choice(len(self.kinds), p=self.shares)]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        mask = make_mask(kind, (steps, *grid[1:]), self.config.mask_ratio, generator, padded_grid=grid)
        return {**sample, "bool_masked_pos": mask}


def measure_normalization(
    items: Sequence[Item], feature_extractor: Any, ledger: "SkippedFiles", max_items: int = 2000
) -> tuple[float, float]:
    """(mean, std) of the log-mel over at most `max_items` of `items`, spread evenly; bad ones go to `ledger`."""

    def waveforms() -> Iterator[tuple[np.ndarray, int]]:
        for item in items[:: math.ceil(len(items) / max_items)]:
            try:
                waveform, rate = read_audio(item.media(), item.path)
            except MediaError as error:
                ledger.add(error.path, error.reason)
                continue
            if waveform.shape[-1] < num_samples(1, rate):
                ledger.add(item.path, "is shorter than one frame of 25 ms")
                continue
            yield waveform, rate

    # On short recordings threads cost more than they give.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return feature_extractor.measure_normalization(waveforms())
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing samples
# ---------------------------------------------------------------------------------------------------------------------


class DrawDataset(Dataset):
    """Map-style data set over an endless sequence of draws.

    `dataset[draw]` is `load(item, rng)` of item `permutation(seed, draw // n)[draw % n]` with
    `rng = np.random.default_rng([seed, draw])`, so that each item comes once in every n draws. Added to what `load`
    returns: `index`, the item's place in `items`, and `skipped`, a list of (path, reason) of bad files met on the way.

    A bad file (`load` raises ValueError, of which MediaError is one) is replaced by an item that depends on
    (seed, draw, attempt) alone. After 32 bad ones in a row the sample holds nothing but `skipped`;
    `train_batches` makes an error of it.
    """

    def __init__(self, items: Sequence[Item], load: Load, seed: int):
        if not items:
            raise ValueError("`items` is empty: there is nothing to draw from")
        self.items, self.load, self.seed = items, load, seed
        self._permutations: dict[int, np.ndarray] = {}

    def index_of(self, draw: int) -> int:
        """Place in `items` of the draw, were no file bad."""
        epoch, position = divmod(draw, len(self.items))
        if epoch not in self._permutations:
            order = _rng(_PERMUTATION_STREAM, self.seed, epoch).permutation(len(self.items))
            # Two are kept: near the turn of an epoch, batches ask for both.
            latest = sorted(self._permutations)[-1:]
            self._permutations = {kept: self._permutations[kept] for kept in latest} | {epoch: order}
        return int(self._permutations[epoch][position])

    def __getitem__(self, draw: int) -> dict[str, Any]:
        skipped: list[tuple[str, str]] = []
        index = self.index_of(draw)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            sample = _load_or_skip(self.items, index, self.load, np.random.default_rng([self.seed, draw]), skipped)
            if sample:
                return {**sample, "skipped": skipped}
            index = int(_rng(_REPLACEMENT_STREAM, self.seed, draw, attempt).integers(len(self.items)))
        return {"skipped": skipped}


def _load_or_skip(
    items: Sequence[Item],
    index: int,
    load: Load,
    rng: np.random.Generator | None,
    skipped: list[tuple[str, str]],
) -> dict[str, Any]:
    """The sample with its `index`, or {} and one more entry in `skipped`."""
    item = items[index]
    try:
        return {**load(item, rng), "index": index}
    except ValueError as error:
        skipped.append((item.path, error.reason if isinstance(error, MediaError) else str(error)))
        return {}


def _rng(stream: int, *entropy: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(stream,)))


class GlobalBatches:
    """Endless batch sampler: which draws make up each batch of this process.

    Step s of the run covers draws [s * G, (s + 1) * G) of the global batch G, and process r of W takes the r-th of W
    equal slices of them. Iteration starts at step `start_batch`.

    Raises:
        ValueError: W does not divide G, or a value is out of range.
    """

    def __init__(self, global_batch_size: int, rank: int = 0, world_size: int = 1, start_batch: int = 0):
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"a global batch of {global_batch_size} cannot be shared equally by {world_size} processes: "
                "choose a multiple of their number"
            )
        if not 0 <= rank < world_size or start_batch < 0:
            raise ValueError(f"rank {rank} of {world_size}, start_batch {start_batch}: out of range")
        self.global_batch_size, self.start_batch = global_batch_size, start_batch
        self.local_batch_size = global_batch_size // world_size
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.start_batch
        while True:
            first = batch * self.global_batch_size + self.rank * self.local_batch_size
            yield list(range(first, first + self.local_batch_size))
            batch += 1


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of the samples that could be read.

    Returns each tensor with a batch dimension in front, `index` (batch,) int64, and `skipped`, the (path, reason)
    of all bad files.
    """
    readable = [sample for sample in samples if "index" in sample]
    batch: dict[str, Any] = {"index": torch.tensor([sample["index"] for sample in readable], dtype=torch.int64)}
    for name in readable[0].keys() - {"index", "skipped"} if readable else ():
        batch[name] = torch.stack([sample[name] for sample in readable])
    batch["skipped"] = [entry for sample in samples for entry in sample["skipped"]]
    return batch


def make_loader(
    dataset: Dataset,
    batches: Iterable[list[int]],
    collate: Callable[[Sequence[dict]], dict] = collate,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader that yields `batches` of `dataset` in order; workers run one torch thread each (torch's rule)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,  # their caches live as long as they do
        prefetch_factor=4 if num_workers > 0 else None,
        generator=torch.Generator(),  # the loader seeds its workers from it, and leaves torch's global state alone
    )


def train_batches(loader: DataLoader, ledger: "SkippedFiles") -> Iterator[dict[str, Any]]:
    """Batches of a loader over `DrawDataset`, endless, with the bad files handed to `ledger` on the way.

    Raises:
        TooManyBadFiles: see `SkippedFiles`; or a draw that found no readable file in 32 attempts.
    """
    expected = loader.batch_sampler.local_batch_size
    for batch in loader:
        skipped = batch.pop("skipped")
        ledger.update(skipped)
        if len(batch["index"]) < expected:
            path, reason = skipped[-1]
            raise TooManyBadFiles(f"{MAX_ATTEMPTS} files in a row cannot be read; the last is {path}: {reason}")
        yield batch


class _InOrder(Dataset):
    """The items one after the other, as in evaluation: nothing random, nothing replaced."""

    def __init__(self, items: Sequence[Item], load: Load):
        self.items, self.load = items, load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped: list[tuple[str, str]] = []
        return _load_or_skip(self.items, index, self.load, None, skipped) | {"skipped": skipped}


def iterate_eval(
    items: Sequence[Item], load: Load, batch_size: int, ledger: "SkippedFiles", num_workers: int = 0
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Every item once, in order: yields (indices of the items kept, batch); bad files go to `ledger`.

    `load` is called without a random generator. The last batch may be smaller, and so is one with bad files in it.

    Raises:
        TooManyBadFiles: see `SkippedFiles`.
    """
    order = range(len(items))
    batches = [list(order[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    for batch in make_loader(_InOrder(items, load), batches, num_workers=num_workers):
        ledger.update(batch.pop("skipped"))
        kept = batch.pop("index").tolist()
        if kept:
            yield kept, batch


class SkippedFiles:
    """The ledger of bad files, kept in the main process.

    Each file is counted once, warned of once and written as a line {"path", "reason"} to `output_path`
    (`OUT/skipped.jsonl`), appended at once so that a crash loses none.

    Args:
        output_path: file to append to.
        total: number of items that the run reads from.
        shared: several processes write the file; what others have written counts, too.
    """

    def __init__(self, output_path: str | os.PathLike, total: int, shared: bool = False):
        self.output_path, self.total, self.shared = Path(output_path), total, shared
        self.reasons: dict[str, str] = {}

    def add(self, path: str, reason: str) -> None:
        """Count a bad file.

        Raises:
            TooManyBadFiles: more than 10% of all items are bad by now.
        """
        if path not in self.reasons:
            self._read_others()
        if path in self.reasons:
            return
        self.reasons[path] = reason
        logger.warning("skipped %s: %s", path, reason)
        with open(self.output_path, "a", encoding="utf-8") as file:
            file.write(self._line(path))
        if len(self.reasons) > MAX_BAD_FRACTION * self.total:
            raise TooManyBadFiles(
                f"{len(self.reasons)} of {self.total} files cannot be read, more than {MAX_BAD_FRACTION:.0%}: "
                f"see {self.output_path}; mend or remove them. The last is {path}: {reason}"
            )

    def update(self, skipped: Iterable[tuple[str, str]]) -> None:
        """`add` each (path, reason)."""
        for path, reason in skipped:
            self.add(path, reason)

    def state_dict(self) -> dict[str, str]:
        """Path to reason, JSON-serialisable."""
        self._read_others()
        return dict(self.reasons)

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Take the ledger back to `state`, the file too: what came after the checkpoint will be found again."""
        self.reasons = dict(state)
        write_text(self.output_path, "".join(map(self._line, self.reasons)))

    def _read_others(self) -> None:
        if not self.shared or not self.output_path.exists():
            return
        for line in self.output_path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                entry = json.loads(line)
                self.reasons.setdefault(entry["path"], entry["reason"])

    def _line(self, path: str) -> str:
        return json.dumps({"path": path, "reason": self.reasons[path]}, ensure_ascii=False) + "\n"
