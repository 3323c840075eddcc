"""From items to batches: draw them in an order that nothing can disturb, read them, keep a ledger of the bad ones.

The order of the data and every random choice about a sample are pure functions of (seed, draw), where a *draw* is the
position of a sample in the whole run: 0, 1, 2, ... without end. Workers, processes and restarts only decide who
computes a draw, and so cannot change it. On the way:

    find_items -> [Item] -> DrawDataset (item of a draw, read by a loader) -> GlobalBatches -> make_loader
                                                                           -> train_batches (bad files to the ledger)

So it is for shards, too: an item of a shard is read where it lies, and an epoch's order takes shards and their parts
as they come near each other (`DrawDataset`). What differs between modalities stands in one table, `MODALITIES` of
training/media.py.
"""

import contextlib
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
from bridle_hf.common.signals import leave_signals_to_parent
from bridle_hf.data.decoding import Item, MediaError, read_audio, reason_of
from bridle_hf.data.loaders import Load
from bridle_hf.data.shards.sources import WINDOW
from bridle_hf.feature_extraction_bridle import num_samples
from bridle_hf.masking_bridle import make_mask
from bridle_hf.monitoring.monitor import write_text
from bridle_hf.patching_bridle import INPUT_NAMES, patch_attention_mask, patchify


logger = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.1
MAX_ATTEMPTS = 32  # with 10% bad files, 32 bad ones in a row are a matter of 1e-32

# Random streams beside that of the sample itself, kept apart by the spawn key.
_PERMUTATION_STREAM, _REPLACEMENT_STREAM = 1, 2


class TooManyBadFiles(RuntimeError):  # noqa: N818 (the name says the error)
    """More than 10% of the items cannot be read, or none can."""


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
                ledger.add(item.path, error.reason)
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


class Places:
    """Which items of a set of shards lie near each other: by shard, and by part (a tar has one, parquet row groups).

    Args:
        part_of_item: (items,) numbers of the parts.
        shard_of_part: (parts,) numbers of the shards.
    """

    def __init__(self, part_of_item: np.ndarray, shard_of_part: np.ndarray):
        self.part_of_item, self.shard_of_part = part_of_item, shard_of_part

    @classmethod
    def of(cls, items: Sequence[Item]) -> "Places | None":
        """Places of the items; None if any can be read as well as any other: files, rows of a Hub set, few parts."""
        parts: dict[tuple[str, int], int] = {}
        part_of_item = np.empty(len(items), np.int64)
        for number, item in enumerate(items):
            if (place := item.place) is None:
                return None
            part_of_item[number] = parts.setdefault(place, len(parts))
        if len(parts) <= WINDOW:
            return None
        shards: dict[str, int] = {}
        return cls(part_of_item, np.array([shards.setdefault(shard, len(shards)) for shard, _ in parts]))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A permutation of the items, (items,) int64, that has them from `WINDOW` parts of as many shards at a time.

        The window slides: shards stand in line at random, and parts begin up to `WINDOW` places behind their shard,
        items up to `WINDOW` places behind their part. So shards are asked for one by one, not many at once.
        """
        shards = rng.permutation(self.shard_of_part.max() + 1)
        parts = _ranks(shards[self.shard_of_part] + WINDOW * rng.random(len(self.shard_of_part)))
        return np.argsort(parts[self.part_of_item] + WINDOW * rng.random(len(self.part_of_item)), kind="stable")


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


class DrawDataset(Dataset):
    """Map-style data set over an endless sequence of draws.

    `dataset[draw]` is `load(item, rng)` of item `order(seed, draw // n)[draw % n]` with
    `rng = np.random.default_rng([seed, draw])`, so that each item comes once in every n draws. The order of an epoch
    is any permutation of the items, or, where they lie in many shards, one that reads from few at a time: `Places`.
    Added to what `load` returns: `index`, the item's place in `items`, and `skipped`, a list of (path, reason) of bad
    files met on the way.

    A bad file (`load` raises ValueError, of which MediaError is one) is replaced by an item that depends on
    (seed, draw, attempt) alone. After 32 bad ones in a row the sample holds nothing but `skipped`;
    `train_batches` makes an error of it.
    """

    def __init__(self, items: Sequence[Item], load: Load, seed: int):
        if not items:
            raise ValueError("`items` is empty: there is nothing to draw from")
        self.items, self.load, self.seed = items, load, seed
        self._places = Places.of(items)
        self._permutations: dict[int, np.ndarray] = {}

    def index_of(self, draw: int) -> int:
        """Place in `items` of the draw, were no file bad."""
        epoch, position = divmod(draw, len(self.items))
        if epoch not in self._permutations:
            rng = _rng(_PERMUTATION_STREAM, self.seed, epoch)
            order = rng.permutation(len(self.items)) if self._places is None else self._places.order(rng)
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
        skipped.append((item.path, reason_of(error)))
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
        worker_init_fn=leave_signals_to_parent,
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
